"""Choosing a sub-network for a budget without training: the baselines of a learned router.

A subnet makes a choice x_m for every module m (the attention and the MLP of each layer) and leaves out the
first n layers of `Menu.dropped`. With costs c of a `CostTable` (c_0 is fixed) and `Damage` d,

    minimise      D(x, n) = sum_{m kept} d_m(x_m) + sum_{i dropped} d_i
    subject to    c(x, n) = c_0 + sum_{m kept} c_m(x_m) <= C
    measured      d_m(k) = loss(whole model with m at k) - loss(whole model);  d_i: without layer i

    greedy        from the whole model, change the one x_m or n of least dD / -dc with dc < 0, until c <= C
    knapsack      b_m(s) = min_k b_{m-1}(s - w_m(k)) + d_m(k),  w_m(k) = ceil((c_m(k) - min c_m) / step)
                  for every n, over the steps s that C leaves above the cheapest choices; the best n
    evolutionary  parents are the best of the population; a child is a parent whose every gene (x_m or n) is
                  redrawn with probability p, or takes every gene from either of two; any loss(subnet)
    random        genes drawn uniformly, then stepped one at a time until (1 - tolerance) C <= c <= C
    uniform       the dearest of the subnets whose layers all make the same choices

A budget that the whole model meets gives the whole model. Attention chooses heads and groups together; the
model's channels stay whole. A smaller choice need not be a cheaper one: latencies are taken as measured.

Evolution is that of Once-for-All, arXiv 1908.09791, as its code has it, but for two things: a child over
the budget is stepped down rather than drawn again, and a population holds no subnet twice. HALP, arXiv
2210.06659, also poses pruning by a table of latencies as a knapsack, of neurons by their saliency.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator

import numpy as np

from elastic_lm.config.checks import AT_LEAST_1, NOT_NEGATIVE, require
from elastic_lm.config.model import ModelConfig
from elastic_lm.config.subnet import Budget, Ints, Menu, Subnet
from elastic_lm.cost.counted import CostTable
from elastic_lm.width.search_space import ModuleSum, Move, Space, Table, check_shape, modules

Loss = Callable[[Subnet], float]
ATTEMPTS = 50  # random draws per subnet asked for


@dataclasses.dataclass(frozen=True)
class Damage:
    """Estimated loss of quality by every module's choice; a subnet loses the sum of what it chooses."""

    attention: tuple[Table, ...]  # [layer][choice of heads][choice of groups], 0 at the last ones
    mlp: Table  # [layer][choice of neurons], 0 at the last one
    dropped: tuple[float, ...]  # [layer], where the whole layer is left out

    def __post_init__(self) -> None:
        layers = len(self.mlp)
        for field in ("attention", "dropped"):
            given = len(getattr(self, field))
            require(given == layers, f"damage.{field}", given, f"there are {layers} layers of MLPs; give all")
        for m, choices in enumerate(modules(self.attention, self.mlp)):
            name = f"damage.{('attention', 'mlp')[m % 2]}[{m // 2}]"
            require(all(map(math.isfinite, choices)), name, choices, "must be finite")
            require(choices[-1] == 0, name, choices, "must end on 0: its last choice is the whole module")
        require(not any(map(math.isnan, self.dropped)), "damage.dropped", self.dropped, "must be numbers")

    def total(self, config: ModelConfig, menu: Menu, subnet: Subnet) -> float:
        """Estimated damage of a subnet.

        Args:
          config: the whole model.
          menu: whose choices are estimated.
          subnet: chosen from it; channels are not looked at.

        Returns:
          The sum, in units of the loss; 0 for the whole model.

        Raises:
          ValueError: a size is not on the menu, or the estimates are of another menu or model.
        """
        check_shape("damage", self.attention, self.mlp, config, menu)
        subnet.check(config)
        mlp, heads, groups = menu.positions(config, subnet)
        chosen = zip(subnet.layers, mlp, heads, groups, strict=True)
        kept = sum(self.attention[i][h][g] + self.mlp[i][f] for i, f, h, g in chosen)
        return kept + sum(d for i, d in enumerate(self.dropped) if i not in subnet.layers)


