"""Elastic training: which subnets are drawn, and that their losses and gradients are those of slices."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from elastic_lm.config.model import ModelConfig
from elastic_lm.config.subnet import Menu, Subnet
from elastic_lm.data.batch import Batch
from elastic_lm.models.decoder import Decoder, Params, stack_layers, unstack_layers
from elastic_lm.models.sharding import make_mesh
from elastic_lm.testing import random_params, random_tokens, tiny_config
from elastic_lm.train.config import TrainConfig
from elastic_lm.train.method import TEACHER
from elastic_lm.train.pretraining import Pretraining
from elastic_lm.width.axes import grouped_kept
from elastic_lm.width.elastic_training import (
    ElasticEvaluation,
    ElasticTraining,
    ElasticTrainingConfig,
    draw_subnets,
    uniform_subnets,
)
from elastic_lm.width.slicing import slice_params
from elastic_lm.width.switched import MenuIndices

CLOSE = functools.partial(np.testing.assert_allclose, rtol=2e-4, atol=2e-5)
CONFIG = tiny_config(n_layers=2, n_heads=8, head_dim=4, elastic_groups=8)
MENU = Menu(mlp=(0.25, 0.5, 1.0), heads=(0.5, 1.0))
FOUR = Menu(mlp=(0.25, 1.0), heads=(0.5, 1.0))
DROPPING = dataclasses.replace(MENU, dropped=(1,))


@functools.cache
def params() -> Params:
    return random_params(CONFIG)


@functools.cache
def packed(config: ModelConfig = CONFIG, rows: int = 2, length: int = 10) -> Batch:
    """Two documents per row; the second one's last targets do not count."""
    tokens, targets = (random_tokens(config, rows, length, seed) for seed in (0, 1))
    positions = jnp.tile(jnp.r_[0:4, 0 : length - 4].astype(jnp.int32), (rows, 1))
    segments = jnp.tile(jnp.repeat(jnp.asarray([1, 2]), jnp.asarray([4, length - 4])), (rows, 1))
    weights = jnp.tile((jnp.arange(length) < length - 2).astype(jnp.float32), (rows, 1))
    return Batch(tokens, targets, weights, positions, segments)


@functools.partial(jax.jit, static_argnums=0)
def logits(config: ModelConfig, params: Params) -> jax.Array:
    batch = packed()
    return Decoder(config).bind({"params": params})(batch.tokens, batch.positions, batch.segments).logits


def sliced(params: Params, subnet: Subnet, config: ModelConfig = CONFIG) -> jax.Array:
    """[B, T, V] of the ordinary model that a subnet is."""
    return logits(*slice_params(config, params, subnet))


def mean(per_token: jax.Array) -> jax.Array:
    return jnp.sum(per_token * packed().weights) / jnp.sum(packed().weights)


def cross_entropy(logits: jax.Array) -> jax.Array:
    return mean(optax.softmax_cross_entropy_with_integer_labels(logits, packed().targets))


def divergence(teacher: jax.Array, logits: jax.Array) -> jax.Array:
    return mean(optax.kl_divergence(jax.nn.log_softmax(logits), jax.nn.softmax(teacher)))


@functools.partial(jax.jit, static_argnums=0)
def draws(method: ElasticTraining, step: int) -> MenuIndices:
    return method.subnets(step)


def subnets(method: ElasticTraining, step: int) -> list[Subnet]:
    """The subnets of a step."""
    config = method.config
    choices, sizes = jax.device_get(draws(method, step)), method.menu.sizes(config)
    found = []
    for mlp, heads, groups, keep in zip(
        choices.mlp, choices.heads, choices.groups, choices.keep, strict=True
    ):
        kept = np.flatnonzero(keep).tolist()
        chosen = (
            tuple(sizes.mlp[i][mlp[i]] for i in kept),
            tuple(sizes.heads[i][heads[i]] for i in kept),
            tuple(sizes.groups[i][groups[i]] for i in kept),
        )
        found.append(Subnet(tuple(kept), *chosen, CONFIG.d_model))
    return found


