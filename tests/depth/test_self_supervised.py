"""Exits that imitate their own model: objectives, gates, the cache, and a backbone that does not move."""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from elastic_lm.config.model import ExitConfig, ExitKind, ModelConfig
from elastic_lm.data.batch import Batch
from elastic_lm.depth.fitting import fit_exits
from elastic_lm.depth.self_supervised import SelfSupervisedExits, cache_taps, gate_cross_entropy
from elastic_lm.models.decoder import Decoder, Params, stack_layers
from elastic_lm.models.exits import attach_exits
from elastic_lm.models.registry import abstract_params, init_params
from elastic_lm.testing import all_logits, assert_same_tree, random_tokens, tiny_config
from elastic_lm.train.losses import Metrics, Objective, imitation_loss
from elastic_lm.train.method import RunData
from elastic_lm.train.state import TrainState

# Programs of moments: compiling them well takes longer than running them.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
CLOSE = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
KINDS: tuple[ExitKind, ...] = ("embedding", "norm", "mlp", "block")
TEACHER = jnp.asarray([[2.0, 0.5, -1.0, 0.0], [0.0, 1.0, 3.0, -2.0]])
STUDENT = jnp.asarray([[1.0, 0.0, 0.5, -0.5], [2.0, 1.0, 0.5, 0.0]])  # right, wrong


@functools.cache
def model(tied: bool = False) -> tuple[ModelConfig, Params]:
    """A model with one exit of every kind, two of them with gates, and numbers without special values."""
    exits = tuple(ExitConfig(i + 1, kind, tied, temperature=1.0 + i / 2) for i, kind in enumerate(KINDS))
    gated = tuple(ExitConfig(e.layer, e.kind, tied, temperature=e.temperature, gate=8) for e in exits[:2])
    config = tiny_config(sandwich_norm=True).with_exits((*gated, *exits[2:]))
    random = np.random.default_rng(0)
    shapes = nn.unbox(abstract_params(config))
    return config, jax.tree.map(lambda p: jnp.asarray(random.normal(0.0, 0.2, p.shape), p.dtype), shapes)


@functools.cache
def packed(config: ModelConfig, rows: int = 2, length: int = 10, seed: int = 0) -> Batch:
    """Two documents per row; the second one's last targets do not count."""
    random = np.random.default_rng(seed)
    tokens, targets = random.integers(0, config.vocab_size, (2, rows, length), np.int32)
    positions = np.tile(np.r_[0:4, 0 : length - 4].astype(np.int32), (rows, 1))
    segments = np.tile(np.repeat(np.asarray([1, 2], np.int32), (4, length - 4)), (rows, 1))
    weights = np.tile((np.arange(length) < length - 2).astype(np.float32), (rows, 1))
    return Batch(*map(jnp.asarray, (tokens, targets, weights, positions, segments)))


def run(method: SelfSupervisedExits, params: Params, batch: Batch) -> Any:
    """((loss, metrics), gradient)."""
    return jit(jax.value_and_grad(method.loss, has_aux=True))(*method.split(params), batch, jnp.int32(0))


def test_objectives_in_closed_form() -> None:
    p, q = np.asarray(jax.nn.softmax(TEACHER)), np.asarray(jax.nn.softmax(STUDENT))
    kl = (p * np.log(p / q)).sum(-1)
    CLOSE(imitation_loss("kl", TEACHER, STUDENT), kl)
    CLOSE(imitation_loss("kl", TEACHER, STUDENT, top_k=4), kl)
    CLOSE(imitation_loss("kl", TEACHER, STUDENT, top_k=99), kl)
    ids = np.asarray([[0, 1], [2, 1]])  # the teacher's two likeliest, renormalised
    p2, q2 = (np.take_along_axis(x, ids, -1) for x in (p, q))
    p2, q2 = p2 / p2.sum(-1, keepdims=True), q2 / q2.sum(-1, keepdims=True)
    CLOSE(imitation_loss("kl", TEACHER, STUDENT, top_k=2), (p2 * np.log(p2 / q2)).sum(-1))
    imitation = -np.log([q[0, 0], q[1, 2]])
    CLOSE(imitation_loss("argmax", TEACHER, STUDENT), imitation)
    unsure = np.asarray([0.0, np.log(4) + (q[1] * np.log(q[1])).sum()])  # the first one is right
    found = imitation_loss("penalised", TEACHER, STUDENT, alpha=0.7)
    CLOSE(found, 0.7 * imitation + 0.3 * unsure)
    uniform = imitation_loss("penalised", TEACHER, jnp.zeros((2, 4)), alpha=0.0)
    CLOSE(uniform, [0.0, 0.0])


