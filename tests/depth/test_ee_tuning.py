"""Training exits: weights, gradients, what is computed and what is not."""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from elastic_lm.config.model import ExitConfig, ModelConfig
from elastic_lm.data.batch import Batch
from elastic_lm.depth.ee_tuning import EETuning, JointTraining
from elastic_lm.models.decoder import Decoder, Params, stack_layers
from elastic_lm.models.exits import attach_exits
from elastic_lm.models.registry import abstract_params
from elastic_lm.testing import assert_same_tree, random_tokens, tiny_config

KINDS = ("embedding", "norm", "mlp", "block")


@functools.cache
def tuned(tied: bool = False) -> tuple[ModelConfig, Params]:
    """A model with one exit of every kind and numbers without special values."""
    exits = tuple(ExitConfig(i + 1, kind, tied, temperature=1.0 + i) for i, kind in enumerate(KINDS))
    config = tiny_config().with_exits(exits)
    random = np.random.default_rng(0)
    shapes = nn.unbox(abstract_params(config))
    return config, jax.tree.map(lambda p: jnp.asarray(random.normal(0.0, 0.2, p.shape), p.dtype), shapes)


def packed(config: ModelConfig, rows: int = 2, length: int = 10) -> Batch:
    """Two documents per row; the second one's last targets do not count."""
    tokens = random_tokens(config, rows, length)
    positions = jnp.broadcast_to(jnp.r_[0:4, 0 : length - 4], tokens.shape)
    segments = jnp.broadcast_to(jnp.r_[jnp.ones(4, int), jnp.full(length - 4, 2)], tokens.shape)
    weights = jnp.ones(tokens.shape).at[:, -2:].set(0.0)
    return Batch(tokens, random_tokens(config, rows, length, seed=1), weights, positions, segments)


def value_and_grad(method: EETuning) -> Callable[..., Any]:
    return jax.value_and_grad(method.loss, has_aux=True)


def count_dots(function: Callable[..., Any], *args: Any) -> int:
    """Matrix products in a program, loop bodies counted once."""

    def inner(value: Any) -> list[Any]:
        if isinstance(value, jax.extend.core.ClosedJaxpr):
            return [value.jaxpr]
        return [value] if isinstance(value, jax.extend.core.Jaxpr) else []

    def count(jaxpr: Any) -> int:
        values = [
            v for e in jaxpr.eqns for p in e.params.values() for v in (p if isinstance(p, tuple) else [p])
        ]
        dots = sum(e.primitive.name == "dot_general" for e in jaxpr.eqns)
        return dots + sum(count(sub) for value in values for sub in inner(value))

    return count(jax.make_jaxpr(function)(*args).jaxpr)


def test_loss_is_the_weighted_sum_and_metrics_are_per_exit() -> None:
    config, params = tuned()
    batch = packed(config)
    method = EETuning(config, weights=(0.1, 0.2, 0.3, 0.4))
    total, metrics = jax.jit(method.loss)(*method.split(params), batch, jnp.int32(0))
    output = Decoder(config).bind({"params": params})(batch.tokens, batch.positions, batch.segments)
    expected = 0.0
    for i, logits in enumerate(output.exit_logits):
        entropy = optax.softmax_cross_entropy_with_integer_labels(logits, batch.targets)
        mean = jnp.sum(entropy * batch.weights) / jnp.sum(batch.weights)
        hits = jnp.sum((jnp.argmax(logits, -1) == batch.targets) * batch.weights)
        np.testing.assert_allclose(metrics[f"loss/exit_{i + 1}"], mean, rtol=1e-5)
        np.testing.assert_allclose(metrics[f"accuracy/exit_{i + 1}"], hits / batch.weights.sum(), rtol=1e-5)
        expected += method.weights[i] * mean
    np.testing.assert_allclose(total, expected, rtol=1e-5)


def test_dynamic_token_weights() -> None:
    config, params = tuned()
    batch = packed(config)
    method = EETuning(config, weights=(0.0, 1.0, 0.0, 0.0), dynamic_token_weights=True)
    (total, metrics), grads = value_and_grad(method)(*method.split(params), batch, jnp.int32(0))

    def by_hand(head: jax.Array) -> jax.Array:
        changed = {**params, "exit_2": {**params["exit_2"], "head": {"kernel": head}}}
        decoder = Decoder(config).bind({"params": changed})
        logits = decoder(batch.tokens, batch.positions, batch.segments).exit_logits[1]
        entropy = optax.softmax_cross_entropy_with_integer_labels(logits, batch.targets)
        omega = jax.lax.stop_gradient(jnp.max(jax.nn.softmax(logits), axis=-1))
        return jnp.sum(omega * entropy * batch.weights) / jnp.sum(batch.weights)

    expected, slope = jax.value_and_grad(by_hand)(params["exit_2"]["head"]["kernel"])
    np.testing.assert_allclose(total, expected, rtol=1e-5)
    np.testing.assert_allclose(grads["exit_2"]["head"]["kernel"], slope, rtol=1e-4, atol=1e-7)
    assert metrics["loss/exit_2"] > total  # the metric stays the plain cross-entropy


