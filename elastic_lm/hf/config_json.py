"""config.json of Hugging Face <-> a model's config, driven by the family's table."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from elastic_lm.config.checks import LARGEST_INT, is_whole, require, require_layers
from elastic_lm.config.model import DTYPES, Activation, ExitConfig, ModelConfig
from elastic_lm.config.parse import from_dict, to_dict
from elastic_lm.hf.family import ACTIVATIONS, REQUIRED, Family, Field, typed
from elastic_lm.hf.keys import ReadKeys, refuse_unread
from elastic_lm.hf.multimodal import text_config
from elastic_lm.hf.registry import find_family
from elastic_lm.hf.rope import rope_to_hf
from elastic_lm.hf.tensors import tensor_names
from elastic_lm.models.registry import Config

ELASTIC_VERSION = 1
LAYERS = ("n_layers", "n_decoder_layers")
NO_TOKEN = -1  # an id by which old configs say that there is none


def config_from_hf(hf: Mapping[str, Any]) -> Config:
    """Describes the model of a parsed config.json.

    Args:
      hf: config.json of a supported family, in the style of transformers 4 or 5. Of a model of images and
        text, the part that describes the text is read.

    Returns:
      The config, of the family's class. `dtype` and `param_dtype` are those of the file (float32 if it
      does not say); exits come from the `elastic` block, if there is one.

    Raises:
      ValueError: the model_type is not supported, a key is missing or has a value of the wrong type,
        or the file asks for a feature that has no counterpart here, or has a key that nothing here reads and
        that may change what the model computes; names the key and its value.

    Example:
      ```python
      import elastic_lm as el

      sizes = {"vocab_size": 512, "hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4}
      config = el.hf.config_from_hf({"model_type": "llama", "intermediate_size": 128, **sizes})
      assert (config.d_model, config.n_layers) == (64, 4)
      ```
    """
    hf = text_config(hf)
    family = find_family(hf.get("model_type"))
    hf = ReadKeys(hf)
    _refuse(family, hf)
    try:
        config = _read_model(family, hf)
    except ValueError as error:
        raise ValueError(_in_their_words(family, str(error))) from error
    refuse_unread(family.model_type, hf, family.ignored)
    return config


def _read_model(family: Family, hf: Mapping[str, Any]) -> Config:
    values: dict[str, Any] = dict(family.fixed)
    for field in family.fields:
        value = _read_field(family, field, hf)
        if value is not None:
            values[field.ours] = value
    if family.config_class is ModelConfig:
        values.setdefault("max_len", ModelConfig.max_len)
    values |= family.read(hf, values)
    if "activation" not in values:
        values["activation"] = _read_activation(family, hf)
    if family.has("eos_ids"):
        values["eos_ids"] = read_eos(hf, family.eos_default)
    if family.has("exits"):
        values["exits"] = _read_exits(family, hf)
    if family.has("elastic_groups"):
        values["elastic_groups"] = _read_groups(hf)
    dtype = _read_dtype(hf)
    return family.config_class(**values, dtype=dtype, param_dtype=dtype, family=family.model_type)


def config_to_hf(config: Config) -> dict[str, Any]:
    """Writes the config.json of `config.family`, readable by transformers 4 and 5.

    Args:
      config: the model; exits and storage groups go to an `elastic` block that transformers ignores.

    Returns:
      JSON-compatible entries.

    Raises:
      ValueError: the family cannot express this model; names the fields that it would lose, or the
        layers that differ in size.

    Example:
      ```python
      import elastic_lm as el

      entries = el.hf.config_to_hf(el.testing.tiny_config())
      assert (entries["model_type"], entries["hidden_size"]) == ("llama", 32)
      ```
    """
    family = find_family(config.family)
    if isinstance(config, ModelConfig):
        _refuse_many_sizes(config)
    hf: dict[str, Any] = {"architectures": [family.architecture], "model_type": family.model_type}
    for field in family.fields:
        value = getattr(config, field.ours)
        hf[field.theirs] = None if value == field.off else value
    hf[family.activation[0]] = _activation_name(family, config.activation)
    held = vars(config)
    if family.has("eos_ids"):
        ids = held["eos_ids"]
        hf["eos_token_id"] = list(ids) if len(ids) > 1 else next(iter(ids), None)
    hf["torch_dtype"] = config.param_dtype
    hf |= family.write(config)
    if held.get("exits"):
        hf["elastic"] = {"version": ELASTIC_VERSION, "exits": list(to_dict(config)["exits"])}
    if groups := held.get("elastic_groups"):
        hf["elastic"] = {"version": ELASTIC_VERSION, **hf.get("elastic", {}), "groups": groups}
    _check_expressible(config, hf)
    return hf


def _in_their_words(family: Family, message: str) -> str:
    """A refusal of our fields, with the keys of config.json that they come from."""
    words = {field.ours: field.theirs for field in family.fields}
    return re.sub(rf"(?<![\w.'])({'|'.join(words)})(?![\w'])", lambda match: words[match[0]], message)


def _refuse(family: Family, hf: Mapping[str, Any]) -> None:
    if hf.get("quantization_config"):
        raise ValueError(
            f"quantization_config={hf['quantization_config']!r}: quantised checkpoints are not supported; "
            "dequantise it with transformers and save it again"
        )
    for key, allowed in family.refuse:
        if key in hf and hf[key] not in allowed:
            raise ValueError(
                f"{key}={hf[key]!r} is not supported for model_type {family.model_type!r}: "
                f"must be {' or '.join(map(str, allowed))}"
            )


def _read_field(family: Family, field: Field, hf: Mapping[str, Any]) -> Any:
    """Value of one field, or None where our own default applies."""
    value = hf.get(field.theirs, field.default)
    if field.alias and hf.get(field.alias) is not None:
        field, value = dataclasses.replace(field, theirs=field.alias), hf[field.alias]
    if value is REQUIRED or (value is None and field.default is REQUIRED):
        raise ValueError(f"{field.theirs} is missing; add it")
    hint = next(f for f in dataclasses.fields(family.config_class) if f.name == field.ours).type
    value = typed({field.theirs: value}, field.theirs, {bool: bool, float: float}.get(hint, int), None)
    require(field.default is not REQUIRED or value >= 1, field.theirs, value, "must be at least 1")
    require(type(value) is not int or value <= LARGEST_INT, field.theirs, value, "must be below 2**31")
    if field.ours == "bos_id" and value == NO_TOKEN:
        return None
    if field.ours in LAYERS and value is not None:
        require_layers(field.theirs, value)  # before lists with an entry per layer are made
    return float(value) if hint is float and value is not None else value


def _read_dtype(hf: Mapping[str, Any]) -> str:
    dtype = str(hf.get("dtype") or hf.get("torch_dtype") or "float32").removeprefix("torch.")
    return dtype if dtype in DTYPES else "float32"


def _read_activation(family: Family, hf: Mapping[str, Any]) -> Activation:
    key, default = family.activation
    name = hf.get(key) or default
    if not isinstance(name, str) or name not in ACTIVATIONS:
        raise ValueError(f"{key}={name!r} is not supported; supported: {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


def _activation_name(family: Family, activation: Activation) -> str:
    """The family's own name where it means the same, else the first that does."""
    default = family.activation[1]
    if ACTIVATIONS[default] == activation:
        return default
    return next(name for name, ours in ACTIVATIONS.items() if ours == activation)


