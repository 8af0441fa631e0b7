"""Searches meet their budgets; the knapsack finds what enumerating all subnets finds."""

import ctypes
import dataclasses
import functools
import itertools
import math
import os
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elastic_lm.config.model import ModelConfig
from elastic_lm.config.subnet import Budget, Menu, Subnet
from elastic_lm.cost.counted import CostTable, Workload, counted_table
from elastic_lm.testing import tiny_config
from elastic_lm.width import search
from elastic_lm.width.search import (
    Damage,
    evolutionary,
    greedy,
    knapsack,
    measured_damage,
    random_subnets,
    uniform_subnet,
)

WIDE = tiny_config(n_layers=2, n_heads=8, n_kv_heads=2, head_dim=4)
MENU = Menu(heads=(0.5, 1.0), groups=(0.5, 1.0), dropped=(1,))
UNEVEN = tiny_config(n_layers=3, layer_mlp=(64, 32, 16), layer_heads=(4, 4, 2), layer_kv_heads=(2, 2, 1))
NARROW = Menu(mlp=(0.5, 1.0), heads=(0.5, 1.0), dropped=(2, 0))
PROBLEMS = {"wide": (WIDE, MENU), "uneven": (UNEVEN, NARROW)}
COUNTED = ("parameters", "flops", "memory_bytes")
SHARES = (0.0, 0.1, 0.35, 0.5, 0.77, 0.95)  # of the way from the least to the greatest cost

TaskProblem = tuple[ModelConfig, Menu, CostTable, Damage]


def all_subnets(config: ModelConfig, menu: Menu) -> list[Subnet]:
    sizes, found = menu.sizes(config), []
    for n in range(len(menu.dropped) + 1):
        kept = [i for i in range(config.n_layers) if i not in menu.dropped[:n]]
        layers = [list(itertools.product(sizes.mlp[i], sizes.heads[i], sizes.groups[i])) for i in kept]
        for chosen in itertools.product(*layers):
            mlp, heads, groups = zip(*chosen, strict=True)
            found.append(Subnet(tuple(kept), mlp, heads, groups, config.d_model))
    return found


EVERY = {name: all_subnets(*problem) for name, problem in PROBLEMS.items()}


def random_damage(config: ModelConfig, menu: Menu, seed: int, low: float = 0.0) -> Damage:
    """Any numbers: not even falling with size; at most a quarter of them negative where `low` is -1 / 3."""
    rng = np.random.default_rng(seed)

    def draw(*shape: int) -> np.ndarray:
        values = rng.uniform(low, 1.0, shape)
        values.reshape(-1)[-1] = 0.0
        return values

    attention = [draw(len(menu.heads), len(menu.groups)).tolist() for _ in range(config.n_layers)]
    mlp = [draw(len(menu.mlp)).tolist() for _ in range(config.n_layers)]
    dropped = rng.uniform(0.5, 2.5, config.n_layers).tolist()
    return Damage(tuple(tuple(map(tuple, a)) for a in attention), tuple(map(tuple, mlp)), tuple(dropped))


def measured_table(config: ModelConfig, menu: Menu, seed: int) -> CostTable:
    """Latencies: no whole numbers, some smaller choices slower, some as fast as larger ones."""
    rng = np.random.default_rng(seed)

    def noisy(base: np.ndarray) -> np.ndarray:
        return np.maximum(base * rng.uniform(0.7, 1.3, base.shape), 0.4)

    heads = np.multiply.outer(menu.heads, menu.groups)
    attention = [tuple(map(tuple, noisy(heads).tolist())) for _ in range(config.n_layers)]
    mlp = [tuple(noisy(2 * np.array(menu.mlp)).tolist()) for _ in range(config.n_layers)]
    return CostTable("latency_ms", 0.3, tuple(attention), tuple(mlp))


def problem(name: str, kind: str, seed: int = 0) -> TaskProblem:
    config, menu = PROBLEMS[name]
    table = (
        measured_table(config, menu, seed)
        if kind == "latency_ms"
        else counted_table(config, menu, kind, Workload(batch=2, context=9))
    )
    return config, menu, table, random_damage(config, menu, seed)


