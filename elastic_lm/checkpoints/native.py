"""Checkpoints: training state with the data iterator, and finished models. Wraps orbax v1."""

import contextlib
import json
import logging
import re
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import flax.linen as nn
import grain
import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh
from orbax.checkpoint import v1 as ocp

from elastic_lm.config.parse import from_dict, to_dict
from elastic_lm.config.subnet import Menu
from elastic_lm.data.tokenizer import Tokenizer
from elastic_lm.files.atomic import (
    naming,
    new_beside,
    read_json,
    real_place,
    whole_folder,
)
from elastic_lm.files.unfinished import remove_anything
from elastic_lm.models.decoder import Params
from elastic_lm.models.registry import KINDS, Config, abstract_params, kind_of
from elastic_lm.models.sharding import Rules, make_mesh, param_shardings

CONFIG_FILE = "elastic_config.json"
MENU_FILE = "menu.json"  # of models that are elastic in width
PARAMS_FOLDER = "params"
SETTLING = 3.0  # seconds, at most, for threads that still write after an error
SETTLED = 15  # looks in a row, 20 ms apart, at which they have written nothing more
ORBAX_PARTIAL = "orbax-checkpoint-tmp"  # in the names of folders that orbax has not finished
QUICKSTART_MARK = ".quickstart"  # lies in every folder that a quickstart made, and in no other
WRITTEN = {
    *(CONFIG_FILE, MENU_FILE, PARAMS_FOLDER, "tokenizer.json", "tokenizer_config.json"),
    *("routers.json", "routers.safetensors"),  # of `width.trained_routers`
    *("_CHECKPOINT_METADATA", "orbax.checkpoint", "commit_success.txt", "state", "descriptor"),  # params/
}


def _is_news(record: logging.LogRecord) -> bool:
    """False for tracebacks that orbax logs in each of its threads: what it raises then says the same once."""
    return not (record.exc_info and "orbax" in record.pathname)


logging.getLogger("absl").addFilter(_is_news)


@contextlib.contextmanager
def _tidy(folder: Path, beginning: str) -> Iterator[None]:
    """Removes what orbax leaves half-written where it fails.

    It raises the first error of its threads. Those of tensorstore go on, make folders anew that have been
    removed, and cannot tell a loop that is closed about it.

    Args:
      folder: where it writes.
      beginning: of the names of what is half-written.
    """
    try:
        yield
    except Exception:
        shown = sys.unraisablehook
        sys.unraisablehook = lambda lost: None if "loop is closed" in str(lost.exc_value) else shown(lost)
        end, quiet = time.monotonic() + SETTLING, 0
        while quiet < SETTLED and time.monotonic() < end:
            found = [path for path in folder.iterdir() if path.name.startswith(beginning)]
            for path in found:
                remove_anything(path)
            quiet = 0 if found else quiet + 1
            time.sleep(0.02)
        raise


class Checkpoints:
    """The newest training checkpoints of one run, each a state and the data iterator's position.

    A step becomes visible only when all of it is on disk, so a process may die at any time.
    """

    def __init__(self, folder: Path, keep: int = 2) -> None:
        """Opens a folder; unfinished checkpoints in it are removed.

        Args:
          folder: one sub-folder per step; made where it is missing.
          keep: newest checkpoints that are kept.

        Raises:
          ValueError: `folder` is remote.
        """
        training: Any = ocp.training
        self._folder = folder = local_folder(folder)
        self._failed = False  # the last save
        self._checkpointer = training.Checkpointer(
            epath.Path(folder.absolute()),
            save_decision_policy=training.save_decision_policies.FixedIntervalPolicy(1),
            preservation_policy=training.preservation_policies.LatestN(keep),
            cleanup_tmp_directories=True,
        )

    def save(self, step: int, state: Any, batches: grain.DatasetIterator) -> None:
        """Writes a checkpoint and removes the oldest ones.

        Args:
          step: optimizer steps done.
          state: a pytree of arrays.
          batches: the data iterator.

        Raises:
          OSError: the disk takes no more; names the checkpoint, of which nothing stays.
        """
        parts = {"state": state, "data": _Position(batches)}
        with naming(self._folder / str(step)), _tidy(self._folder, f"{step}.{ORBAX_PARTIAL}"):
            self._failed = True
            self._checkpointer.save_checkpointables(step, parts, overwrite=True)
            self._failed = False

    def restore(self, abstract: Any, batches: grain.DatasetIterator) -> tuple[int, Any] | None:
        """Reads the newest checkpoint that is intact and moves `batches` to its position.

        Args:
          abstract: pytree of `jax.ShapeDtypeStruct` with shardings: the state to restore into.
          batches: a fresh data iterator; set to the checkpoint's position.

        Returns:
          (step, state), or None where nothing was saved yet.

        Raises:
          ValueError: there are checkpoints and none can be read; names the folder and the reason.
        """
        start = batches.get_state()
        reasons = []
        for step in sorted((c.step for c in self._checkpointer.checkpoints), reverse=True):
            try:
                wanted = {"state": abstract, "data": _Position(batches)}
                return step, self._checkpointer.load_checkpointables(step, wanted)["state"]
            except (MemoryError, PermissionError):
                raise  # says nothing about the checkpoint
            except Exception as error:
                reasons.append(f"step {step}: {_first_line(error)}")
                logging.warning("checkpoint %s/%d cannot be read and is skipped", self._folder, step)
                batches.set_state(start)
        if not reasons:
            return None
        raise ValueError(
            f"no checkpoint in {self._folder} can be read into this configuration: {'; '.join(reasons)}. "
            "Use the configuration of the run that wrote them, or another workdir"
        )

    def close(self) -> None:
        """Waits for pending work."""
        # An error of a save, which has been raised, is raised once more here.
        with contextlib.suppress(*[Exception] * self._failed):
            self._checkpointer.close()


