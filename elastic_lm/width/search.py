"""Choosing a sub-network for a budget without training: the baselines of a learned router.

A subnet makes a choice x_m for every module m (the attention and the MLP of each layer) and leaves out the
first n layers of `Menu.dropped`. With costs c of a `CostTable` (c_0 is fixed) and `Damage` d,

    minimise      D(x, n) = sum_{m kept} d_m(x_m) + sum_{i dropped} d_i
    subject to    c(x, n) = c_0 + sum_{m kept} c_m(x_m) <= C
    measured      d_m(k) = loss(whole model with m at k) - loss(whole model);  d_i: without layer i

    greedy        from the whole model, change the one x_m or n of least dD / -dc with dc < 0, until c <= C
    knapsack      the minimum itself, by integer programming
    evolutionary  parents are the best of the population; a child is a parent whose every gene (x_m or n) is
                  redrawn with probability p, or takes every gene from either of two; any loss(subnet)
    random        genes drawn uniformly, then stepped one at a time until (1 - tolerance) C <= c <= C
    uniform       the most expensive that fits of the subnets whose layers all make the same choices

A budget that the whole model meets gives the whole model. Attention chooses heads and groups together; the
model's channels stay whole. A smaller choice need not be a cheaper one: latencies are taken as measured.

The evolution is that of Once-for-All, arXiv 1908.09791, and follows its code in all but two points: a child
over the budget is stepped down instead of drawn again, and a population holds no subnet twice. HALP, arXiv
2210.06659, also prunes by a table of latencies and poses a knapsack, over neurons and their saliency.
"""

import contextlib
import ctypes
import dataclasses
import itertools
import math
import os
import sys
from collections.abc import Callable, Iterator

import numpy as np
import scipy

from elastic_lm.config.checks import require, require_at_least_1, require_not_negative
from elastic_lm.config.model import ModelConfig
from elastic_lm.config.subnet import Budget, Ints, Menu, Subnet
from elastic_lm.cost.counted import CostTable
from elastic_lm.width.search_space import ModuleSum, Move, Space, Table, check_shape, modules

Loss = Callable[[Subnet], float]
ATTEMPTS = 50  # random draws per subnet asked for

# Of the knapsack's solver:
SCALE = 2.0**20  # of its costs and of its damages
TIE = 1e-7  # damages that differ by less, as a share of the largest of a choice, count as equal
NODES = 250  # branches that it tries at most; ordinary tables need fewer than 150
SLACKS = (*10 * [0.0], 1e-8, 1e-6)  # shares of the budget that are given up where its results exceed it


