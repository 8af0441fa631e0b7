"""Checkpoints: training state with the data iterator, and finished models. Wraps orbax v1."""

import json
import logging
import re
import shutil
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import flax.linen as nn
import grain
import jax
from etils import epath
from jax.sharding import Mesh
from orbax.checkpoint import v1 as ocp

from elastic_lm.config.parse import from_dict, to_dict
from elastic_lm.config.subnet import Menu
from elastic_lm.data.tokenizer import Tokenizer
from elastic_lm.data.tokenizer_files import BESIDE, TEMPLATES, TOKENIZER_FILE
from elastic_lm.files.atomic import read_json
from elastic_lm.hf.carried import GENERATION_FILE, KEPT_FILE, Carried
from elastic_lm.hf.files import replace_folder
from elastic_lm.models.decoder import Params
from elastic_lm.models.registry import KINDS, Config, abstract_params, kind_of
from elastic_lm.models.sharding import Rules, make_mesh, param_shardings

CONFIG_FILE = "elastic_config.json"
MENU_FILE = "menu.json"  # of models that are elastic in width
PARAMS_FOLDER = "params"
QUICKSTART_MARK = ".quickstart"  # lies in every folder that a quickstart made, and in no other
WRITTEN = {
    *(CONFIG_FILE, MENU_FILE, PARAMS_FOLDER, TOKENIZER_FILE, TEMPLATES, *BESIDE),  # and the tokenizer's files
    *(KEPT_FILE, GENERATION_FILE),  # of `hf.carried`
    *("routers.json", "routers.safetensors"),  # of `width.trained_routers`
    *("_CHECKPOINT_METADATA", "orbax.checkpoint", "commit_success.txt", "state", "descriptor"),  # params/
}


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
        """
        parts = {"state": state, "data": _Position(batches)}
        self._checkpointer.save_checkpointables(step, parts, overwrite=True)

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
    source: str | Path | None = None,
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
      source: the folder that the model comes from: what its config.json and generation_config.json say beyond
        the model is kept for an export; None = there is none.
      beside: writes further files into the folder before it appears; None = there are none.
      overwrite: replace an earlier checkpoint at `path`.

    Raises:
      FileExistsError: `path` holds something that may not be replaced.
      ValueError: `path` is remote.
    """
    target = check_target(path, overwrite)
    partial = target.with_name(f".{target.name}.partial")  # the same in every process: all write into it
    first = jax.process_index() == 0
    if first:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    try:
        ocp.save(epath.Path(partial / PARAMS_FOLDER), params)
        if first:
            if source:
                Carried.of_folder(source).save(partial)
            if tokenizer is not None:
                tokenizer.save(partial)
            (partial / CONFIG_FILE).write_text(_json({"kind": kind_of(config).name, **to_dict(config)}))
            if menu is not None:
                (partial / MENU_FILE).write_text(_json(to_dict(menu)))
            if beside is not None:
                beside(partial)
            replace_folder(partial, target)
    finally:
        if first:
            shutil.rmtree(partial, ignore_errors=True)


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
