"""Widths and depths of an elastic model: sub-networks, the menu they are chosen from, and budgets.

    subnet   a static choice of layers, MLP widths, heads and model width: `Subnet`
    menu     the choices that a model was made elastic for: `Menu`
    nested   a smaller choice is a prefix of a larger one, after ranking by importance (`width.importance`)
    budget   what a user asks for: latency, parameters, FLOPs or memory: `Budget`

Ranked neurons are dealt out to G = `ModelConfig.elastic_groups` storage groups: the one of rank r lies in
group r mod G at position r div G. A width k, a multiple of G, is then the prefix k / G of every group, and
where tensor parallelism splits the groups every device keeps its own part. Heads are chosen inside every
key/value group, which tensor parallelism does not split. Key/value groups are stored in order of rank.

Everything here is plain Python: subnets are static arguments of jitted functions.
"""

import dataclasses
import functools
import math
import numbers
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from elastic_lm.config.checks import require, require_shares, require_type, require_types
from elastic_lm.config.model import ExitConfig, ModelConfig

if TYPE_CHECKING:
    import numpy as np

Ints = tuple[int, ...]


def whole(field: str, fraction: float, size: int, unit: int, of: str) -> int:
    """`fraction` of `size`, a multiple of `unit`.

    Raises:
      ValueError: the fraction does not give such a number; names `field` and the nearest fractions that do.
    """
    right = isinstance(fraction, numbers.Real) and math.isfinite(fraction)
    require(right, field, fraction, "must be a share in (0, 1]")
    exact = fraction * size
    if 0 < fraction <= 1 and math.isclose(exact, round(exact), rel_tol=1e-5) and round(exact) % unit == 0:
        return round(exact)
    low, steps = int(max(exact, 0) // unit), size // unit
    near = sorted({min(max(n, 1), steps) * unit for n in (low, low + 1)} if steps else {size})
    number = f"a whole number of the {size}" if unit == 1 else f"a multiple of {unit} of {size}"
    nearest = ", ".join(f"{n / size:.6g} ({n})" for n in near)
    raise ValueError(f"{field}={fraction!r}: must give {number} {of}; nearest: {nearest}")


@dataclasses.dataclass(frozen=True)
class Subnet:
    """A sub-network of an elastic model; frozen, hashable and static under jit.

    Example:
      ```python
      import elastic_lm as el

      config = el.testing.tiny_config()
      subnet = el.Subnet.uniform(config, mlp=0.5, depth=0.75)
      small = subnet.sliced(config)
      assert (small.n_layers, small.d_mlp) == (3, 32)
      ```
    """

    layers: Ints  # kept layers in increasing order, counted from 0
    mlp: Ints  # MLP neurons of every kept layer
    heads: Ints  # query heads in every key/value group, of every kept layer
    groups: Ints  # key/value groups of every kept layer
    d_model: int  # width of the residual stream

    def __post_init__(self) -> None:
        # Searches make many sub-networks, so that the sizes themselves are not looked at one by one.
        for field in ("layers", "mlp", "heads", "groups"):
            value = getattr(self, field)
            right = isinstance(value, tuple) and isinstance(value[0] if value else 0, numbers.Integral)
            require(right, f"subnet.{field}", value, "must be a tuple of whole numbers, one per kept layer")
        require_type("subnet.d_model", self.d_model, int)

        layers = self.layers
        increasing = list(layers) == sorted(set(layers)) and bool(layers) and layers[0] >= 0
        require(increasing, "subnet.layers", layers, "must be distinct layers from 0, in increasing order")
        for field in ("mlp", "heads", "groups"):
            sizes = getattr(self, field)
            require(
                len(sizes) == len(layers) and min(sizes) >= 1,
                f"subnet.{field}",
                sizes,
                f"needs one size of at least 1 for each of the {len(layers)} kept layers",
            )
        require(self.d_model >= 1, "subnet.d_model", self.d_model, "must be at least 1")

    @classmethod
    def full(cls, config: ModelConfig) -> "Subnet":
        """The whole model."""
        return cls.uniform(config)

    @classmethod
    def uniform(
        cls,
        config: ModelConfig,
        *,
        mlp: float = 1.0,
        heads: float = 1.0,
        groups: float = 1.0,
        d_model: float = 1.0,
        depth: float = 1.0,
        layers: Sequence[int] | None = None,
    ) -> "Subnet":
        """The same fractions in every layer.

        Args:
          config: the whole model.
          mlp: share of the MLP neurons.
          heads: share of the query heads inside every key/value group.
          groups: share of the key/value groups.
          d_model: share of the model's channels.
          depth: share of the layers, the lowest.
          layers: the layers to keep instead, counted from 0.

        Raises:
          ValueError: a share is outside (0, 1] or does not give whole neurons per storage group, heads,
            groups, channels or layers; names the nearest that do.
        """
        count = whole("depth", depth, config.n_layers, 1, "layers")
        require(layers is None or depth == 1.0, "depth", depth, "leave it at 1 where layers are named")
        kept = tuple(range(count) if layers is None else layers)
        _check_layers(config, kept)
        unit = max(config.elastic_groups, 1)
        sizes = [config.sizes(i) for i in kept]
        return cls(
            kept,
            tuple(whole("mlp", mlp, f, unit, "neurons") for f, _, _ in sizes),
            tuple(whole("heads", heads, n // k, 1, "heads per group") for _, n, k in sizes),
            tuple(whole("groups", groups, k, 1, "key/value groups") for _, _, k in sizes),
            config.d_model if d_model == 1.0 else whole("d_model", d_model, config.d_model, unit, "channels"),
        )

    def check(self, config: ModelConfig) -> None:
        """Checks that this is a sub-network of a model.

        Args:
          config: the whole model.

        Raises:
          ValueError: names what does not fit.
        """
        _check_layers(config, self.layers)
        unit = config.elastic_groups
        dealt = self.d_model == config.d_model or not unit or config.d_model % unit == 0
        require(
            dealt,
            "subnet.d_model",
            self.d_model,
            f"d_model={config.d_model} of the model is no multiple of elastic_groups={unit}; keep it whole",
        )
        for j, i in enumerate(self.layers):
            mlp, heads, groups = config.sizes(i)
            if config.qk_norm_whole:
                _require_all_heads(f"subnet.heads[{j}]", self.heads[j], heads // groups)
                _require_all_heads(f"subnet.groups[{j}]", self.groups[j], groups)
            _check_size(f"subnet.mlp[{j}]", self.mlp[j], mlp, unit, f"MLP neurons of layer {i}")
            _check_size(
                f"subnet.heads[{j}]", self.heads[j], heads // groups, 0, f"heads per group of layer {i}"
            )
            _check_size(f"subnet.groups[{j}]", self.groups[j], groups, 0, f"key/value groups of layer {i}")
            _check_slopes(config, f"subnet.heads[{j}]", self.heads[j], self.heads[j] == heads // groups)
            _check_slopes(config, f"subnet.groups[{j}]", self.groups[j], self.groups[j] == groups)
        _check_size("subnet.d_model", self.d_model, config.d_model, unit, "channels of the model")

    def sliced(self, config: ModelConfig) -> ModelConfig:
        """The smaller model that this subnet of `config` is; its exits are those whose layer is kept."""
        sizes = [(f, a * k, k) for f, a, k in zip(self.mlp, self.heads, self.groups, strict=True)]
        exits = tuple(new for _, new in self.exits(config))
        width = config.norm_width if self.d_model > config.norm_width else 0
        cut = dataclasses.replace(config.with_layers(self.layers, sizes, exits), norm_width=width)
        return dataclasses.replace(cut, d_model=self.d_model)

    def exits(self, config: ModelConfig) -> list[tuple[ExitConfig, ExitConfig]]:
        """Exits of `config` whose layer is kept, before and after slicing."""
        depth = {i + 1: j + 1 for j, i in enumerate(self.layers)}
        kept = [e for e in config.exits if e.layer in depth]
        return [(e, dataclasses.replace(e, layer=depth[e.layer])) for e in kept]

    def compose(self, inner: "Subnet") -> "Subnet":
        """A sub-network of the model that this subnet leaves, expressed on the whole model.

        Args:
          inner: subnet of the sliced model.

        Returns:
          The subnet that gives in one slice what slicing to `self` and then to `inner` gives.

        Raises:
          ValueError: `inner` names layers that this subnet does not keep, or is wider than it.
        """
        require(
            inner.layers[-1] < len(self.layers),
            "subnet.layers",
            inner.layers,
            f"the sliced model has {len(self.layers)} layers",
        )
        for field in ("mlp", "heads", "groups"):
            sizes, there = getattr(inner, field), [getattr(self, field)[i] for i in inner.layers]
            fits = all(size <= most for size, most in zip(sizes, there, strict=True))
            require(fits, f"subnet.{field}", sizes, f"the sliced model has {tuple(there)}")
        require(inner.d_model <= self.d_model, "subnet.d_model", inner.d_model, f"there are {self.d_model}")
        return dataclasses.replace(inner, layers=tuple(self.layers[i] for i in inner.layers))


def _check_layers(config: ModelConfig, layers: Ints) -> None:
    inside = all(0 <= i < config.n_layers for i in layers)
    require(
        bool(layers) and inside,
        "subnet.layers",
        layers,
        f"the model has {config.n_layers} layers, counted from 0",
    )


def _require_all_heads(field: str, found: float, whole: float) -> None:
    """Refuses to cut heads that are normalised together: the others would be other ones without them."""
    fix = (
        f"qk_norm_whole=True normalises all heads of a layer at once; keep {whole}, and cut neurons or layers"
    )
    require(found == whole, field, found, fix)


def _check_size(field: str, size: int, full: int, unit: int, of: str) -> None:
    require(size <= full, field, size, f"there are {full} {of}")
    fits = size == full or not unit or size % unit == 0
    require(fits, field, size, f"must be a multiple of elastic_groups={unit} of the {full} {of}")


def _check_slopes(config: ModelConfig, field: str, value: object, whole: bool) -> None:
    """Refuses to cut heads whose slopes follow from their number and from how many there are."""
    fix = "heads of a model with position='alibi' have slopes of their own and are not cut; keep all of them"
    require(whole or config.position != "alibi", field, value, fix)


@dataclasses.dataclass(frozen=True)
class Sizes:
    """A menu in numbers; entry i of a per-layer field holds the choices of layer i, in increasing order."""

    mlp: tuple[Ints, ...]  # MLP neurons
    heads: tuple[Ints, ...]  # query heads in every key/value group
    groups: tuple[Ints, ...]  # key/value groups
    d_model: Ints  # width of the residual stream


@dataclasses.dataclass(frozen=True)
class Menu:
    """The choices that a model is made elastic for: fractions in increasing order, the last one 1.

    Example:
      ```python
      import elastic_lm as el

      menu = el.Menu(mlp=(0.5, 1.0), heads=(0.5, 1.0), dropped=(2,))
      smallest = menu.smallest(el.testing.tiny_config())
      assert (smallest.layers, smallest.mlp, smallest.heads) == ((0, 1, 3), (32, 32, 32), (1, 1, 1))
      ```
    """

    mlp: tuple[float, ...] = (0.25, 0.5, 0.75, 1.0)  # of the MLP neurons, per layer
    heads: tuple[float, ...] = (0.5, 1.0)  # of the query heads in every key/value group, per layer
    groups: tuple[float, ...] = (1.0,)  # of the key/value groups, per layer
    d_model: tuple[float, ...] = (1.0,)  # of the model's channels
    dropped: Ints = ()  # layers, counted from 0, that may be left out: the first n of them for n = 0, 1, ...

    def __post_init__(self) -> None:
        require_types(self, "menu.")
        for field in ("mlp", "heads", "groups", "d_model"):
            require_shares(f"menu.{field}", getattr(self, field))
        distinct = len(set(self.dropped)) == len(self.dropped)
        require(distinct, "menu.dropped", self.dropped, "names a layer twice; name each once")

    @functools.lru_cache(maxsize=64)  # noqa: B019 (menus and configs are small; searches ask many times)
    def sizes(self, config: ModelConfig) -> Sizes:
        """The choices in neurons, heads, groups and channels.

        Args:
          config: the whole model.

        Raises:
          ValueError: a choice does not give whole neurons per storage group, heads, groups or channels
            (names it and the nearest that do), or all layers may be dropped.
        """
        self._check_dropped(config)
        if config.qk_norm_whole:
            for field in ("heads", "groups"):
                _require_all_heads(f"menu.{field}", min(getattr(self, field)), 1.0)
        for field in ("heads", "groups"):
            shares = getattr(self, field)
            _check_slopes(config, f"menu.{field}", shares, shares == (1.0,))
        unit = max(config.elastic_groups, 1)
        sizes = [config.sizes(i) for i in range(config.n_layers)]

        def choices(field: str, size: int, unit: int, of: str) -> Ints:
            shares = getattr(self, field)
            return (*(whole(f"menu.{field}", s, size, unit, of) for s in shares[:-1]), size)

        return Sizes(
            tuple(choices("mlp", f, unit, "neurons") for f, _, _ in sizes),
            tuple(choices("heads", n // k, 1, "heads per group") for _, n, k in sizes),
            tuple(choices("groups", k, 1, "key/value groups") for _, _, k in sizes),
            choices("d_model", config.d_model, unit, "channels"),
        )

    def _check_dropped(self, config: ModelConfig) -> None:
        inside = all(0 <= i < config.n_layers for i in self.dropped)
        require(
            inside and len(self.dropped) < config.n_layers,
            "menu.dropped",
            self.dropped,
            f"the model has {config.n_layers} layers, counted from 0, one of which must stay",
        )

    def smallest(self, config: ModelConfig) -> Subnet:
        """The subnet of the smallest choice everywhere."""
        return self._pick(config, lambda field: 0, len(self.dropped))

    def largest(self, config: ModelConfig) -> Subnet:
        """The whole model."""
        return self._pick(config, lambda field: -1, 0)

    def sample(self, config: ModelConfig, rng: "np.random.Generator", *, uniform: bool = False) -> Subnet:
        """A random subnet, every choice equally likely.

        Args:
          config: the whole model.
          rng: draws the choices.
          uniform: all layers take the same choice, instead of each its own.
        """

        def draw(field: str) -> int:
            return int(rng.integers(len(getattr(self, field))))

        same = {field: draw(field) for field in ("mlp", "heads", "groups", "d_model")}
        dropped = int(rng.integers(len(self.dropped) + 1))
        return self._pick(config, same.__getitem__ if uniform else draw, dropped)

    def _pick(self, config: ModelConfig, choose: Callable[[str], int], dropped: int) -> Subnet:
        """The subnet of the choices whose index `choose` gives for the name of a field."""
        sizes = self.sizes(config)
        kept = tuple(i for i in range(config.n_layers) if i not in self.dropped[:dropped])
        return Subnet(
            kept,
            tuple(sizes.mlp[i][choose("mlp")] for i in kept),
            tuple(sizes.heads[i][choose("heads")] for i in kept),
            tuple(sizes.groups[i][choose("groups")] for i in kept),
            sizes.d_model[choose("d_model")],
        )

    def indices(self, config: ModelConfig, subnet: Subnet) -> tuple[Ints, Ints, Ints, tuple[bool, ...]]:
        """What `width.switched` switches on to compute a subnet: all layers' indices into the choices.

        Args:
          config: the whole model.
          subnet: chosen from this menu, with all channels.

        Returns:
          (index into the MLP choices, the head choices, the group choices, whether the layer is kept), one
          entry per layer of the whole model; 0 where the layer is not kept.

        Raises:
          ValueError: a size is not on the menu, or channels are left out.
        """
        subnet.check(config)
        require(
            subnet.d_model == config.d_model,
            "subnet.d_model",
            subnet.d_model,
            "channels are not switched; slice them out with slice_params",
        )
        chosen = dict(zip(subnet.layers, zip(*self.positions(config, subnet), strict=True), strict=True))
        each = [chosen.get(i, (0, 0, 0)) for i in range(config.n_layers)]
        mlp, heads, groups = zip(*each, strict=True)
        return mlp, heads, groups, tuple(i in chosen for i in range(config.n_layers))

    def positions(self, config: ModelConfig, subnet: Subnet) -> tuple[Ints, Ints, Ints]:
        """Where on the menu a subnet's sizes are.

        Args:
          config: the whole model.
          subnet: chosen from this menu.

        Returns:
          (index into the MLP choices, the head choices, the group choices), one entry per kept layer.

        Raises:
          ValueError: a size is not on the menu.
        """
        sizes = self.sizes(config)

        def find(field: str) -> Ints:
            chosen, choices = getattr(subnet, field), getattr(sizes, field)
            kept = enumerate(subnet.layers)
            return tuple(_index(f"subnet.{field}[{j}]", chosen[j], choices[i]) for j, i in kept)

        return find("mlp"), find("heads"), find("groups")


def _index(field: str, size: int, choices: Ints) -> int:
    require(size in choices, field, size, f"is not on the menu: choose from {choices}")
    return choices.index(size)


BUDGET_KINDS = ("latency_ms", "parameters", "flops", "memory_bytes")  # what can be spent


@dataclasses.dataclass(frozen=True)
class Budget:
    """What may be spent, to an amount or to a share like "70%", and how good it must be.

    At most one of the costs is set, and exactly one where `quality` is not. A share is one of what the whole
    model costs in the same unit. `SubnetChooser` chooses by a cost alone; `el.choose` reads `quality` too.

    Example:
      ```python
      import elastic_lm as el

      budget = el.Budget(parameters=1e6)
      assert (budget.kind, budget.amount) == ("parameters", 1e6)
      assert el.Budget(parameters="70%").of(2e6) == el.Budget(parameters=1.4e6)
      assert el.Budget(latency_ms=5, quality=0.99).agreement == 0.99
      assert el.Budget(quality="+0.05").added_loss == 0.05  # nats per token
      ```
    """

    latency_ms: float | str | None = None  # milliseconds, of what the latency table measured
    parameters: float | str | None = None  # stored numbers
    flops: float | str | None = None  # floating point operations
    memory_bytes: float | str | None = None  # bytes of parameters and caches
    # Share of tokens that are the whole model's, or like "+0.05": nats per token that the loss may be above
    # the whole model's.
    quality: float | str | None = None

    def __post_init__(self) -> None:
        self._check_quality()
        given = {name: v for name in BUDGET_KINDS if (v := getattr(self, name)) is not None}
        if self.quality is not None and not given:
            return
        for name, value in given.items():
            if not isinstance(value, str):
                require_type(f"budget.{name}", value, float)
        require(len(given) == 1, "budget", given, f"set exactly one of {', '.join(BUDGET_KINDS)}")

        field, value = f"budget.{self.kind}", self.given
        if isinstance(value, str):
            right = 0 < (self.share or 0) <= 1
            require(right, field, value, "must be a number, or a share of the whole model like '70%'")
        else:
            require(0 < value < math.inf, field, value, "must be positive and finite")

    def _check_quality(self) -> None:
        """A share in (0, 1], or a loss like "+0.05"."""
        value = self.quality
        fix = "must be a share of equal tokens in (0, 1] like 0.99, or an added loss in nats like '+0.05'"
        if isinstance(value, str):
            added = self.added_loss
            require(added is not None and 0 <= added < math.inf, "budget.quality", value, fix)
        elif value is not None:
            require_type("budget.quality", value, float)
            require(0 < value <= 1, "budget.quality", value, fix)

    @property
    def agreement(self) -> float | None:
        """The share of tokens that must be the whole model's; None = none is asked for."""
        return None if self.quality is None or isinstance(self.quality, str) else float(self.quality)

    @property
    def added_loss(self) -> float | None:
        """Nats per token that the loss may be above the whole model's; None = not asked for."""
        if not isinstance(self.quality, str):
            return None
        sign, number = self.quality[:1], self.quality[1:]
        try:
            return float(number) if sign == "+" else math.nan
        except ValueError:
            return math.nan

    @property
    def kind(self) -> str:
        """Name of the cost that is set; "quality" where none is."""
        return next((name for name in BUDGET_KINDS if getattr(self, name) is not None), "quality")

    @property
    def given(self) -> float | str:
        """The value of `kind` as it was given: an amount, or a share like "70%"."""
        value = getattr(self, self.kind)
        return value if isinstance(value, str) else float(value)

    @property
    def share(self) -> float | None:
        """The share of the whole model's cost, e.g. 0.7 for "70%"; None = an amount was given."""
        if not isinstance(self.given, str):
            return None
        number, sign, rest = self.given.strip().partition("%")
        try:
            return float(number) / 100 if sign and not rest else math.nan
        except ValueError:
            return math.nan

    @property
    def amount(self) -> float:
        """The amount, in the unit of `kind`.

        Raises:
          ValueError: it is a share, and what the whole model costs is not known here; see `of`.
        """
        given, fix = self.given, "is a share; budget.of(what the whole model costs) is the amount"
        require(not isinstance(given, str), f"budget.{self.kind}", given, fix)
        return float(given)

    def of(self, whole: float) -> "Budget":
        """The same budget as an amount.

        Args:
          whole: what the whole model costs, in the unit of `kind`.
        """
        if self.kind == "quality" or self.share is None:
            return self
        return dataclasses.replace(self, **{self.kind: self.share * whole})
