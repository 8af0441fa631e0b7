"""Previews of the vocabulary head: the whole head's choice where they are sure, and rows for themselves."""

import dataclasses
import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

import elastic_lm as el
from elastic_lm.config.model import ExitConfig
from elastic_lm.data.batch import Batch
from elastic_lm.decode.results import check_drawn
from elastic_lm.decode.sampling import BROKEN
from elastic_lm.decode.segment import PREVIEW
from elastic_lm.depth.preview_files import load_preview, save_preview
from elastic_lm.depth.previewing import (
    directions,
    fit_preview,
    least_margin,
    make_preview,
    measure_preview,
    outcomes,
    trial,
)
from elastic_lm.models.decoder import Decoder
from elastic_lm.models.finite import NotFiniteError
from elastic_lm.models.registry import init_params
from elastic_lm.nn.preview import head_fingerprint, preview_logits
from elastic_lm.nn.vocab_head import Head
from elastic_lm.testing import random_tokens, tiny_config

NEW = 24
V, D = 61, 32  # a vocabulary that is no multiple of a block


@pytest.fixture(scope="module")
def decaying():
    """Features [N, D] and a head [V, D] of which a few directions say most."""
    rng = np.random.default_rng(0)
    spread = 0.7 ** np.arange(D)
    features = (rng.normal(size=(2000, D)) * spread) @ np.linalg.qr(rng.normal(size=(D, D)))[0]
    return features.astype(np.float32), rng.normal(size=(V, D)).astype(np.float32)


def preview_of(features, kernel, rank, blocks=4, block=4):
    moment = features.T.astype(np.float64) @ features / len(features)
    down, up = directions(kernel.astype(np.float64), moment)
    return make_preview(down, up, rank, jnp.float32, blocks=blocks, block=block)


def test_directions_have_the_least_squared_error_of_all_logits(decaying):
    features, kernel = decaying
    whole = features @ kernel.T
    best = np.linalg.svd(whole, compute_uv=False)
    for rank in (1, 4, 16):
        preview = preview_of(features, kernel, rank)
        error = np.sum((features @ np.asarray(preview.down)[:rank].T @ np.asarray(preview.up).T - whole) ** 2)
        assert error == pytest.approx(np.sum(best[rank:] ** 2), rel=1e-3)  # Eckart and Young


def test_kept_rows_are_exact_and_the_others_previewed(decaying):
    features, kernel = decaying
    preview = preview_of(features, kernel, 6)
    found = preview_logits(preview, jnp.asarray(features[:200]), Head(jnp.asarray(kernel)))
    scores = features[:200] @ np.asarray(preview.down)[:6].T @ np.asarray(preview.up).T
    whole = features[:200] @ kernel.T
    exact = np.isclose(found.logits, whole, atol=1e-4)
    assert (exact.sum(axis=1) >= 13).all()  # four blocks of four, the last block of the vocabulary has one
    np.testing.assert_allclose(np.where(exact, 0, found.logits), np.where(exact, 0, scores), atol=1e-4)


def test_the_gap_is_in_standard_deviations_of_the_errors(decaying):
    """The spread of a row is that of its errors, and a wide gap is never wrong."""
    features, kernel = decaying
    preview = preview_of(features, kernel, 6)
    errors = features @ kernel.T - features @ np.asarray(preview.down)[:6].T @ np.asarray(preview.up).T
    np.testing.assert_allclose(preview.spread, np.sqrt(np.mean(errors**2, axis=0)), rtol=1e-3)
    found = preview_logits(preview, jnp.asarray(features), Head(jnp.asarray(kernel)))
    wrong = np.argmax(found.logits, axis=1) != np.argmax(features @ kernel.T, axis=1)
    gap = np.asarray(found.gap)
    assert 0 < wrong.mean() < 0.2
    assert wrong[gap > 3].mean() < 0.1 * wrong[gap < 0].mean()