def budget_at(table: CostTable, menu: Menu, share: float) -> Budget:
    least, most = table.range(menu)
    return Budget(**{table.kind: least + share * (most - least)})


class Enumeration:
    """Cost and damage of every subnet of a menu."""

    def __init__(self, name: str, table: CostTable, damage: Damage):
        subnets = EVERY[name]
        self.cost = np.array([table.total(*PROBLEMS[name], s) for s in subnets])
        self.damage = np.array([damage.total(*PROBLEMS[name], s) for s in subnets])

    def least_damage(self, amount: float) -> float:
        return self.damage[self.cost <= amount].min(initial=math.inf)


@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize("kind", [*COUNTED, "latency_ms"])
def test_knapsack_is_the_best_of_all_subnets_and_greedy_no_better(name: str, kind: str) -> None:
    config, menu, table, damage = problem(name, kind)
    worse, every = 0, Enumeration(name, table, damage)
    for share in SHARES:
        budget = budget_at(table, menu, share)
        best = every.least_damage(budget.amount)
        exact = knapsack(config, menu, table, budget, damage)
        quick = greedy(config, menu, table, budget, damage)
        assert table.total(config, menu, exact) <= budget.amount
        assert table.total(config, menu, quick) <= budget.amount
        assert damage.total(config, menu, exact) == pytest.approx(best, abs=1e-12)
        assert damage.total(config, menu, quick) >= best - 1e-12
        worse += damage.total(config, menu, quick) > best + 1e-12
    assert worse < len(SHARES)  # greedy is no nonsense either


def genes_of(config: ModelConfig, menu: Menu, subnet: Subnet) -> tuple[int, int]:
    """(dropped layers, how much smaller than the largest the choices are): what decides between equals."""
    mlp, heads, groups = menu.positions(config, subnet)
    lost = zip(heads, groups, mlp, strict=True)
    few = len(menu.groups)
    smaller = sum(len(menu.heads) * few - 1 - (h * few + g) + len(menu.mlp) - 1 - f for h, g, f in lost)
    return config.n_layers - len(subnet.layers), smaller


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.integers(0, 2**20),
    st.floats(0, 0.999),
    st.sampled_from(list(PROBLEMS)),
    st.sampled_from((*COUNTED, "latency_ms")),
    st.sampled_from(("floats", "few values", "none")),
)
def test_knapsack_is_exact_and_prefers_the_larger_of_equals(
    seed: int, share: float, name: str, kind: str, values: str
) -> None:
    config, menu, table, _ = problem(name, kind, seed)
    damage = random_damage(config, menu, seed, low=-1 / 3)
    if values != "floats":  # many sub-networks of equal damage
        grid = 2.0 if values == "few values" else 0.0
        attention, mlp, dropped = (np.round(grid * np.array(x)) for x in dataclasses.astuple(damage))
        damage = Damage(_tuples(attention), _tuples(mlp), _tuples(dropped))
    budget = budget_at(table, menu, share)
    if table.total(config, menu, Subnet.full(config)) <= budget.amount:
        return

    found = knapsack(config, menu, table, budget, damage)
    assert table.total(config, menu, found) <= budget.amount
    every = Enumeration(name, table, damage)
    best = every.least_damage(budget.amount)
    assert damage.total(config, menu, found) == pytest.approx(best, abs=1e-6)
    if values != "floats":
        fits = (every.cost <= budget.amount) & (every.damage == best)
        equals = [genes_of(config, menu, EVERY[name][i]) for i in np.flatnonzero(fits)]
        assert genes_of(config, menu, found) == min(equals)


