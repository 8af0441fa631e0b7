"""Named sub-networks of a model: what each keeps, and what was measured of it.

A table is about a model of given sizes. What was measured is about its weights, too: a table that comes to
lie beside other weights keeps its names and loses its numbers (`SubnetTable.of_weights`).

Names that the package gives say what a sub-network keeps: `d12-w50-h67` has 12 layers, half of the MLP
neurons and two thirds of the query heads of the whole model; `g` stands for key/value groups and `c` for
channels. What is whole is left out, and `whole` is the model itself.
"""

import dataclasses
import difflib
import re
from collections.abc import Iterator, Mapping, Sequence

from elastic_lm.config.checks import require, require_types
from elastic_lm.config.model import ModelConfig
from elastic_lm.config.subnet import Subnet

FORMAT = "elastic_lm subnets 1"
WHOLE = "whole"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
NAME_FIX = "must begin with a letter or digit and hold up to 64 letters, digits, dots, dashes and underscores"


@dataclasses.dataclass(frozen=True)
class MeasuredLoss:
    """Loss of a sub-network on held-out text."""

    nats_per_token: float  # mean cross-entropy
    tokens: int  # that were counted
    text: str  # which text, without the folders of a machine
    date: str = ""  # ISO 8601

    def __post_init__(self) -> None:
        require_types(self, "loss.")


@dataclasses.dataclass(frozen=True)
class MeasuredTime:
    """Time that a sub-network takes to write a token."""

    ms_per_token: float  # of each text of the batch, the prompt's share included
    speedup: float  # the whole model's time over its own, in the same rounds
    device: str
    batch: int = 1  # texts that are written together
    prompt: int = 16  # tokens of each prompt
    new_tokens: int = 64  # that were written after it
    date: str = ""  # ISO 8601

    def __post_init__(self) -> None:
        require_types(self, "time.")


@dataclasses.dataclass(frozen=True)
class NamedSubnet:
    """A sub-network with its name.

    Example:
      ```python
      import elastic_lm as el

      config = el.testing.tiny_config()
      half = el.width.NamedSubnet("half", el.Subnet.uniform(config, mlp=0.5), parameters=1000)
      assert half.loss is None  # it was not measured
      ```
    """

    name: str
    subnet: Subnet
    parameters: int  # numbers that are stored, without exits
    loss: MeasuredLoss | None = None  # None = not measured
    time: MeasuredTime | None = None  # None = not measured
    origin: str = ""  # where it comes from, if not from this package

    def __post_init__(self) -> None:
        require_types(self, "subnets.")
        require(bool(NAME.fullmatch(self.name)), "subnets.name", self.name, NAME_FIX)


@dataclasses.dataclass(frozen=True)
class ModelSizes:
    """The sizes of a model that sub-networks are cut from."""

    d_model: int
    elastic_groups: int  # storage groups of its neurons
    layers: tuple[tuple[int, ...], ...]  # MLP neurons, query heads and key/value groups of every layer

    @classmethod
    def of(cls, config: ModelConfig) -> "ModelSizes":
        """The sizes of a model."""
        sizes = tuple(tuple(config.sizes(i)) for i in range(config.n_layers))
        return cls(config.d_model, config.elastic_groups, sizes)


