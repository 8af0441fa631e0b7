"""Loading a Hugging Face folder, one tensor at a time."""

import dataclasses
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from elastic_lm.config.checks import require
from elastic_lm.config.model import DTYPES
from elastic_lm.files.atomic import moved_away
from elastic_lm.files.checksums import check_files
from elastic_lm.files.gguf import is_gguf
from elastic_lm.files.hub import OR_NAME, local_model
from elastic_lm.files.remote import addresses_in_errors, named
from elastic_lm.hf.config_json import NO_TOKEN, config_from_hf, read_eos
from elastic_lm.hf.family import Family, typed
from elastic_lm.hf.files import TensorFiles, read_json
from elastic_lm.hf.generation import limits_beside
from elastic_lm.hf.gguf import GGUFTensors, config_entries
from elastic_lm.hf.multimodal import text_tensors
from elastic_lm.hf.registry import find_family
from elastic_lm.hf.tensors import EXITS_FILE, Binding, bindings
from elastic_lm.models.decoder import Params
from elastic_lm.models.finite import cast_tensor
from elastic_lm.models.registry import Config
from elastic_lm.nn.int8 import becomes_int8, to_int8

# What old checkpoints carry and nothing reads: buffers that are computed here, mostly.
BUFFERS = (
    ".rotary_emb.inv_freq",
    ".attn.bias",
    ".attn.masked_bias",
    ".attention.bias",
    ".attention.masked_bias",
    ".EncDecAttention.relative_attention_bias.weight",  # of T5's first releases, which nothing read
    "embeddings.position_ids",
    "embeddings.token_type_ids",
    ".embed_positions.weight",  # sinusoids (Marian), which are computed
    "encoder.version",  # of BART's first releases
    "decoder.version",
    "embeddings.position_embeddings.weight",  # of DeBERTas that do not read it
    ".pooler.dense.weight",  # RoBERTa's classifiers were saved with a pooler that they do not read
    ".pooler.dense.bias",
)


def load(
    path: str | Path,
    *,
    dtype: str | None = None,
    mesh: jax.sharding.Mesh | None = None,
    revision: str | None = None,
    weights: str | None = None,
) -> tuple[Config, Params]:
    """Loads a model of a supported family from its Hugging Face folder.

    Every parameter is assembled from its tensors, cast and put in place before the next is read, so
    the host never holds a second copy of the model.

    Args:
      path: folder with config.json and model.safetensors, or shards with an index; or a .gguf file, or a
        model's name on the Hub, see `el.load`. Where it has
        checksums, as every folder that `export` writes, all of its files are checked.
      dtype: "float32", "bfloat16" or "float16" of parameters and activations; None = that of the
        file, except on a CPU, where it is float32 (half precision is slow there).
      mesh: devices to spread the parameters over (`elastic_lm.models.sharding`); None = the default device.
      revision: branch, tag or commit on the Hub; None = the main branch.
      weights: "int8" = kernels and tables in 8 bits, see `el.load`; None = in `dtype`.

    Returns:
      (config, canonical parameters). Token ids that start and end a text come from
      generation_config.json where it has them, else from config.json.

    Raises:
      FileNotFoundError: the folder or one of its files is missing.
      ValueError: `path` is remote, a file is damaged, the family or one of its features is not supported, a
        tensor is missing, not expected, of the wrong shape, or holds NaN, infinity, or values that are too
        large for `dtype`. Messages name file, tensor and fix.

    Example:
      ```python
      import jax.numpy as jnp

      import elastic_lm as el

      config, params = el.hf.load(el.embedded_model())
      logits = el.Decoder(config).apply({"params": params}, jnp.array([[1, 2, 3]])).logits
      ```
    """
    folder = local_model(path, revision=revision)
    with addresses_in_errors():
        _check_folder(folder)
        config = _read_config(folder, dtype)
        exits = [folder / EXITS_FILE] if getattr(config, "exits", ()) else []
        tensors = (
            GGUFTensors(folder) if is_gguf(folder) else text_tensors(TensorFiles.of_folder(folder, exits))
        )
        _check_layers(folder, config, tensors)
        config = _complete(config, tensors)
        config = _resolve_tying(config, tensors)
        table = _match(folder, config, tensors)
        check_files(folder)  # after what can say more exactly what is wrong
        place = _placement(config, mesh)
        _tell_of_quantised(tensors, config)
        params: Params = {}
        for binding in table:
            sources = [tensors.read(name) for name in binding.names]
            leaf = binding.layout.join(sources, binding.shape)
            where = f"{tensors.files[binding.names[0]]}: tensor {_listed(list(binding.names))}"
            leaf = cast_tensor(where, leaf, jnp.dtype(config.param_dtype))
            _insert(params, binding.path, place(binding.path, leaf, weights))
    return config, params


