"""Decoding on a mesh: the tokens of one device, and caches that are really divided."""

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

import elastic_lm as el
from elastic_lm.decode.prefill import prefill
from elastic_lm.decode.state import DecodeState
from elastic_lm.models.placement import heads_over, mesh_of, rows_over
from elastic_lm.models.sharding import make_mesh, param_shardings
from elastic_lm.testing import random_params, tiny_config

pytestmark = pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 devices")

PROMPTS = [[1, 2, 3, 1, 2, 3, 1, 2], [4, 5, 4, 5], [6], [7, 8, 9, 7, 8]]
CONFIG = tiny_config(exits=(1, 3))
POLICY = el.ConfidenceExit("max_prob", thresholds=(0.3, 0.3), layers=(1, 3))
WAYS = {
    "plain": {},
    "exits": {"exit": POLICY},
    "propagated": {"exit": POLICY, "missing": "propagate"},
    "lossless": {"exit": POLICY, "lossless": True},
    "lookup": {"lossless": True, "lookup": True, "draft": 3},
    "lookup_and_exits": {"exit": POLICY, "lossless": True, "lookup": True, "draft": 3},
}
MESHES = {"data": (4, 1, 2), "fsdp": (1, 4, 2), "both": (2, 2, 2), "rows": (8, 1, 1)}


@pytest.fixture(scope="module")
def params():
    return random_params(CONFIG)


def placed(params, mesh: Mesh):
    return jax.device_put(params, param_shardings(CONFIG, mesh))


def tokens(params, prompts, settings=None, **options):
    sampler = el.Sampler(el.Decoder(CONFIG), params, window=8, **options)
    samples = sampler.sample(prompts, 12, **(settings or {}))
    return [sample.tokens for sample in samples], [sample.exit_layers for sample in samples]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("sizes", [MESHES["data"], MESHES["both"]], ids=str)
def test_a_mesh_gives_the_tokens_of_one_device(params, way: str, sizes: tuple[int, int, int]) -> None:
    alone = tokens(params, PROMPTS, **WAYS[way])
    assert tokens(placed(params, make_mesh(*sizes)), PROMPTS, **WAYS[way]) == alone


@pytest.mark.parametrize("sizes", MESHES.values(), ids=str)
def test_drawn_tokens_and_single_rows_are_the_same_on_a_mesh(params, sizes: tuple[int, int, int]) -> None:
    on_mesh = placed(params, make_mesh(*sizes))
    drawn = {"temperature": 0.8, "top_k": 20, "repetition_penalty": 1.1, "seed": [1, 2, 3, 4]}
    assert tokens(on_mesh, PROMPTS, drawn, exit=POLICY) == tokens(params, PROMPTS, drawn, exit=POLICY)
    assert tokens(on_mesh, PROMPTS[:1], exit=POLICY) == tokens(params, PROMPTS[:1], exit=POLICY)
