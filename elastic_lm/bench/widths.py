"""Widths chosen while decoding: what nested blocks cost and save.

Rows, on the 12-layer Llama of `bench.decode` with four key/value groups of three heads, random weights, 64
new tokens a call, prefill included:

- widths/nested_whole: speed of the whole model in nested blocks; ideal = the plain model.
- widths/nested_half: tokens/s with half the neurons and two thirds of the heads chosen in every layer,
  batch 1; ideal = the slice of these widths, an ordinary smaller model.
- widths/nested_half_vs_whole: the same; ideal = the plain whole model.
- widths/nested_..._batch8: the same for eight rows of the same widths.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from elastic_lm.bench.model import random_model
from elastic_lm.bench.report import Measurement, Options
from elastic_lm.bench.timing import interleave
from elastic_lm.config.subnet import Menu, Subnet
from elastic_lm.decode.sampler import Sampler
from elastic_lm.models.decoder import Decoder
from elastic_lm.models.registry import init_params
from elastic_lm.width.importance import STORAGE_GROUPS
from elastic_lm.width.nested_decoder import WIDTH_INPUTS, NestedConfig, NestedDecoder, nested_params
from elastic_lm.width.slicing import slice_params

NEW_TOKENS = 64
MENU = Menu((0.25, 0.5, 0.75, 1.0), (1 / 3, 2 / 3, 1.0))
TINY_MENU = Menu((0.5, 1.0), (0.5, 1.0))


def rows(options: Options) -> Iterator[Measurement]:
    """Measures every row of this module, each as soon as it is measured.

    Args:
      options: size, rounds and seed; a model of the user's own is not read.
    """
    for batch in (1, 8):
        yield from _rows(options, batch)


def _rows(options: Options, batch: int) -> Iterator[Measurement]:
    groups, menu = (2, TINY_MENU) if options.tiny else (4, MENU)
    config = dataclasses.replace(random_model(options.tiny), n_kv_heads=groups, elastic_groups=STORAGE_GROUPS)
    params = init_params(config, jax.random.key(options.seed))
    half = Subnet.uniform(config, mlp=0.5, heads=menu.heads[-2])
    nested_config = NestedConfig.of(config, menu, per_token=False)
    nested = nested_params(nested_config, params)
    rng = np.random.default_rng(options.seed)
    prompts = rng.integers(3, config.vocab_size, (batch, 16)).tolist()

    def side(sampler: Sampler) -> Callable[[], Any]:
        return lambda: sampler.sample(prompts, NEW_TOKENS, ignore_eos=True)

    def chosen(subnet: Subnet) -> Sampler:
        mlp, heads, _, _ = (jnp.tile(jnp.asarray(n), (batch, 1)) for n in menu.indices(config, subnet))
        return Sampler(NestedDecoder(nested_config), {**nested, WIDTH_INPUTS: {"mlp": mlp, "heads": heads}})

    small, sliced = slice_params(config, params, half)
    sides = {
        "plain": side(Sampler(Decoder(config), params)),
        "slice": side(Sampler(Decoder(small), sliced)),
        "nested": side(chosen(Subnet.full(config))),
        "half": side(chosen(half)),
    }
    seconds = {name: np.asarray(times) for name, times in interleave(sides, options.rounds).items()}

    def row(name: str, ours: str, theirs: str) -> Measurement:
        measured, ideal = (batch * NEW_TOKENS / float(np.median(seconds[s])) for s in (ours, theirs))
        suffix = "" if batch == 1 else f"_batch{batch}"
        ratio = float(np.median(seconds[theirs] / seconds[ours]))
        return Measurement(f"widths/{name}{suffix}", measured, ideal, ratio)

    yield row("nested_whole", "nested", "plain")
    yield row("nested_half", "half", "slice")
    yield row("nested_half_vs_whole", "half", "plain")