def read_eos(hf: Mapping[str, Any], default: int | None) -> tuple[int, ...]:
    """Ids that end a text.

    Args:
      hf: parsed config.json or generation_config.json.
      default: the id where the key is missing; None = none.

    Returns:
      The ids, () where the file says null or -1.

    Raises:
      ValueError: `eos_token_id` is neither an id, nor a list of them, nor null.
    """
    ids = hf.get("eos_token_id", default)
    ids = () if ids is None else tuple(ids) if isinstance(ids, list | tuple) else (ids,)
    if not all(is_whole(i, -1) for i in ids):
        raise ValueError(f"eos_token_id={ids!r}: must be a token id below 2**31, or a list of them")
    return tuple(i for i in ids if i != NO_TOKEN)


def _read_exits(family: Family, hf: Mapping[str, Any]) -> tuple[ExitConfig, ...] | tuple[int, ...]:
    block = hf.get("elastic")
    if not block:
        return ()
    if not isinstance(block, Mapping) or not isinstance(block.get("exits", []), list):
        raise ValueError(
            f"elastic={block!r}: must be a mapping with version and a list of exits; export again"
        )
    if block.get("version") != ELASTIC_VERSION:
        raise ValueError(
            f"elastic.version={block.get('version')!r}: this release reads version {ELASTIC_VERSION}; "
            "update elastic_lm"
        )
    exits = block.get("exits", [])
    if family.config_class is not ModelConfig:
        whole = all(type(layer) is int for layer in exits)
        require(whole, "elastic.exits", exits, "must be layers of an encoder; export again")
        return tuple(exits)
    return tuple(from_dict(ExitConfig, e, f"elastic.exits[{i}].") for i, e in enumerate(exits))