class _Position:
    """The position of a data iterator, as orbax saves and loads it.

    grain's own way writes JSON too, but then reads an empty remainder of a packed document, a tuple,
    as a list, which it takes for a remainder that is there; the resumed run would skip one document.
    """

    def __init__(self, batches: grain.DatasetIterator) -> None:
        self._batches = batches

    async def save(self, directory: Any) -> Awaitable[None]:
        """Takes the position now and writes it once `directory` exists."""
        return self._write(directory, json.dumps(self._batches.get_state()))

    async def load(self, directory: Any) -> Awaitable[None]:
        """Moves the iterator."""
        return self._read(directory)

    async def _write(self, directory: Any, text: str) -> None:
        ((await directory.await_creation()) / self._name).write_text(text)

    async def _read(self, directory: Any) -> None:
        self._batches.set_state(_tuples(json.loads((directory / self._name).read_text())))

    @property
    def _name(self) -> str:
        return f"process_{jax.process_index()}_of_{jax.process_count()}.json"


def _tuples(state: Any) -> Any:
    """JSON's lists as the tuples they were."""
    if isinstance(state, dict):
        return {key: _tuples(value) for key, value in state.items()}
    return tuple(map(_tuples, state)) if isinstance(state, list) else state


def save_model(
    path: str | Path,
    config: Config,
    params: Params,
    tokenizer: Tokenizer | None,
    *,
    menu: Menu | None = None,
    beside: Callable[[Path], None] | None = None,
    overwrite: bool = False,
) -> None:
    """Writes an elastic checkpoint: elastic_config.json, params/, menu.json and the tokenizer's files.

    The folder appears complete or not at all.

    Args:
      path: folder to create.
      config: the model.
      params: canonical parameters.
      tokenizer: saved beside them; None = no tokenizer.
      menu: the choices that the model was made elastic for, saved beside them; None = no menu.
      beside: writes further files into the folder before it appears; None = there are none.
      overwrite: replace an earlier checkpoint at `path`.

    Raises:
      FileExistsError: `path` holds something that may not be replaced.
      ValueError: `path` is remote.
    """
    target = check_target(path, overwrite)
    partial = _shared_name(target)
    first = jax.process_index() == 0
    with whole_folder(target, partial) if first else naming(target, partial):
        with _tidy(partial.parent, partial.name):
            ocp.save(epath.Path(partial / PARAMS_FOLDER), params)
        if first:
            if tokenizer is not None:
                tokenizer.save(partial)
            (partial / CONFIG_FILE).write_text(_json({"kind": kind_of(config).name, **to_dict(config)}))
            if menu is not None:
                (partial / MENU_FILE).write_text(_json(to_dict(menu)))
            if beside is not None:
                beside(partial)
            check_target(path, overwrite)  # another process may have been there meanwhile


def _shared_name(target: Path) -> Path:
    """A new name beside a folder, the same in every process: all write into it."""
    name = new_beside(real_place(target))
    if jax.process_count() == 1:
        return name
    from jax.experimental import multihost_utils

    digits = np.frombuffer(name.name.encode(), np.uint8)
    return name.with_name(bytes(multihost_utils.broadcast_one_to_all(digits)).decode())


