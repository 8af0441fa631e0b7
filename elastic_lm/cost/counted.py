"""What a model costs, counted: parameters, FLOPs, bytes read and bytes held.

A layer of N query heads in K groups of width H, F neurons and D channels has

    attention   D H (N + 2 K) + N H D           weights, and biases and norms where the family has them
    MLP         3 D F gated, 2 D F plain
    per token   2 FLOPs per weight, and 4 N H FLOPs per key that is seen
    cache       2 K H numbers per position

A sub-network costs what its slice costs (`Subnet.sliced`). Over a menu, costs are sums of one number per
module and choice, a `CostTable`. Latency that was measured on a device is a table of the same form
(`cost.latency_table`).
"""

import dataclasses
import functools
import itertools

from elastic_lm.config.checks import NOT_NEGATIVE, require, require_each, require_types
from elastic_lm.config.model import ExitConfig, ModelConfig
from elastic_lm.config.subnet import Budget, Menu, Subnet

COUNTED = ("parameters", "flops", "memory_bytes")  # kinds of cost that follow from a config
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclasses.dataclass(frozen=True)
class Workload:
    """How a model is used: the batch and context at which costs are counted or measured.

    Raises:
      ValueError: a number is out of its range.

    Example:
      ```python
      import elastic_lm as el
      from elastic_lm.testing import tiny_config

      workload = el.width.Workload(batch=8, context=100)
      table = el.width.counted_table(tiny_config(), el.Menu(mlp=(0.5, 1.0)), "flops", workload)
      ```
    """

    batch: int = 1  # sequences decoded together
    context: int = 0  # positions before the token that is decoded

    def __post_init__(self) -> None:
        require_types(self, "workload.")
        require(self.batch >= 1, "workload.batch", self.batch, "must be at least 1")
        require_each(self, "workload.", ("context",), *NOT_NEGATIVE)


@dataclasses.dataclass(frozen=True)
class Cost:
    """What one model, or a part of one, costs under a `Workload`; costs of parts add up."""

    parameters: int  # stored numbers
    flops: int  # of one decoding step of the whole batch; a multiplication and an addition are two
    read_bytes: int  # weights and caches that one decoding step of the whole batch reads
    memory_bytes: int  # weights, and caches that hold `context` positions of every sequence

    def __add__(self, other: "Cost") -> "Cost":
        pairs = zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)
        return Cost(*(a + b for a, b in pairs))


def model_cost(config: ModelConfig, workload: Workload = Workload()) -> Cost:
    """Cost of a model that is decoded at full depth; exits are held, but not run.

    Args:
      config: the model; layers may differ in size.
      workload: batch and context.

    Returns:
      Its cost; parameters and bytes are exactly those of its arrays.
    """
    layers = [_layer(config, i, workload) for i in range(config.n_layers)]
    return functools.reduce(Cost.__add__, layers, base_cost(config, workload))


def base_cost(config: ModelConfig, workload: Workload = Workload()) -> Cost:
    """Cost of what is not in the layers: tables, final norm, vocabulary head, and exits, which are held only.

    Args:
      config: the model.
      workload: batch and context.
    """
    c, d = config, config.d_model
    table = c.vocab_size * d
    looked_up = table + ((c.position_offset + c.max_len) * d if c.position == "learned" else 0)
    norm = _norm(c) * (2 if c.embed_norm else 1)
    head, bias = table, c.vocab_size if c.head_bias else 0
    exits = sum(_exit_parameters(c, e) for e in c.exits)
    held = looked_up + norm + (0 if c.tied else head + bias) + exits

    read = (2 if c.position == "learned" else 1) * workload.batch * d  # the rows of the newest tokens
    blocks = sum(_cache(c, c.sizes(e.layer - 1)[2]) for e in c.exits if e.kind == "block")
    size = BYTES[c.param_dtype]
    return Cost(
        parameters=held,
        flops=2 * head * workload.batch,
        read_bytes=(read + norm + head + bias) * size,
        memory_bytes=held * size + blocks * workload.batch * workload.context * BYTES[c.dtype],
    )


