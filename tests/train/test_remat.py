"""Remat policies by name: the same gradients, and temporaries that shrink from name to name."""

import itertools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import pytest

from elastic_lm.config.parse import from_dict
from elastic_lm.config.subnet import Menu
from elastic_lm.data.batch import Batch
from elastic_lm.depth.ee_tuning import EETuning, JointTraining
from elastic_lm.models.decoder import stack_layers
from elastic_lm.nn.remat import NAMES
from elastic_lm.testing import random_params, random_tokens, tiny_config
from elastic_lm.train.config import TrainConfig
from elastic_lm.train.method import Method
from elastic_lm.train.overrides import parsed
from elastic_lm.train.pretraining import Pretraining
from elastic_lm.width.elastic_training import ElasticTraining

CONFIG = tiny_config(n_layers=4, d_mlp=256, exits=(2,), elastic_groups=8)
PLAIN = tiny_config(n_layers=4, d_mlp=256)
ROWS, LENGTH = 4, 64  # enough tokens that products are written as on every device (`nn.linear`)


def batch() -> Batch:
    tokens = random_tokens(CONFIG, batch=ROWS, length=LENGTH + 1)
    ones = jnp.ones((ROWS, LENGTH), jnp.int32)
    return Batch(tokens[:, :-1], tokens[:, 1:], 1.0 * ones, jnp.cumsum(ones, 1) - 1, ones)


def compiled(method: Method[Any], *, stacked: bool = True) -> tuple[Any, Any]:
    """The compiled gradient and what it is given."""
    params = random_params(method.config)
    trainable, frozen = method.split(stack_layers(params) if stacked else params)
    given = trainable, frozen, batch(), jnp.zeros((), jnp.int32)
    return jax.jit(jax.value_and_grad(method.loss, has_aux=True)).lower(*given).compile(), given


def test_gradients_are_equal_and_temporaries_shrink() -> None:
    temporaries, found = {}, {}
    for name in NAMES:
        program, given = compiled(Pretraining(PLAIN, remat=name))
        found[name] = program(*given)
        temporaries[name] = program.memory_analysis().temp_size_in_bytes
    for name in NAMES[1:]:
        chex.assert_trees_all_close(found[name], found["none"], rtol=1e-5, atol=1e-6)
    sizes = [temporaries[name] for name in NAMES]
    # Each keeps less than the one before it, by more than a layer's input.
    least = ROWS * LENGTH * PLAIN.d_model * 4
    assert all(more > less + least for more, less in itertools.pairwise(sizes)), temporaries


@pytest.mark.long
def test_layers_of_their_own_have_the_same_gradients() -> None:
    """Without a scan, XLA's CPU backend computes nothing again, so that only gradients are compared."""
    found = {}
    for name in NAMES:
        program, given = compiled(Pretraining(PLAIN, remat=name), stacked=False)
        found[name] = program(*given)
    for name in NAMES[1:]:
        chex.assert_trees_all_close(found[name], found["none"], rtol=1e-5, atol=1e-6)


def test_truth_values_mean_full_and_none() -> None:
    texts = {
        remat: compiled(Pretraining(PLAIN, remat=remat))[0].as_text()
        for remat in (True, "full", False, "none", None, "dots")
    }
    assert texts[True] == texts["full"]
    assert texts[False] == texts["none"] == texts[None]
    assert len(set(texts.values())) == 3


@pytest.mark.parametrize("method", [EETuning, JointTraining, ElasticTraining])
@pytest.mark.long
def test_every_method_that_recomputes_knows_the_names(method: type[Method[Any]]) -> None:
    how = {"menu": Menu((0.5, 1.0), (1.0,), (0.5, 1.0))} if method is ElasticTraining else {}
    config = CONFIG if not how else tiny_config(n_layers=4, elastic_groups=8)
    found = {}
    for name in ("none", "dots", "dots_no_batch"):
        program, given = compiled(method(config, remat=name, **how))  # pyright: ignore[reportCallIssue]
        found[name] = program(*given)
    for name in ("dots", "dots_no_batch"):
        chex.assert_trees_all_close(found[name], found["none"], rtol=1e-5, atol=1e-6)


def test_configs_and_overrides_take_names_and_truth_values() -> None:
    for text, remat in {"dots": "dots", "true": True, "none": None, "full": "full"}.items():
        assert from_dict(TrainConfig, {"remat": parsed(text, False)}, "train.").remat == remat
    with pytest.raises(ValueError, match=r"train\.remat='some': must be True or False, or one of none, dots"):
        TrainConfig(remat="some")