def _tell_of_quantised(tensors: TensorFiles, config: Config) -> None:
    """Warns that a quantised file is larger in memory than on the disk."""
    kinds = tensors.quantised if isinstance(tensors, GGUFTensors) else {}
    if kinds:
        listed = ", ".join(f"{count} of {kind}" for kind, count in kinds.items())
        path = next(iter(tensors.files.values()))
        warnings.warn(
            f"{named(path)}: tensors ({listed}) are dequantised to {config.param_dtype}", stacklevel=3
        )


def _check_folder(folder: Path) -> None:
    if not folder.exists():
        raise FileNotFoundError(
            f"{folder}: no such folder. Expected a Hugging Face folder. {OR_NAME}{moved_away(folder)}"
        )
    if not folder.is_dir() and not is_gguf(folder):
        raise ValueError(f"{folder}: not a folder; pass the folder that holds config.json, or a .gguf file")


def _read_config(folder: Path, dtype: str | None) -> Config:
    path = folder if is_gguf(folder) else folder / "config.json"
    hf = config_entries(path) if is_gguf(folder) else read_json(path)
    try:
        config = config_from_hf(hf)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from error
    family = find_family(config.family)
    ids = _generation_ids(folder / "generation_config.json")
    ids |= limits_beside(folder / "generation_config.json", config)
    config = dataclasses.replace(config, **{field: i for field, i in ids.items() if family.has(field)})
    if dtype is None:
        dtype = "float32" if jax.default_backend() == "cpu" else config.param_dtype
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r}: must be one of {', '.join(DTYPES)}")
    return dataclasses.replace(config, dtype=dtype, param_dtype=dtype)


def _generation_ids(path: Path) -> dict[str, Any]:
    """The fields of a config that begin and end a text, as far as the file has them."""
    hf = read_json(path) if path.is_file() else {}
    try:
        ids = {key: typed(hf, key, int, None) for key in ("bos_token_id", "decoder_start_token_id")}
        ids["eos_token_id"] = read_eos(hf, None)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    fields = {
        "bos_token_id": "bos_id",
        "eos_token_id": "eos_ids",
        "decoder_start_token_id": "decoder_start_id",
    }
    return {ours: ids[theirs] for theirs, ours in fields.items() if hf.get(theirs) not in (None, NO_TOKEN)}


def _check_layers(folder: Path, config: Config, tensors: TensorFiles) -> None:
    """Refuses more layers than there are tensors, before the names of all their tensors are made."""
    require(
        getattr(config, "shared_layers", False) or config.n_layers <= len(tensors.files),
        f"{folder / 'config.json'}: the number of layers",
        config.n_layers,
        f"the weights are {len(tensors.files)} tensors, and every layer has some; correct it",
    )


def _stored(name: str | None, family: Family, tensors: TensorFiles) -> str | None:
    """The name under which the folder holds a tensor: as it is, or without the base model's prefix."""
    if name is None:
        return None
    return next((n for n in (name, name.removeprefix(family.prefix)) if n in tensors.files), None)


def _complete(config: Config, tensors: TensorFiles) -> Config:
    """The config with what only the names of the tensors tell."""
    family = find_family(config.family)
    return family.complete(config, {name.removeprefix(family.prefix) for name in tensors.files})


def _resolve_tying(config: Config, tensors: TensorFiles) -> Config:
    """Unties a model that claims to be tied but stores an embedding and a head that differ."""
    family = find_family(config.family)
    if not getattr(config, "tied", False):
        return config
    embed = _stored(family.root["embed/table"].names[0], family, tensors)
    head = _head_name(family, tensors)
    if embed is None or head is None:
        return config
    if np.array_equal(tensors.read(embed), tensors.read(head)):
        return config
    warnings.warn(
        f"{tensors.files[head]}: config.json ties {head!r} to {embed!r}, but their values differ; "
        "both are loaded, untied",
        stacklevel=3,
    )
    return dataclasses.replace(config, tied=False)


def _head_name(family: Family, tensors: TensorFiles) -> str | None:
    head = family.head
    if head is None:
        return None
    return _stored(head.names[0], family, tensors) or _stored(head.alias, family, tensors)


def _match(folder: Path, config: Config, tensors: TensorFiles) -> list[Binding]:
    """Bindings under the names that the folder uses, after checking names and shapes of all tensors."""
    family = find_family(config.family)
    tied = getattr(config, "tied", False)
    table, missing = [], []
    for binding in bindings(config):
        names = [_stored(name, family, tensors) for name in binding.names]
        if None in names and binding.alias:
            names = [_stored(binding.alias, family, tensors)]
        if None in names and binding.names[0] in family.copies.values():
            names = [_any_copy(binding.names[0], family, tensors)]
        if None in names and binding.path[0] == "embed" and tied:
            names = [_head_name(family, tensors)]
        missing += [b for b, n in zip(binding.names, names, strict=True) if n is None]
        table.append(dataclasses.replace(binding, names=tuple(n for n in names if n is not None)))
    if missing:
        _report_missing(folder, family, tensors, missing)
    for binding in table:
        _check_shapes(folder, binding, tensors)
    used = {name for binding in table for name in binding.names}
    if tied:
        used.add(_head_name(family, tensors) or "")
    used |= _copies(family, tensors)
    _report_extra(family, tensors, sorted(set(tensors.files) - used))
    return table


