"""Routers: gates that equal slices, draws that repeat, budgets that are met, files that come back."""

import dataclasses
import functools
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from elastic_lm.config.model import ModelConfig
from elastic_lm.config.subnet import Budget, Menu, Subnet
from elastic_lm.cost.counted import CostTable, counted_table
from elastic_lm.data.batch import Batch
from elastic_lm.models.decoder import Decoder, Params, stack_layers
from elastic_lm.testing import random_params, random_tokens, tiny_config
from elastic_lm.width.gated import Picks, gated_hidden
from elastic_lm.width.picking import ROUTERS
from elastic_lm.width.router import budget_code, straight_through
from elastic_lm.width.router_training import RouterTraining
from elastic_lm.width.slicing import slice_params
from elastic_lm.width.surrogate import SURROGATE
from elastic_lm.width.tilts import fit_tilts
from elastic_lm.width.trained_routers import DESCRIPTION, WEIGHTS, Routers, RouterShape

MENU = Menu((0.25, 0.5, 0.75, 1.0), (0.25, 0.5, 1.0), dropped=(2,))
ANCHORS = (0.6, 0.7, 0.8, 0.9, 1.0)
BETWEEN = (0.65, 0.75, 0.85, 0.95)
STEPS = 120
SCHEMES = [("end_to_end", "budget"), ("surrogate", "budget"), ("end_to_end", "hidden")]


@functools.cache
def model() -> tuple[ModelConfig, Params]:
    config = tiny_config(n_layers=4, n_heads=8, head_dim=4, elastic_groups=8, tied=True)
    return config, random_params(config)


@functools.cache
def table() -> CostTable:
    return counted_table(model()[0], MENU, "parameters")


def whole() -> float:
    return table().range(MENU)[1]


def batch(rows: int = 8, length: int = 16) -> Batch:
    tokens = random_tokens(model()[0], rows, length + 1)
    positions = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (rows, length))
    ones = jnp.ones((rows, length))
    return Batch(tokens[:, :-1], tokens[:, 1:], ones, positions, ones.astype(jnp.int32))


def method(scheme: Any, reads: Any, **fields: Any) -> RouterTraining:
    menu = dataclasses.replace(MENU, dropped=()) if reads == "hidden" else MENU
    shape = RouterShape(model()[0], menu, ANCHORS, reads, 32)
    return RouterTraining(shape, table(), STEPS, scheme=scheme, **fields)


@functools.cache
def stepper(scheme: str, reads: str) -> tuple[RouterTraining, Any, Any]:
    """A method, its optimizer and one compiled step."""
    training = method(scheme, reads)
    optimizer = optax.adam(optax.cosine_decay_schedule(1e-2, STEPS))
    frozen, data = stack_layers(model()[1]), batch()

    @jax.jit
    def step(trainable: Params, state: Any, i: jax.Array) -> Any:
        (_, metrics), gradients = jax.value_and_grad(training.loss, has_aux=True)(trainable, frozen, data, i)
        updates, state = optimizer.update(gradients, state)
        return optax.apply_updates(trainable, updates), state, metrics

    return training, optimizer, step


def train(scheme: str, reads: str) -> tuple[RouterTraining, Params, list[dict[str, float]]]:
    """A method, what it trained, and its metrics of every step."""
    training, optimizer, step = stepper(scheme, reads)
    trainable = training.split(stack_layers(model()[1]))[0]
    state, curve = optimizer.init(trainable), []
    for i in range(STEPS):
        trainable, state, metrics = step(trainable, state, jnp.int32(i))
        curve.append(jax.device_get(metrics))
    return training, trainable, curve


trained = functools.cache(train)


def routers(scheme: str = "surrogate") -> Routers:
    training, params, _ = trained(scheme, "budget")
    return Routers(training.shape, params[ROUTERS], table())


def budget(share: float) -> Budget:
    return Budget(parameters=share * whole())


def one_hot(indices: Any, choices: int) -> jax.Array:
    return jnp.eye(choices)[jnp.asarray(indices)]


def spent(subnet: Subnet, share: float) -> float:
    return table().total(model()[0], MENU, subnet) / budget(share).amount


