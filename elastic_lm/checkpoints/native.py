"""Checkpoints: training state with the data iterator, and finished models. Wraps orbax v1."""

import contextlib
import dataclasses
import functools
import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self

import flax.linen as nn
import grain
import jax
import numpy as np
from jax.sharding import Mesh
from orbax.checkpoint import v1 as ocp

from elastic_lm.checkpoints.background import Background
from elastic_lm.checkpoints.named_subnets import table_to_save
from elastic_lm.checkpoints.orbax_folders import (
    ORBAX_PARTIAL,
    check_usable,
    first_line,
    readable_name,
    tidy,
)
from elastic_lm.checkpoints.position import Position, anywhere
from elastic_lm.checkpoints.read_back import check_same, on_host
from elastic_lm.checkpoints.remote import check_remote_target, save_remote
from elastic_lm.config.checks import require
from elastic_lm.config.parse import from_dict, to_dict
from elastic_lm.config.subnet import Menu
from elastic_lm.config.subnet_table import SubnetTable
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
from elastic_lm.files.remote import address_of, check_direct, is_remote, place_of
from elastic_lm.files.remote_models import stored_folder
from elastic_lm.files.remote_workdirs import check_held, flush
from elastic_lm.files.shortage import is_shortage
from elastic_lm.files.subnet_files import SUBNETS_FILE, save_subnets
from elastic_lm.hf.carried import GENERATION_FILE, KEPT_FILE, Carried
from elastic_lm.models.decoder import Params
from elastic_lm.models.finite import check_finite
from elastic_lm.models.registry import KINDS, Config, abstract_params, kind_of
from elastic_lm.models.sharding import Rules, make_mesh, param_shardings
from elastic_lm.nn.int8 import check_wide
from elastic_lm.processes import (
    LostProcess,
    all_or_none,
    bytes_of_all,
    lost_process,
    settle,
    wait_for_all,
)

CONFIG_FILE = "elastic_config.json"
MENU_FILE = "menu.json"  # of models that are elastic in width
PARAMS_FOLDER = "params"
LOST_WAIT = 5.0  # seconds for a save in which another process is missing
QUICKSTART_MARK = ".quickstart"  # lies in every folder that a quickstart made, and in no other
WRITTEN = {
    *(CONFIG_FILE, MENU_FILE, SUBNETS_FILE, PARAMS_FOLDER, checksums.FILE),
    *(TOKENIZER_FILE, TEMPLATES, *BESIDE),  # the tokenizer's files
    *(KEPT_FILE, GENERATION_FILE),  # of `hf.carried`
    *("routers.json", "routers.safetensors"),  # of `width.trained_routers`
    *("_CHECKPOINT_METADATA", "orbax.checkpoint", "commit_success.txt", "state", "descriptor"),  # params/
}


class Differs(OSError):
    """A checkpoint does not read back as it was written."""