def check_target(path: str | Path, overwrite: bool) -> Path:
    """Where a checkpoint may be written.

    Args:
      path: the folder that `save_model` is asked for.
      overwrite: whether an earlier checkpoint there may be replaced.

    Returns:
      The absolute path.

    Raises:
      FileExistsError: `path` holds something that may not be replaced; names it.
      ValueError: `path` is remote.
    """
    target = local_folder(path).absolute()
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return target
    if (target / QUICKSTART_MARK).exists() or any(target.glob(f"*/{QUICKSTART_MARK}")):
        raise FileExistsError(
            f"{target}: belongs to `elastic-lm quickstart`, whose next run there replaces it; choose another "
            "path or workdir, or remove the folder"
        )
    if not target.is_dir() or not (target / CONFIG_FILE).is_file():
        raise FileExistsError(f"{target}: is no elastic checkpoint and is not replaced; choose another path")
    if not overwrite:
        raise FileExistsError(f"{target}: exists already; choose another path, or overwrite it")
    params = target / PARAMS_FOLDER
    for file in [*target.iterdir(), *(params.iterdir() if params.is_dir() else ())]:
        if file.name not in WRITTEN:
            raise FileExistsError(
                f"{file}: not written by this package, so {target} is not replaced; move it away, or choose "
                "another path"
            )
    return target


def load_model(
    path: str | Path, mesh: Mesh | None = None, rules: Rules | None = None
) -> tuple[Config, Params]:
    """Reads an elastic checkpoint onto any mesh, whatever it was saved from.

    Args:
      path: folder written by `save_model`.
      mesh: where the parameters go; None = the first device.
      rules: logical to mesh axes.

    Returns:
      (config, canonical parameters).

    Raises:
      FileNotFoundError: the folder is not an elastic checkpoint.
      ValueError: its parameters do not fit its config, or are damaged.
    """
    folder, config = epath.Path(path).absolute(), load_config(path)
    mesh = make_mesh(devices=jax.devices()[:1]) if mesh is None else mesh
    shardings = param_shardings(config, mesh, rules)
    abstract = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        nn.unbox(abstract_params(config)),
        shardings,
    )
    try:
        return config, ocp.load(folder / PARAMS_FOLDER, abstract)
    except Exception as error:
        reason = f"does not hold the parameters of {CONFIG_FILE}: {_first_line(error)}"
        raise ValueError(f"{folder / PARAMS_FOLDER} {reason}") from error


def load_config(path: str | Path) -> Config:
    """Reads what an elastic checkpoint says about its model.

    Args:
      path: folder written by `save_model`.

    Raises:
      FileNotFoundError: the folder is not an elastic checkpoint.
      ValueError: its config is damaged.
    """
    file = epath.Path(path).absolute() / CONFIG_FILE
    if not file.is_file():
        raise FileNotFoundError(f"{file.parent} is not an elastic checkpoint: it has no {CONFIG_FILE}")
    values = read_json(file)
    name = values.pop("kind", "decoder")  # older checkpoints hold decoders and do not say so
    if name not in KINDS:
        raise ValueError(f"{file}: kind={name!r}: must be one of {', '.join(KINDS)}; update elastic_lm")
    return _described(KINDS[name].config, values, file, "model.")


def load_menu(path: str | Path) -> Menu:
    """Reads the menu of an elastic checkpoint.

    Args:
      path: folder written by `save_model`.

    Raises:
      FileNotFoundError: the checkpoint has no menu.
      ValueError: its menu is damaged.
    """
    file = epath.Path(path).absolute() / MENU_FILE
    if not file.is_file():
        fix = (
            "train an elastic model with configs/flextron.py, or give a Menu: el.SubnetChooser(config, menu)"
        )
        raise FileNotFoundError(f"{file.parent} has no {MENU_FILE}: {fix}")
    return _described(Menu, read_json(file), file, "menu.")


def _described(cls: Any, values: dict[str, Any], file: epath.Path, where: str) -> Any:
    """The dataclass `cls` that a file's values describe."""
    try:
        return from_dict(cls, values, where)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


def _json(values: dict[str, Any]) -> str:
    return json.dumps(values, indent=2) + "\n"


def local_folder(path: str | Path) -> Path:
    """`path` as a local folder.

    Raises:
      ValueError: it names another machine, like gs://bucket/run.
    """
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", str(path)):  # `Path` makes one slash of two
        raise ValueError(f"{path}: remote paths are not supported yet, name a local folder")
    return Path(path)


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"[:300]