def expected_loss(params: Params, d: float, drawn: list[Subnet], teacher: jax.Array) -> jax.Array:
    """The loss from slices, with the teacher's logits given."""
    slices = [sliced(params, subnet) for subnet in drawn]
    each = [(1 - d) * cross_entropy(x) + d * divergence(teacher, x) for x in slices]
    return cross_entropy(logits(CONFIG, params)) + sum(each) / len(each)


LIVE = ElasticTraining(
    CONFIG,
    menu=dataclasses.replace(FOUR, dropped=(1,)),
    samples=1,
    smallest_share=0.6,
    distil=0.25,
    loss_chunk=4,
)
live_step = jax.jit(jax.value_and_grad(LIVE.loss, has_aux=True))


@pytest.mark.long
def test_gradient_is_that_of_slices_and_nothing_flows_into_the_teacher() -> None:
    step = next(s for s in range(50) if subnets(LIVE, s)[0].layers == (0, 1))
    (loss, metrics), found = live_step(stack_layers(params()), {}, packed(), jnp.int32(step))
    drawn, teacher = subnets(LIVE, step), logits(CONFIG, params())
    reference = jax.jit(jax.value_and_grad(lambda p, teacher: expected_loss(p, 0.25, drawn, teacher)))
    expected, gradient = reference(params(), teacher)
    CLOSE(loss, expected)
    jax.tree.map(CLOSE, unstack_layers(found), gradient)
    sampled = 0.75 * metrics["loss/sampled"] + 0.25 * metrics["kl/sampled"]
    CLOSE(loss, metrics["loss/final"] + sampled)
    assert metrics["kl/sampled"] > 0.05


def test_what_is_cut_learns_from_the_whole_model_alone() -> None:
    """And one compiled step serves every draw."""
    form = stack_layers(params())
    plain = jax.jit(jax.grad(Pretraining(CONFIG).loss, has_aux=True))(form, {}, packed(), 0)[0]
    smallest, losses = LIVE.menu.smallest(CONFIG), set()
    lives = grouped_kept(64, 16, 8)
    hits = 0
    for step in range(6):
        (loss, metrics), grads = live_step(form, {}, packed(), jnp.int32(step))
        assert loss == metrics["loss"]
        losses.add(float(loss))
        if subnets(LIVE, step) == [smallest]:
            hits += 1
            for name, axis in (("up", -2), ("down", -1)):
                pair = (tree["layers"]["mlp"][name]["kernel"] for tree in (grads, plain))
                ours, theirs = (np.moveaxis(np.asarray(kernel), axis, 1) for kernel in pair)
                CLOSE(ours[1], theirs[1])  # the layer that is left out
                CLOSE(ours[0, ~lives], theirs[0, ~lives])
                change = np.abs(ours[0, lives] - theirs[0, lives])
                assert np.all(np.max(change.reshape(16, -1), axis=1) > 1e-4)
    assert hits > 0
    assert 1 < len(losses) < 6, "some draws are the smallest, not all"
    assert live_step._cache_size() == 1


def test_loss_with_a_frozen_teacher() -> None:
    method = ElasticTraining(CONFIG, menu=MENU, draw="uniform", distil=0.5, teacher="frozen", remat=True)
    _, frozen = method.split(stack_layers(params()))
    now = jax.tree.map(lambda leaf: 1.1 * leaf, params())  # training has moved away from the teacher
    step = next(s for s in range(50) if len(set(subnets(method, s))) == 2)
    loss, metrics = jax.jit(method.loss)(stack_layers(now), frozen, packed(), jnp.int32(step))
    drawn, teacher = subnets(method, step), logits(CONFIG, params())
    CLOSE(loss, expected_loss(now, 0.5, drawn, teacher))
    each = [cross_entropy(sliced(now, subnet)) for subnet in drawn]
    CLOSE(metrics["loss/sampled"], sum(each) / 2)
    CLOSE(metrics["loss/final"], cross_entropy(logits(CONFIG, now)))


ALONE = tiny_config(n_layers=2, n_heads=4, n_kv_heads=4)