def attention_cost(
    config: ModelConfig, layer: int, heads: int, groups: int, workload: Workload = Workload()
) -> Cost:
    """Cost of one layer's attention with its norms.

    Args:
      config: the model; its channels, head width and dtypes are read.
      layer: counted from 0; decides about the sliding window.
      heads: query heads in every key/value group.
      groups: key/value groups.
      workload: batch and context.
    """
    c, d = config, config.d_model
    queries = heads * groups * c.head_dim
    projected = queries + 2 * groups * c.head_dim
    weights = d * projected + queries * d
    normed = heads * groups + groups if c.qk_norm_whole else 2  # heads whose scales the norms have
    small = (projected if c.qkv_bias else 0) + (d if c.out_bias else 0)
    held = weights + small + (normed * c.head_dim if c.qk_norm else 0) + _branch_norms(c)

    # A sliding window bounds what a step reads, not what the cache holds.
    window = c.window(layer)
    seen = min(workload.context + 1, window) if window else workload.context + 1  # with the token itself
    cache = _cache(c, groups)
    size, state = BYTES[c.param_dtype], BYTES[c.dtype]
    return Cost(
        parameters=held,
        flops=workload.batch * (2 * weights + 4 * queries * seen),
        read_bytes=held * size + workload.batch * cache * (seen - 1) * state,
        memory_bytes=held * size + workload.batch * cache * workload.context * state,
    )


def mlp_cost(config: ModelConfig, neurons: int, workload: Workload = Workload()) -> Cost:
    """Cost of one layer's MLP with its norms.

    Args:
      config: the model; its channels and dtypes are read.
      neurons: hidden width.
      workload: batch and context.
    """
    c, d = config, config.d_model
    ways = 2 if c.gated else 1
    weights = (ways + 1) * d * neurons
    norms = _branch_norms(c) - (_norm(c) if c.shared_norm else 0)
    held = weights + (ways * neurons + d if c.mlp_bias else 0) + norms
    size = BYTES[c.param_dtype]
    return Cost(
        parameters=held,
        flops=2 * weights * workload.batch,
        read_bytes=held * size,
        memory_bytes=held * size,
    )