def measured_damage(config: ModelConfig, menu: Menu, loss: Loss) -> Damage:
    """Measures every choice of every module alone, with the rest of the model whole.

    Args:
      config: the whole model.
      menu: what may be chosen.
      loss: held-out loss of a subnet; called once for the whole model, for every smaller choice of every
        module and for every layer that may be dropped.

    Returns:
      How much the loss rises, negative where it falls; infinite for dropping a layer that has to stay.

    Raises:
      ValueError: the menu does not fit the model, or a loss is not finite.
    """
    sizes, full = menu.sizes(config), menu.largest(config)
    base = _measure(loss, full)

    def rise(i: int, **changed: int) -> float:
        whole = {field: getattr(full, field) for field in changed}
        fields = {field: (*whole[field][:i], n, *whole[field][i + 1 :]) for field, n in changed.items()}
        subnet = dataclasses.replace(full, **fields)
        return 0.0 if subnet == full else _measure(loss, subnet) - base

    def attention(i: int) -> Table:
        return tuple(tuple(rise(i, heads=h, groups=g) for g in sizes.groups[i]) for h in sizes.heads[i])

    def without(i: int) -> float:
        rest = [j for j in range(config.n_layers) if j != i]
        return _measure(loss, Subnet.uniform(config, layers=rest)) - base if i in menu.dropped else math.inf

    each = range(config.n_layers)
    mlp = tuple(tuple(rise(i, mlp=f) for f in sizes.mlp[i]) for i in each)
    return Damage(tuple(map(attention, each)), mlp, tuple(map(without, each)))


def _measure(loss: Loss, subnet: Subnet) -> float:
    value = float(loss(subnet))
    require(math.isfinite(value), "loss", value, f"must be finite; look at {subnet}")
    return value


def _sum(config: ModelConfig, menu: Menu, damage: Damage) -> ModuleSum:
    check_shape("damage", damage.attention, damage.mlp, config, menu)
    return ModuleSum(0.0, modules(damage.attention, damage.mlp), damage.dropped, menu.dropped)


def greedy(config: ModelConfig, menu: Menu, table: CostTable, budget: Budget, damage: Damage) -> Subnet:
    """Reduces, step by step, what loses the least quality per cost saved, until the budget is met.

    Args:
      config: the whole model.
      menu: what may be chosen; a step is a cheaper choice of one module, or dropping the next layers.
      table: costs, measured or counted.
      budget: what may be spent, of the table's kind.
      damage: of every choice.

    Returns:
      A subnet within the budget.

    Raises:
      ValueError: the budget is of another kind or below the least possible, or `table` or `damage` is of
        another menu or model.
    """
    space, harm = Space(config, menu, table, budget), _sum(config, menu, damage)

    def price(move: Move) -> float:
        return harm.change(genes, move.place, move.value) / -move.cost

    genes = space.whole
    while not space.fits(genes):
        move = min((m for m in space.moves(genes) if m.cost < 0), key=price)
        genes = move.of(genes)
    return space.subnet(genes)