class Checkpoints:
    """The newest training checkpoints of one run, each a state and the data iterator's position.

    A save takes its copy and goes on in the background, while the run trains. A step becomes visible only
    when its state and position are on disk, so a process may die at any time. Then it gets checksums, so that
    damage is noticed when a run goes on, and is read back and compared, a few arrays at a time. Where a
    process dies in between, the run that goes on from the step writes the checksums. Older steps go only
    after that, so that there is always one that was read back.

    It is a context: its end waits for the last save, and raises its error unless another one is on its way.
    """

    def __init__(self, folder: Path, keep: int = 2, keep_period: int = 0) -> None:
        """Opens a folder; unfinished checkpoints in it are removed.

        Args:
          folder: one sub-folder per step, local or at gs://; made where it is missing.
          keep: newest checkpoints that are kept.
          keep_period: steps that are multiples of it are kept as well; 0 = none are.

        Raises:
          ValueError: remote paths of this kind are not supported.
        """
        training: Any = ocp.training
        check_direct(folder)
        self._folder = folder = place_of(folder)
        self._keep, self._keep_period = keep, keep_period
        self._saving: tuple[int, Background] | None = None  # the step that is being saved
        self._removed: set[int] = set()  # of the steps that orbax has seen
        self._failed = False  # the last save, which said why
        folder.mkdir(parents=True, exist_ok=True)
        if jax.process_index() == 0:
            for left in folder.glob(f".*.{PARTIAL}-x*"):  # of steps that were being removed
                remove_leftovers(folder / left.name[1:].partition(".")[0])
        self._open = contextlib.ExitStack()
        self._checkpointer = training.Checkpointer(
            self._open.enter_context(readable_name(folder)),
            save_decision_policy=training.save_decision_policies.FixedIntervalPolicy(1),
            # What goes is for `_remove_old` to say: orbax would not wait until a step was read back.
            preservation_policy=training.preservation_policies.PreserveAll(),
            cleanup_tmp_directories=True,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.close()
            return
        self._abandon(LOST_WAIT if issubclass(kind, LostProcess) else None)

    def save(self, step: int, state: Any, batches: grain.DatasetIterator) -> None:
        """Begins to write a checkpoint. It has its copy when this returns: the state may be donated then.

        All processes call it with the same step. The save before is waited for.

        Args:
          step: optimizer steps done.
          state: a pytree of `jax.Array`.
          batches: the data iterator.

        Raises:
          OSError: as `settle`, of the save before or of the beginning of this one.
        """
        self.settle()
        with all_or_none():
            flush(self._folder)
        position = Position(batches)
        parts = {"state": state, "data": position}
        held = on_host(state) if jax.process_count() == 1 else None
        self._failed = True
        with self._writing(step):
            # Forced: orbax skips steps before the latest, which may be one that could not be read.
            response = self._checkpointer.save_checkpointables_async(step, parts, overwrite=True, force=True)
        self._failed = False

        finish = functools.partial(self._finish, step, response, held, position)
        self._saving = (step, Background(finish))

    def poll(self) -> None:
        """Raises the error of a save that has failed meanwhile; called between steps, it waits for nothing.

        Of several processes none does: they tell each other in `settle`.

        Raises:
          OSError: as `settle`.
        """
        if self._saving is not None and jax.process_count() == 1 and self._saving[1].done():
            self.settle()

    def settle(self) -> None:
        """Waits until the checkpoint that is being written is safe, and removes the oldest ones.

        Several processes call it together.

        Raises:
          OSError: the disk takes no more, or what was written does not read back as it was; names the
            checkpoint, of which nothing stays. One that could only not be compared, for want of memory, room
            or permission, stays.
        """
        if self._saving is None:
            return
        step, saving = self._saving
        saving.wait()
        self._saving = None
        error = self._failure(step, saving.error)
        if error is not None:
            self._failed = True
            raise error
        self._remove_old(step)

    def _failure(self, step: int, error: BaseException | None) -> BaseException | None:
        """What went wrong with a save in any process; what does not read back in one of them is removed."""
        if jax.process_count() == 1 or (error is not None and lost_process(error)):
            return error
        own = first_line(error).encode(errors="replace") if error else b""
        try:
            said = [text.decode() for text in bytes_of_all(own)]
        except (ValueError, RuntimeError):
            if error is None:
                raise
            return error  # the cause, of which others may have noticed the end of a process alone
        if isinstance(error, Differs) or not any(said):
            return error
        folder = self._folder / str(step)
        if jax.process_index() == 0 and any(text.startswith(Differs.__name__) for text in said):
            remove_folder(folder)
        first = next(i for i, text in enumerate(said) if text)
        return error or OSError(f"{folder}: was not saved by all (process {first}: {said[first]})")

    @contextlib.contextmanager
    def _writing(self, step: int) -> Iterator[None]:
        """Names the checkpoint in errors of writing it, after which nothing half-written stays."""
        with naming(self._folder / str(step)), tidy(self._folder, f"{step}.{ORBAX_PARTIAL}"):
            yield

    def _finish(self, step: int, response: Any, held: Any, position: Position) -> None:
        """The part of a save that goes on in the background."""
        with self._writing(step):
            response.result()

        folder = self._folder / str(step)
        if jax.process_index() == 0:
            checksums.write_checksums(folder)
        try:
            position.check(folder / "data")
            if held is not None:
                read = self._checkpointer.load_checkpointables
                check_same(held, lambda like: read(step, {"state": like})["state"])
        except Exception as error:
            if is_shortage(error):
                raise
            if jax.process_index() == 0:  # which does so for the others in `settle`
                check_held(folder)
                remove_folder(folder)
            raise Differs(
                f"{folder}: does not read back as it was written ({first_line(error)}) and is removed; "
                "check the disk and its free space, then run again, which goes on from the checkpoint before"
            ) from error

    def _remove_old(self, step: int) -> None:
        """Removes what is not to be kept, once a step is safe.

        Later steps do not count: the run has gone on from before them, because they could not be read.
        """
        steps = sorted(c.step for c in self._checkpointer.checkpoints if c.step <= step)
        steps = [one for one in steps if one not in self._removed]
        for old in steps[: -self._keep]:
            if self._keep_period and old % self._keep_period == 0:
                continue
            self._removed.add(old)
            if jax.process_index() == 0:
                check_held(self._folder)
                remove_folder(self._folder / str(old))

    def restore(self, abstract: Any, batches: grain.DatasetIterator) -> tuple[int, Any] | None:
        """Reads the newest checkpoint that is intact and moves `batches` to its position.

        A save that is on its way is waited for.

        Args:
          abstract: pytree of `jax.ShapeDtypeStruct` with shardings: the state to restore into.
          batches: a fresh data iterator; set to the checkpoint's position.

        Returns:
          (step, state), or None where nothing was saved yet.

        Raises:
          ValueError: there are checkpoints and none can be read; names the folder and the reason.
        """
        self.settle()
        start = batches.get_state()
        reasons = []
        for step in sorted((c.step for c in self._checkpointer.checkpoints), reverse=True):
            folder, state = self._folder / str(step), None
            # Processes try a step together: one that went on alone would wait for the others for ever.
            error = anywhere(self._damage(folder))
            if error is None:
                try:
                    wanted = {"state": abstract, "data": Position(batches)}
                    state = self._checkpointer.load_checkpointables(step, wanted)["state"]
                except Exception as raised:
                    error = raised
                error = anywhere(error)
            if error is None:
                self._complete(folder)
                return step, state
            if is_shortage(error):
                raise error
            reasons.append(f"step {step}: {first_line(error)}")
            logging.warning("checkpoint %s cannot be read and is skipped: %s", folder, first_line(error))
            batches.set_state(start)
        if not reasons:
            return None
        raise ValueError(
            f"no checkpoint in {self._folder} can be read into this configuration: {'; '.join(reasons)}. "
            "Use the configuration of the run that wrote them, or another workdir"
        )

    def _damage(self, folder: Path) -> Exception | None:
        """What is wrong with the files of a step, of which each process reads some."""
        try:
            checksums.check_files(folder, divided=True)
        except Exception as error:
            return error
        return None

    def _complete(self, folder: Path) -> None:
        """Writes the checksums of a sound step whose process died before it could."""
        if jax.process_index() == 0 and not (folder / checksums.FILE).is_file():
            checksums.write_checksums(folder)

    def close(self) -> None:
        """Waits for pending work.

        Raises:
          OSError: as `settle`.
        """
        try:
            self.settle()
        finally:
            self._close()

    def _abandon(self, seconds: float | None) -> None:
        """Closes after an error, which is not to be hidden by that of the save that is on its way.

        Args:
          seconds: to wait for it, at most. A process that is gone would be waited for long.
        """
        if self._saving is not None:
            step, saving = self._saving
            saving.wait(seconds)
            self._saving = None
            if not saving.done():
                return
            if saving.error is not None:
                self._failed = True
                logging.warning(
                    "checkpoint %s/%d was not saved: %s", self._folder, step, first_line(saving.error)
                )
        self._close()

    def _close(self) -> None:
        # orbax raises the error of a failed save once more, in its own words.
        with contextlib.suppress(*([Exception] if self._failed else [])):
            self._checkpointer.close()
        self._open.close()


def is_step(folder: Path) -> bool:
    """Whether a folder is one step of a training run."""
    return folder.name.isdigit() and (folder / "state").is_dir() and (folder / "data").is_dir()


def read_state(folder: Path, abstract: Any) -> Any:
    """Reads parts of the state of one step, whatever mesh it was saved from.

    Args:
      folder: of the step, see `is_step`.
      abstract: a state whose arrays are `jax.ShapeDtypeStruct` with shardings, or `ocp.PLACEHOLDER` for those
        that are not read.

    Raises:
      ValueError: a file is damaged, or the state is that of another model or optimizer.
    """
    checksums.check_files(folder)
    try:
        with readable_name(folder) as name:
            return ocp.load_checkpointables(name, {"state": abstract})["state"]
    except Exception as error:
        if is_shortage(error):
            raise
        raise ValueError(f"{folder}: does not hold the state of its run: {first_line(error)}") from error


def save_model(
    path: str | Path,
    config: Config,
    params: Params,
    tokenizer: Tokenizer | None,
    *,
    menu: Menu | None = None,
    subnets: SubnetTable | None = None,
    source: str | Path | None = None,
    beside: Callable[[Path], None] | None = None,
    overwrite: bool = False,
) -> None:
    """Writes an elastic checkpoint: elastic_config.json, params/, menu.json and the tokenizer's files.

    A model with a menu gets a table of named sub-networks, subnets.json, too.

    The folder appears complete or not at all, with checksums of its files, after it was read back.

    Args:
      path: folder to create, on this machine or in a store. In a store, an earlier checkpoint goes before
        the new one is written.
      config: the model.
      params: canonical parameters.
      tokenizer: saved beside them; None = no tokenizer.
      menu: the choices that the model was made elastic for, saved beside them; None = no menu.
      subnets: its named sub-networks; None = those of the source, and those that span the menu.
      source: the folder that the model comes from: what its config.json and generation_config.json say beyond
        the model is kept for an export, and its named sub-networks stay; None = there is none.
      beside: writes further files into the folder before it appears; None = there are none.
      overwrite: replace an earlier checkpoint at `path`.

    Raises:
      FileExistsError: `path` holds something that may not be replaced.
      OSError: what was written does not read back as it was; an earlier checkpoint stays.
      ValueError: remote paths of this kind are not supported.
    """
    check_wide("save_model", params)
    target = check_target(path, overwrite)
    named = table_to_save(config, params, menu, subnets, source)

    def describe(folder: Path) -> None:
        if source:
            Carried.of_folder(source).save(folder)
        if tokenizer is not None:
            tokenizer.save(folder)
        (folder / CONFIG_FILE).write_text(_json({"kind": kind_of(config).name, **to_dict(config)}))
        if menu is not None:
            (folder / MENU_FILE).write_text(_json(to_dict(menu)))
        if named is not None:
            save_subnets(folder, named)
        if beside is not None:
            beside(folder)

    if is_remote(target):
        save_remote(address_of(target), params, PARAMS_FOLDER, describe)
        return
    partial = _shared_name(target)
    first = jax.process_index() == 0
    with whole_folder(target, partial) if first else naming(target, partial):
        with readable_name(partial) as folder, tidy(partial.parent, partial.name):
            ocp.save(folder / PARAMS_FOLDER, params)
        if first:
            describe(partial)
            checksums.write_checksums(partial)
            _check_saved(partial, target, config, params)
            check_target(path, overwrite)  # another process may have been there meanwhile
    wait_for_all("the model is saved")  # nobody reads it before


def _shared_name(target: Path) -> Path:
    """A new name beside a folder, the same in every process: all write into it."""
    name = new_beside(real_place(target))
    if jax.process_count() == 1:
        return name
    from jax.experimental import multihost_utils

    digits = np.frombuffer(name.name.encode(), np.uint8)
    settle()
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


def check_target(path: str | Path, overwrite: bool) -> Any:
    """Where a checkpoint may be written.

    Args:
      path: the folder that `save_model` is asked for.
      overwrite: whether an earlier checkpoint there may be replaced.

    Returns:
      The absolute path; the address of a remote one.

    Raises:
      FileExistsError: `path` holds something that may not be replaced; names it.
      NotADirectoryError: something above it is a file.
      ValueError: remote paths of this kind are not supported, or it holds a character that orbax cannot write
        to here.
    """
    if is_remote(path):
        check_usable(address := address_of(path))
        check_remote_target(address, overwrite, CONFIG_FILE, WRITTEN)
        return address
    target = local_path(path).absolute()
    check_usable(target)
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
      path: folder written by `save_model`, on this machine or in a store.
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
    copy = local_model(path).absolute()
    config = load_config(copy)
    folder = stored_folder(copy)  # where the arrays are, which are not copied
    if dtype is not None:
        config = dataclasses.replace(config, dtype=dtype, param_dtype=dtype)
    mesh = make_mesh(devices=jax.local_devices()[:1]) if mesh is None else mesh
    # Onto devices of its own a process may load a model that no other one loads.
    together = mesh.is_multi_process
    with all_or_none() if together else contextlib.nullcontext():
        checksums.check_files(folder, divided=together)
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
