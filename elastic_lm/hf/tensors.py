"""A family's table spelled out for one model: every parameter with its tensors' names and shapes.

Tensors of the backbone have the names that transformers gives them. Exits follow the same table, under
names of our own, in a file of their own (`elastic_exits.safetensors`):

    elastic.exits.<layer>.norm.weight, .norm.bias    the exit's normalisation
    elastic.exits.<layer>.mlp.*                      an `mlp` exit's MLP, named as in the family's layers
    elastic.exits.<layer>.block.*                    a `block` exit's layer, named as in the family's layers
    elastic.exits.<layer>.head.weight, .head.bias    [V, D] vocabulary head of an untied exit, and its bias
    elastic.exits.<layer>.gate.up.*, .gate.down.*    weight and bias of the two projections of a gate
    elastic.exits.<layer>.pooler.*, .head.*          of an encoder's exit: weight, bias, the pooler's norm

where <layer> counts the layers below the exit (`ExitConfig.layer`).
"""

import dataclasses
import re
from typing import Any

import flax.linen as nn
import jax

from elastic_lm.hf.family import Family, Tensor
from elastic_lm.hf.layouts import Layout, Shape
from elastic_lm.hf.registry import find_family
from elastic_lm.models.decoder import LAYER
from elastic_lm.models.registry import Config, abstract_params

EXIT = re.compile(r"exit_(\d+)")
EXIT_PREFIX = "elastic.exits.{}."
EXITS_FILE = "elastic_exits.safetensors"

EXIT_TENSORS = {
    "norm/scale": Tensor(("norm.weight",)),
    "norm/bias": Tensor(("norm.bias",)),
    "head/kernel": Tensor(("head.weight",)),
    "head/bias": Tensor(("head.bias",)),
    "pooler/kernel": Tensor(("pooler.weight",)),
    "pooler/bias": Tensor(("pooler.bias",)),
    "pooler/norm/scale": Tensor(("pooler.norm.weight",)),
    "pooler/norm/bias": Tensor(("pooler.norm.bias",)),
    "map/kernel": Tensor(("map.weight",)),
    "map/bias": Tensor(("map.bias",)),
    "gate/up/kernel": Tensor(("gate.up.weight",)),
    "gate/up/bias": Tensor(("gate.up.bias",)),
    "gate/down/kernel": Tensor(("gate.down.weight",)),
    "gate/down/bias": Tensor(("gate.down.bias",)),
}


@dataclasses.dataclass(frozen=True)
class Binding:
    """One parameter of a model and the tensors that hold it.

    Attributes:
      path: keys into the parameter tree.
      shape: of the parameter.
      names: full names of the tensors.
      shapes: of the tensors.
      layout: how they become the parameter.
      alias: another name for a single tensor, or None.
    """

    path: tuple[str, ...]
    shape: Shape
    names: tuple[str, ...]
    shapes: tuple[Shape, ...]
    layout: Layout
    alias: str | None

    @property
    def is_exit(self) -> bool:
        """Whether the parameter belongs to an exit."""
        return EXIT.fullmatch(self.path[0]) is not None


def bindings(config: Config) -> list[Binding]:
    """Every parameter of the model in the order of its tree.

    Args:
      config: the model, with `family` (and `exits`); static.

    Raises:
      ValueError: the family has no tensor for a parameter.
    """
    family = find_family(config.family)
    family = dataclasses.replace(
        family,
        root={**family.root, **family.varying(config)},
        layers={**family.layers, **family.varying_layers(config)},
    )
    leaves, _ = jax.tree_util.tree_flatten_with_path(nn.unbox(abstract_params(config)))
    return [_bind(config, family, tuple(key.key for key in path), leaf) for path, leaf in leaves]


def tensor_names(config: Config) -> set[str]:
    """Names of all tensors that hold the model, without the prefix of the base model.

    Args:
      config: as in `bindings`.
    """
    prefix = find_family(config.family).prefix
    return {name.removeprefix(prefix) for binding in bindings(config) for name in binding.names}


def _bind(config: Config, family: Family, path: tuple[str, ...], leaf: Any) -> Binding:
    prefix, tensor = _lookup(family, path)
    if tensor is None:
        raise ValueError(
            f"parameter {'/'.join(path)} {leaf.shape} has no tensor in family={family.model_type!r}; "
            "set config.family to one whose models have it"
        )
    names = tuple(prefix + name for name in tensor.names)
    shapes = tuple(tensor.layout.shapes(config, leaf.shape))
    alias = tensor.alias and prefix + tensor.alias
    return Binding(path, leaf.shape, names, shapes, tensor.layout, alias)


def _lookup(family: Family, path: tuple[str, ...]) -> tuple[str, Tensor | None]:
    """Prefix of the names and the table's entry for the parameter at `path`."""
    if layer := LAYER.fullmatch(path[0]):
        return family.layer.format(layer[1]), family.layers.get("/".join(path[1:]))
    if not (exit_ := EXIT.fullmatch(path[0])):
        return "", family.root.get("/".join(path))
    prefix = EXIT_PREFIX.format(exit_[1])
    if path[1] == "block":
        return prefix + "block.", family.layers.get("/".join(path[2:]))
    table = family.layers if path[1] == "mlp" else EXIT_TENSORS
    return prefix, table.get("/".join(path[1:]))