def test_gated_layers_compute_what_the_slice_computes() -> None:
    config, params = model()
    rng = np.random.default_rng(0)
    for _ in range(2):
        subnet = MENU.sample(config, rng)
        mlp, heads, _, keep = MENU.indices(config, subnet)
        given = Picks(one_hot(heads, 3)[:, None, None], one_hot(mlp, 4)[:, None, None])
        keep_LB = jnp.broadcast_to(jnp.asarray(keep, jnp.float32)[:, None], (4, 2))
        tokens = random_tokens(config, 2, 9)
        found, mean = gated_hidden(
            config, MENU, stack_layers(params), tokens, lambda given, _: given, given, keep_LB
        )
        small, sliced = slice_params(config, params, subnet)
        taps = Decoder(small).bind({"params": sliced}).taps(tokens, (small.n_layers,))
        expected = taps[small.n_layers].hidden
        assert float(jnp.max(jnp.abs(found - expected))) < 2e-6 * float(jnp.max(jnp.abs(expected)))
        assert jnp.array_equal(mean.mlp, given.mlp[:, :, 0])


def test_code_is_one_hot_at_anchors_and_linear_between() -> None:
    codes = budget_code(jnp.asarray([0.6, 0.65, 0.675, 1.0, 0.1, 2.0]), ANCHORS)
    expected = [[1, 0, 0, 0, 0], [0.5, 0.5, 0, 0, 0], [0.25, 0.75, 0, 0, 0], [0, 0, 0, 0, 1]]
    expected += [[1, 0, 0, 0, 0], [0, 0, 0, 0, 1]]
    np.testing.assert_allclose(codes, expected, atol=1e-6)
    np.testing.assert_allclose(budget_code(jnp.asarray([0.3, 1.0]), (1.0,)), [[1.0], [1.0]])


def test_choices_are_one_hot_with_the_gradient_of_a_softmax() -> None:
    logits, key, weights = jnp.asarray([0.3, 0.1, -0.2]), jax.random.key(3), jnp.asarray([1.0, 2.0, 5.0])
    assert sorted(straight_through(logits, key).tolist()) == [0.0, 0.0, 1.0]
    assert straight_through(logits).tolist() == [1.0, 0.0, 0.0]
    noise = jax.random.gumbel(key, (3,))
    found = jax.grad(lambda r: straight_through(r, key, 2.0, 0.5) @ weights)(logits)
    expected = jax.grad(lambda r: jax.nn.softmax((2.0 * r + noise) / 0.5) @ weights)(logits)
    np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("scheme", "reads"), [SCHEMES[1], *(pytest.param(*SCHEMES[i], marks=pytest.mark.long) for i in (0, 2))]
)
def test_same_seed_same_draws_and_curve(scheme: str, reads: str) -> None:
    first = trained(scheme, reads)
    again = train(scheme, reads)
    assert first[2] == again[2]
    assert jax.tree.all(jax.tree.map(jnp.array_equal, first[1], again[1]))
    params = {**stack_layers(model()[1]), ROUTERS: first[1][ROUTERS]}
    everyone = jnp.full((8,), 0.8)
    picking = first[0].picking
    drawn = [picking.forward(params, batch(), everyone, key=jax.random.key(i))[1] for i in (0, 0, 1)]
    assert jax.tree.all(jax.tree.map(jnp.array_equal, drawn[0], drawn[1]))
    assert not jax.tree.all(jax.tree.map(jnp.array_equal, drawn[0], drawn[2]))


@pytest.mark.parametrize("scheme", ["end_to_end", "surrogate"])
def test_budgets_are_met_seen_and_between(scheme: str) -> None:
    for share in ANCHORS:
        assert 0.95 <= spent(routers(scheme).subnet(budget(share)), share) <= 1
    for share in BETWEEN:
        assert 0.92 <= spent(routers(scheme).subnet(budget(share)), share) <= 1


@pytest.mark.parametrize("scheme", ["end_to_end", "surrogate"])
def test_routers_learn_to_meet_budgets_by_themselves(scheme: str) -> None:
    untrained = method(scheme, "budget").shape.init(jax.random.key(5))
    before = Routers(routers(scheme).shape, untrained, table())
    misses = [
        np.mean([abs(spent(r.likeliest(budget(b)), b) - 1) for b in ANCHORS])
        for r in (before, routers(scheme))
    ]
    assert misses[1] < 0.06 < misses[0]
    assert routers(scheme).likeliest(budget(1.0)) == MENU.largest(model()[0])


