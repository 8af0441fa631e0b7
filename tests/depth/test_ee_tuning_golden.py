"""Twenty steps of EE-Tuning on a tiny model, against the losses stored in tests/golden.

A change of the curve that is meant is stored by:  python tests/depth/test_ee_tuning_golden.py
"""

import json
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from elastic_lm.config.model import ExitConfig
from elastic_lm.data.batch import Batch
from elastic_lm.depth.ee_tuning import EETuning
from elastic_lm.models.exits import attach_exits
from elastic_lm.models.registry import abstract_params
from elastic_lm.testing import tiny_config

GOLDEN = Path(__file__).parents[1] / "golden" / "ee_tuning" / "losses.json"
STEPS = 20


def stepping_tokens(random: np.random.Generator, rows: int, length: int, vocab: int) -> np.ndarray:
    """Rows that count up by 1, 2 or 3, one step per row: predictable from two tokens."""
    start = random.integers(0, vocab, (rows, 1))
    return (start + random.integers(1, 4, (rows, 1)) * np.arange(length)) % vocab


def losses() -> dict[str, list[float]]:
    """The curve of every metric; numpy draws everything, so it depends on no PRNG of JAX."""
    random = np.random.default_rng(0)
    config = tiny_config(tied=True)
    shapes = nn.unbox(abstract_params(config))
    params = jax.tree.map(lambda p: jnp.asarray(random.normal(0, 0.1, p.shape), p.dtype), shapes)
    exits = (ExitConfig(1, "norm"), ExitConfig(2, "mlp"), ExitConfig(3, "block", tied=True))
    config, params = attach_exits(config, params, exits, jax.random.key(0))
    method = EETuning(
        config, weights=(0.5, 1.0, 1.0), warmup_steps=4, dynamic_token_weights=True, loss_chunk=8
    )
    trainable, frozen = method.split(params)
    optimizer = optax.adam(1e-2)

    @jax.jit
    def update(trainable, state, batch, step):
        (_, metrics), grads = jax.value_and_grad(method.loss, has_aux=True)(trainable, frozen, batch, step)
        updates, state = optimizer.update(grads, state)
        return optax.apply_updates(trainable, updates), state, metrics

    state = optimizer.init(trainable)
    curve: dict[str, list[float]] = {}
    for step in range(STEPS):
        rows = jnp.asarray(stepping_tokens(random, 8, 25, config.vocab_size), jnp.int32)
        tokens, targets = rows[:, :-1], rows[:, 1:]
        positions = jnp.broadcast_to(jnp.arange(24), tokens.shape)
        batch = Batch(tokens, targets, jnp.ones(tokens.shape), positions, jnp.ones_like(tokens))
        trainable, state, metrics = update(trainable, state, batch, jnp.int32(step))
        for name, value in metrics.items():
            curve.setdefault(name, []).append(round(float(value), 6))
    return curve


def test_twenty_steps() -> None:
    stored = json.loads(GOLDEN.read_text())
    curve = losses()
    hint = "if this change is meant, store the new curve: python tests/depth/test_ee_tuning_golden.py"
    assert curve.keys() == stored.keys(), hint
    for name in ("loss", "loss/exit_1", "loss/exit_2", "loss/exit_3"):
        np.testing.assert_allclose(curve[name], stored[name], rtol=2e-3, err_msg=f"{name}: {hint}")
        if name != "loss":  # the sum grows while its weights warm up
            assert stored[name][-1] < stored[name][0] - 0.1


if __name__ == "__main__":
    GOLDEN.parent.mkdir(parents=True, exist_ok=True)
    GOLDEN.write_text(json.dumps(losses(), indent=1) + "\n")
    print(f"stored {GOLDEN}")
