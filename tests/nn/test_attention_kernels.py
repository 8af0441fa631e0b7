"""Kernels give what XLA's attention gives, in Pallas' interpreter, and serve only what they are made for."""

import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from elastic_lm.config.model import ModelConfig
from elastic_lm.models.decoder import Decoder, stack_layers
from elastic_lm.nn import kernels
from elastic_lm.nn.kernels import Kernel, attention_by, choose
from elastic_lm.testing import random_params, random_tokens, tiny_config
from elastic_lm.train.config import TrainConfig

LENGTH = 256  # two blocks of 128 would be one of 256, so that tests with more blocks name smaller ones
SPLASH, CUDNN = (Kernel(name, interpret=True, required=True) for name in ("splash", "cudnn"))
CASES = {
    "causal": tiny_config(n_layers=1),
    "window": tiny_config(n_layers=1, windows=(40,)),
    "windows of a scan": tiny_config(n_layers=3, windows=(40, 0, 7)),
    "softcap": tiny_config(n_layers=1, attn_softcap=2.0),
    "one group": tiny_config(n_layers=1, n_kv_heads=1),
}


def loss_and_gradient(config: ModelConfig, kernel: Kernel | None, *, documents: bool = True) -> Any:
    """Of a packed row of three documents, with layers stacked as in training."""
    params = stack_layers(random_params(config))
    tokens = random_tokens(config, batch=2, length=LENGTH)
    starts = jnp.asarray([0, 70, 201])
    segments = jnp.tile(jnp.searchsorted(starts, jnp.arange(LENGTH), side="right"), (2, 1))
    positions = jnp.arange(LENGTH) - starts[segments - 1]
    given = (positions, segments) if documents else (None, None)
    # So small that gradients are about 1, of which sums of 512 tokens are right to 1e-5.
    target = np.random.default_rng(0).normal(size=(2, LENGTH, config.d_model)).astype(np.float32) / 64

    def loss(params: Any) -> jax.Array:
        with attention_by(kernel):
            decoder = Decoder(config).bind({"params": params})
            tap = decoder.taps(tokens, (config.n_layers,), *given)[config.n_layers]
        return jnp.sum(tap.hidden * target)

    return jax.device_get(jax.jit(jax.value_and_grad(loss))(params))


@pytest.mark.parametrize("case", CASES)
def test_splash_is_equal(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "BLOCKS", (128,))
    expected = loss_and_gradient(CASES[case], None)
    chex.assert_trees_all_close(loss_and_gradient(CASES[case], SPLASH), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", [case for case in CASES if case != "softcap"])
def test_what_cudnn_is_given_is_equal(case: str) -> None:
    """Mask, scale and layout, with jax's own attention in the place of cuDNN's."""
    expected = loss_and_gradient(CASES[case], None)
    chex.assert_trees_all_close(loss_and_gradient(CASES[case], CUDNN), expected, rtol=1e-5, atol=1e-5)


def test_rows_of_one_document_need_no_ids() -> None:
    config = CASES["causal"]
    expected = loss_and_gradient(config, None, documents=False)
    found = loss_and_gradient(config, SPLASH, documents=False)
    chex.assert_trees_all_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 devices")
def test_splash_on_a_mesh_is_equal() -> None:
    from elastic_lm.models.sharding import make_mesh

    config = CASES["causal"]
    found = loss_and_gradient(config, Kernel("splash", make_mesh(2, 1, 2, jax.devices()[:4]), True, True))
    chex.assert_trees_all_close(found, loss_and_gradient(config, None), rtol=1e-5, atol=1e-5)


def test_what_a_kernel_does_not_serve() -> None:
    q = jnp.zeros((1, 130, 4, 8), jnp.float32)
    assert "130 tokens are no multiple of 128" in kernels.unserved(SPLASH, q, 2, softcap=0.0)
    assert "head_dim=192" in kernels.unserved(SPLASH, jnp.zeros((1, 128, 4, 192)), 2, softcap=0.0)
    real = Kernel("cudnn")
    assert "float32" in kernels.unserved(real, q, 2, softcap=0.0)
    assert "softcap" in kernels.unserved(real, q.astype(jnp.bfloat16), 2, softcap=1.0)
    assert not kernels.unserved(real, q.astype(jnp.bfloat16), 2, softcap=0.0)


@pytest.mark.parametrize(
    ("config", "reason"), [(tiny_config(position="alibi"), "biases are added"), (tiny_config(), "130 tokens")]
)
def test_a_layer_that_is_not_served_is_refused_by_name_and_computed_by_auto(
    config: ModelConfig, reason: str
) -> None:
    params, tokens = random_params(config), random_tokens(config, batch=1, length=130)
    run = functools.partial(Decoder(config).apply, {"params": params}, tokens)
    with pytest.raises(ValueError, match=rf"train\.attention='splash': .*{reason}"), attention_by(SPLASH):
        run()
    with attention_by(Kernel("splash", interpret=True)):
        found = run()
    np.testing.assert_array_equal(found.logits, run().logits)


def test_the_platform_chooses() -> None:
    assert choose("auto", None) is None
    assert choose("xla", None) is None
    for name in ("splash", "cudnn"):
        with pytest.raises(ValueError, match=rf"train\.attention='{name}': runs on .*devices are cpu"):
            choose(name, None)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"train\.attention='flash': must be one of auto"):
        TrainConfig(attention="flash")  # pyright: ignore[reportArgumentType]


def test_recomputed_layers_without_windows_are_traced() -> None:
    """`jax.checkpoint` traces the window 0 that every layer of such a model is given."""
    config = tiny_config(n_layers=3)
    params = stack_layers(random_params(config))
    tokens = random_tokens(config, batch=2, length=LENGTH)

    def hidden(params: Any) -> jax.Array:
        with attention_by(SPLASH):
            return Decoder(config, remat=True).bind({"params": params}).taps(tokens, (3,))[3].hidden

    assert jax.eval_shape(hidden, params).shape == (2, LENGTH, config.d_model)