@pytest.mark.long
def test_routers_of_states_spend_their_budget_on_average() -> None:
    training, learned, _ = trained("end_to_end", "hidden")
    params = {**stack_layers(model()[1]), **learned}
    data = batch()
    padded = jax.tree.map(lambda x: jnp.concatenate([x, jnp.zeros_like(x)]), data)
    picking = training.picking
    tilts = fit_tilts(picking, params, [padded])  # rows of padding do not count
    for anchor, tilt in zip(ANCHORS, tilts, strict=True):
        picked = picking.forward(params, batch(), jnp.full((8,), anchor), tilt=tilt)[1]
        assert 0.95 <= float(jnp.mean(picking.costs(picked))) / anchor <= 1.001


def test_the_likeliest_sub_network_is_served_where_it_fits() -> None:
    config, shape = model()[0], routers().shape
    rng = np.random.default_rng(0)
    for _ in range(20):
        drawn = jax.tree.map(
            lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32), shape.init(jax.random.key(0))
        )
        found = Routers(shape, drawn, table())
        for share in (0.6, 0.8, 0.95):
            likeliest, served = found.likeliest(budget(share)), found.subnet(budget(share))
            costs = [table().total(config, MENU, s) / whole() for s in (likeliest, served)]
            if costs[0] <= share:
                assert set(likeliest.layers) <= set(served.layers)
                assert costs[0] <= costs[1] <= share
                grown = zip(likeliest.layers, likeliest.mlp, likeliest.heads, strict=True)
                at = {i: (f, h) for i, f, h in zip(served.layers, served.mlp, served.heads, strict=True)}
                assert all(f <= at[i][0] and h <= at[i][1] for i, f, h in grown)


def test_whole_budget_is_the_whole_model() -> None:
    config, params = model()
    assert routers().subnet(budget(1.0)) == Subnet.full(config)
    assert routers().subnet(budget(3.0)) == Subnet.full(config)
    training, learned, _ = trained("surrogate", "budget")
    found = training.for_evaluation().loss(learned, stack_layers(params), batch(), jnp.int32(0))[1]
    taps = Decoder(config).bind({"params": params}).taps(batch().tokens, (4,))
    sums = training.picking.token_sums({**stack_layers(params)}, batch(), taps[4].hidden)
    np.testing.assert_allclose(found["loss/budget_1"], jnp.sum(sums.loss) / jnp.sum(sums.weight), rtol=1e-6)


def test_the_cost_of_what_is_picked_is_the_tables() -> None:
    config, rng = model()[0], np.random.default_rng(1)
    picking = method("surrogate", "budget").picking
    for _ in range(4):
        subnet = MENU.sample(config, rng)
        mlp, heads, _, keep = MENU.indices(config, subnet)
        picked = {
            "heads": one_hot(heads, 3)[:, None],
            "mlp": one_hot(mlp, 4)[:, None],
        }
        picked["dropped"] = one_hot([keep.count(False)], 2)
        expected = table().total(config, MENU, subnet) / whole()
        np.testing.assert_allclose(picking.costs(picked), [expected], rtol=1e-5)


def test_the_surrogate_sends_no_gradient_to_the_model_and_waits_for_its_own_fit() -> None:
    stacked = stack_layers(model()[1])
    training = method("surrogate", "budget", surrogate_error=1e-9)
    trainable, frozen = training.split(stacked)
    assert set(trainable) == {ROUTERS, SURROGATE}
    step, data = jnp.int32(0), batch()
    gradient = jax.jit(jax.grad(lambda t, f: training.loss(t, f, data, step)[0], (0, 1)))(trainable, frozen)
    assert not any(jnp.any(leaf) for leaf in jax.tree.leaves((gradient[0][ROUTERS], gradient[1])))
    assert all(jnp.any(leaf) for leaf in jax.tree.leaves(gradient[0][SURROGATE]))
    trusting = dataclasses.replace(training, surrogate_error=1e9)
    gradient = jax.jit(jax.grad(lambda t: trusting.loss(t, frozen, data, step)[0]))(trainable)
    assert all(jnp.any(leaf) for leaf in jax.tree.leaves(gradient[ROUTERS]["layers"]))