def _layer(config: ModelConfig, layer: int, workload: Workload) -> Cost:
    """Cost of one whole layer."""
    mlp, heads, groups = config.sizes(layer)
    return attention_cost(config, layer, heads // groups, groups, workload) + mlp_cost(config, mlp, workload)


def _norm(config: ModelConfig) -> int:
    """Parameters of one norm: scales, and biases where it has them."""
    return config.d_model * (2 if config.norm == "layernorm" and config.norm_bias else 1)


def _branch_norms(config: ModelConfig) -> int:
    """Parameters of the norms around one attention or one MLP."""
    return _norm(config) * (config.pre_norm + config.sandwich_norm)


def _cache(config: ModelConfig, groups: int) -> int:
    """Numbers that one position of one layer's cache holds."""
    return 2 * groups * config.head_dim


def _exit_parameters(config: ModelConfig, e: ExitConfig) -> int:
    """Parameters of one exit: body, gate and vocabulary head."""
    c, i = config, e.layer - 1
    body = 0 if e.kind in ("embedding", "linear") else _norm(c)
    if e.kind == "linear":
        beside = e.hidden * 3 * c.d_model + (2 * e.hidden + c.d_model if e.hidden and c.mlp_bias else 0)
        body += c.d_model * (c.d_model + 1) + beside
    if e.kind == "mlp":
        # An exit has no norms around its MLP. An MLP of no neurons is these norms and the output bias.
        around = mlp_cost(c, 0).parameters - (c.d_model if c.mlp_bias else 0)
        body += mlp_cost(c, c.sizes(i)[0]).parameters - around
    if e.kind == "block":
        body += _layer(c, i, Workload()).parameters
    gate = e.gate * c.d_model + 2 * e.gate + 1 if e.gate else 0
    return body + gate + (0 if e.tied else c.vocab_size * (c.d_model + c.head_bias))


@dataclasses.dataclass(frozen=True)
class CostTable:
    """One kind of cost of every module and choice of a menu; a subnet costs the sum of what it chooses.

    Raises:
      ValueError: the kind is no field of `Budget`, or the layers of attention and MLPs differ in number.

    Example:
      ```python
      import elastic_lm as el
      from elastic_lm.testing import tiny_config

      config, menu = tiny_config(), el.Menu(mlp=(0.5, 1.0), heads=(0.5, 1.0))
      table = el.width.counted_table(config, menu, "parameters")  # a `CostTable`
      least, whole = table.range(menu)
      assert table.total(config, menu, menu.smallest(config)) == least
      table.check(el.Budget(parameters=0.9 * whole), menu)  # raises where a budget cannot be met
      ```
    """

    kind: str  # a field of `Budget`
    fixed: float  # what no choice changes
    attention: tuple[tuple[tuple[float, ...], ...], ...]  # [layer][choice of heads][choice of groups]
    mlp: tuple[tuple[float, ...], ...]  # [layer][choice of neurons]

    def __post_init__(self) -> None:
        kinds = tuple(f.name for f in dataclasses.fields(Budget))
        require(self.kind in kinds, "table.kind", self.kind, f"must be one of {', '.join(kinds)}")
        require(
            len(self.attention) == len(self.mlp),
            "table.attention",
            len(self.attention),
            f"there are {len(self.mlp)} layers of MLPs; give both for every layer",
        )

    def total(self, config: ModelConfig, menu: Menu, subnet: Subnet) -> float:
        """Cost of a subnet.

        Args:
          config: the whole model.
          menu: whose choices the table holds.
          subnet: chosen from it, with all channels.

        Returns:
          The cost, in the unit of `kind`.

        Raises:
          ValueError: a size is not on the menu, or channels are left out.
        """
        subnet.check(config)
        require(
            subnet.d_model == config.d_model,
            "subnet.d_model",
            subnet.d_model,
            "the table holds costs at the model's full width; leave d_model whole",
        )
        mlp, heads, groups = menu.positions(config, subnet)
        chosen = zip(subnet.layers, mlp, heads, groups, strict=True)
        return self.fixed + sum(self.attention[i][h][g] + self.mlp[i][f] for i, f, h, g in chosen)

    def range(self, menu: Menu) -> tuple[float, float]:
        """(the least that a subnet can cost, without all layers that may go; what the whole model costs)."""
        cheapest = [min(itertools.chain(*a)) + min(m) for a, m in zip(self.attention, self.mlp, strict=True)]
        least = sum(cost for i, cost in enumerate(cheapest) if i not in menu.dropped)
        whole = sum(a[-1][-1] + m[-1] for a, m in zip(self.attention, self.mlp, strict=True))
        return self.fixed + least, self.fixed + whole

    def check(self, budget: Budget, menu: Menu) -> Budget:
        """Checks that a budget can be met.

        Args:
          budget: what may be spent, an amount or a share of what the whole model costs.
          menu: what may be chosen.

        Returns:
          The budget as an amount.

        Raises:
          ValueError: it is of another kind than the table, or below the least that the menu can cost.
        """
        require(
            budget.kind == self.kind, "budget", budget.kind, f"this table holds {self.kind}; build one for it"
        )
        least, whole = self.range(menu)
        found = budget.of(whole)
        require(
            found.amount >= least,
            f"budget.{self.kind}",
            budget.given,
            f"the cheapest sub-network of this menu costs {least:.6g} (the whole model {whole:.6g}): raise "
            "the budget, or make the model elastic with a menu of smaller choices",
        )
        return found


def counted_table(config: ModelConfig, menu: Menu, kind: str, workload: Workload = Workload()) -> CostTable:
    """The table of a cost that is counted rather than measured, of a model without its exits.

    Args:
      config: the whole model.
      menu: what may be chosen.
      kind: "parameters", "flops" or "memory_bytes".
      workload: batch and context.

    Returns:
      The table; its totals equal `model_cost` of the slices exactly.

    Raises:
      ValueError: the kind is not counted, or the menu does not fit the model or offers widths of all of it.

    Example:
      ```python
      import elastic_lm as el
      from elastic_lm.testing import tiny_config

      menu = el.Menu(mlp=(0.25, 0.5, 1.0), heads=(0.5, 1.0))
      table = el.width.counted_table(tiny_config(), menu, "parameters")
      print(table.fixed, table.mlp[0])  # embeddings and head; the first layer's MLP in three widths
      ```
    """
    require(
        menu.d_model == (1.0,),
        "menu.d_model",
        menu.d_model,
        "a table holds costs at the model's full width: leave d_model=(1.0,)",
    )
    require(
        kind in COUNTED,
        "kind",
        kind,
        f"only {', '.join(COUNTED)} are counted; latency is measured: elastic-lm latency build",
    )
    config = config.with_exits(())
    sizes = menu.sizes(config)

    def attention(i: int, heads: int, groups: int) -> float:
        return float(getattr(attention_cost(config, i, heads, groups, workload), kind))

    def mlp(neurons: int) -> float:
        return float(getattr(mlp_cost(config, neurons, workload), kind))

    layers = range(config.n_layers)
    return CostTable(
        kind=kind,
        fixed=float(getattr(base_cost(config, workload), kind)),
        attention=tuple(
            tuple(tuple(attention(i, h, g) for g in sizes.groups[i]) for h in sizes.heads[i]) for i in layers
        ),
        mlp=tuple(tuple(map(mlp, sizes.mlp[i])) for i in layers),
    )