def _tuples(array: Any) -> Any:
    return tuple(map(_tuples, array)) if array.ndim > 1 else tuple(array.tolist())


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(0, 2**20), st.sampled_from((0.0, 1e-15, 1e-13, 1e-11, 1e-9, 1e-7)), st.booleans())
def test_costs_that_differ_in_the_last_digits_never_exceed_a_budget(
    seed: int, noise: float, below: bool
) -> None:
    config, menu, _, damage = problem("uneven", "latency_ms", seed)
    rng = np.random.default_rng(seed)

    def nearly(*costs: float) -> Any:
        return tuple((np.array(costs) * (1 + noise * rng.uniform(-1, 1, len(costs)))).tolist())

    # All modules cost nearly the same, and the budget is exactly what some sub-network costs.
    attention = tuple(tuple((c,) for c in nearly(0.1, 0.2)) for _ in range(config.n_layers))
    table = CostTable("latency_ms", 0.3, attention, tuple(nearly(0.1, 0.2) for _ in range(config.n_layers)))
    every = Enumeration("uneven", table, damage)
    amount = float(rng.choice(every.cost[every.cost > every.cost.min()]))
    budget = Budget(latency_ms=float(np.nextafter(amount, 0)) if below else amount)

    found = knapsack(config, menu, table, budget, damage)
    assert table.total(config, menu, found) <= budget.amount
    if table.total(config, menu, Subnet.full(config)) > budget.amount:
        # Costs that are equal but for the order of the sum are told apart one by one.
        lost = 2e-6 * (amount - every.cost.min()) if noise else 0.0
        least = every.least_damage(budget.amount - lost)
        assert damage.total(config, menu, found) <= least + 1e-6


def test_where_rounding_leaves_nothing_the_knapsack_takes_what_greedy_finds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config, menu, table, damage = problem("wide", "latency_ms")
    budget = budget_at(table, menu, 0.5)
    expected = greedy(config, menu, table, budget, damage)
    for genes in ((3, 3, 3, 3, 0), None):  # the whole model, which is too expensive, and nothing at all
        monkeypatch.setattr(search._Programme, "solve", lambda self, slack, genes=genes: genes)
        assert knapsack(config, menu, table, budget, damage) == expected


def test_what_the_solver_prints_does_not_reach_stdout(capfd: pytest.CaptureFixture[str]) -> None:
    print("before")
    with search._stdout_kept():
        ctypes.CDLL(None).puts(b"from C")
    print("after")
    shown = capfd.readouterr()
    assert shown.out == "before\nafter\n"
    assert shown.err == "from C\n"


@pytest.mark.parametrize("descriptor", [1, 2])
def test_the_knapsack_runs_where_a_standard_stream_is_closed(descriptor: int) -> None:
    config, menu, table, damage = problem("wide", "latency_ms")
    budget = budget_at(table, menu, 0.5)
    expected = knapsack(config, menu, table, budget, damage)
    kept = os.dup(descriptor)
    try:
        os.close(descriptor)
        found = knapsack(config, menu, table, budget, damage)
    finally:
        os.dup2(kept, descriptor)
        os.close(kept)
    assert found == expected


def searched(given: TaskProblem, budget: Budget, uniform: bool = True) -> dict[str, Subnet]:
    """What each of the searches finds."""
    config, menu, table, damage = given
    each = config, menu, table, budget

    def loss(subnet: Subnet) -> float:
        return damage.total(config, menu, subnet)

    found = {
        "greedy": greedy(*each, damage),
        "knapsack": knapsack(*each, damage),
        "evolutionary": evolutionary(*each, loss, seed=0, population=10, generations=3),
        "random": random_subnets(*each, 1, seed=1, tolerance=1.0)[0],
    }
    return {**found, "uniform": uniform_subnet(*each)} if uniform else found


@settings(max_examples=20, deadline=None, derandomize=True)
@given(st.integers(0, 2**20), st.floats(0, 1), st.sampled_from(list(PROBLEMS)))
def test_all_meet_budgets_of_latencies(seed: int, share: float, name: str) -> None:
    config, menu, table, damage = problem(name, "latency_ms", seed)
    budget = budget_at(table, menu, share)
    found = searched((config, menu, table, damage), budget, uniform=False)
    for subnet in found.values():
        assert table.total(config, menu, subnet) <= budget.amount
        assert subnet in EVERY[name]


