"""Checkpoints: training state with the data iterator, and finished models. Wraps orbax v1."""

import contextlib
import dataclasses
import json
import logging
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import flax.linen as nn
import grain
import jax
import numpy as np
from jax.sharding import Mesh
from orbax.checkpoint import v1 as ocp

from elastic_lm.checkpoints.orbax_folders import (
    ORBAX_PARTIAL,
    check_name,
    first_line,
    readable_name,
    tidy,
)
from elastic_lm.checkpoints.read_back import check_same
from elastic_lm.config.checks import require
from elastic_lm.config.parse import from_dict, parse_json, to_dict
from elastic_lm.config.subnet import Menu
from elastic_lm.data.tokenizer import Tokenizer
from elastic_lm.data.tokenizer_files import BESIDE, TEMPLATES, TOKENIZER_FILE
from elastic_lm.files import checksums
from elastic_lm.files.atomic import (
    PARTIAL,
    naming,
    new_beside,
    read_json,
    real_place,
    remove_folder,
    remove_leftovers,
    whole_folder,
)
from elastic_lm.files.hub import local_model
from elastic_lm.files.local import local_path, require_folder_above
from elastic_lm.files.shortage import is_shortage
from elastic_lm.hf.carried import GENERATION_FILE, KEPT_FILE, Carried
from elastic_lm.models.decoder import Params
from elastic_lm.models.finite import check_finite
from elastic_lm.models.registry import KINDS, Config, abstract_params, kind_of
from elastic_lm.models.sharding import Rules, make_mesh, param_shardings
from elastic_lm.nn.int8 import check_wide

CONFIG_FILE = "elastic_config.json"
MENU_FILE = "menu.json"  # of models that are elastic in width
PARAMS_FOLDER = "params"
QUICKSTART_MARK = ".quickstart"  # lies in every folder that a quickstart made, and in no other
WRITTEN = {
    *(CONFIG_FILE, MENU_FILE, PARAMS_FOLDER, checksums.FILE),
    *(TOKENIZER_FILE, TEMPLATES, *BESIDE),  # the tokenizer's files
    *(KEPT_FILE, GENERATION_FILE),  # of `hf.carried`
    *("routers.json", "routers.safetensors"),  # of `width.trained_routers`
    *("_CHECKPOINT_METADATA", "orbax.checkpoint", "commit_success.txt", "state", "descriptor"),  # params/
}