def test_penalty_makes_wrong_heads_unsure_and_leaves_right_ones_alone() -> None:
    slope = jax.grad(lambda z: imitation_loss("penalised", TEACHER, z, alpha=0.0).sum())(STUDENT)
    assert not np.any(slope[0])
    before, after = (jnp.max(jax.nn.softmax(z[1])) for z in (STUDENT, STUDENT - 0.1 * slope))
    assert after < before


@pytest.mark.parametrize("tied", [False, True])
def test_loss_is_the_mean_over_exits(tied: bool) -> None:
    config, params = model(tied)
    batch = packed(config)
    method = SelfSupervisedExits(config, objective="argmax", loss_chunk=4)
    (loss, metrics), _ = run(method, params, batch)
    output = jit(Decoder(config).apply)({"params": params}, batch.tokens, batch.positions, batch.segments)
    y = jnp.argmax(output.logits, -1)

    def mean(x: jax.Array) -> jax.Array:
        return jnp.sum(x * batch.weights) / jnp.sum(batch.weights)

    expected = []
    for e, logits in zip(config.exits, output.exit_logits, strict=True):
        entropy = optax.softmax_cross_entropy_with_integer_labels(logits, y)
        CLOSE(metrics[f"loss/{e.name}"], mean(entropy))
        CLOSE(metrics[f"agreement/{e.name}"], mean(jnp.argmax(logits, -1) == y))
        expected.append(mean(entropy) + metrics.get(f"gate_loss/{e.name}", 0.0))
    CLOSE(loss, sum(expected) / 4)
    assert {name for name in metrics if "gate" in name} == {
        f"gate_{what}/exit_{i}" for what in ("loss", "accuracy") for i in (1, 2)
    }


def test_labels_are_not_read_and_uncounted_tokens_do_not_count() -> None:
    config, params = model()
    method, batch = SelfSupervisedExits(config), packed(config)
    other = batch.replace(targets=batch.targets * 0, tokens=batch.tokens.at[:, -2:].set(0))
    call = jit(method.loss)
    first, second = (call(*method.split(params), b, jnp.int32(0))[0] for b in (batch, other))
    assert first == second


@pytest.mark.parametrize("kind", ["norm", "mlp"])
def test_divergence_of_a_copied_last_exit_is_zero(kind: ExitKind) -> None:
    base = tiny_config()
    backbone = jax.tree.map(lambda p: 4 * p, init_params(base, jax.random.key(0)))
    config, params = attach_exits(base, backbone, [ExitConfig(4, kind)], jax.random.key(1))
    method = SelfSupervisedExits(config)
    (loss, metrics), grads = run(method, params, packed(config))
    assert abs(loss) < 1e-6
    assert metrics["agreement/exit_4"] == 1.0
    assert optax.tree.norm(grads) < 1e-4
    shallow, grown = attach_exits(base, backbone, [ExitConfig(1, kind)], jax.random.key(1))
    assert run(SelfSupervisedExits(shallow), grown, packed(config))[0][0] > 1e-3


def test_top_k_of_everything_is_the_full_divergence() -> None:
    config, params = model()
    batch = packed(config)
    full = run(SelfSupervisedExits(config), params, batch)
    all_ids = run(SelfSupervisedExits(config, top_k=config.vocab_size, loss_chunk=3), params, batch)
    jax.tree.map(CLOSE, all_ids, full)


@pytest.mark.parametrize("stacked", [False, True])
def test_cached_loss_is_the_online_loss(stacked: bool) -> None:
    config, params = model()
    form = stack_layers(params) if stacked else params
    method = SelfSupervisedExits(config, loss_chunk=4)
    trainable, frozen = method.split(form)
    batches = [packed(config, seed=seed) for seed in range(2)]
    cache = cache_taps(method, frozen, batches)
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(cache))
    assert [set(exit_taps) for exit_taps in cache[0].exits] == [
        {"hidden"},
        {"hidden"},
        {"residual", "mlp_input"},
        {"hidden"},
    ]
    online = jit(jax.value_and_grad(method.loss, has_aux=True))
    offline = jit(jax.value_and_grad(method.loss, has_aux=True))
    for batch, taps in zip(batches, cache, strict=True):
        expected = online(trainable, frozen, batch, jnp.int32(0))
        jax.tree.map(CLOSE, offline(trainable, frozen, taps, jnp.int32(0)), expected)