def test_weight_warmup() -> None:
    config, _ = tuned()
    linear = EETuning(config, weights=(1.0, 0.5, 0.2, 0.0), warmup_steps=10, warmup_from=0.1)
    np.testing.assert_allclose(linear.exit_weights(0), [0.1, 0.1, 0.1, 0.0], rtol=1e-6)
    np.testing.assert_allclose(linear.exit_weights(5), [0.55, 0.3, 0.15, 0.0], rtol=1e-6)
    np.testing.assert_allclose(linear.exit_weights(10), [1.0, 0.5, 0.2, 0.0], rtol=1e-6)
    np.testing.assert_allclose(linear.exit_weights(99), [1.0, 0.5, 0.2, 0.0], rtol=1e-6)
    cosine = EETuning(config, warmup_steps=4, warmup="cosine")
    expected = [0.0, (1 - 0.5**0.5) / 2, 0.5, (1 + 0.5**0.5) / 2, 1.0]
    for step, weight in enumerate(expected):
        np.testing.assert_allclose(cosine.exit_weights(step), [weight] * 4, atol=1e-6)
    np.testing.assert_allclose(EETuning(config).exit_weights(0), [1.0] * 4)


@pytest.mark.long
def test_chunks_remat_and_stacking_change_nothing() -> None:
    config, params = tuned()

    def run(method: EETuning, params: Params) -> Any:
        return jax.jit(value_and_grad(method))(*method.split(params), packed(config), jnp.int32(0))

    expected = run(EETuning(config), params)
    others = {
        "chunk": run(EETuning(config, loss_chunk=3), params),
        "remat": run(EETuning(config, loss_chunk=4, remat=True), params),
        "stacked": run(EETuning(config), stack_layers(params)),
    }
    for name, result in others.items():
        check = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6, err_msg=name)
        jax.tree.map(check, result, expected)


@pytest.mark.parametrize("tied", [False, True])
def test_backbone_is_bit_identical_after_training(tied: bool) -> None:
    config, params = tuned(tied)
    method = EETuning(config, dynamic_token_weights=True)
    trainable, frozen = method.split(params)
    before = jax.tree.map(np.array, params)
    optimiser = optax.adamw(1e-2)

    @jax.jit
    def update(trainable: Params, state: Any, step: jax.Array) -> tuple[Params, Any]:
        grads, _ = jax.grad(method.loss, has_aux=True)(trainable, frozen, packed(config), step)
        updates, state = optimiser.update(grads, state, trainable)
        return optax.apply_updates(trainable, updates), state

    state = optimiser.init(trainable)
    for step in range(3):
        trainable, state = update(trainable, state, jnp.int32(step))
    after = {**frozen, **trainable}
    assert set(trainable) == {e.name for e in config.exits if jax.tree.leaves(params.get(e.name, {}))}
    assert_same_tree({k: before[k] for k in frozen}, {k: after[k] for k in frozen})
    for name, tree in trainable.items():
        moved = jax.tree.map(lambda a, b: bool(np.any(a != b)), before[name], tree)
        assert all(jax.tree.leaves(moved)), f"{name} has a parameter that does not train"


def gradient_dots(layers: int, exit_layers: tuple[int, ...], weights: tuple[float, ...] = ()) -> int:
    exits = tuple(ExitConfig(layer, "norm") for layer in exit_layers)
    config = tiny_config(n_layers=layers).with_exits(exits)
    method = EETuning(config, weights=weights)
    params = nn.unbox(abstract_params(config))
    batch = packed(config, length=20)  # so many tokens that products have one form on every platform
    return count_dots(value_and_grad(method), *method.split(params), batch, jnp.int32(0))


def test_no_backward_through_the_backbone() -> None:
    # A layer forward is six products: qkv, q k, p v, out, up, down; a backward would double them.
    assert gradient_dots(6, (3,)) - gradient_dots(6, (2,)) == 6
    assert gradient_dots(6, (6,)) - gradient_dots(6, (2,)) == 4 * 6


def test_forward_stops_after_the_deepest_exit_in_use() -> None:
    assert gradient_dots(4, (2,)) == gradient_dots(9, (2,))
    assert gradient_dots(6, (2, 5), weights=(1.0, 0.0)) == gradient_dots(6, (2,))
    config, params = tuned()
    method = EETuning(config, weights=(1.0, 0.0, 1.0, 0.0))
    assert set(method.split(params)[0]) == {"exit_1", "exit_3"}
    kept = {k: v for k, v in params.items() if k not in ("layers_3", "final_norm", "head", "exit_4")}
    _, metrics = method.loss(*method.split(kept), packed(config), jnp.int32(0))
    assert set(metrics) == {"loss", "loss/exit_1", "accuracy/exit_1", "loss/exit_3", "accuracy/exit_3"}


