"""Writing a Hugging Face folder that transformers loads."""

import dataclasses
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from safetensors.numpy import save_file

from elastic_lm.files import checksums
from elastic_lm.files.atomic import whole_folder
from elastic_lm.files.local import local_path, require_folder_above
from elastic_lm.files.remote import address_of, is_remote
from elastic_lm.files.remote_folders import top_names
from elastic_lm.files.remote_models import UNFINISHED, is_unfinished
from elastic_lm.files.subnet_files import SUBNETS_FILE, carried_subnets, save_subnets
from elastic_lm.hf.carried import GENERATION_FILE, Carried, write_json
from elastic_lm.hf.config_json import config_to_hf
from elastic_lm.hf.files import INDEX, WEIGHTS, TensorFiles
from elastic_lm.hf.tensors import EXITS_FILE, Binding, bindings
from elastic_lm.models.decoder import Params
from elastic_lm.models.finite import check_finite
from elastic_lm.models.registry import Config
from elastic_lm.nn.int8 import check_wide
from elastic_lm.processes import is_first, on_host, wait_for_all

WRITTEN = (
    "config.json",
    "generation_config.json",
    "tokenizer*.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.*",
    "*.safetensors",
    "*.safetensors.index.json",
    SUBNETS_FILE,
    checksums.FILE,
)
WRITTEN_FOLDERS = {"additional_chat_templates": "*.jinja"}


class Tokenizer(Protocol):
    """What `export` needs of a tokenizer."""

    def save(self, folder: str | Path) -> Any:
        """Writes tokenizer.json, and what transformers wants beside it, into `folder`."""
        ...


def export(
    config: Config,
    params: Params,
    path: str | Path,
    tokenizer: Tokenizer | None = None,
    *,
    source: str | Path | None = None,
    max_shard_bytes: int = 5 * 10**9,
    overwrite: bool = False,
) -> None:
    """Writes a model as a Hugging Face folder of `config.family`; `load` reads it back bit by bit.

    The folder appears complete or not at all, with checksums of its files, after its weights were read back
    and compared. Exits go to `elastic_exits.safetensors`, described in
    an `elastic` block of config.json; transformers ignores both and loads the full-depth model. Of several
    processes all must call this; the first one writes, one tensor after the other.

    Args:
      config: the model.
      params: its canonical parameters, in the dtype that is to be stored.
      path: folder to create, on this machine or in a store.
      tokenizer: saved beside the weights, if given, with its chat template and all that names its tokens.
      source: the folder that the model comes from, a Hugging Face folder or a checkpoint of this package:
        keys of its config.json and generation_config.json that are no part of the model are written again,
        and so are its named sub-networks, where the whole model is exported.
      max_shard_bytes: weights above this size are split over several files with an index.
      overwrite: replace an earlier export at `path`.

    Raises:
      ValueError: the family cannot express the model, parameters and config disagree or hold NaN or
        infinity, or remote paths like `path` are not supported.
      FileExistsError: `path` holds something that may not be replaced.
      NotADirectoryError: something above it is a file.
      OSError: weights cannot be written, or do not read back as they were; an earlier export stays.

    Example:
      ```python
      import tempfile

      import elastic_lm as el

      config = el.testing.tiny_config(exits=(2,))
      with tempfile.TemporaryDirectory() as folder:
          el.hf.export(config, el.testing.random_params(config), f"{folder}/model")
          assert el.hf.load(f"{folder}/model")[0].exits == config.exits
      ```
    """
    check_wide("export", params)
    target = check_target(path, overwrite)
    leaves = [(binding, _leaf(params, binding)) for binding in bindings(config)]
    check_finite("the model that is exported", params)
    dtype = str(leaves[0][1].dtype)
    entries = config_to_hf(dataclasses.replace(config, param_dtype=dtype))
    carried = Carried({}, None) if source is None else Carried.of_folder(source)
    entries = carried.with_entries(config, entries)
    subnets = carried_subnets(source, config, params)
    if not is_first():
        # Gives its parts of the tensors, in the order that they are written in.
        for _, leaf in sorted(leaves, key=lambda pair: pair[0].is_exit):
            on_host(leaf)
        wait_for_all("the export is written")
        return

    with whole_folder(target) as partial:
        _write_weights(config, leaves, partial, max_shard_bytes)
        if generation := carried.with_ids(entries):
            write_json(partial / GENERATION_FILE, generation)
        write_json(partial / "config.json", entries)
        if subnets is not None:
            save_subnets(partial, subnets)
        if tokenizer is not None:  # after the configs: it writes down what those do not say
            tokenizer.save(partial)
        for shard in partial.glob("*.safetensors"):  # safetensors makes them readable by their owner alone
            shutil.copymode(partial / "config.json", shard)
        checksums.write_checksums(partial)
        check_target(path, overwrite)  # another process may have been there meanwhile
    wait_for_all("the export is written")