def test_a_preview_of_all_coordinates_is_the_head(decaying):
    features, kernel = decaying
    found = preview_logits(
        preview_of(features, kernel, D), jnp.asarray(features[:20]), Head(jnp.asarray(kernel))
    )
    np.testing.assert_allclose(found.logits, features[:20] @ kernel.T, atol=1e-3)
    assert np.isfinite(found.gap).all()


def test_a_bias_of_the_head_counts_in_what_is_kept_and_in_what_is_previewed(decaying):
    """A row becomes the likeliest by its bias alone, and rows that are not kept have theirs."""
    features, kernel = decaying
    bias = np.random.default_rng(1).normal(0, 2, len(kernel)).astype(np.float32)
    bias[7] = 100.0
    head = Head(jnp.asarray(kernel), jnp.asarray(bias))
    preview = preview_of(features, kernel, 6)
    found = preview_logits(preview, jnp.asarray(features[:50]), head)
    np.testing.assert_allclose(found.logits[:, 7], features[:50] @ kernel[7] + 100, rtol=1e-4)

    scores = features[:50] @ np.asarray(preview.down)[:6].T @ np.asarray(preview.up).T + bias
    whole = features[:50] @ kernel.T + bias
    either = np.isclose(found.logits, whole, atol=1e-3) | np.isclose(found.logits, scores, atol=1e-3)
    assert either.all()
    assert head_fingerprint(head) != head_fingerprint(Head(head.kernel))


def test_the_margin_allows_just_so_many_wrong_tokens():
    gap = np.arange(10, dtype=np.float32)
    right = np.ones(10, bool)
    assert least_margin(gap, right, 0.9) == -np.inf
    right[[2, 5, 7]] = False
    for allowed, share in ((1, 0.89), (2, 0.79)):
        margin = least_margin(gap, right, share)
        assert np.sum((gap >= margin) & ~right) == allowed
    assert np.sum((gap >= least_margin(gap, right, 0.95)) & ~right) == 0


@pytest.mark.parametrize("rank", [1, 6])
def test_the_calibration_counts_as_right_what_decoding_gets_right(decaying, rank):
    """For every number of blocks, also where a row that was not kept has the largest logit."""
    features, kernel = decaying
    blocks = (1, 3, 16)
    gaps, rights = trial(
        preview_of(features, kernel, rank, blocks=16), features, Head(jnp.asarray(kernel)), blocks
    )
    for count, gap, right in zip(blocks, gaps, rights, strict=True):
        preview = preview_of(features, kernel, rank, blocks=count)
        decoded_gap, decoded_right, _ = outcomes(preview, features, Head(jnp.asarray(kernel)))
        np.testing.assert_array_equal(right, decoded_right)
        np.testing.assert_allclose(gap, decoded_gap, rtol=1e-3, atol=1e-3)


@pytest.fixture(
    scope="module", params=[pytest.param(False, marks=pytest.mark.long), True], ids=["untied", "tied"]
)
def fitted(request, make_model):
    exits = (ExitConfig(1, "norm", tied=True), ExitConfig(2, "norm", tied=False))
    config = dataclasses.replace(tiny_config(n_layers=3, vocab_size=V), exits=exits, tied=request.param)
    params = jax.tree.map(lambda x: 6.0 * x if x.ndim > 1 else x, init_params(config, jax.random.key(0)))
    tokens = random_tokens(config, batch=64, length=33)
    ones = jnp.ones((16, 32), jnp.int32)
    batches = [
        Batch(part[:, :-1], part[:, 1:], 1.0 * ones, jnp.cumsum(ones, 1) - 1, ones)
        for part in np.split(tokens, 4)
    ]
    preview, report = fit_preview(
        config, params, batches, ranks=(8, 16), agreement=0.99, blocks=(2, 4), block=4
    )
    return make_model(config, params), preview, report


PROMPTS = np.random.default_rng(2).integers(0, V, (6, 9)).tolist()