def knapsack(
    config: ModelConfig,
    menu: Menu,
    table: CostTable,
    budget: Budget,
    damage: Damage,
    *,
    resolution: int = 100_000,
) -> Subnet:
    """Solves the multiple-choice knapsack of least damage by dynamic programming on rounded-up costs.

    Costs above those of the cheapest choices are rounded up to a grid of at most `resolution` steps, so a
    budget is never exceeded. Where costs differ by whole numbers, the step is a multiple of their greatest
    common divisor g, and the result is an exact optimum if the budget leaves no more than resolution * g
    above the cheapest choices. Else every module's cost is rounded by less than a step: the result is no
    worse than the optimum of a budget that is lower by a step for every module, a relative
    2 n_layers / resolution of what the budget leaves.

    Args:
      config: the whole model.
      menu: what may be chosen; solved for every number of dropped layers.
      table: costs, measured or counted.
      budget: what may be spent, of the table's kind.
      damage: of every choice.
      resolution: steps of the grid; time and memory grow with it.

    Returns:
      A subnet within the budget; of equals one with few dropped layers and large choices.

    Raises:
      ValueError: the budget is of another kind or below the least possible, `table` or `damage` is of
        another menu or model, or the resolution is not positive.
    """
    require(AT_LEAST_1[0](resolution), "resolution", resolution, AT_LEAST_1[1])
    space, harm = Space(config, menu, table, budget), _sum(config, menu, damage)
    if space.fits(space.whole):
        return space.subnet(space.whole)
    costs, most = space.costs.modules, len(menu.dropped)
    cheapest = tuple(c.index(min(c)) for c in costs)
    left = [max(budget.amount - space.costs.total((*cheapest, n)), 0.0) for n in range(most + 1)]
    above = [[float(c - min(choices)) for c in choices] for choices in costs]
    step = _step(above, max(left), resolution)
    size = int(max(left) // step) + 1
    weights = [[math.ceil(min(c / step, size)) for c in choices] for choices in above]
    best, chosen, found = np.zeros(size), dict[int, np.ndarray](), list[Ints]()
    for n in range(most, -1, -1):
        for i in space.kept(n) if n == most else menu.dropped[n : n + 1]:
            for m in (2 * i, 2 * i + 1):
                best, chosen[m] = _with_module(best, weights[m], harm.modules[m])
        traces = (_trace(chosen, weights, steps, n) for steps in range(int(left[n] // step), -1, -1))
        found += itertools.islice(filter(space.fits, traces), 1)
    return space.subnet(min(reversed(found), key=harm.total))


def _step(above: list[list[float]], left: float, resolution: int) -> float:
    """Step of the grid: of at most `resolution` steps in `left`, and exact where it can be."""
    differences = list(itertools.chain(*above))
    if all(d.is_integer() for d in differences):
        unit = math.gcd(*map(int, differences)) or 1
        return float(unit * max(1, math.ceil(left / unit / resolution)))
    return left / resolution or 1.0


def _with_module(
    best: np.ndarray, weights: list[int], damage: tuple[float, ...]
) -> tuple[np.ndarray, np.ndarray]:
    """One module more: (least damage within [s] steps, choice that gives it, the largest of equals)."""
    options = np.full((len(weights), len(best)), math.inf)
    for k, (weight, d) in enumerate(zip(weights, damage, strict=True)):
        options[k, weight:] = best[: len(best) - weight] + d
    choice = len(weights) - 1 - np.argmin(options[::-1], axis=0)
    return options.min(axis=0), choice.astype(np.int32)


def _trace(chosen: dict[int, np.ndarray], weights: list[list[int]], steps: int, dropped: int) -> Ints:
    """Genes of the least damage within `steps`; modules outside `chosen`, all dropped, get 0."""
    genes = [0] * len(weights)
    for m, choice in reversed(chosen.items()):
        genes[m] = int(choice[steps])
        steps -= weights[m][genes[m]]
    return (*genes, dropped)


def evolutionary(
    config: ModelConfig,
    menu: Menu,
    table: CostTable,
    budget: Budget,
    loss: Loss,
    *,
    seed: int,
    population: int = 100,
    generations: int = 20,
    parent_ratio: float = 0.25,
    mutation_ratio: float = 0.5,
    mutation_probability: float = 0.1,
) -> Subnet:
    """Evolves subnets within the budget towards the least loss (Once-for-All).

    Args:
      config: the whole model.
      menu: what may be chosen.
      table: costs, measured or counted.
      budget: what may be spent, of the table's kind.
      loss: of a subnet, measured or predicted; called once per subnet, at most
        population * (generations + 1) times.
      seed: of all draws; the same one gives the same subnet.
      population: subnets drawn at first, and children of every generation.
      generations: how often the best are kept and have children; more of them are never worse.
      parent_ratio: share of the population that is kept and has children.
      mutation_ratio: share of the children that are mutated parents; the others cross two.
      mutation_probability: p, with which a mutation redraws each gene.

    Returns:
      The best subnet seen.

    Raises:
      ValueError: the budget is of another kind or below the least possible, `table` is of another menu or
        model, a number is out of its range, or a loss is not a number.
    """
    require(AT_LEAST_1[0](population), "population", population, AT_LEAST_1[1])
    require(NOT_NEGATIVE[0](generations), "generations", generations, NOT_NEGATIVE[1])
    ratios = {"parent_ratio": parent_ratio, "mutation_ratio": mutation_ratio}
    for field, share in {**ratios, "mutation_probability": mutation_probability}.items():
        require(0 <= share <= 1, field, share, "must be in [0, 1]")
    space, rng = Space(config, menu, table, budget), np.random.default_rng(seed)
    if space.fits(space.whole):
        return space.subnet(space.whole)
    losses: dict[Subnet, float] = {}

    def ranked(alive: dict[Subnet, Ints]) -> dict[Subnet, Ints]:
        losses.update({subnet: _measure(loss, subnet) for subnet in alive if subnet not in losses})
        return {subnet: alive[subnet] for subnet in sorted(alive, key=losses.__getitem__)}

    def child(parents: list[Ints], mutated: bool) -> Ints:
        first, second = (parents[i] for i in rng.integers(len(parents), size=2))
        other, share = (space.draw(rng), mutation_probability) if mutated else (second, 0.5)
        return tuple(np.where(rng.random(len(first)) < share, other, first).tolist())

    def subnets(drawn: Iterator[Ints]) -> dict[Subnet, Ints]:
        return {space.subnet(genes): genes for genes in (space.repaired(g, rng) for g in drawn)}

    alive = ranked(subnets(space.draw(rng) for _ in range(population)))
    for _ in range(generations):
        best = dict(itertools.islice(alive.items(), max(1, round(parent_ratio * population))))
        parents, mutants = list(best.values()), round(mutation_ratio * population)
        alive = ranked({**subnets(child(parents, i < mutants) for i in range(population)), **best})
    return next(iter(alive))


def random_subnets(
    config: ModelConfig,
    menu: Menu,
    table: CostTable,
    budget: Budget,
    count: int,
    *,
    seed: int,
    tolerance: float = 0.05,
) -> list[Subnet]:
    """Draws subnets that cost nearly the budget.

    Args:
      config: the whole model.
      menu: what may be chosen.
      table: costs, measured or counted.
      budget: what may be spent, of the table's kind.
      count: subnets to draw.
      seed: of all draws; the same one gives the same subnets.
      tolerance: share of the budget that may be left over.

    Returns:
      `count` subnets; they repeat only where fewer were found, or where the whole model meets the budget.

    Raises:
      ValueError: the budget is of another kind or below the least possible, `table` is of another menu or
        model, `count` or `tolerance` is out of its range, or no subnet came near enough to the budget.
    """
    require(AT_LEAST_1[0](count), "count", count, AT_LEAST_1[1])
    require(0 <= tolerance <= 1, "tolerance", tolerance, "must be in [0, 1]")
    space, rng = Space(config, menu, table, budget), np.random.default_rng(seed)
    if space.fits(space.whole):
        return [space.subnet(space.whole)] * count
    low, nearest = (1 - tolerance) * budget.amount, -math.inf
    found: dict[Subnet, None] = {}
    for _ in range(ATTEMPTS * count):
        genes = space.repaired(space.draw(rng), rng, low)
        nearest = max(nearest, space.costs.total(genes))
        if space.costs.total(genes) >= low:
            found[space.subnet(genes)] = None
        if len(found) == count:
            break
    fix = f"no subnet drawn costs {low:.6g} to {budget.amount:.6g}, the nearest {nearest:.6g}; raise it"
    require(bool(found), "tolerance", tolerance, fix)
    return list(itertools.islice(itertools.cycle(found), count))


def uniform_subnet(config: ModelConfig, menu: Menu, table: CostTable, budget: Budget) -> Subnet:
    """Takes the same choices in every layer, the dearest that the budget allows.

    Args:
      config: the whole model.
      menu: what may be chosen, the number of dropped layers too.
      table: costs, measured or counted.
      budget: what may be spent, of the table's kind.

    Returns:
      A subnet within the budget; of equally dear ones that with the larger MLPs.

    Raises:
      ValueError: the budget is of another kind or below the least possible, `table` is of another menu or
        model, or only subnets that are not uniform meet the budget.
    """
    space = Space(config, menu, table, budget)
    if space.fits(space.whole):
        return space.subnet(space.whole)
    mlp, attention = (range(n - 1, -1, -1) for n in (len(menu.mlp), len(menu.heads) * len(menu.groups)))
    choices = itertools.product(mlp, attention, range(len(menu.dropped) + 1))
    uniform = [((a, f) * config.n_layers) + (n,) for f, a, n in choices]
    least = min(map(space.costs.total, uniform))
    fix = f"the cheapest uniform sub-network costs {least:.6g}: raise the budget, or take greedy or knapsack"
    require(least <= budget.amount, f"budget.{budget.kind}", budget.amount, fix)
    return space.subnet(max(filter(space.fits, uniform), key=space.costs.total))