def test_cached_batches_are_what_exits_are_fitted_on() -> None:
    """The frozen layers do not run over the text a second time."""
    base, backbone = tiny_config(), model()[1]
    config, params = attach_exits(base, backbone, [ExitConfig(2, "linear", True, "fit")], jax.random.key(0))
    method = SelfSupervisedExits(config, cached_batches=2)
    trainable, frozen = method.split(params)
    batches = [packed(config, seed=seed) for seed in range(2)]

    def nothing() -> Iterator[Any]:
        raise AssertionError("the text is read again")
        yield

    data = RunData(nothing(), lambda: [], mesh=None, place=lambda batch, mesh: batch, seed=0)  # pyright: ignore[reportArgumentType]
    data = dataclasses.replace(data, read=method.batches(iter(batches), frozen, data))
    begun = method.begin(TrainState(jnp.int32(0), trainable, None), frozen, data)

    expected = fit_exits(config, params, batches)["exit_2"]["map"]
    jax.tree.map(CLOSE, begun.params["exit_2"]["map"], expected)


@pytest.mark.parametrize("objective", ["kl", "argmax", "penalised"])
def test_full_model_is_bit_identical_and_every_exit_trains(objective: Objective) -> None:
    config, params = model()
    method = SelfSupervisedExits(config, objective=objective)
    trainable, frozen = method.split(params)
    assert set(trainable) == {e.name for e in config.exits}
    tokens = random_tokens(config, 2, 9)
    before = all_logits(config, params, tokens)[config.n_layers]
    kept = jax.tree.map(np.array, frozen)
    optimiser = optax.adamw(1e-2)
    batch = packed(config)

    @jit
    def update(trainable: Params, state: Any) -> tuple[Params, Any, Metrics]:
        (_, metrics), grads = jax.value_and_grad(method.loss, has_aux=True)(
            trainable, frozen, batch, jnp.int32(0)
        )
        updates, state = optimiser.update(grads, state, trainable)
        return optax.apply_updates(trainable, updates), state, metrics

    state, losses, start = optimiser.init(trainable), [], trainable
    for _ in range(4):
        trainable, state, metrics = update(trainable, state)
        losses.append(sum(float(metrics[f"loss/{e.name}"]) for e in config.exits))
    assert losses[-1] < losses[0]
    assert_same_tree(kept, frozen)
    assert jnp.array_equal(all_logits(config, {**frozen, **trainable}, tokens)[config.n_layers], before)
    moved = jax.tree.map(lambda a, b: bool(np.any(a != b)), start, trainable)
    assert all(jax.tree.leaves(moved)), "a parameter does not train"


def test_gate_does_not_train_the_head() -> None:
    config, params = model()
    batch = packed(config)
    grads = [
        run(SelfSupervisedExits(config, balance_gates=balance), params, batch)[1] for balance in (True, False)
    ]
    heads = [{k: v for k, v in g["exit_2"].items() if k != "gate"} for g in grads]
    jax.tree.map(CLOSE, *heads)
    differs = jax.tree.map(
        lambda a, b: bool(np.any(a != b)), grads[0]["exit_2"]["gate"], grads[1]["exit_2"]["gate"]
    )
    assert any(jax.tree.leaves(differs))


@pytest.mark.parametrize("balance", [False, True])
def test_gate_loss_by_hand(balance: bool) -> None:
    config, params = model()
    own = {**params["exit_2"], "head": params["head"], "norm": params["final_norm"]}
    params, batch = {**params, "exit_2": own}, packed(config, rows=6)
    (_, metrics), _ = run(SelfSupervisedExits(config, balance_gates=balance, loss_chunk=4), params, batch)

    @jit
    def by_hand(params: Params) -> tuple[jax.Array, jax.Array]:
        decoder = Decoder(config).bind({"params": params})
        taps = decoder.taps(batch.tokens, (2, 4), batch.positions, batch.segments)
        features = decoder.exit_features(1, taps[2], batch.positions, batch.segments)
        student = jnp.argmax(decoder.exit_logits(1, features), -1)
        teacher = jnp.argmax(decoder.final_logits(decoder.final_features(taps[4].hidden)), -1)
        return decoder.exit_gate(1, features), student == teacher

    counted = np.asarray(batch.weights) > 0
    gate, right = (np.asarray(x)[counted] for x in by_hand(params))
    entropy = -np.where(right, np.log(gate), np.log1p(-gate))
    assert 0 < right.sum() < right.size
    means = entropy[right].mean(), entropy[~right].mean()
    CLOSE(metrics["gate_loss/exit_2"], sum(means) / 2 if balance else entropy.mean())
    CLOSE(metrics["gate_accuracy/exit_2"], ((gate > 0.5) == right).mean())


