"""Bytes that decoding reads, counted from what has run, against the costs of the configuration."""

import math
from typing import Any

import jax
import pytest

import elastic_lm as el
from elastic_lm.bench.timing import bandwidth_note
from elastic_lm.cli.generate import stats_line
from elastic_lm.cost import device_kinds
from elastic_lm.cost.counted import Workload, model_cost
from elastic_lm.decode.results import SampleStatistics
from elastic_lm.testing import random_params, tiny_config

PROMPT, NEW = [1, 2, 3, 4], 6


def stats(config: el.ModelConfig, prompts: list, **how: Any) -> SampleStatistics:
    sampler = el.Sampler(el.Decoder(config), random_params(config), options=el.DecodeOptions(window=4, **how))
    return sampler.sample(prompts, NEW, ignore_eos=True)[0].stats


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("rows", [1, 3])
def test_full_depth_reads_what_the_config_says_in_every_tick(tied: bool, rows: int) -> None:
    config = tiny_config(n_layers=3, tied=tied)
    found = stats(config, [PROMPT] * rows)
    (ticks,) = found.segment_ticks
    step = model_cost(config, Workload(batch=rows, context=len(PROMPT) + NEW // 2)).read_bytes
    small = 4 * config.d_model * (rows + 1)  # of the embedding, and the final norm
    assert found.read_bytes == ticks * (step - small)
    assert found.gb_per_s == pytest.approx(found.read_bytes / found.seconds / 1e9)


@pytest.mark.long
def test_an_exit_that_is_always_taken_reads_its_head_and_few_of_the_upper_layers() -> None:
    config = tiny_config(n_layers=4, exits=(2,))
    full = stats(config.with_exits(()), [PROMPT])
    early = stats(config, [PROMPT], exit=el.StaticExit(2, layers=(2,)))
    layer = model_cost(tiny_config(n_layers=2)).read_bytes - model_cost(tiny_config(n_layers=1)).read_bytes
    lower, upper = early.segment_ticks
    heads = early.exit_counts[2], early.exit_counts.get(4, 0)
    exit_bytes = 4 * (config.vocab_size + 1) * config.d_model
    head = 4 * config.vocab_size * config.d_model
    weights = 2 * layer * (lower + upper) + heads[0] * exit_bytes + heads[1] * head
    cache = early.read_bytes - weights
    assert 0 < cache < 0.2 * weights
    assert upper < lower
    assert early.read_bytes < full.read_bytes


def test_a_sub_network_reads_its_part() -> None:
    config = tiny_config(n_layers=2)
    subnet = el.Subnet.uniform(config, mlp=0.5)
    sampler = el.Sampler(el.Decoder(config), random_params(config))
    part = sampler.sample(PROMPT, NEW, subnet=subnet, ignore_eos=True).stats
    whole = sampler.sample(PROMPT, NEW, ignore_eos=True).stats
    ticks = whole.segment_ticks[0]
    assert part.segment_ticks == (ticks,)
    saved = model_cost(config).read_bytes - model_cost(subnet.sliced(config)).read_bytes
    assert whole.read_bytes - part.read_bytes == ticks * saved


def test_the_share_of_a_published_bandwidth_is_shown_where_it_is_known(monkeypatch) -> None:
    config = tiny_config(n_layers=2)
    found = stats(config, [PROMPT])
    shown = f", {found.gb_per_s:.1f} GB/s (compilation included), "
    assert shown in stats_line(found, 2)

    kind = jax.devices()[0].device_kind
    monkeypatch.setitem(device_kinds.KINDS, kind, "v5e")
    share = found.gb_per_s / 819
    assert f" GB/s ({share:.0%} of its memory's) (compilation included), " in stats_line(found, 2)

    read = model_cost(config, Workload(context=8)).read_bytes
    note = bandwidth_note(config, Workload(context=8), read / 409.5e9, copied=819e9)
    shares = "50% of one large product's and 50% of the published bandwidth"
    assert note == f"409.5 GB/s of weights and caches, {shares}"
    assert math.isclose(device_kinds.bandwidth_share(409.5, kind), 0.5)
