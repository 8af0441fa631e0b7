"""What describes one family of Hugging Face checkpoints: two tables, tensors and config.json."""

import dataclasses
import math
from collections.abc import Callable, Collection, Mapping
from typing import Any

from elastic_lm.config.checks import require
from elastic_lm.config.model import Activation, ModelConfig
from elastic_lm.hf.layouts import SAME, Layout

REQUIRED = object()

# transformers' names of activations; the first name of each is the one we write.
ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_accurate": "gelu_tanh",
    "relu": "relu",
    "relu2": "relu2",
}


def typed(values: Mapping[str, Any], key: str, kind: type, default: Any) -> Any:
    """The value under `key`, or the default where there is none.

    Args:
      values: parsed config.json, or a mapping in it.
      key: where the value is.
      kind: its type; integers count as floats, booleans only as themselves.
      default: taken, of any type, where the key is missing or null.

    Returns:
      The value as it is; an integer for a float stays one.

    Raises:
      ValueError: it is not of type `kind`.
    """
    value = default if values.get(key) is None else values[key]
    right = value is default or type(value) is kind or (kind is float and type(value) is int)
    require(right, key, value, f"must be of type {kind.__name__}")
    return value


def number(values: Mapping[str, Any], key: str, default: float, *, above: float | None = None) -> float:
    """The number under `key`, or the default where there is none.

    Args:
      values: parsed config.json, or a mapping in it.
      key: where the number is.
      default: taken where the key is missing or null.
      above: the number must be larger; None = at least 0.

    Returns:
      The number as it is, int or float.

    Raises:
      ValueError: it is not a number, or too small.
    """
    value = default if values.get(key) is None else values[key]
    low = "of at least 0" if above is None else f"above {above:g}"
    right = type(value) in (int, float) and (value >= 0 if above is None else value > above)
    require(right and value < math.inf, key, value, f"must be a number {low}")
    return value


@dataclasses.dataclass(frozen=True)
class Tensor:
    """Where one parameter of ours lives in a checkpoint.

    Attributes:
      names: the checkpoint's tensors, relative to the part of the model (root, layer) that holds them.
      layout: how they become our parameter.
      alias: another name under which a single tensor may be stored.
    """

    names: tuple[str, ...]
    layout: Layout = SAME
    alias: str | None = None


@dataclasses.dataclass(frozen=True)
class Field:
    """One number or switch of config.json.

    Attributes:
      ours: field of the family's config.
      theirs: key of config.json.
      default: value where the key is missing; `REQUIRED` refuses that. `null` in the file means
        our own default.
      off: value of ours that is written as `null`.
    """

    ours: str
    theirs: str
    default: Any = REQUIRED
    off: Any = None


@dataclasses.dataclass(frozen=True)
class Family:
    """Everything that distinguishes one `model_type`.

    Attributes:
      model_type: as in config.json.
      architecture: transformers' class of the language model, where `write` does not say otherwise.
      prefix: in front of every tensor of the base model; checkpoints of the base model alone lack it.
      layer: prefix of a layer's tensors, with {} for its number counted from 0.
      root: parameters outside the layers, by path; names are complete.
      layers: parameters of one layer, by path; names come after `layer`.
      fields: the entries of config.json that map one to one.
      fixed: fields of the config that hold for the whole family.
      activation: (key of config.json, name where the key is missing).
      eos_default: token that ends a text where config.json does not say, or None.
      read: (config.json, fields of the config read so far) -> further fields.
      write: config -> further entries of config.json.
      refuse: (key, values it may have) for features without a counterpart here; missing is fine.
      ignored: keys that the family's models do not compute with, which nothing here reads, with the values
        that they may have; None = any. Keys that hold for all families are in `hf.keys`.
      config_class: describes the family's models, and with that says which kind they are (`models.registry`).
      varying: config -> parameters outside the layers whose tensors depend on it, as in `root`.
      complete: (config, names of the folder's tensors, without `prefix`) -> the config with what only
        the tensors tell.
      copies: tensors that a checkpoint may hold beside the one they repeat, or in its place, by name:
        {copy: original}.
      inside: beginnings of further names that only tensors of the model have.
    """

    model_type: str
    architecture: str
    prefix: str
    layer: str
    root: Mapping[str, Tensor]
    layers: Mapping[str, Tensor]
    fields: tuple[Field, ...]
    fixed: Mapping[str, Any]
    activation: tuple[str, str]
    eos_default: int | None
    read: Callable[[Mapping[str, Any], Mapping[str, Any]], dict[str, Any]]
    write: Callable[[Any], dict[str, Any]]
    refuse: tuple[tuple[str, tuple[Any, ...]], ...] = ()
    ignored: Mapping[str, tuple[Any, ...] | None] = dataclasses.field(default_factory=dict)
    config_class: type = ModelConfig
    varying: Callable[[Any], Mapping[str, Tensor]] = lambda config: {}
    complete: Callable[[Any, Collection[str]], Any] = lambda config, names: config
    copies: Mapping[str, str] = dataclasses.field(default_factory=dict)
    inside: tuple[str, ...] = ()

    @property
    def head(self) -> Tensor | None:
        """The vocabulary head, which tied checkpoints may store instead of the embedding."""
        return self.root.get("head/kernel") if self.has("tied") else None

    def has(self, field: str) -> bool:
        """Whether the family's configs have this field."""
        return any(f.name == field for f in dataclasses.fields(self.config_class))
