"""The relatives of BERT beyond parity: exits, resuming, training, meshes and costs."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import elastic_lm as el
from elastic_lm import hf
from elastic_lm.cascade.classifier import classify
from elastic_lm.cascade.scores import PLAIN
from elastic_lm.config.encoder import EncoderConfig
from elastic_lm.cost.sequences import encoder_flops
from elastic_lm.models.encoder import Encoder
from elastic_lm.models.sharding import make_mesh, param_shardings
from elastic_lm.models.task_heads import exit_encoder
from elastic_lm.nn.disentangled import distance_index
from elastic_lm.nn.encoder import places
from elastic_lm.testing import random_params
from elastic_lm.train.tasks.tuning import TaskBatch, TaskTuning

FOLDER = Path(__file__).parents[1] / "golden" / "encoders"
RELATIVES = ("xlm-roberta", "electra", "deberta-v2", "modernbert", "mpnet", "albert")
SHAPE = {"vocab_size": 40, "d_model": 16, "n_layers": 3, "n_heads": 2, "d_mlp": 24, "max_len": 40}


def classifier(family: str) -> tuple[EncoderConfig, dict]:
    """The golden model of a family, with a head for three classes and an exit."""
    config, params = hf.load(FOLDER / family)
    assert isinstance(config, EncoderConfig)
    if config.mlm:
        config, params = dataclasses.replace(config, mlm=False), {**params}
        params.pop("token_head")
    if not config.n_labels:
        config, params = el.attach_task_head(config, params, 3, "classification", jax.random.key(0))
    return el.attach_task_exits(config, params, (1,))


def batch_of(config: EncoderConfig) -> TaskBatch:
    expected = np.load(FOLDER / config.family / "expected.npz")
    tokens, mask = jnp.asarray(expected["tokens"]), jnp.asarray(expected["mask"]).astype(bool)
    return TaskBatch(
        tokens=tokens,
        mask=mask,
        types=jnp.asarray(expected["types"]),
        targets=jnp.asarray([0, 1, 2]),
        weights=jnp.ones((3,), jnp.float32),
    )


@pytest.mark.parametrize("family", RELATIVES)
def test_an_exit_is_a_smaller_encoder_from_which_the_larger_one_resumes(family: str) -> None:
    config, params = classifier(family)
    batch = batch_of(config)
    model = Encoder(config).bind({"params": params})
    early, last = model.all_logits(batch.tokens, batch.mask, batch.types)

    small, own = exit_encoder(config, params, 1)
    found = Encoder(small).bind({"params": own})(batch.tokens, batch.mask, batch.types)
    np.testing.assert_allclose(found.logits, early, rtol=1e-5, atol=1e-5)

    inputs = (batch.tokens, batch.mask, batch.types)
    entering = model.states(*inputs, depth=1)
    resumed = classify(config, params, *inputs, entering, scoring=PLAIN, layers_done=1)
    np.testing.assert_allclose(resumed.logits, last, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(resumed.logits, model(*inputs).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", RELATIVES)
@pytest.mark.long
def test_every_parameter_learns_from_a_task(family: str) -> None:
    config, params = classifier(family)
    method, batch = TaskTuning(config=config), batch_of(config)
    trainable, frozen = method.split(params)
    assert not frozen
    (before, _), slopes = jax.value_and_grad(method.loss, has_aux=True)(
        trainable, frozen, batch, jnp.int32(0)
    )

    still = [
        jax.tree_util.keystr(path)
        for path, slope in jax.tree_util.tree_leaves_with_path(slopes)
        if not np.abs(slope).max() > 0
    ]
    assert not still
    moved = jax.tree.map(lambda x, slope: x - 1e-3 * slope, trainable, slopes)
    after, _ = method.loss(moved, frozen, batch, jnp.int32(0))
    assert after < before


@pytest.mark.parametrize("family", RELATIVES)
def test_every_parameter_has_a_place_on_a_mesh(family: str) -> None:
    config, params = classifier(family)
    shardings = param_shardings(config, make_mesh(devices=jax.devices()[:1]))
    assert jax.tree.structure(shardings) == jax.tree.structure(params)


def test_a_local_layer_sees_as_many_tokens_on_either_side() -> None:
    mask = np.ones((1, 9), bool)
    mask[0, 5] = False
    queries, keys, window = places(jnp.asarray(mask), 2)
    ahead = np.asarray(queries)[0, :, None] - np.asarray(keys)[0, None]
    near = np.abs(np.arange(9)[:, None] - np.arange(9)[None]) <= 2
    np.testing.assert_array_equal((ahead >= 0) & (ahead < window), near & mask)


@pytest.mark.parametrize(("buckets", "longest"), [(256, 512), (4, 8), (32, 64), (0, 7)])
def test_buckets_are_those_of_transformers(buckets: int, longest: int) -> None:
    torch = pytest.importorskip("torch")
    module = pytest.importorskip("transformers.models.deberta_v2.modeling_deberta_v2")
    span = buckets or longest
    states = torch.zeros(1, 600, 1)
    theirs = module.build_relative_position(states, states, bucket_size=buckets or -1, max_position=longest)
    theirs = torch.clamp(theirs[0] + span, 0, 2 * span - 1).numpy()
    np.testing.assert_array_equal(distance_index(600, buckets, longest), theirs)


def test_flops_are_those_of_the_products_that_run() -> None:
    def counted(config: EncoderConfig) -> float:
        params = random_params(config)
        tokens = jnp.zeros((1, 32), jnp.int32)
        model = jax.jit(lambda params: Encoder(config).apply({"params": params}, tokens).logits)
        return model.lower(params).cost_analysis()["flops"]

    forms = {
        "gated": {"gated": True},
        "map": {"embed_map": True},
        "vectors": {"relative": "disentangled", "relative_buckets": 8, "relative_max_distance": 16},
        "convolution": {"conv_kernel": 3},
    }
    plain = EncoderConfig(**{**SHAPE, "d_model": 64}, n_labels=2)
    for name, changes in forms.items():
        other = dataclasses.replace(plain, **changes)
        wanted = encoder_flops(other, 32) - encoder_flops(plain, 32)
        # Softmaxes, norms, activations and look-ups are counted by XLA only.
        assert counted(other) - counted(plain) == pytest.approx(wanted, rel=0.2), name

    local = dataclasses.replace(plain, window=4, global_every=3)
    near = sum(abs(i - j) <= 2 for i in range(32) for j in range(32))
    assert encoder_flops(plain, 32) - encoder_flops(local, 32) == 4 * 64 * 2 * (32 * 32 - near)
    assert encoder_flops(local, 32, layers=3) == encoder_flops(local, 32)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"embed_dim": 8}, r"embed_map=False: embed_dim=8 is not d_model=16"),
        ({"positions": "rope", "d_model": 6}, r"head_dim=3: .* even"),
        ({"conv_kernel": 2}, r"conv_kernel=2: .* odd"),
        ({"relative": "bias", "relative_buckets": 7}, r"relative_buckets=7: must be even"),
        ({"relative": "disentangled", "relative_buckets": 2}, r"relative_buckets=2: must be 0"),
        ({"relative": "bias", "relative_max_distance": 9}, r"relative_max_distance=9: must exceed the 16"),
        ({"window": -1}, r"window=-1"),
        ({"global_every": 0}, r"global_every=0"),
    ],
)
def test_what_does_not_fit_is_refused(changes: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        EncoderConfig(**{**SHAPE, **changes})