def test_groups_choose_the_heads_of_a_model_whose_heads_share_none() -> None:
    method = ElasticTraining(ALONE, menu=Menu((0.5, 1.0), (1.0,), (0.5, 1.0)), smallest_share=0.0, remat=True)
    weights = random_params(ALONE)
    step = next(s for s in range(50) if {g for x in subnets(method, s) for g in x.groups} == {2, 4})
    _, metrics = jax.jit(method.loss)(stack_layers(weights), {}, packed(), jnp.int32(step))
    each = [cross_entropy(sliced(weights, subnet, ALONE)) for subnet in subnets(method, step)]
    CLOSE(metrics["loss/sampled"], sum(each) / 2)
    CLOSE(metrics["loss/final"], cross_entropy(logits(ALONE, weights)))


@pytest.mark.parametrize("draw", ["per_layer", "one_per_step"])
def test_a_menu_of_the_whole_model_is_plain_training(draw: Any) -> None:
    method = ElasticTraining(CONFIG, menu=Menu((1.0,), (1.0,)), draw=draw)
    loss, metrics = jax.jit(method.loss)(params(), {}, packed(), jnp.int32(3))
    plain = cross_entropy(logits(CONFIG, params()))
    CLOSE(loss, plain if draw == "one_per_step" else 2 * plain)  # once as the whole model, once as a subnet
    assert ("loss/final" in metrics) == (draw != "one_per_step")


def test_one_granularity_per_step() -> None:
    method = ElasticTraining(CONFIG, menu=MENU, draw="one_per_step")
    assert method.split(params()) == (params(), {})
    call = jax.jit(method.loss)
    for step in range(3):
        (subnet,) = subnets(method, step)
        loss, metrics = call(params(), {}, packed(), jnp.int32(step))
        CLOSE(loss, cross_entropy(sliced(params(), subnet)))
        assert metrics == {"loss": loss}
    assert call._cache_size() == 1
    mlp, heads = granularities(jax.vmap(functools.partial(draws, method))(jnp.arange(3000)))
    counts = np.bincount((2 * mlp + heads)[:, 0], minlength=6)
    np.testing.assert_allclose(counts / 3000, 1 / 6, atol=0.03)


def granularities(choices: MenuIndices) -> tuple[np.ndarray, np.ndarray]:
    """Indices [..., S] of uniform choices [..., S, L]."""
    mlp, heads = np.asarray(choices.mlp), np.asarray(choices.heads)
    assert np.all(mlp == mlp[..., :1])
    assert np.all(heads == heads[..., :1])
    return mlp[..., 0], heads[..., 0]


def test_draws_follow_seed_and_step() -> None:
    method = ElasticTraining(CONFIG, menu=MENU, samples=8)
    again, other = (
        ElasticTraining(CONFIG, menu=MENU, samples=8),
        ElasticTraining(CONFIG, menu=MENU, samples=8, seed=1),
    )

    def same(a: MenuIndices, b: MenuIndices) -> bool:
        return jax.tree.all(jax.tree.map(jnp.array_equal, a, b))

    assert same(draws(method, 5), again.subnets(jnp.int32(5)))
    assert not same(draws(method, 5), draws(method, 6))
    assert not same(draws(method, 5), draws(other, 5))


def many(menu: Menu, layers: int, samples: int, **options: Any) -> MenuIndices:
    keys = jax.random.split(jax.random.key(0), 4000)
    draw = functools.partial(draw_subnets, menu=menu, n_layers=layers, samples=samples, **options)
    return jax.device_get(jax.vmap(draw)(keys))


def test_layers_draw_for_themselves_every_choice_as_often() -> None:
    choices = many(Menu(groups=(0.5, 1.0)), 3, 2)
    assert choices.mlp.shape == choices.keep.shape == (4000, 2, 3)
    for index, size in ((choices.mlp, 4), (choices.heads, 2), (choices.groups, 2)):
        for choice in range(size):
            np.testing.assert_allclose(np.mean(index == choice, axis=0), 1 / size, atol=0.03)
    columns = [np.asarray(index).reshape(4000, 6) for index in (choices.mlp, choices.heads, choices.groups)]
    np.testing.assert_allclose(np.corrcoef(np.concatenate(columns, axis=1).T), np.eye(18), atol=0.07)
    assert np.all(choices.keep)


