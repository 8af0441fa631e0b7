"""Perplexity, accuracy and agreement per depth against numbers from whole logits."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from elastic_lm.depth.observations import observe
from elastic_lm.depth.quality import evaluate, shared_threshold_curve
from elastic_lm.models.decoder import Decoder, Params
from elastic_lm.models.registry import abstract_params
from elastic_lm.testing import random_tokens, tiny_config

CONFIG = tiny_config(exits=(1, 3))


class Letters:
    """One or two bytes per token."""

    def decode(self, ids: list[int]) -> str:
        return "".join("é" if i % 2 else "e" for i in ids)


@pytest.fixture(scope="module")
def params() -> Params:
    random = np.random.default_rng(0)
    shapes = nn.unbox(abstract_params(CONFIG))
    return jax.tree.map(lambda p: jnp.asarray(random.normal(0, 0.3, p.shape), p.dtype), shapes)


def fields(seed: int) -> dict[str, np.ndarray]:
    tokens = np.asarray(random_tokens(CONFIG, 3, 9, seed))
    weights = np.ones(tokens.shape, np.float32)
    weights[:, -2:] = 0
    return {
        "tokens": tokens,
        "targets": np.asarray(random_tokens(CONFIG, 3, 9, seed + 50)),
        "weights": weights,
        "positions": np.broadcast_to(np.arange(9, dtype=np.int32), tokens.shape),
        "segments": np.ones_like(tokens),
    }


def test_every_depth(params: Params) -> None:
    data = fields(0)
    rows = evaluate(CONFIG, params, [data], tokenizer=Letters())
    output = jax.jit(lambda p, t: Decoder(CONFIG).bind({"params": p})(t))(params, data["tokens"])
    counted = data["weights"] > 0
    text_bytes = int(np.sum(1 + data["targets"][counted] % 2))
    best = np.argmax(output.logits, -1)
    for row, logits in zip(rows, (*output.exit_logits, output.logits), strict=True):
        nats = optax.softmax_cross_entropy_with_integer_labels(logits, data["targets"])[counted]
        choice = np.argmax(logits, -1)
        assert row.nats_per_token == pytest.approx(float(np.mean(nats)), rel=1e-5)
        assert row.perplexity == pytest.approx(math.exp(np.mean(nats)), rel=1e-4)
        assert row.nats_per_byte == pytest.approx(float(np.sum(nats)) / text_bytes, rel=1e-5)
        assert row.accuracy == pytest.approx(np.mean((choice == data["targets"])[counted]))
        assert row.agreement == pytest.approx(np.mean((choice == best)[counted]))
    assert [row.layers for row in rows] == [1, 3, 4]
    assert rows[-1].agreement == 1.0


def test_without_exits_and_tokenizer(params: Params) -> None:
    rows = evaluate(CONFIG.with_exits(()), params, [fields(0), fields(1)])
    assert [row.layers for row in rows] == [4]
    assert rows[0].nats_per_byte is None


def test_shared_threshold_curve(params: Params) -> None:
    curve = shared_threshold_curve(observe(CONFIG, params, [fields(0)]))
    assert len(curve) == 21
    assert (curve[0].threshold, curve[-1].threshold) == (1.0, 0.0)
    layers = [point.mean_layers for point in curve]
    assert layers == sorted(layers, reverse=True)
    assert layers[-1] == 1  # threshold 0: the first exit, always
