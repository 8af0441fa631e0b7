"""The subnets of a menu that a budget allows, as genes that a search changes one by one.

genes    a choice of attention and of MLP for layer 0, for layer 1, ..., then the number of dropped layers
module   attention (its choices of heads and groups, in one row) or MLP; module 2 i + (0 or 1) of layer i
move     another value of one gene
"""

import dataclasses
import itertools
import math

import numpy as np

from elastic_lm.config.model import ModelConfig
from elastic_lm.config.subnet import Budget, Ints, Menu, Subnet
from elastic_lm.cost.counted import CostTable

Table = tuple[tuple[float, ...], ...]


def modules(attention: tuple[Table, ...], mlp: Table) -> Table:
    """[module][choice] of [layer][choice of heads][choice of groups] and [layer][choice of neurons]."""
    layers = zip(attention, mlp, strict=True)
    return tuple(choices for a, m in layers for choices in (tuple(itertools.chain(*a)), m))


def check_shape(name: str, attention: tuple[Table, ...], mlp: Table, config: ModelConfig, menu: Menu) -> None:
    """Checks that a table has an entry for every choice of a menu.

    Args:
      name: of the table, for the message.
      attention: [layer][choice of heads][choice of groups].
      mlp: [layer][choice of neurons].
      config: the whole model.
      menu: what may be chosen.

    Raises:
      ValueError: it has others; names their numbers.
    """
    sizes = menu.sizes(config)
    layers = zip(sizes.heads, sizes.groups, sizes.mlp, strict=True)
    wanted = [([len(g)] * len(h), len(f)) for h, g, f in layers]
    found = [([len(row) for row in a], len(m)) for a, m in zip(attention, mlp, strict=True)]
    if found != wanted:
        raise ValueError(
            f"choices of {name}={found!r}: is of another menu or model; this one has (groups for all heads, "
            f"neurons) {wanted}: build it anew"
        )


@dataclasses.dataclass(frozen=True)
class ModuleSum:
    """Costs or damages of all modules, and their sum over a subnet."""

    fixed: float
    modules: Table  # [module][choice]
    dropped: tuple[float, ...]  # [layer], what a dropped layer counts
    order: Ints  # in which layers are dropped

    def total(self, genes: Ints) -> float:
        """The sum over a subnet; of costs exactly `CostTable.total`, which adds in the same order."""
        gone, layers = self.order[: genes[-1]], range(len(self.dropped))
        return self.fixed + sum(self.dropped[i] if i in gone else self._layer(genes, i) for i in layers)

    def change(self, genes: Ints, place: int, value: int) -> float:
        """By how much the sum rises where the gene at `place` takes `value`."""
        if place < len(self.modules):
            return self.modules[place][value] - self.modules[place][genes[place]]

        # The last gene is the number of dropped layers: some go, or come back with the choices in `genes`.
        few, many = sorted((genes[-1], value))
        rise = sum(self.dropped[i] - self._layer(genes, i) for i in self.order[few:many])
        return rise if value == many else -rise

    def _layer(self, genes: Ints, i: int) -> float:
        return self.modules[2 * i][genes[2 * i]] + self.modules[2 * i + 1][genes[2 * i + 1]]


@dataclasses.dataclass(frozen=True)
class Move:
    """Another value of one gene."""

    place: int  # of the gene
    value: int  # that it takes
    cost: float  # by which the subnet's rises

    def of(self, genes: Ints) -> Ints:
        """The genes after the move."""
        return (*genes[: self.place], self.value, *genes[self.place + 1 :])


class Space:
    """The subnets of a menu, and which of them a budget allows."""

    def __init__(self, config: ModelConfig, menu: Menu, table: CostTable, budget: Budget):
        """Creates the space of a possible budget.

        Args:
          config: the whole model.
          menu: what may be chosen.
          table: costs, measured or counted.
          budget: what may be spent, of the table's kind.

        Raises:
          ValueError: the table is of another menu or model, or the budget of another kind or below the
            least possible.
        """
        check_shape("table", table.attention, table.mlp, config, menu)
        self.config, self.menu, self.amount = config, menu, table.check(budget, menu).amount
        self.sizes = menu.sizes(config)
        costs = modules(table.attention, table.mlp)
        self.costs = ModuleSum(table.fixed, costs, (0.0,) * config.n_layers, menu.dropped)
        self.choices = (*map(len, costs), len(menu.dropped) + 1)  # number of values of every gene
        self.whole = (*(n - 1 for n in self.choices[:-1]), 0)  # genes of the whole model

    def fits(self, genes: Ints) -> bool:
        """Whether the budget allows a subnet."""
        return self.costs.total(genes) <= self.amount

    def kept(self, dropped: int) -> Ints:
        """Layers that stay where so many are dropped."""
        return tuple(i for i in range(self.config.n_layers) if i not in self.menu.dropped[:dropped])

    def subnet(self, genes: Ints) -> Subnet:
        """The subnet of some genes; those of dropped layers make no difference."""
        sizes, kept = self.sizes, self.kept(genes[-1])
        heads, groups = zip(*(divmod(genes[2 * i], len(sizes.groups[i])) for i in kept), strict=True)
        return Subnet(
            kept,
            tuple(sizes.mlp[i][genes[2 * i + 1]] for i in kept),
            tuple(sizes.heads[i][h] for i, h in zip(kept, heads, strict=True)),
            tuple(sizes.groups[i][g] for i, g in zip(kept, groups, strict=True)),
            self.config.d_model,
        )

    def genes(self, subnet: Subnet) -> Ints:
        """Inverse of `subnet`; dropped layers get their largest choices."""
        chosen = zip(*self.menu.positions(self.config, subnet), strict=True)
        genes = list(self.whole)
        for i, (f, h, g) in zip(subnet.layers, chosen, strict=True):
            genes[2 * i : 2 * i + 2] = h * len(self.sizes.groups[i]) + g, f
        return (*genes[:-1], self.config.n_layers - len(subnet.layers))

    def draw(self, rng: np.random.Generator) -> Ints:
        """Random genes, every value equally likely, within the budget or not."""
        return tuple(rng.integers(self.choices).tolist())

    def moves(self, genes: Ints) -> list[Move]:
        """All other values of every gene that makes a difference; those of dropped layers make none."""
        places = [m for i in self.kept(genes[-1]) for m in (2 * i, 2 * i + 1)] + [len(genes) - 1]
        moves = [(p, v) for p in places for v in range(self.choices[p]) if v != genes[p]]
        return [Move(*move, self.costs.change(genes, *move)) for move in moves]

    def repaired(self, genes: Ints, rng: np.random.Generator, low: float = -math.inf) -> Ints:
        """Genes moved until they meet the budget and then, where any move does, cost at least `low`."""
        while not self.fits(genes):
            genes = _smallest([m for m in self.moves(genes) if m.cost < 0], rng).of(genes)
        while self.costs.total(genes) < low:
            growths = [m for m in self.moves(genes) if m.cost > 0 and self.fits(m.of(genes))]
            if not growths:
                break
            genes = _smallest(growths, rng).of(genes)
        return genes


def _smallest(moves: list[Move], rng: np.random.Generator) -> Move:
    """The smallest move of a random gene."""
    of_gene = {m.place: m for m in sorted(moves, key=lambda m: -abs(m.cost))}
    return of_gene[int(rng.choice(list(of_gene)))]