def test_the_report(fitted):
    _, preview, report = fitted
    assert report.rank == preview.rank in (8, 16)
    assert report.agreement > 0.95
    assert 0 <= report.variation < 0.1
    assert report.tokens == 256


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"blocks": ()}, r"blocks=\(\): give at least one"),
        ({"blocks": (4, 0)}, r"blocks=\(4, 0\): .* at least 1"),
        ({"ranks": (0,)}, r"ranks=\(0,\): .* at least 1"),
        ({"block": 0}, r"block=0: must be at least 1"),
        ({"agreement": 1.0}, r"agreement=1.0: must be a share"),
    ],
)
def test_sizes_that_give_no_preview_are_refused(sizes, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        fit_preview(tiny_config(), {}, [], **sizes)


def test_a_preview_is_measured_on_text(fitted):
    model, preview, _ = fitted
    tokens = random_tokens(model.config, batch=4, length=33, seed=7)
    ones = jnp.ones((4, 32), jnp.int32)
    weights = 1.0 * ones.at[0].set(0)
    batch = Batch(tokens[:, :-1], tokens[:, 1:], weights, jnp.cumsum(ones, 1) - 1, ones)
    report = measure_preview(model.config, model.params, [batch, vars(batch)], preview)
    assert report.tokens == 2 * 3 * 32
    assert report.agreement > 0.9


def test_a_preview_that_is_always_sure_is_read_and_not_to_blame(fitted, tmp_path):
    model, preview, report = fitted
    sure = preview.replace(margin=jnp.float32(-np.inf))
    save_preview(sure, report, tmp_path / "sure.safetensors")
    assert load_preview(tmp_path / "sure.safetensors", model.config)[0].margin == -np.inf
    served = types.SimpleNamespace(params={**model.params, PREVIEW: sure}, config=model.config)
    with pytest.raises(NotFiniteError, match="all weights are finite"):
        check_drawn([[1]], np.asarray([[1, BROKEN]]), [2], served)
    save_preview(preview.replace(margin=jnp.float32(np.nan)), report, tmp_path / "bad.safetensors")
    with pytest.raises(ValueError, match=r"is no preview .*margin=.*nan.*: must be a number"):
        load_preview(tmp_path / "bad.safetensors", model.config)


@pytest.mark.long
def test_never_sure_is_the_whole_head_and_always_sure_is_not(fitted):
    model, preview, _ = fitted
    full = [out.tokens for out in model.sampler().sample(PROMPTS, NEW)]
    never = model.sampler(preview=preview.replace(margin=jnp.float32(np.inf)))
    assert [out.tokens for out in never.sample(PROMPTS, NEW)] == full
    poor = preview.replace(up=preview.up[:, :2], margin=jnp.float32(-np.inf))
    assert [out.tokens for out in model.sampler(preview=poor).sample(PROMPTS, NEW)] != full


@pytest.mark.long
def test_an_exit_without_a_threshold_reads_the_whole_head_where_the_preview_is_unsure(fitted):
    model, preview, _ = fitted
    never = preview.replace(margin=jnp.float32(np.inf))
    static = (0.0, 2.0)
    whole, previewed = (model.sampler(static, preview=p).sample(PROMPTS, NEW) for p in (None, never))
    assert [out.tokens for out in previewed] == [out.tokens for out in whole]
    assert [out.exit_layers for out in previewed] == [out.exit_layers for out in whole]


def test_tokens_go_deeper_where_the_preview_is_unsure(fitted):
    """By a confidence that reads no logits, all of them would leave after the first layer."""
    model, preview, _ = fitted
    sampler = model.sampler((0.01, 2.0), "cosine", preview=preview.replace(margin=jnp.float32(np.inf)))
    outputs = sampler.sample(PROMPTS, NEW)
    assert {layers for out in outputs for layers in out.exit_layers} == {3}
    assert [out.tokens for out in outputs] == [out.tokens for out in model.sampler().sample(PROMPTS, NEW)]


@pytest.mark.parametrize("thresholds", [None, (0.055, 2.0), (0.05, 0.05)])
def test_rows_of_a_batch_are_what_they_are_alone(fitted, thresholds):
    model, preview, _ = fitted
    sampler = model.sampler(thresholds, preview=preview)
    together = [out.tokens for out in sampler.sample(PROMPTS, NEW)]
    assert together == [sampler.sample(prompt, NEW).tokens for prompt in PROMPTS]


@pytest.mark.long
def test_lossless_rows_are_verified_by_the_whole_head(fitted):
    model, preview, _ = fitted
    full = [out.tokens for out in model.sampler().sample(PROMPTS, NEW)]
    poor = preview.replace(up=preview.up[:, :2], margin=jnp.float32(-np.inf))
    sampler = model.sampler((0.05, 0.05), preview=poor, lossless=True, lookup=True, window=8)
    assert [out.tokens for out in sampler.sample(PROMPTS, NEW)] == full


def test_a_sub_network_is_refused(fitted):
    """A preview is of the whole model's features, as options say that name both."""
    model, preview, _ = fitted
    half = el.Subnet.uniform(model.config, mlp=0.5)
    sampler = model.sampler(preview=preview)
    with pytest.raises(ValueError, match=r"^subnet=Subnet.*: the preview is of the whole model"):
        sampler.sample(PROMPTS, NEW, subnet=half)
    whole = sampler.sample(PROMPTS, NEW, subnet=el.Subnet.full(model.config))
    assert [out.tokens for out in whole] == [out.tokens for out in sampler.sample(PROMPTS, NEW)]
    with pytest.raises(ValueError, match=r"^preview='given': is of the whole model's features"):
        model.sampler(preview=preview, subnet=half)


def test_another_margin_compiles_nothing(fitted):
    model, preview, _ = fitted
    model.sampler(preview=preview).sample(PROMPTS, NEW)
    before = el.Sampler.compilations()
    model.sampler(preview=preview.replace(margin=jnp.float32(0.123))).sample(PROMPTS, NEW)
    assert el.Sampler.compilations() == before


def test_a_preview_of_another_head_is_refused(fitted):
    """Also one of the same size; the same head in another dtype is no other head."""
    model, preview, _ = fitted
    other = jax.tree.map(lambda x: 2 * x, model.params)
    with pytest.raises(
        ValueError, match=rf"^preview.head='{preview.head}': is of another model's vocabulary"
    ):
        el.Sampler(Decoder(model.config), other, preview=preview)
    rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16), model.params)
    assert el.Sampler(Decoder(model.config), rounded, preview=preview).options.preview is preview
    el.Sampler(Decoder(model.config), other, preview=preview.replace(head=""))  # not recorded