@pytest.mark.parametrize("kind", [*COUNTED, "latency_ms"])
@pytest.mark.parametrize("name", PROBLEMS)
def test_a_budget_of_the_whole_model_gives_it(name: str, kind: str) -> None:
    given = problem(name, kind)
    config, menu, table, damage = given
    cost = table.total(config, menu, Subnet.full(config))
    better = dataclasses.replace(damage, dropped=(-5.0,) * config.n_layers)  # noise may favour less
    for amount in (cost, 2 * cost):
        found = searched((config, menu, table, better), Budget(**{kind: amount}))
        assert set(found.values()) == {Subnet.full(config)}
    below = searched(given, Budget(**{kind: np.nextafter(cost, 0)}))
    assert Subnet.full(config) not in below.values()


@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize("kind", COUNTED)
def test_the_least_budget_gives_the_smallest_subnet(name: str, kind: str) -> None:
    given = problem(name, kind)
    config, menu, table, _ = given
    found = searched(given, budget_at(table, menu, 0))
    assert set(found.values()) == {menu.smallest(config)}


@pytest.mark.parametrize("method", ["greedy", "knapsack", "evolutionary", "random", "uniform"])
def test_impossible_budgets_and_foreign_tables_are_refused(method: str) -> None:
    config, menu, table, damage = problem("wide", "parameters")
    calls = {
        "greedy": lambda c, m, t, b: greedy(c, m, t, b, damage),
        "knapsack": lambda c, m, t, b: knapsack(c, m, t, b, damage),
        "evolutionary": lambda c, m, t, b: evolutionary(c, m, t, b, lambda s: 0.0, seed=0),
        "random": lambda c, m, t, b: random_subnets(c, m, t, b, 2, seed=0),
        "uniform": uniform_subnet,
    }
    least = table.range(menu)[0]
    with pytest.raises(
        ValueError, match=r"budget.parameters=.*: the cheapest sub-network of this menu costs"
    ):
        calls[method](config, menu, table, Budget(parameters=least - 1))
    with pytest.raises(ValueError, match="budget='flops': this table holds parameters"):
        calls[method](config, menu, table, Budget(flops=1e12))
    for model, choices in ((config, Menu()), (tiny_config(n_layers=3, n_heads=8, n_kv_heads=2), MENU)):
        with pytest.raises(ValueError, match=r"choices of table=.* is of another menu or model"):
            calls[method](model, choices, table, Budget(parameters=1e9))


def test_greedy_takes_the_least_damage_per_cost_saved() -> None:
    config, menu = tiny_config(n_layers=2), Menu(mlp=(0.25, 0.5, 1.0), heads=(1.0,))
    table = CostTable("latency_ms", 1.0, (((4.0,),),) * 2, ((7.0, 10.0, 10.0), (2.0, 6.0, 10.0)))
    damage = Damage((((0.0,),),) * 2, ((0.9, 0.1, 0.0), (9.0, 1.0, 0.0)), (math.inf, math.inf))
    # Layer 0 has 0.9 / 3 = 0.3 at 0.25, and 0.5 saves nothing; layer 1 has 1 / 4 at 0.5 and then 8 / 4.
    expected = {
        29.0: (64, 64),
        28.0: (64, 32),
        25.0: (64, 32),
        24.0: (16, 32),
        22.0: (16, 32),
        21.0: (16, 16),
    }
    for amount, mlp in expected.items():
        assert greedy(config, menu, table, Budget(latency_ms=amount), damage).mlp == mlp
    # At 26 it pays to look ahead: layer 0 alone meets the budget.
    assert greedy(config, menu, table, Budget(latency_ms=26.0), damage).mlp == (64, 32)
    assert knapsack(config, menu, table, Budget(latency_ms=26.0), damage).mlp == (16, 64)