@dataclasses.dataclass(frozen=True)
class Damage:
    """Estimated loss of quality by every module's choice; a subnet loses the sum of what it chooses.

    Raises:
      ValueError: the fields have different numbers of layers, a module's last choice, which is the whole
        module, has a damage, or a damage is not finite. Only dropping a layer may have an infinite damage.

    Example:
      ```python
      import elastic_lm as el
      from elastic_lm.testing import tiny_config

      config, menu = tiny_config(), el.Menu(mlp=(0.5, 1.0), heads=(0.5, 1.0))
      never = (float("inf"),) * config.n_layers  # no layer may be dropped
      damage = el.width.Damage((((0.3,), (0.0,)),) * 4, ((0.1, 0.0),) * 4, never)
      damage.total(config, menu, menu.smallest(config))  # 4 * (0.3 + 0.1)
      ```
    """

    attention: tuple[Table, ...]  # [layer][choice of heads][choice of groups], 0 at the last ones
    mlp: Table  # [layer][choice of neurons], 0 at the last one
    dropped: tuple[float, ...]  # [layer], where the whole layer is left out

    def __post_init__(self) -> None:
        layers = len(self.mlp)
        for field in ("attention", "dropped"):
            count = len(getattr(self, field))
            require(count == layers, f"damage.{field}", count, f"there are {layers} layers of MLPs; give all")

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

    Example:
      ```python
      import optax
      import elastic_lm as el
      from elastic_lm.testing import all_logits, random_params, random_tokens, tiny_config

      config, menu = tiny_config(n_layers=1), el.Menu(mlp=(0.5, 1.0), heads=(1.0,))
      params, tokens = random_params(config), random_tokens(config, batch=2, length=9)

      def loss(subnet):
          small, sliced = el.slice_params(config, params, subnet)
          logits = all_logits(small, sliced, tokens[:, :-1])[small.n_layers]
          return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

      damage = el.width.measured_damage(config, menu, loss)
      damage.mlp  # of the one layer: (what half of the neurons lose, 0.0)
      ```
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

    Example:
      ```python
      import elastic_lm as el
      from elastic_lm.testing import tiny_config

      config, menu = tiny_config(), el.Menu()
      table = el.width.counted_table(config, menu, "parameters")
      damage = el.width.measured_damage(config, menu, lambda subnet: 1 / sum(subnet.mlp + subnet.heads))
      subnet = el.width.greedy(config, menu, table, el.Budget(parameters=30_000), damage)
      table.total(config, menu, subnet)  # at most 30,000
      ```
    """
    space, harm = Space(config, menu, table, budget), _sum(config, menu, damage)

    def price(move: Move) -> float:
        return harm.change(genes, move.place, move.value) / -move.cost

    genes = space.whole
    while not space.fits(genes):
        move = min((m for m in space.moves(genes) if m.cost < 0), key=price)
        genes = move.of(genes)
    return space.subnet(genes)


def knapsack(config: ModelConfig, menu: Menu, table: CostTable, budget: Budget, damage: Damage) -> Subnet:
    """Finds the subnet of least damage within a budget: a multiple-choice knapsack, solved exactly.

    The solver has tolerances, so its result is checked: a budget is never exceeded. A subnet that is above it
    by a rounding error is excluded, and after ten of them a millionth of what the budget leaves above the
    cheapest subnet is given up. Where damage is nearly proportional to cost, millions of subnets are nearly
    as good as the best one: the search then stops after a while with the best that it found.

    Args:
      config: the whole model.
      menu: what may be chosen; all numbers of dropped layers are tried.
      table: costs, measured or counted.
      budget: what may be spent, of the table's kind.
      damage: of every choice.

    Returns:
      A subnet within the budget. Damages that differ by less than 1e-7 of the largest damage of a choice
      count as equal; of equals, the subnet with the fewest dropped layers and then the largest choices.

    Raises:
      ValueError: the budget is of another kind or below the least possible, or `table` or `damage` is of
        another menu or model.

    Example:
      ```python
      import elastic_lm as el
      from elastic_lm.testing import tiny_config

      config, menu = tiny_config(), el.Menu(dropped=(2,))
      table = el.width.counted_table(config, menu, "parameters")
      damage = el.width.measured_damage(config, menu, lambda subnet: 1 / sum(subnet.mlp + subnet.heads))
      subnet = el.width.knapsack(config, menu, table, el.Budget(parameters=30_000), damage)
      damage.total(config, menu, subnet)  # no subnet of at most 30,000 parameters has less
      ```
    """
    space, harm = Space(config, menu, table, budget), _sum(config, menu, damage)
    if space.fits(space.whole):
        return space.subnet(space.whole)

    programme = _Programme(space, harm)
    for slack in SLACKS:  # each call gives another subnet
        genes = programme.solve(slack)
        if genes is not None and space.fits(genes):
            return space.subnet(genes)
    return greedy(config, menu, table, budget, damage)


class _Programme:
    """The knapsack as an integer programme.

    It has a column of 0 or 1 for every choice of every module, and one for every number n of dropped layers:

        minimise    sum_{m, k} d_m(k) x_{m, k} + sum_n d(n) y_n      d(n): damage of the n dropped layers
        subject to  sum_{m, k} c_m(k) x_{m, k} <= C - c_0
                    sum_k x_{m, k} = sum_{n that keep m} y_n  for every m,      sum_n y_n = 1
    """

    def __init__(self, space: Space, harm: ModuleSum):
        costs, numbers = space.costs.modules, range(space.choices[-1])
        cheapest = tuple(choices.index(min(choices)) for choices in costs)
        least = np.array([space.costs.total((*cheapest, n)) for n in numbers])
        self.ends = np.cumsum([len(choices) for choices in costs])

        # Only what is spent above the cheapest choices counts, so that all digits are left for it. Most
        # tolerances of the solver are absolute, about 1e-6: at this scale they are a part in 10^12.
        left = space.amount - least.min()
        spent = np.concatenate([np.subtract(c, min(c)) for c in costs] + [least - least.min()])
        unit = left or spent.max() or 1.0
        self.spent, self.left = np.minimum(spent / unit, 2.0) * SCALE, left / unit * SCALE

        # An infinite damage says that a layer has to stay: it goes only where nothing else meets the budget.
        gone = np.cumsum([0.0, *(harm.dropped[i] for i in harm.order)])
        kind = np.where(np.isfinite(gone), 0.0, gone)
        possible = np.array([space.fits((*cheapest, n)) for n in numbers])
        usable = possible & (kind == kind[possible].min())
        self.most = np.concatenate([np.ones(self.ends[-1]), usable])

        # The second objective breaks ties: one dropped layer outweighs all choices of all modules.
        damage = np.concatenate([*harm.modules, np.where(usable & np.isfinite(gone), gone, 0.0)])
        positions = np.concatenate([np.arange(len(choices)) for choices in costs])
        outweighs = positions.sum() + 1
        narrow = np.concatenate([-positions, outweighs * np.arange(len(numbers))])
        damage /= np.abs(damage).max() or 1.0
        self.objective = SCALE * (damage + TIE * narrow / (outweighs * len(numbers)))

        # One row per module, then the row of the numbers of dropped layers.
        self.rows = np.zeros((len(costs) + 1, len(self.spent)))
        for m, (end, choices) in enumerate(zip(self.ends, costs, strict=True)):
            self.rows[m, end - len(choices) : end] = 1
            self.rows[m, self.ends[-1] :] = [-float(m // 2 in space.kept(n)) for n in numbers]
        self.rows[-1, self.ends[-1] :] = 1
        self.sums = np.append(np.zeros(len(costs)), 1.0)
        self.excluded: list[np.ndarray] = []

    def solve(self, slack: float) -> Ints | None:
        """Genes of the least damage of all that no call gave before; None = there are none.

        Args:
          slack: share of what the budget leaves that is not spent.
        """
        constraints = [
            scipy.optimize.LinearConstraint(self.rows, self.sums, self.sums),
            scipy.optimize.LinearConstraint(self.spent[None], ub=(1 - slack) * self.left),
        ]
        # One of the columns that were 1 has to be 0.
        constraints += [scipy.optimize.LinearConstraint(x[None], ub=x.sum() - 1) for x in self.excluded]
        with _stdout_kept():
            found = scipy.optimize.milp(
                self.objective,
                integrality=np.ones(len(self.spent)),
                bounds=scipy.optimize.Bounds(0, self.most),
                constraints=constraints,
                options={"mip_rel_gap": 0.0, "node_limit": NODES},
            )
        if found.x is None:
            return None

        self.excluded.append(np.round(found.x))
        # The columns of a dropped layer's modules are all 0; their genes mean nothing.
        return tuple(int(np.argmax(columns)) for columns in np.split(found.x, self.ends))


@contextlib.contextmanager
def _stdout_kept() -> Iterator[None]:
    """Sends to stderr what C code prints.

    The solver in scipy 1.17 prints a line of its own debugging now and then, and stdout may be a user's JSON.
    Where stdout or stderr has no open file descriptor, C code prints as it would anyway.
    """
    stdout = None if sys.platform == "win32" else _copy_of_stdout()
    if stdout is None:
        yield
        return

    flush = ctypes.CDLL(None).fflush
    try:
        flush(None)
        os.dup2(2, 1)
        yield
    finally:
        flush(None)  # C keeps what it prints until there is a pageful
        os.dup2(stdout, 1)
        os.close(stdout)


def _copy_of_stdout() -> int | None:
    """A new descriptor of what descriptor 1 writes to; None where it or that of stderr is closed."""
    try:
        os.fstat(2)
        return os.dup(1)
    except OSError:
        return None


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

    Example:
      ```python
      import elastic_lm as el
      from elastic_lm.testing import tiny_config

      config, menu = tiny_config(), el.Menu(dropped=(2,))
      table = el.width.counted_table(config, menu, "parameters")
      budget = el.Budget(parameters=30_000)

      def loss(subnet):  # in place of a held-out loss
          return 1 / sum(subnet.mlp + subnet.heads)

      el.width.evolutionary(config, menu, table, budget, loss, seed=0, population=20, generations=5)
      ```

    Paper: Once-for-All, arXiv 1908.09791.
    """
    require_at_least_1("population", population)
    require_not_negative("generations", generations)
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
        # A mutation takes some genes from a random subnet, a crossing takes each from either parent.
        other, share = (space.draw(rng), mutation_probability) if mutated else (second, 0.5)
        return tuple(np.where(rng.random(len(first)) < share, other, first).tolist())

    def subnets(drawn: Iterator[Ints]) -> dict[Subnet, Ints]:
        return {space.subnet(genes): genes for genes in (space.repaired(g, rng) for g in drawn)}

    alive = ranked(subnets(space.draw(rng) for _ in range(population)))
    for _ in range(generations):
        best = dict(itertools.islice(alive.items(), max(1, round(parent_ratio * population))))
        parents, mutants = list(best.values()), round(mutation_ratio * population)
        # Parents live on with their children, so that the best subnet is never lost.
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

    Example:
      ```python
      import elastic_lm as el
      from elastic_lm.testing import tiny_config

      config, menu = tiny_config(), el.Menu()
      table = el.width.counted_table(config, menu, "parameters")
      el.width.random_subnets(config, menu, table, el.Budget(parameters=30_000), count=3, seed=0)
      ```
    """
    require_at_least_1("count", count)
    require(0 <= tolerance <= 1, "tolerance", tolerance, "must be in [0, 1]")

    space, rng = Space(config, menu, table, budget), np.random.default_rng(seed)
    if space.fits(space.whole):
        return [space.subnet(space.whole)] * count

    low, nearest = (1 - tolerance) * space.amount, -math.inf
    found: dict[Subnet, None] = {}
    for _ in range(ATTEMPTS * count):
        genes = space.repaired(space.draw(rng), rng, low)
        nearest = max(nearest, space.costs.total(genes))
        if space.costs.total(genes) >= low:
            found[space.subnet(genes)] = None
        if len(found) == count:
            break
    if not found:
        raise ValueError(
            f"tolerance={tolerance!r}: no subnet drawn costs {low:.6g} to {space.amount:.6g}, the nearest "
            f"{nearest:.6g}; raise it"
        )
    return list(itertools.islice(itertools.cycle(found), count))


def uniform_subnet(config: ModelConfig, menu: Menu, table: CostTable, budget: Budget) -> Subnet:
    """Takes the same choices in every layer: the most expensive ones that fit the budget.

    Args:
      config: the whole model.
      menu: what may be chosen, the number of dropped layers too.
      table: costs, measured or counted.
      budget: what may be spent, of the table's kind.

    Returns:
      A subnet within the budget; of equally expensive ones the one with the larger MLPs.

    Raises:
      ValueError: the budget is of another kind or below the least possible, `table` is of another menu or
        model, or only subnets that are not uniform meet the budget.

    Example:
      ```python
      import elastic_lm as el
      from elastic_lm.testing import tiny_config

      config, menu = tiny_config(), el.Menu()
      table = el.width.counted_table(config, menu, "parameters")
      el.width.uniform_subnet(config, menu, table, el.Budget(parameters=30_000)).mlp  # (32, 32, 32, 32)
      ```
    """
    space = Space(config, menu, table, budget)
    if space.fits(space.whole):
        return space.subnet(space.whole)

    mlp, attention = (range(n - 1, -1, -1) for n in (len(menu.mlp), len(menu.heads) * len(menu.groups)))
    choices = itertools.product(mlp, attention, range(len(menu.dropped) + 1))
    uniform = [((a, f) * config.n_layers) + (n,) for f, a, n in choices]
    least = min(map(space.costs.total, uniform))
    if least > space.amount:
        raise ValueError(
            f"budget.{budget.kind}={budget.given!r}: the cheapest uniform sub-network costs {least:.6g}: "
            "raise the budget, or take greedy or knapsack"
        )
    return space.subnet(max(filter(space.fits, uniform), key=space.costs.total))
