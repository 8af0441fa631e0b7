"""Keys and values after any pattern of exits are those of a full pass."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from elastic_lm.config.model import ExitConfig
from elastic_lm.decode.loop import ring_write, tick_widths
from elastic_lm.decode.sampler import ENDLESS
from elastic_lm.decode.served import jit_run
from elastic_lm.decode.state import segments
from elastic_lm.models.decoder import Decoder
from elastic_lm.models.registry import init_params


def full_pass(model, tokens):
    """Rows of every layer, and of the `block` exit after layer 1, over `tokens`."""
    decoder = Decoder(model.config).bind({"params": model.params})
    positions = jnp.arange(len(tokens), dtype=jnp.int32)[None]
    hidden = decoder.embed(jnp.asarray([tokens]), positions)
    tap, first = decoder.run_layers(hidden, positions, 0, 1)
    _, block = decoder.exit_state(0, tap, positions)
    _, rest = decoder.run_layers(tap.hidden, positions, 1, model.config.n_layers)
    return [*first, *rest], block


@pytest.mark.long
@pytest.mark.parametrize("share", [0.0, 1.0])
@pytest.mark.parametrize("window", [2, 8])
def test_deep_rows_equal_full_pass(model, prompts, mixed, window, share):
    for thresholds in [*mixed, (0.0, 0.0), (2.0, 2.0)]:
        sampler = model.sampler(thresholds, window=window, fire_share=share)
        _, state, controls = sampler._prefill(sampler._call(prompts[:3]), 20)
        state = jit_run(model.config, model.params, state, controls, 2**30)
        for row in range(3):
            length = int(state.length[row])
            assert length - 1 >= state.done[0, row] >= state.done[1, row] >= state.done[2, row]
            assert state.done[0, row] - state.done[2, row] <= window
            rows, block = full_pass(model, state.tokens[row, :length].tolist())
            compare(state.exit_cache[0], block, row, int(state.done[0, row]))
            for j, (start, stop) in enumerate(segments(model.config)):
                for layer in range(start, stop):
                    compare(state.cache[layer], rows[layer], row, int(state.done[j, row]))


def compare(cache, rows, row, done):
    for ours, theirs in zip(cache, rows, strict=True):
        np.testing.assert_allclose(ours[row, :, :done], theirs[0, :, :done], rtol=0, atol=1e-4)


@pytest.mark.long
def test_tick_count_shows_skipped_work(model, prompts):
    stats = model.sampler((0.0, 0.0), window=8).sample(prompts[3], 24).stats
    shallow, _, deep = stats.segment_ticks
    assert shallow == 24
    assert deep <= 24 // 8


def test_ring_write_keeps_what_is_not_new():
    ring = jnp.arange(4.0).reshape(1, 4, 1)
    new = jnp.asarray([[[10.0], [11.0], [12.0]]])
    written = ring_write(ring, new, jnp.asarray([3]), jnp.asarray([2]))
    np.testing.assert_array_equal(written[0, :, 0], [11.0, 1.0, 2.0, 10.0])


def test_deep_ticks_are_compiled_for_few_positions_and_for_the_window():
    assert [tick_widths(w) for w in (1, 2, 8)] == [(1,), (1, 2), (1, 2, 3, 4, 8)]


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="reads the program that XLA's CPU backend makes")
@pytest.mark.parametrize(
    ("size", "mode"),
    [(3, "exact"), *(pytest.param(1, mode, marks=pytest.mark.long) for mode in ("verify", "propagate"))],
)
def test_no_cache_is_copied(model, prompts, size, mode):
    no_copies(model.sampler((0.5, 0.5), window=4), prompts[:size], mode)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="reads the program that XLA's CPU backend makes")
@pytest.mark.parametrize(("size", "mode"), [(1, "exact"), (3, "verify")])
@pytest.mark.long
def test_no_cache_is_copied_where_segments_have_several_layers(model, prompts, size, mode):
    exits = (ExitConfig(2, "norm"),)
    config = dataclasses.replace(model.config, n_layers=5, exits=exits)
    deeper = dataclasses.replace(model, config=config, params=init_params(config, jax.random.key(0)))
    no_copies(deeper.sampler((0.5,), window=4), prompts[:size], mode)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="reads the program that XLA's CPU backend makes")
@pytest.mark.long
def test_no_cache_is_copied_beside_gates(model, prompts):
    exits = tuple(dataclasses.replace(e, gate=4) for e in model.config.exits)
    config = model.config.with_exits(exits)
    gated = dataclasses.replace(model, config=config, params=init_params(config, jax.random.key(0)))
    no_copies(gated.sampler((0.5, 0.5), window=4), prompts[:3], "exact")


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="reads the program that XLA's CPU backend makes")
@pytest.mark.parametrize(
    ("size", "exits"), [(1, False), (3, False), pytest.param(3, True, marks=pytest.mark.long)]
)
def test_no_cache_is_copied_by_lookup(model, prompts, size, exits):
    config = model.config if exits else model.config.with_exits(())
    looking = dataclasses.replace(model, config=config, params=init_params(config, jax.random.key(0)))
    no_copies(looking.sampler(window=8, lossless=True, lookup=True, draft=3), prompts[:size], "verify")


def no_copies(sampler, prompts, mode):
    """Compiles the loop and looks for copies of caches in its program."""
    _, state, controls = sampler._prefill(sampler._call(prompts), 8)
    shape = ",".join(map(str, state.cache[0][0].shape))
    program = (
        jit_run.lower(sampler.config, sampler.params, state, controls, ENDLESS, mode).compile().as_text()
    )
    assert f"f32[{shape}]" in program
    assert not re.findall(rf"= f32\[{shape}\]\S* copy\(", program)


def test_exit_after_the_last_layer_cuts_nothing(model):
    exits = (*model.config.exits, dataclasses.replace(model.config.exits[0], layer=3))
    assert segments(model.config.with_exits(exits)) == segments(model.config)