@pytest.mark.parametrize("share", [0.2, 0.8])
def test_evolution_comes_near_the_optimum_and_repeats_itself(share: float) -> None:
    config = tiny_config(n_layers=4, n_heads=8, n_kv_heads=2)
    menu = Menu(groups=(0.5, 1.0), dropped=(2, 1))
    table, damage = counted_table(config, menu, "parameters"), random_damage(config, menu, 1)
    budget, evaluated, total = budget_at(table, menu, share), [], functools.cache(damage.total)

    def loss(subnet: Subnet) -> float:
        evaluated.append(subnet)
        return total(config, menu, subnet)

    def evolved(seed: int, generations: int) -> Subnet:
        evaluated.clear()
        each = config, menu, table, budget
        found = evolutionary(*each, loss, seed=seed, population=60, generations=generations)
        assert len(evaluated) == len(set(evaluated))
        assert all(table.total(config, menu, s) <= budget.amount for s in evaluated)
        assert total(config, menu, found) == min(total(config, menu, s) for s in evaluated)
        return found

    best = damage.total(config, menu, knapsack(config, menu, table, budget, damage))
    course = [total(config, menu, evolved(0, n)) for n in (0, 1, 20)]
    assert course == sorted(course, reverse=True)
    assert best - 1e-12 <= course[-1] <= 1.05 * best
    assert course[0] > 1.05 * best  # it was not found by luck
    assert evolved(0, 1) == evolved(0, 1)
    assert len({evolved(seed, 0) for seed in (0, 1)}) > 1


def test_evolution_never_loses_the_best() -> None:
    config, menu, table, damage = problem("wide", "parameters")
    budget, losses = budget_at(table, menu, 0.5), []

    def loss(subnet: Subnet) -> float:
        losses.append(damage.total(config, menu, subnet))
        return losses[-1]

    for seed in range(4):  # children that are drawn anew have nothing of their parents
        losses.clear()
        drawn = {"population": 4, "generations": 5, "mutation_ratio": 1.0, "mutation_probability": 1.0}
        found = evolutionary(config, menu, table, budget, loss, seed=seed, **drawn)
        assert damage.total(config, menu, found) == min(losses) < losses[-1]
        assert 4 < len(losses) <= 4 * 6


def test_parents_are_crossed_and_mutated() -> None:
    config, menu, table, damage = problem("wide", "parameters")
    budget, seen = budget_at(table, menu, 0.5), set()

    def loss(subnet: Subnet) -> float:
        seen.add(subnet)
        return damage.total(config, menu, subnet)

    def evaluated(**changes: Any) -> set[Subnet]:
        seen.clear()
        evolutionary(config, menu, table, budget, loss, seed=0, population=12, **changes)
        return set(seen)

    first = evaluated(generations=0)
    assert evaluated(mutation_ratio=1.0, mutation_probability=0.0) == first
    assert evaluated(mutation_ratio=0.0) > first  # crossed
    assert evaluated(mutation_ratio=1.0, parent_ratio=0.0) > first  # mutants of the one best


def test_evolution_takes_any_loss() -> None:
    config, menu, table, _ = problem("wide", "flops")
    budget = budget_at(table, menu, 0.6)
    target = next(s for s in reversed(EVERY["wide"]) if table.total(config, menu, s) <= budget.amount)

    def loss(subnet: Subnet) -> float:
        same = zip(dataclasses.astuple(subnet), dataclasses.astuple(target), strict=True)
        return float(sum(a != b for a, b in same))

    each = config, menu, table, budget
    assert evolutionary(*each, loss, seed=0, population=60) == target
    with pytest.raises(ValueError, match=r"loss=nan: must be finite; look at Subnet\("):
        evolutionary(*each, lambda s: math.nan, seed=0)
    for field, value in {
        "population": 0,
        "generations": -1,
        "parent_ratio": 1.5,
        "mutation_ratio": -1,
    }.items():
        with pytest.raises(ValueError, match=f"{field}={value}: must be"):
            evolutionary(*each, loss, seed=0, **{field: value})


@pytest.mark.parametrize("kind", COUNTED)
@pytest.mark.parametrize("name", PROBLEMS)
def test_uniform_is_the_dearest_uniform_choice(name: str, kind: str) -> None:
    config, menu, table, _ = problem(name, kind)
    uniform = [
        Subnet.uniform(config, mlp=f, heads=h, groups=g, layers=kept)
        for f, h, g in itertools.product(menu.mlp, menu.heads, menu.groups)
        for kept in {s.layers for s in EVERY[name]}
    ]
    for share in SHARES:
        budget = budget_at(table, menu, share)
        costs = [table.total(config, menu, s) for s in uniform]
        found = uniform_subnet(config, menu, table, budget)
        assert found in uniform
        assert table.total(config, menu, found) == max(c for c in costs if c <= budget.amount)