def test_model_trains_only_where_asked() -> None:
    stacked = stack_layers(model()[1])
    joint = method("end_to_end", "budget", train_model=True, distil=0.5)
    trainable, frozen = joint.split(stacked)
    assert set(trainable) == {*stacked, ROUTERS}
    assert not frozen
    data = batch()
    gradient = jax.jit(jax.grad(lambda t: joint.loss(t, frozen, data, jnp.int32(0))[0]))(trainable)
    assert all(jnp.any(leaf) for leaf in jax.tree.leaves(gradient["layers"]))
    assert set(method("end_to_end", "budget").split(stacked)[0]) == {ROUTERS}


def test_files_come_back(tmp_path: Any) -> None:
    routers().save(tmp_path)
    loaded = Routers.load(tmp_path, model()[0])
    assert loaded.shape == routers().shape
    assert loaded.table == table()
    assert all(loaded.subnet(budget(b)) == routers().subnet(budget(b)) for b in (*ANCHORS, *BETWEEN))


def test_other_costs_are_met_as_well() -> None:
    costly = dataclasses.replace(table(), kind="latency_ms", fixed=0.0)
    other = dataclasses.replace(routers(), table=costly)
    most = costly.range(MENU)[1]
    for share in (0.55, 0.7, 0.9):
        total = costly.total(model()[0], MENU, other.subnet(Budget(latency_ms=share * most)))
        assert 0.92 * share * most <= total <= share * most


def test_errors_say_what_to_do(tmp_path: Any) -> None:
    config = model()[0]
    with pytest.raises(ValueError, match="cheapest sub-network of this menu costs"):
        routers().subnet(budget(0.01))
    with pytest.raises(ValueError, match="table holds parameters"):
        routers().subnet(Budget(latency_ms=1.0))
    with pytest.raises(ValueError, match="raise the budget"):
        RouterTraining(RouterShape(config, MENU, (0.01, 1.0)), table(), STEPS)
    with pytest.raises(ValueError, match=r"^budgets=\(0\.9, 1\.0\): shape has anchors=.*: leave budgets out"):
        RouterTraining(RouterShape(config, MENU, ANCHORS), table(), STEPS, budgets=(0.9, 1.0))
    with pytest.raises(ValueError, match="router_width=8: shape has width=16"):
        RouterTraining(RouterShape(config, MENU, ANCHORS, width=16), table(), STEPS, router_width=8)
    with pytest.raises(ValueError, match=r"increasing, the last one 1\.0"):
        RouterShape(config, MENU, (0.5, 0.9))
    with pytest.raises(ValueError, match="end_to_end"):
        method("surrogate", "hidden")
    with pytest.raises(ValueError, match="end_to_end"):
        method("surrogate", "budget", train_model=True)
    by_token = Routers(
        RouterShape(config, Menu(), ANCHORS, "hidden"), {}, counted_table(config, Menu(), "flops"), (0.0,) * 5
    )
    with pytest.raises(ValueError, match="choose widths alone"):
        RouterShape(config, MENU, ANCHORS, "hidden")
    with pytest.raises(ValueError, match="for every token"):
        by_token.subnet(Budget(flops=1e9))
    with pytest.raises(FileNotFoundError, match="--config routers"):
        Routers.load(tmp_path, config)
    routers().save(tmp_path)
    with pytest.raises(ValueError, match="of another model"):
        Routers.load(tmp_path, tiny_config(n_layers=3, n_heads=8, head_dim=4, elastic_groups=8))
    (tmp_path / WEIGHTS).write_bytes((tmp_path / WEIGHTS).read_bytes()[:100])
    with pytest.raises(ValueError, match="not usable routers"):
        Routers.load(tmp_path, config)
    (tmp_path / DESCRIPTION).write_text(json.dumps({"format": "else"}))
    with pytest.raises(ValueError, match="format='else'"):
        Routers.load(tmp_path, config)
