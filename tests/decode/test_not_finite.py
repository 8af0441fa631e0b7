"""Logits that are not finite are never answered with a token: every way to decode stops and says why."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import elastic_lm as el
from elastic_lm.config.model import ExitConfig
from elastic_lm.data.batch import Batch
from elastic_lm.decode.sampling import BROKEN, Sampling, sample
from elastic_lm.depth.observations import observe
from elastic_lm.depth.previewing import fit_preview
from elastic_lm.models.finite import NotFiniteError
from elastic_lm.testing import random_params, random_tokens, tiny_config

DEEP, EXIT, GATE = "layers_2/mlp/up/kernel", "exit_1/norm/scale", "exit_1/gate/up/kernel"
EXITS = (ExitConfig(1, "norm", gate=4), ExitConfig(2, "norm", tied=True, gate=4))


def damaged(params, name, value=jnp.nan):
    """The parameters with one bad value."""
    keys = name.split("/")
    tree = params = jax.tree.map(lambda x: x, params)
    for key in keys[:-1]:
        tree = tree[key]
    leaf = tree[keys[-1]]
    tree[keys[-1]] = leaf.at[(0,) * leaf.ndim].set(value)
    return params


@pytest.fixture(scope="module")
def gated(make_model):
    config = tiny_config(n_layers=3).with_exits(EXITS)
    return make_model(config, random_params(config))


def broken(model, name, value=jnp.nan):
    return dataclasses.replace(model, params=damaged(model.params, name, value))


@pytest.mark.parametrize(("bad", "which"), [(np.nan, 7), (np.inf, 7), (-np.inf, slice(None))])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_no_token_is_drawn_from_a_bad_logit(bad, which, temperature) -> None:
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(2, 64)), jnp.float32)
    logits = logits.at[0, 5].set(-np.inf).at[1, which].set(bad)  # one that is never drawn is no error
    settings = Sampling(
        temperature=jnp.full(2, temperature),
        top_k=jnp.full(2, 3),
        top_p=jnp.full(2, 0.9),
        min_p=jnp.zeros(2),
        repetition_penalty=jnp.ones(2),
        seed=jnp.zeros(2, jnp.uint32),
    )
    good, none = sample(logits, jnp.zeros((2, 4), jnp.int32), jnp.asarray([1, 1]), settings)
    assert 0 <= int(good) < 64
    assert int(good) != 5
    assert int(none) == BROKEN


@pytest.mark.parametrize(
    ("thresholds", "options"),
    [
        (None, {}),
        pytest.param((2.0, 0.9), {"lossless": True}, marks=pytest.mark.long),
        pytest.param((2.0, 0.9), {"lossless": True, "lookup": True}, marks=pytest.mark.long),
        pytest.param((2.0, 0.9), {"missing": "propagate"}, marks=pytest.mark.long),
    ],
)
@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_every_way_to_decode(model, thresholds, options, temperature) -> None:
    sampler = broken(model, DEEP).sampler(thresholds, **options)
    with pytest.raises(NotFiniteError, match=rf"prompt 0: the logits after 3 tokens .*{DEEP}"):
        sampler.sample([1, 2, 3], 6, temperature=temperature)


def test_streams_and_stop_strings(model) -> None:
    sampler = broken(model, DEEP).sampler(stream_every=2)
    with pytest.raises(NotFiniteError, match=DEEP):
        list(sampler.stream([1, 2, 3], 6))

    class Letters:
        def encode(self, text, *, bos=False):
            return [ord(c) % 64 for c in text]

        def decode(self, ids):
            return "".join(chr(64 + i) for i in ids)

    sampler.tokenizer = Letters()
    with pytest.raises(NotFiniteError, match=DEEP):
        sampler.sample("abc", 6, stop="zz")


@pytest.mark.parametrize(("name", "metric"), [(EXIT, "max_prob"), (EXIT, "logit_margin"), (GATE, "learned")])
@pytest.mark.parametrize("lossless", [False, True])
@pytest.mark.long
def test_a_damaged_exit_does_not_only_seem_unsure(gated, name, metric, lossless) -> None:
    sampler = broken(gated, name).sampler((0.5, 2.0), metric, lossless=lossless)
    with pytest.raises(NotFiniteError, match=name):
        sampler.sample([1, 2, 3], 6)
    # An exit that nothing reads does no harm.
    assert len(sampler.sample([1, 2, 3], 6, exit=None).tokens) == 6


def test_a_damaged_exit_is_named(model) -> None:
    sampler = broken(model, "exit_1/norm/scale").sampler((0.5, 2.0))
    with pytest.raises(NotFiniteError, match="exit_1/norm/scale"):
        sampler.sample([1, 2, 3], 6)


@pytest.mark.long
def test_a_preview() -> None:
    config = tiny_config(n_layers=3)
    tokens = random_tokens(config, batch=32, length=17)
    ones = jnp.ones((32, 16), jnp.int32)
    batch = Batch(tokens[:, :-1], tokens[:, 1:], 1.0 * ones, jnp.cumsum(ones, 1) - 1, ones)
    params = random_params(config)
    preview, _ = fit_preview(config, params, [batch] * 4, ranks=(8,))
    bad = damaged(params, "layers_1/attn/out/kernel", jnp.inf)
    sampler = el.Sampler(el.Decoder(config), bad, preview=preview)
    with pytest.raises(NotFiniteError, match="layers_1/attn/out/kernel"):
        sampler.sample([1, 2], 3)
    with pytest.raises(NotFiniteError, match=r"features .*layers_1/attn/out/kernel"):
        fit_preview(config, bad, [batch] * 4, ranks=(8,))


@pytest.mark.long
def test_float16_that_overflows_is_named(gated) -> None:
    config = dataclasses.replace(gated.config, dtype="float16", param_dtype="float16")
    large = jax.tree.map(lambda x: (100 * x if x.ndim > 1 else x).astype(jnp.float16), gated.params)
    with pytest.raises(NotFiniteError, match=r"all weights are finite: .*float16, 65504.*'bfloat16'"):
        el.Sampler(el.Decoder(config), large).sample([1, 2, 3], 4)


@pytest.mark.long
def test_held_out_text_is_not_observed(gated) -> None:
    tokens = random_tokens(gated.config, batch=2, length=9)
    ones = jnp.ones((2, 8), jnp.int32)
    batch = Batch(tokens[:, :-1], tokens[:, 1:], 1.0 * ones, jnp.cumsum(ones, 1) - 1, ones)
    for name in (DEEP, EXIT, GATE):
        with pytest.raises(NotFiniteError, match=rf"held-out row 0: the logits .*{name}"):
            observe(gated.config, damaged(gated.params, name), [batch])


@pytest.mark.long
def test_encoder_decoders() -> None:
    config = el.EncoderDecoderConfig(vocab_size=48, d_model=32, n_layers=2, n_heads=4, d_mlp=64, n_labels=2)
    params = random_params(config)
    name = "/".join(k.key for k in jax.tree_util.tree_leaves_with_path(params["encoder_head"])[-1][0])
    model = el.TextToText(el.EncoderDecoder(config), damaged(params, f"encoder_head/{name}"))
    assert model.generate([3, 4, 5], 3)[0].tokens
    with pytest.raises(NotFiniteError, match="encoder_head"):
        model.encode([[3, 4, 5], [6]])

    decoder = next(k for k in params if k.startswith("decoder"))
    path = "/".join(k.key for k in jax.tree_util.tree_leaves_with_path(params[decoder])[0][0])
    model = el.TextToText(el.EncoderDecoder(config), damaged(params, f"{decoder}/{path}"))
    with pytest.raises(NotFiniteError, match=decoder):
        model.generate([[3, 4, 5], [6]], 3)
    with pytest.raises(NotFiniteError, match=decoder):
        model.classify([[3, 4, 5], [6]], labels=[[7, 1], [8, 1]])


@pytest.mark.long
def test_a_prefix_keeps_nothing_that_is_not_finite(gated) -> None:
    prefix = el.PrefixCache()
    sampler = broken(gated, DEEP).sampler()
    with pytest.raises(NotFiniteError):
        sampler.sample([1, 2, 3, 4], 4, prefix=prefix)
    assert not prefix.tokens