def test_only_uneven_subnets_may_meet_a_budget() -> None:
    config, menu = tiny_config(n_layers=2), Menu(mlp=(0.5, 1.0), heads=(1.0,))
    table = CostTable("latency_ms", 1.0, (((1.0,),),) * 2, ((2.0, 3.0), (3.0, 2.0)))
    damage, budget = random_damage(config, menu, 0), Budget(latency_ms=7.0)
    with pytest.raises(ValueError, match=r"budget.latency_ms=7.0: the cheapest uniform sub-network costs 8:"):
        uniform_subnet(config, menu, table, budget)
    assert greedy(config, menu, table, budget, damage).mlp == (32, 64)
    assert knapsack(config, menu, table, budget, damage).mlp == (32, 64)


@pytest.mark.parametrize("kind", [*COUNTED, "latency_ms"])
def test_random_subnets_are_near_the_budget_and_distinct(kind: str) -> None:
    config, menu, table, _ = problem("wide", kind)
    for share in (0.5, 0.8):
        budget = budget_at(table, menu, share)
        drawn = random_subnets(config, menu, table, budget, 10, seed=0, tolerance=0.1)
        assert len(set(drawn)) == len(drawn) == 10
        assert set(drawn) <= set(EVERY["wide"])
        costs = [table.total(config, menu, s) for s in drawn]
        assert all(0.9 * budget.amount <= cost <= budget.amount for cost in costs)
        assert drawn == random_subnets(config, menu, table, budget, 10, seed=0, tolerance=0.1)
        assert drawn != random_subnets(config, menu, table, budget, 10, seed=1, tolerance=0.1)


@pytest.mark.parametrize("share", [0.05, 0.95])
def test_random_subnets_are_near_a_budget_far_from_the_mean(share: float) -> None:
    config, menu = tiny_config(n_layers=8), Menu(heads=(0.5, 1.0), dropped=(4, 5))
    table = counted_table(config, menu, "parameters")
    budget = budget_at(table, menu, share)
    drawn = random_subnets(config, menu, table, budget, 5, seed=0, tolerance=0.03)
    assert len(set(drawn)) == 5
    for subnet in drawn:
        assert 0.97 * budget.amount <= table.total(config, menu, subnet) <= budget.amount


@pytest.mark.parametrize("kind", [*COUNTED, "latency_ms"])
def test_random_subnets_repeat_where_there_are_no_more(kind: str) -> None:
    config, menu, table, _ = problem("wide", kind)
    budget = budget_at(table, menu, 0.2)
    near = {s for s in EVERY["wide"] if 0.9 * budget.amount <= table.total(config, menu, s) <= budget.amount}
    assert 2 < len(near) < 8
    drawn = random_subnets(config, menu, table, budget, 8, seed=0, tolerance=0.1)
    assert len(drawn) == 8
    assert set(drawn) == near


def test_random_subnets_that_no_draw_comes_near_are_refused() -> None:
    config, menu, table, _ = problem("wide", "parameters")
    least = table.range(menu)[0]
    message = rf"tolerance=0: no subnet drawn costs .* the nearest {least:.6g}; raise it"
    with pytest.raises(ValueError, match=message):
        random_subnets(config, menu, table, Budget(parameters=least + 1), 3, seed=0, tolerance=0)
    with pytest.raises(ValueError, match="count=0: must be at least 1"):
        random_subnets(config, menu, table, Budget(parameters=least), 0, seed=0)