def test_files(fitted, tmp_path):
    model, preview, report = fitted
    save_preview(preview, report, tmp_path / "preview.safetensors")
    again, what = load_preview(tmp_path / "preview.safetensors", model.config)
    assert what == report
    jax.tree.map(np.testing.assert_array_equal, again, preview)
    assert (again.blocks, again.block) == (preview.blocks, 4)

    with pytest.raises(FileNotFoundError, match="no preview"):
        load_preview(tmp_path / "other", model.config)
    with pytest.raises(ValueError, match=r"is of a head of \(61, 32\) rows and columns, not \(64, 32\)"):
        load_preview(tmp_path / "preview.safetensors", tiny_config())
    with safe_open(tmp_path / "preview.safetensors", framework="numpy") as file:
        metadata = file.metadata()
    assert metadata["format"] == "elastic_lm preview 1"
    assert {"date", "versions"} == set(json.loads(metadata["provenance"]))
    arrays = {"down": np.eye(D, dtype=np.float32)}
    save_file(arrays, tmp_path / "old", {**metadata, "format": "another"})
    with pytest.raises(ValueError, match=r'"format" is not "elastic_lm preview 1".*write one with'):
        load_preview(tmp_path / "old", model.config)

    (tmp_path / "text").write_text("no")
    with pytest.raises(ValueError, match="is no preview of a vocabulary head"):
        load_preview(tmp_path / "text", model.config)
    with pytest.raises(ValueError, match=r"is of a head of \(61, 32\)"):
        el.Sampler(Decoder(tiny_config()), {}, preview=preview)