def _any_copy(original: str, family: Family, tensors: TensorFiles) -> str | None:
    """A tensor that stands in for the one that it repeats."""
    stored = [_stored(copy, family, tensors) for copy, of in family.copies.items() if of == original]
    return next(filter(None, stored), None)


def _copies(family: Family, tensors: TensorFiles) -> set[str]:
    """Tensors that repeat another one, as far as the folder has them."""
    found = set()
    for copy, original in family.copies.items():
        name, kept = _stored(copy, family, tensors), _stored(original, family, tensors)
        if name is None or kept is None:
            continue
        if not np.array_equal(tensors.read(name), tensors.read(kept)):
            raise ValueError(
                f"{tensors.files[name]}: tensor {name!r} must be the same as {kept!r} in model_type "
                f"{family.model_type!r}, but their values differ; remove it, or make them equal"
            )
        found.add(name)
    return found


def _listed(names: list[str], limit: int = 8) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(map(repr, names[:limit])) + more


def _report_missing(folder: Path, family: Family, tensors: TensorFiles, missing: list[str]) -> None:
    config = folder / "config.json"
    fix = f"{config} describes a model that has them: correct it, or add the tensors"
    if family.head and missing == list(family.head.names):
        fix = f"set tie_word_embeddings to true in {config} if the head is the embedding"
    if all(name.startswith("elastic.") for name in missing):
        fix = f"export the model again, or remove the elastic block from {config}"
    searched = sorted({path.name for path in tensors.files.values()})
    raise ValueError(f"{folder}: missing tensors {_listed(missing)} in {', '.join(searched[:4])}; {fix}")


def _check_shapes(folder: Path, binding: Binding, tensors: TensorFiles) -> None:
    for name, wanted in zip(binding.names, binding.shapes, strict=True):
        found = tensors.shape(name)
        if found != wanted:
            raise ValueError(
                f"{tensors.files[name]}: tensor {name!r} has shape {found}, but {folder / 'config.json'} "
                f"asks for {wanted}; correct the sizes there, or use the weights that belong to it"
            )


def _report_extra(family: Family, tensors: TensorFiles, extra: list[str]) -> None:
    """Refuses unknown tensors inside the model, where they would change its output; warns of others."""
    extra = [name for name in extra if not name.endswith(BUFFERS)]
    layers = family.layer.split("{}")[0].removeprefix(family.prefix)
    heads = family.head.names[:1] if family.head else ()
    roots = tuple(filter(None, (family.prefix, layers, "elastic.", *heads, *family.inside)))
    inside = [name for name in extra if name.startswith(roots)]
    if inside:
        raise ValueError(
            f"{tensors.files[inside[0]]}: unexpected tensors {_listed(inside)} that config.json has no use "
            f"for in model_type {family.model_type!r}; correct config.json, or remove them"
        )
    if extra:
        warnings.warn(
            f"{tensors.files[extra[0]]}: tensors {_listed(extra)} are not part of model_type "
            f"{family.model_type!r} and are ignored",
            stacklevel=4,
        )


def _placement(
    config: Config, mesh: jax.sharding.Mesh | None
) -> Callable[[tuple[str, ...], np.ndarray, str | None], Any]:
    """Returns what puts an assembled parameter where it belongs, in 8 bits if it is to be."""

    def narrowed(path: tuple[str, ...], leaf: np.ndarray, weights: str | None) -> Any:
        return to_int8(leaf) if weights == "int8" and becomes_int8(path) else leaf

    if mesh is None:
        return lambda path, leaf, weights: jax.tree.map(
            lambda x: jnp.array(np.ascontiguousarray(x)), narrowed(path, leaf, weights)
        )
    from elastic_lm.models.sharding import param_shardings

    shardings = param_shardings(config, mesh)

    def place(path: tuple[str, ...], leaf: np.ndarray, weights: str | None) -> Any:
        sharding: Any = shardings
        for key in path:
            sharding = sharding[key]

        def put(x: np.ndarray) -> jax.Array:
            # The scales of a kernel have its outputs alone.
            own = NamedSharding(mesh, PartitionSpec(*sharding.spec[: x.ndim]))
            own = sharding if x.ndim == leaf.ndim else own
            return jax.make_array_from_callback(x.shape, own, lambda index: x[index])

        return jax.tree.map(put, narrowed(path, leaf, weights))

    return place


def _insert(params: Params, path: tuple[str, ...], leaf: jax.Array) -> None:
    for key in path[:-1]:
        params = params.setdefault(key, {})
    params[path[-1]] = leaf