def _read_groups(hf: Mapping[str, Any]) -> int:
    return typed(hf.get("elastic") or {}, "groups", int, 0)


def _refuse_many_sizes(config: ModelConfig) -> None:
    """transformers builds all layers of our families from the sizes of one config.

    Its configs can hold sizes of single layers (`per_layer_config`), which these models do not read.
    """
    if not config.heterogeneous:
        return
    layers: dict[tuple[int, int, int], list[int]] = {}
    for i in range(config.n_layers):
        layers.setdefault(config.sizes(i), []).append(i)
    found = "; ".join(
        f"layers {', '.join(map(str, which))}: d_mlp={mlp}, n_heads={heads}, n_kv_heads={kv_heads}"
        for (mlp, heads, kv_heads), which in layers.items()
    )
    raise ValueError(
        f"layers differ in size ({found}), and transformers gives every layer of a {config.family} model the "
        "same: export a uniform subnet, or what slicing.mask_params gives (the whole model's sizes, zeros "
        "for what is cut), or save an elastic checkpoint"
    )


def _check_expressible(config: Config, hf: Mapping[str, Any]) -> None:
    """Reads `hf` back and refuses when something was lost on the way."""
    pooling = getattr(config, "pooling", "first")
    fix = "this family's models in transformers do not read the mean state; save an elastic checkpoint"
    require(pooling == "first" or "classifier_pooling" in hf, "pooling", pooling, fix)
    family, again = find_family(config.family), config_from_hf(hf)
    if not isinstance(config, ModelConfig):
        again = family.complete(again, tensor_names(config))
    ours, back = _comparable(config), _comparable(again)
    lost = [f"{key}={ours[key]!r} (would become {back[key]!r})" for key in ours if ours[key] != back[key]]
    if lost:
        raise ValueError(
            f"family={config.family!r} cannot express {', '.join(lost)}; set config.family to one of the "
            "families that can, or change the model"
        )


def _comparable(config: Config) -> dict[str, Any]:
    """Fields that decide what the model computes, in a form with one spelling for each meaning."""
    values = to_dict(config)
    del values["dtype"]
    if not isinstance(config, ModelConfig):
        return values
    values["windows"] = [config.window(i) for i in range(config.n_layers)]
    values["attn_scale"] = config.query_scale
    ropes = [_comparable_rope(config, layer) for layer in range(config.n_layers)]
    values["rope"] = ropes[0] if config.layers_rotate_alike else ropes
    del values["local_rope"], values["rotated"]
    return values


def _comparable_rope(config: ModelConfig, layer: int) -> dict[str, Any] | None:
    rope = config.rope_of(layer)
    if rope is None:
        return None
    entries = rope_to_hf(rope, config.max_len, fraction_key="partial_rotary_factor")
    grows_from = rope.original_max_len if config.query_growth else 0
    return entries | {"interleaved": rope.interleaved, "grows_from": grows_from}