class Checkpoints:
    """The newest training checkpoints of one run, each a state and the data iterator's position.

    A step becomes visible only when its state and position are on disk, so a process may die at any time.
    Then it gets checksums, so that damage is noticed when a run goes on, and is read back and compared, a
    few arrays at a time. Where a process dies in between, the run that goes on from the step writes the
    checksums. Older steps go only after that, so that there is always one that was read back.
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
        self._folder = folder = local_path(folder)
        self._keep = keep
        self._failed = False  # the last save, which said why
        folder.mkdir(parents=True, exist_ok=True)
        if jax.process_index() == 0:
            for left in folder.glob(f".*.{PARTIAL}-x*"):  # of steps that were being removed
                remove_leftovers(folder / left.name[1:].partition(".")[0])
        self._open = contextlib.ExitStack()
        self._checkpointer = training.Checkpointer(
            self._open.enter_context(readable_name(folder)),
            save_decision_policy=training.save_decision_policies.FixedIntervalPolicy(1),
            preservation_policy=training.preservation_policies.LatestN(max(keep, 2)),
            cleanup_tmp_directories=True,
        )

    def save(self, step: int, state: Any, batches: grain.DatasetIterator) -> None:
        """Writes a checkpoint and removes the oldest ones.

        Args:
          step: optimizer steps done.
          state: a pytree of arrays.
          batches: the data iterator.

        Raises:
          OSError: the disk takes no more, or what was written does not read back as it was; names the
            checkpoint, of which nothing stays. One that could only not be compared, for want of memory, room
            or permission, stays.
        """
        position = _Position(batches)
        parts = {"state": state, "data": position}
        self._failed = True
        with naming(self._folder / str(step)), tidy(self._folder, f"{step}.{ORBAX_PARTIAL}"):
            self._checkpointer.save_checkpointables(step, parts, overwrite=True)
        self._failed = False

        folder = self._folder / str(step)
        if jax.process_index() == 0:
            checksums.write_checksums(folder)
        try:
            position.check(folder / "data")
            check_same(
                state, lambda like: self._checkpointer.load_checkpointables(step, {"state": like})["state"]
            )
        except Exception as error:
            if is_shortage(error):
                raise
            if jax.process_index() == 0:
                remove_folder(folder)
            raise OSError(
                f"{folder}: does not read back as it was written ({first_line(error)}) and is removed; "
                "check the disk and its free space, then run again, which goes on from the checkpoint before"
            ) from error
        for old in sorted(c.step for c in self._checkpointer.checkpoints)[: -self._keep]:
            self._checkpointer.delete(old)

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
                checksums.check_files(self._folder / str(step))
                wanted = {"state": abstract, "data": _Position(batches)}
                state = self._checkpointer.load_checkpointables(step, wanted)["state"]
            except Exception as error:
                if is_shortage(error):
                    raise
                reasons.append(f"step {step}: {first_line(error)}")
                logging.warning(
                    "checkpoint %s/%d cannot be read and is skipped: %s",
                    self._folder,
                    step,
                    first_line(error),
                )
                batches.set_state(start)
            else:
                self._complete(self._folder / str(step))
                return step, state
        if not reasons:
            return None
        raise ValueError(
            f"no checkpoint in {self._folder} can be read into this configuration: {'; '.join(reasons)}. "
            "Use the configuration of the run that wrote them, or another workdir"
        )

    def _complete(self, folder: Path) -> None:
        """Writes the checksums of a sound step whose process died before it could."""
        if jax.process_index() == 0 and not (folder / checksums.FILE).is_file():
            checksums.write_checksums(folder)

    def close(self) -> None:
        """Waits for pending work."""
        # orbax raises the error of a failed save once more, in its own words.
        with contextlib.suppress(*([Exception] if self._failed else [])):
            self._checkpointer.close()
        self._open.close()


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

    def check(self, directory: Path) -> None:
        """Checks that the position was written to `directory` as it is now.

        Raises:
          ValueError: it was not.
        """
        due = json.dumps(self._batches.get_state())
        if (directory / self._name).read_text() != due:
            raise ValueError(f"{directory / self._name} differs from the position of the data")

    async def _write(self, directory: Any, text: str) -> None:
        ((await directory.await_creation()) / self._name).write_text(text)

    async def _read(self, directory: Any) -> None:
        self._batches.set_state(_tuples(parse_json((directory / self._name).read_text())))

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

    The folder appears complete or not at all, with checksums of its files, after it was read back.

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
      OSError: what was written does not read back as it was; an earlier checkpoint stays.
      ValueError: `path` is remote.
    """
    check_wide("save_model", params)
    target = check_target(path, overwrite)
    partial = _shared_name(target)
    first = jax.process_index() == 0
    with whole_folder(target, partial) if first else naming(target, partial):
        with readable_name(partial) as folder, tidy(partial.parent, partial.name):
            ocp.save(folder / PARAMS_FOLDER, params)
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
            checksums.write_checksums(partial)
            _check_saved(partial, target, config, params)
            check_target(path, overwrite)  # another process may have been there meanwhile


def _shared_name(target: Path) -> Path:
    """A new name beside a folder, the same in every process: all write into it."""
    name = new_beside(real_place(target))
    if jax.process_count() == 1:
        return name
    from jax.experimental import multihost_utils

    digits = np.frombuffer(name.name.encode(), np.uint8)
    return name.with_name(bytes(multihost_utils.broadcast_one_to_all(digits)).decode())


def _check_saved(partial: Path, target: Path, config: Config, params: Params) -> None:
    """Reads a model back that was just written.

    Raises:
      OSError: it cannot be read, or differs.
    """
    try:
        if load_config(partial) != config:
            raise ValueError(f"{CONFIG_FILE} describes another model")
        with readable_name(partial) as folder:
            check_same(params, lambda like: ocp.load(folder / PARAMS_FOLDER, like))
    except Exception as error:
        if is_shortage(error):
            raise
        raise OSError(
            f"{target}: does not read back as it was written ({first_line(error)}) and is not kept; check "
            "the disk and its free space, or choose another path"
        ) from error


def check_target(path: str | Path, overwrite: bool) -> Path:
    """Where a checkpoint may be written.

    Args:
      path: the folder that `save_model` is asked for.
      overwrite: whether an earlier checkpoint there may be replaced.

    Returns:
      The absolute path.

    Raises:
      FileExistsError: `path` holds something that may not be replaced; names it.
      NotADirectoryError: something above it is a file.
      ValueError: `path` is remote, or holds a character that orbax cannot write to here.
    """
    target = local_path(path).absolute()
    check_name(target)
    require_folder_above(target)
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
        raise FileExistsError(
            f"{target}: exists already; choose another path, or overwrite it (--overwrite, overwrite=True)"
        )
    params = target / PARAMS_FOLDER
    for file in [*target.iterdir(), *(params.iterdir() if params.is_dir() else ())]:
        if file.name not in WRITTEN:
            raise FileExistsError(
                f"{file}: not written by this package, so {target} is not replaced; move it away, or choose "
                "another path"
            )
    return target