def test_uniform_draws_and_the_smallest() -> None:
    mlp, heads = granularities(many(MENU, 4, 2, smallest_share=0.4, uniform=True))
    smallest = np.mean((mlp == 0) & (heads == 0), axis=0)
    np.testing.assert_allclose(smallest, [0.4 + 0.6 / 6, 1 / 6], atol=0.03)
    always = many(dataclasses.replace(DROPPING, groups=(0.5, 1.0)), 2, 1, smallest_share=1.0)
    assert not np.any(always.mlp)
    assert not np.any(always.heads)
    assert not np.any(always.groups)
    assert np.all(always.keep == [True, False])


def test_layers_are_left_out_in_their_order() -> None:
    keep = many(Menu(dropped=(2, 0)), 4, 1).keep[:, 0]
    found, counts = np.unique(keep, axis=0, return_counts=True)
    assert found.tolist() == [[False, True, False, True], [True, True, False, True], [True] * 4]
    np.testing.assert_allclose(counts / 4000, 1 / 3, atol=0.03)


def test_evaluation_reads_every_uniform_width() -> None:
    method = ElasticTraining(CONFIG, menu=DROPPING, distil=0.5, teacher="frozen")
    evaluation = ElasticEvaluation(method)
    loss, metrics = jax.jit(evaluation.loss)(*evaluation.split(params()), packed(), jnp.int32(2**31 - 1))
    named = uniform_subnets(CONFIG, DROPPING)
    widths = {f"mlp_{m}_heads_{h}": (float(m), float(h)) for m in ("0.25", "0.5", "1") for h in ("0.5", "1")}
    del widths["mlp_1_heads_1"]
    assert set(named) == {*widths, "smallest", "final"}
    for name, (mlp, heads) in widths.items():
        assert named[name] == Subnet.uniform(CONFIG, mlp=mlp, heads=heads)
    for name in ("final", "smallest", "mlp_0.5_heads_1", "mlp_1_heads_0.5"):
        CLOSE(metrics[f"loss/{name}"], cross_entropy(sliced(params(), named[name])))
    right = jnp.argmax(logits(CONFIG, params()), -1) == packed().targets
    CLOSE(metrics["accuracy/final"], mean(right.astype(jnp.float32)))
    each = [metrics[f"loss/{name}"] for name in named]
    CLOSE(loss, sum(each) / len(each))
    assert len({round(float(x), 4) for x in each}) == len(each)


def test_names_of_menus_with_one_axis() -> None:
    assert list(uniform_subnets(CONFIG, Menu((0.25, 0.5, 1.0), (1.0,)))) == ["smallest", "mlp_0.5", "final"]
    assert list(uniform_subnets(CONFIG, Menu((1.0,), (0.25, 0.5, 1.0)))) == ["smallest", "heads_0.5", "final"]
    assert list(uniform_subnets(CONFIG, Menu((1.0,), (1.0,)))) == ["final"]
    both = uniform_subnets(CONFIG, Menu((0.5, 1.0), (1.0,), (0.5, 1.0)))
    assert list(both) == ["smallest", "mlp_0.5_groups_1", "mlp_1_groups_0.5", "final"]
    assert both["mlp_1_groups_0.5"] == Subnet.uniform(CONFIG, groups=0.5)


def test_only_the_branches_that_are_drawn_run() -> None:
    """A switch that is batched becomes a select of all of its branches."""
    method = ElasticTraining(CONFIG, menu=DROPPING, samples=3)
    batch = packed(length=20)  # so many tokens that products need no condition of their own
    program = str(jax.make_jaxpr(method.loss)(stack_layers(params()), {}, batch, jnp.int32(0)))
    loops = 2  # layers but the last, the last: both inside one loop over subnets
    assert program.count("cond[") == 3 * loops, "one each for layer, attention and MLP"


def temporary_bytes(samples: int) -> int:
    config = tiny_config(n_layers=1, vocab_size=8192, d_model=16, n_heads=2, d_mlp=16, max_len=512)
    method = ElasticTraining(
        config, menu=Menu((0.5, 1.0), (1.0,)), samples=samples, distil=0.5, loss_chunk=16
    )
    batch = packed(config, 2, 512)
    step = jax.jit(jax.grad(method.loss, has_aux=True)).lower(random_params(config), {}, batch, jnp.int32(0))
    return step.compile().memory_analysis().temp_size_in_bytes