@dataclasses.dataclass(frozen=True)
class SubnetTable(Mapping[str, NamedSubnet]):
    """The named sub-networks of a model, by their names.

    Raises:
      ValueError: a name stands twice.

    Example:
      ```python
      import elastic_lm as el

      config = el.testing.tiny_config()
      table = el.width.default_subnets(config, el.Menu(mlp=(0.5, 1.0), heads=(1.0,)))
      assert list(table) == ["w50", "whole"]
      assert table["w50"].subnet == el.Subnet.uniform(config, mlp=0.5)
      ```
    """

    sizes: ModelSizes  # of the model that they are parts of
    subnets: tuple[NamedSubnet, ...] = ()
    weights: str = ""  # fingerprint of the weights that were measured; "" = nothing was

    def __post_init__(self) -> None:
        names = [one.name for one in self.subnets]
        twice = sorted({name for name in names if names.count(name) > 1})
        require(not twice, "subnets.name", ", ".join(twice), "stands twice; rename one")

    def __iter__(self) -> Iterator[str]:
        return (one.name for one in self.subnets)

    def __len__(self) -> int:
        return len(self.subnets)

    def __getitem__(self, name: str) -> NamedSubnet:
        for one in self.subnets:
            if one.name == name:
                return one
        raise KeyError(name)

    def find(self, name: str) -> NamedSubnet:
        """The sub-network of a name.

        Raises:
          ValueError: there is none; says which names are near, or which there are.
        """
        if name in self:
            return self[name]
        near = difflib.get_close_matches(name, self, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(self) or 'none'}"
        raise ValueError(f"subnet={name!r}: the model has no sub-network of this name; {hint}")

    def check(self, config: ModelConfig) -> None:
        """Checks that this is a table of a model, and that all of its sub-networks are parts of it.

        Raises:
          ValueError: names what does not fit.
        """
        found, wanted = dataclasses.asdict(self.sizes), dataclasses.asdict(ModelSizes.of(config))
        for field, value in wanted.items():
            require(found[field] == value, f"subnets.sizes.{field}", found[field], f"the model has {value}")
        for one in self.subnets:
            try:
                one.subnet.check(config)
            except ValueError as error:
                raise ValueError(f"subnets: {one.name}: {error}") from error

    def fits(self, config: ModelConfig) -> bool:
        """Whether this is a table of a model of these sizes."""
        return self.sizes == ModelSizes.of(config)

    def of_weights(self, weights: str) -> "SubnetTable":
        """The table of a model of the same sizes: without what was measured, where its weights are others.

        Args:
          weights: fingerprint of the model's weights (`subnet_weights`).
        """
        if weights == self.weights:
            return self
        unmeasured = tuple(dataclasses.replace(one, loss=None, time=None) for one in self.subnets)
        return dataclasses.replace(self, subnets=unmeasured, weights=weights)

    def adding(self, subnets: Sequence[NamedSubnet]) -> "SubnetTable":
        """The table with further sub-networks at its end; equal ones of equal names stay as they are.

        Raises:
          ValueError: a name is taken by another sub-network.
        """
        new = []
        for one in subnets:
            same = one.name in self and self[one.name].subnet == one.subnet
            fix = "is the name of another sub-network; choose another, or remove that one first"
            require(same or one.name not in self, "subnets.name", one.name, fix)
            new += [] if same else [one]
        return dataclasses.replace(self, subnets=(*self.subnets, *new))

    def without(self, name: str) -> "SubnetTable":
        """The table without a name.

        Raises:
          ValueError: there is none.
        """
        gone = self.find(name)
        return dataclasses.replace(self, subnets=tuple(one for one in self.subnets if one is not gone))

    def replacing(self, subnets: Sequence[NamedSubnet]) -> "SubnetTable":
        """The table with these entries in place of those of their names."""
        by_name = {one.name: one for one in subnets}
        return dataclasses.replace(self, subnets=tuple(by_name.get(one.name, one) for one in self.subnets))


def name_of(config: ModelConfig, subnet: Subnet) -> str:
    """A name that says what a sub-network keeps.

    Args:
      config: the whole model.
      subnet: of it.

    Returns:
      Such as `d12-w50-h67`, see above; sub-networks that keep equal amounts in other places have one name.
    """
    full = Subnet.full(config)
    parts = [f"d{len(subnet.layers)}"] if len(subnet.layers) < config.n_layers else []
    kept = [(full.mlp[i], full.heads[i], full.groups[i]) for i in subnet.layers]
    shares = {
        "w": sum(subnet.mlp) / sum(mlp for mlp, _, _ in kept),
        "h": sum(subnet.heads) / sum(heads for _, heads, _ in kept),
        "g": sum(subnet.groups) / sum(groups for _, _, groups in kept),
        "c": subnet.d_model / config.d_model,
    }
    parts += [f"{letter}{100 * share:.3g}" for letter, share in shares.items() if share < 1]
    return "-".join(parts) or WHOLE