def temporary_bytes(exit_layers: tuple[int, ...], chunk: int) -> int:
    exits = tuple(ExitConfig(layer, "norm") for layer in exit_layers)
    config = tiny_config(vocab_size=8192, d_model=16, n_heads=2, d_mlp=16, max_len=512).with_exits(exits)
    method = EETuning(config, loss_chunk=chunk)
    params = nn.unbox(abstract_params(config))
    batch = packed(config, rows=2, length=512)
    step = jax.jit(value_and_grad(method)).lower(*method.split(params), batch, jnp.int32(0))
    return step.compile().memory_analysis().temp_size_in_bytes


def test_memory_does_not_grow_with_exits_times_vocabulary() -> None:
    logits = 2 * 512 * 8192 * 4  # what the unchunked logits of one exit take: 33.5 MB
    one, four = temporary_bytes((1,), chunk=16), temporary_bytes((1, 2, 3, 4), chunk=16)
    assert four < logits / 2, f"{four} bytes: as much as whole logits"
    assert four - one < logits / 10, f"three more exits take {four - one} bytes"
    assert temporary_bytes((1,), chunk=512) > logits


def test_joint_training_is_final_plus_weighted_exits() -> None:
    config, params = tuned()
    batch = packed(config)
    weights = (0.25, 0.5, 0.0, 0.1)
    exits, joint = EETuning(config, weights=weights), JointTraining(config, weights=weights, loss_chunk=4)
    trainable, frozen = joint.split(params)
    assert frozen == {}
    (total, metrics), grads = jax.jit(value_and_grad(joint))(trainable, frozen, batch, jnp.int32(0))
    part, _ = jax.jit(exits.loss)(*exits.split(params), batch, jnp.int32(0))
    np.testing.assert_allclose(total, metrics["loss/final"] + part, rtol=1e-5)
    assert np.any(grads["layers_0"]["mlp"]["up"]["kernel"])
    assert np.any(grads["exit_4"]["norm"]["scale"])


def test_joint_exits_learn_from_full_depth() -> None:
    config, params = tuned()
    batch = packed(config)
    joint = JointTraining(config, weights=(0.25, 0.0, 0.0, 0.5), distil=0.75, loss_chunk=4)
    (total, metrics), grads = jax.jit(value_and_grad(joint))(params, {}, batch, jnp.int32(0))

    def by_hand(params: Params) -> jax.Array:
        output = Decoder(config).apply({"params": params}, batch.tokens, batch.positions, batch.segments)
        teacher = jax.lax.stop_gradient(jax.nn.softmax(output.logits))

        def mean(x: jax.Array) -> jax.Array:
            return jnp.sum(x * batch.weights) / jnp.sum(batch.weights)

        total = mean(optax.softmax_cross_entropy_with_integer_labels(output.logits, batch.targets))
        for weight, logits in ((0.25, output.exit_logits[0]), (0.5, output.exit_logits[3])):
            entropy = optax.softmax_cross_entropy_with_integer_labels(logits, batch.targets)
            divergence = optax.kl_divergence(jax.nn.log_softmax(logits), teacher)
            total += weight * mean(0.25 * entropy + 0.75 * divergence)
        return total

    expected, slopes = jax.jit(jax.value_and_grad(by_hand))(params)
    np.testing.assert_allclose(total, expected, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6), grads, slopes)
    assert set(metrics) >= {"loss/final", "accuracy/final", "loss/exit_1", "loss/exit_4"}


def test_messages() -> None:
    config, _ = tuned()
    with pytest.raises(ValueError, match=r"method.distil=1.5: must be in \[0, 1\]"):
        JointTraining(config, distil=1.5)
    with pytest.raises(ValueError, match="attach exits first"):
        EETuning(tiny_config())
    with pytest.raises(ValueError, match=r"weights=\(1.0,\): needs one entry per exit.*\(1, 2, 3, 4\)"):
        EETuning(config, weights=(1.0,))
    with pytest.raises(ValueError, match="at least one exit"):
        EETuning(config, weights=(0.0,) * 4)
    with pytest.raises(ValueError, match="warmup='sine'"):
        EETuning(config, warmup="sine")


def test_copied_exits_learn() -> None:
    config = tiny_config()
    _, params = tuned()
    backbone = {k: v for k, v in params.items() if not k.startswith("exit_")}
    config, params = attach_exits(config, backbone, [ExitConfig(2, "mlp")], jax.random.key(0))
    method = EETuning(config)
    trainable, frozen = method.split(params)
    run = jax.jit(value_and_grad(method))
    losses = []
    for step in range(10):
        (loss, _), grads = run(trainable, frozen, packed(config), jnp.int32(step))
        trainable = jax.tree.map(lambda p, g: p - 0.1 * g, trainable, grads)
        losses.append(float(loss))
    assert losses == sorted(losses, reverse=True)


def test_exits_that_own_nothing_cannot_be_tuned() -> None:
    config, params = attach_exits(
        tiny_config(), {}, [ExitConfig(1, "embedding", tied=True)], jax.random.key(0)
    )
    with pytest.raises(ValueError, match=r"exits after layers \(1,\): tied `embedding` exits own nothing"):
        EETuning(config).split(params)