def test_memory_does_not_grow_with_subnets_times_vocabulary() -> None:
    logits = 2 * 512 * 8192 * 4  # of one subnet: 33.5 MB
    one, three = temporary_bytes(1), temporary_bytes(3)
    assert three - one < logits / 5, f"two more subnets take {three - one} bytes"


def test_the_frozen_teacher_is_a_copy() -> None:
    """Training steps reuse the memory of what trains."""
    method = ElasticTraining(CONFIG, menu=MENU, distil=0.5, teacher="frozen")
    trainable, frozen = method.split(params())
    assert set(frozen) == {TEACHER}
    for ours, theirs in zip(jax.tree.leaves(trainable), jax.tree.leaves(frozen), strict=True):
        assert jnp.array_equal(ours, theirs)
        assert ours.unsafe_buffer_pointer() != theirs.unsafe_buffer_pointer()
    assert ElasticTraining(CONFIG, menu=MENU, distil=0.5).split(params())[1] == {}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"menu": Menu((0.3, 1.0))}, r"menu\.mlp=0\.3: must give a multiple of 8 of 64"),
        ({"menu": Menu(heads=(0.3, 1.0))}, r"menu\.heads=0\.3: .* heads per group"),
        ({"menu": Menu(groups=(0.3, 1.0))}, r"menu\.groups=0\.3: .* key/value groups"),
        ({"menu": Menu(d_model=(0.5, 1.0))}, r"menu\.d_model=\(0\.5, 1\.0\): is one width for all layers"),
        ({"draw": "all"}, r"draw='all': must be one of per_layer"),
        ({"teacher": "none"}, r"teacher='none': must be one of live"),
        ({"teacher": "frozen"}, r"method\.teacher='frozen': not read with method\.distil=0\.0"),
        ({"draw": "one_per_step", "distil": 0.5}, r"method\.distil=0\.5: not read with .*'one_per_step'"),
        ({"samples": 0}, r"samples=0: must be at least 1"),
        ({"distil": 2.0}, r"distil=2\.0: must be in \[0, 1\]"),
    ],
)
def test_messages(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ElasticTraining(CONFIG, **options)


def created(config: ModelConfig, section: ElasticTrainingConfig, **train: Any) -> ElasticTraining:
    """The method for a model that was ranked before."""
    return ElasticTraining.create(section, config, {}, TrainConfig(**train), make_mesh())[0]


def test_a_section_becomes_the_method() -> None:
    options: dict[str, Any] = {"samples": 3, "smallest_share": 0.1, "distil": 0.2, "teacher": "frozen"}
    menu = dataclasses.replace(DROPPING, groups=(0.5, 1.0))
    section = ElasticTrainingConfig(menu=menu, draw="uniform", **options)
    expected = ElasticTraining(CONFIG, menu=menu, draw="uniform", loss_chunk=8, remat=True, seed=4, **options)
    assert created(CONFIG, section, loss_chunk=8, remat=True, seed=4) == expected

    wrong = ElasticTrainingConfig(menu=Menu(heads=(0.3, 1.0)))
    with pytest.raises(
        ValueError, match=r"method\.menu\.heads=0\.3: .* of the 4 heads per group; nearest: 0\.25"
    ):
        created(CONFIG, wrong)
    halved = ElasticTrainingConfig(menu=Menu(heads=(0.5, 1.0)))
    with pytest.raises(ValueError, match=r"menu\.heads=0\.5: .*share no .* heads by method\.menu\.groups"):
        created(ALONE, halved)


@pytest.mark.parametrize(("neurons", "groups"), [(1536, 16), (172, 1), (8 * 43, 2)])
def test_any_model_is_stored_in_as_many_groups_as_its_widths_allow(neurons: int, groups: int) -> None:
    config = tiny_config(n_layers=1, d_mlp=neurons)
    section = ElasticTrainingConfig(menu=Menu(heads=(1.0,)))  # quarters of the neurons, and all heads
    begun = TrainConfig(init_from="a model")
    method, _ = ElasticTraining.create(section, config, {}, begun, make_mesh())
    assert method.config.elastic_groups == groups
    assert method.menu.sizes(method.config).mlp == ((neurons // 4, neurons // 2, neurons * 3 // 4, neurons),)