def load_model(
    path: str | Path, mesh: Mesh | None = None, rules: Rules | None = None, dtype: str | None = None
) -> tuple[Config, Params]:
    """Reads an elastic checkpoint onto any mesh, whatever it was saved from.

    Args:
      path: folder written by `save_model`.
      mesh: where the parameters go; None = the first device.
      rules: logical to mesh axes.
      dtype: of all parameters and of the activations; None = each as it was saved. What was trained over
        frozen weights in half precision was saved in float32.

    Returns:
      (config, canonical parameters).

    Raises:
      FileNotFoundError: the folder is not an elastic checkpoint.
      ValueError: its parameters do not fit its config, a file is damaged, or they hold NaN or infinity; names
        the first such parameter.
    """
    folder = local_path(path).absolute()
    config = load_config(folder)
    checksums.check_files(folder)
    if dtype is not None:
        config = dataclasses.replace(config, dtype=dtype, param_dtype=dtype)
    mesh = make_mesh(devices=jax.devices()[:1]) if mesh is None else mesh
    saved = _saved(folder, config)
    shardings = param_shardings(config, mesh, rules)
    abstract = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        nn.unbox(abstract_params(config)),
        shardings,
    )
    abstract = _as_saved(abstract, saved, dtype)
    try:
        with readable_name(folder) as name:
            params = ocp.load(name / PARAMS_FOLDER, abstract)
    except Exception as error:
        reason = f"does not hold the parameters of {CONFIG_FILE}: {first_line(error)}"
        raise ValueError(f"{folder / PARAMS_FOLDER} {reason}") from error
    check_finite(str(folder / PARAMS_FOLDER) + (f" as {dtype}" if dtype else ""), params)
    return config, params


def _saved(folder: Any, config: Config) -> dict[Any, Any]:
    """Path -> shape and dtype of the parameters that a checkpoint holds, none of which is read.

    Raises:
      ValueError: its config has more layers than there are parameters.
    """
    try:
        with readable_name(folder) as name:
            saved = ocp.metadata(name / PARAMS_FOLDER).metadata
        found = dict(jax.tree_util.tree_leaves_with_path(saved))
    except Exception as error:
        reason = f"does not hold the parameters of {CONFIG_FILE}: {first_line(error)}"
        raise ValueError(f"{folder / PARAMS_FOLDER} {reason}") from error
    require(
        config.n_layers <= len(found),
        f"{folder / CONFIG_FILE}: model.n_layers",
        config.n_layers,
        f"{PARAMS_FOLDER} holds {len(found)} parameters, and every layer has some; correct it",
    )
    return found


def _as_saved(abstract: Params, saved: dict[Any, Any], dtype: str | None) -> Params:
    """The abstract parameters, in `dtype`, or each in that which it was saved in.

    Raises:
      ValueError: a shape is another one than that in the checkpoint.
    """

    def one(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        there = saved.get(path)
        name = "/".join(key.key for key in path)
        shape = leaf.shape if there is None else tuple(there.shape)
        fix = f"{CONFIG_FILE} asks for {leaf.shape}"
        require(shape == leaf.shape, f"{PARAMS_FOLDER}: {name}", shape, fix)
        own = dtype or (leaf.dtype if there is None else there.dtype)
        return jax.ShapeDtypeStruct(leaf.shape, own, sharding=leaf.sharding)

    return jax.tree_util.tree_map_with_path(one, abstract)


def load_config(path: str | Path) -> Config:
    """Reads what an elastic checkpoint says about its model.

    Args:
      path: folder written by `save_model`.

    Raises:
      FileNotFoundError: the folder is not an elastic checkpoint.
      ValueError: its config is damaged.
    """
    file = local_model(path, weights=False).absolute() / CONFIG_FILE
    if not file.is_file():
        raise FileNotFoundError(f"{file.parent} is not an elastic checkpoint: it has no {CONFIG_FILE}")
    values = read_json(file)
    name = values.pop("kind", "decoder")  # older checkpoints hold decoders and do not say so
    if not isinstance(name, str) or name not in KINDS:
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
    file = local_model(path, weights=False).absolute() / MENU_FILE
    if not file.is_file():
        fix = "train an elastic model with --config flextron (in Python: el.SubnetChooser(config, menu))"
        raise FileNotFoundError(f"{file.parent} has no {MENU_FILE}: {fix}")
    return _described(Menu, read_json(file), file, "menu.")


def _described(cls: Any, values: dict[str, Any], file: Path, where: str) -> Any:
    """The dataclass `cls` that a file's values describe, once the file is known to be as it was written."""
    try:
        described = from_dict(cls, values, where)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
    checksums.check_files(file.parent, (file.name,))
    return described


def _json(values: dict[str, Any]) -> str:
    return json.dumps(values, indent=2) + "\n"