def test_layers_are_dropped_in_the_menus_order() -> None:
    config, menu, table, damage = problem("uneven", "parameters")
    free = dataclasses.replace(damage, dropped=(0.0, 0.0, 5.0))  # layer 0 for nothing, but 2 goes first
    for share in (0.01, 0.2, 0.4, 0.6, 0.8):
        for subnet in searched((config, menu, table, free), budget_at(table, menu, share)).values():
            assert subnet.layers in {(0, 1, 2), (0, 1), (1,)}
    costly = Damage((((0.9,), (0.0,)),) * 3, ((0.9, 0.0),) * 3, (math.inf, math.inf, 0.1))
    for amount in (0.95, 0.8):
        budget = budget_at(table, menu, amount)
        for method in (greedy, knapsack):
            first = method(config, menu, table, budget, costly)
            assert first.layers == (0, 1)
    layers = [
        knapsack(config, menu, table, budget_at(table, menu, s), damage).layers for s in (0.99, 0.3, 0.0)
    ]
    assert layers[0] == (0, 1, 2)
    assert layers[-1] == (1,)


def test_of_equal_damage_the_larger_stays() -> None:
    config, menu, table, _ = problem("uneven", "parameters")
    none = Damage((((0.0,), (0.0,)),) * 3, ((0.0, 0.0),) * 3, (0.0,) * 3)
    cost = table.total(config, menu, Subnet.full(config))
    found = knapsack(config, menu, table, Budget(parameters=cost - 1), none)
    assert found.layers == (0, 1, 2)
    full = Subnet.full(config)
    changed = [
        a != b for f in ("mlp", "heads") for a, b in zip(getattr(found, f), getattr(full, f), strict=True)
    ]
    assert sum(changed) == 1


def test_damage_is_measured_one_module_at_a_time() -> None:
    config, menu, _, damage = problem("wide", "parameters")
    calls = []

    def loss(subnet: Subnet) -> float:
        calls.append(subnet)
        return 3.0 + damage.total(config, menu, subnet)

    found = measured_damage(config, menu, loss)
    full = Subnet.full(config)
    assert np.allclose(np.array(found.attention), damage.attention, rtol=0, atol=1e-12)
    assert np.allclose(np.array(found.mlp), damage.mlp, rtol=0, atol=1e-12)
    assert found.dropped == (math.inf, pytest.approx(damage.dropped[1]))
    assert found.total(config, menu, full) == 0.0
    assert len(calls) == len(set(calls)) == 1 + 2 * (3 + 3) + 1
    for subnet in calls:
        pairs = [zip(getattr(subnet, f), getattr(full, f), strict=False) for f in ("mlp", "heads", "groups")]
        places = {(f == 0, i) for f, pair in enumerate(pairs) for i, (a, b) in enumerate(pair) if a != b}
        assert len(places) == (subnet != full and subnet.layers == full.layers)
    two = dataclasses.replace(full, mlp=(16, 64), heads=(4, 2), groups=(1, 2))
    assert found.total(config, menu, two) == pytest.approx(
        damage.mlp[0][0] + damage.attention[0][1][0] + damage.attention[1][0][1]
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mlp": ((0.5, 0.1), (0.5, 0.0))}, r"damage.mlp\[0\]=.*: must end on 0"),
        ({"attention": (((0.0,),), ((math.inf,),))}, r"damage.attention\[1\]=.*: must be finite"),
        ({"dropped": (1.0,)}, "damage.dropped=1: there are 2 layers of MLPs; give all"),
        ({"dropped": (1.0, math.nan)}, "damage.dropped=.*: must be numbers"),
    ],
)
def test_wrong_damage_is_refused(change, message: str) -> None:
    right = Damage((((0.0,),), ((0.0,),)), ((0.5, 0.0), (0.5, 0.0)), (1.0, 1.0))
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(right, **change)


def test_damage_of_another_menu_is_refused() -> None:
    config, menu, table, _ = problem("wide", "parameters")
    other = random_damage(config, NARROW, 0)
    message = r"choices of damage=.* is of another menu or model"
    with pytest.raises(ValueError, match=message):
        other.total(config, menu, Subnet.full(config))
    for method in (greedy, knapsack):
        with pytest.raises(ValueError, match=message):
            method(config, menu, table, budget_at(table, menu, 0.5), other)