def check_target(path: str | Path, overwrite: bool) -> Any:
    """Where a folder may be exported to.

    Args:
      path: the folder that `export` is asked for.
      overwrite: whether an earlier export there may be replaced.

    Returns:
      The path; the address of a remote one.

    Raises:
      FileExistsError: `path` holds something that may not be replaced; names it.
      NotADirectoryError: something above it is a file.
      ValueError: remote paths of this kind are not supported.
    """
    if is_remote(path):
        _check_remote_target(address_of(path), overwrite)
        return address_of(path)
    target = local_path(path)
    require_folder_above(target)
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return target
    if not overwrite:
        raise FileExistsError(
            f"{target}: exists already; choose another path, or overwrite it (--overwrite, overwrite=True)"
        )
    if not (target / "config.json").is_file():
        raise FileExistsError(
            f"{target}: is no Hugging Face folder and is not overwritten; choose another path"
        )
    inside = [target / name for name in WRITTEN_FOLDERS if (target / name).is_dir()]
    files = [path for path in target.iterdir() if path not in inside]
    strange = [path for path in files if not path.is_file() or not any(map(path.match, WRITTEN))]
    for folder in inside:
        pattern = WRITTEN_FOLDERS[folder.name]
        strange += [path for path in folder.iterdir() if not path.is_file() or not path.match(pattern)]
    if strange:
        raise FileExistsError(
            f"{min(strange)}: not written by an export, so the folder is not overwritten; move it away, or "
            "choose another path"
        )
    return target


def _check_remote_target(address: str, overwrite: bool) -> None:
    """`check_target` for a folder in a store."""
    found = top_names(address)
    if not found:
        return
    begun = is_unfinished(address, found)
    if not begun and not overwrite:
        raise FileExistsError(
            f"{address}: exists already; choose another path, or overwrite it (--overwrite, overwrite=True)"
        )
    if not begun and "config.json" not in found:
        raise FileExistsError(
            f"{address}: is no Hugging Face folder and is not overwritten; choose another path"
        )
    known = {name for name in found if name in WRITTEN_FOLDERS or any(map(Path(name).match, WRITTEN))}
    known |= {UNFINISHED} if begun else set()
    if found - known:
        raise FileExistsError(
            f"{address}/{min(found - known)}: not written by an export, so the folder is not overwritten; "
            "move it away, or choose another path"
        )


def _leaf(params: Params, binding: Binding) -> Any:
    leaf: Any = params
    for key in binding.path:
        if not isinstance(leaf, dict) or key not in leaf:
            raise ValueError(
                f"params has no {'/'.join(binding.path)}, which the config asks for; stacked parameters "
                "must pass models.decoder.unstack_layers first"
            )
        leaf = leaf[key]
    if leaf.shape != binding.shape:
        raise ValueError(
            f"params {'/'.join(binding.path)} has shape {leaf.shape}, but the config asks for {binding.shape}"
        )
    return leaf


def _write_weights(
    config: Config, leaves: list[tuple[Binding, Any]], folder: Path, max_shard_bytes: int
) -> None:
    backbone = [pair for pair in leaves if not pair[0].is_exit]
    exits = [pair for pair in leaves if pair[0].is_exit]
    shards = list(_shards(backbone, max_shard_bytes))
    weight_map = {}
    for i, shard in enumerate(shards):
        name = WEIGHTS if len(shards) == 1 else f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        weight_map |= dict.fromkeys(_save(config, shard, folder / name), name)
    if exits:
        _save(config, exits, folder / EXITS_FILE)
    if exits or len(shards) > 1:
        # With exits the index tells readers that take every *.safetensors which ones are the model.
        total = sum(leaf.nbytes for _, leaf in backbone)
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _shards(leaves: list[tuple[Binding, Any]], limit: int) -> Iterator[list[tuple[Binding, Any]]]:
    """Groups parameters in order into runs of at most `limit` bytes (or one larger parameter)."""
    shard: list[tuple[Binding, Any]] = []
    size = 0
    for binding, leaf in leaves:
        if shard and size + leaf.nbytes > limit:
            yield shard
            shard, size = [], 0
        shard.append((binding, leaf))
        size += leaf.nbytes
    yield shard


def _save(config: Config, leaves: list[tuple[Binding, Any]], path: Path) -> list[str]:
    """Writes one file and returns the names of its tensors."""
    tensors = {}
    for binding, leaf in leaves:
        parts = binding.layout.split(config, on_host(leaf))
        tensors |= {n: np.ascontiguousarray(p) for n, p in zip(binding.names, parts, strict=True)}
    save_file(tensors, path, metadata={"format": "pt"})
    with path.open("rb+") as file:
        os.fsync(file.fileno())
    _check_saved(tensors, path)
    return list(tensors)


def _check_saved(tensors: dict[str, np.ndarray], path: Path) -> None:
    """Reads a file of weights back that was just written.

    Raises:
      OSError: it cannot be read, or a tensor differs.
    """
    stored = TensorFiles({})
    try:
        stored.add(path)
        for name, due in tensors.items():
            found = stored.read(name)
            same = found.shape == due.shape and found.dtype == due.dtype
            if not same or not np.array_equal(
                found.reshape(-1).view(np.uint8), due.reshape(-1).view(np.uint8)
            ):
                raise ValueError(f"tensor {name!r} differs")
    except ValueError as error:
        raise OSError(
            f"{path}: does not read back as it was written ({error}) and is not kept; check the disk and its "
            "free space"
        ) from error