def test_gate_cross_entropy_stays_finite() -> None:
    probability = jnp.asarray([0.0, 0.25, 1.0])
    for right in (True, False):
        value, slope = jax.value_and_grad(
            lambda p, right=right: gate_cross_entropy(p, jnp.full(3, right)).sum()
        )(probability)
        assert np.isfinite(value)
        assert np.all(np.isfinite(slope))
    CLOSE(gate_cross_entropy(jnp.asarray([0.25, 0.25]), jnp.asarray([True, False])), -np.log([0.25, 0.75]))


def test_gate_learns_a_separable_toy() -> None:
    # Only tokens whose id is even are read rightly: the exit's head is the model's, negated for odd rows.
    config = tiny_config(n_layers=1, exits=()).with_exits((ExitConfig(1, "embedding", gate=16),))
    params = dict(init_params(config, jax.random.key(0)))
    table = jax.random.normal(jax.random.key(1), params["embed"]["table"].shape)
    head = jnp.where(jnp.arange(config.vocab_size)[:, None] % 2, 0.0, 1.0) * table
    params |= {"embed": {"table": table}, "head": {"kernel": table}}
    params["exit_1"] = {**params["exit_1"], "head": {"kernel": head}}
    params["layers_0"] = jax.tree.map(jnp.zeros_like, params["layers_0"])  # logits depend on the token alone
    method, batch = SelfSupervisedExits(config), packed(config, rows=4, length=32)
    trainable, frozen = method.split(params)
    optimiser = optax.adam(1e-2)

    @jit
    def update(gate: Params, state: Any) -> tuple[Params, Any, Any]:
        def loss(gate: Params) -> Any:
            return method.loss({"exit_1": {**trainable["exit_1"], "gate": gate}}, frozen, batch, jnp.int32(0))

        (_, metrics), grads = jax.value_and_grad(loss, has_aux=True)(gate)
        updates, state = optimiser.update(grads, state)
        return optax.apply_updates(gate, updates), state, metrics

    gate = trainable["exit_1"]["gate"]
    state, accuracy = optimiser.init(gate), []
    for _ in range(150):
        gate, state, metrics = update(gate, state)
        accuracy.append(float(metrics["gate_accuracy/exit_1"]))
    agreement = float(metrics["agreement/exit_1"])
    assert 0.2 < agreement < 0.8
    assert max(accuracy[0], agreement, 1 - agreement) < 0.9
    assert accuracy[-1] > 0.95


def temporary_bytes(exit_layers: tuple[int, ...], chunk: int) -> int:
    exits = tuple(ExitConfig(layer, "norm") for layer in exit_layers)
    config = tiny_config(vocab_size=8192, d_model=16, n_heads=2, d_mlp=16, max_len=512).with_exits(exits)
    method = SelfSupervisedExits(config, loss_chunk=chunk)
    params = nn.unbox(abstract_params(config))
    step = jit(jax.value_and_grad(method.loss, has_aux=True))
    lowered = step.lower(*method.split(params), packed(config, 2, 512), jnp.int32(0))
    return lowered.compile().memory_analysis().temp_size_in_bytes


def test_memory_does_not_grow_with_exits_times_vocabulary() -> None:
    logits = 2 * 512 * 8192 * 4  # of the full model or one exit, unchunked: 33.5 MB
    one, three = temporary_bytes((1,), chunk=16), temporary_bytes((1, 2, 3), chunk=16)
    assert three < logits / 2, f"{three} bytes: as much as whole logits"
    assert three - one < logits / 8, f"two more exits take {three - one} bytes"


def test_messages() -> None:
    with pytest.raises(ValueError, match="attach exits first"):
        SelfSupervisedExits(tiny_config())
    config, _ = model()
    with pytest.raises(ValueError, match=r"objective='mse': must be one of kl"):
        SelfSupervisedExits(config, objective="mse")
    bare = tiny_config().with_exits((ExitConfig(1, "embedding", tied=True),))
    with pytest.raises(ValueError, match=r"exits after layers \(1,\): tied `embedding` exits own nothing"):
        SelfSupervisedExits(bare).split({})
