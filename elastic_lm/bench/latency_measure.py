"""Times of sub-networks, by the programs that `Sampler` prefills and decodes with.

Every program is timed from the moment it is called until its arrays are computed: the prompts of the batch
once, then the tokens that follow, at the capacity that the sampler would give the caches. Sub-networks take
turns with the full model in groups of a few, so that few weights are alive at a time, and only ratios
within a round are used: a machine that slows down slows both.
"""

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from elastic_lm.bench.timing import interleave
from elastic_lm.config.checks import require
from elastic_lm.config.decoding import WINDOW
from elastic_lm.config.model import ModelConfig
from elastic_lm.config.subnet import Subnet
from elastic_lm.cost.counted import Workload
from elastic_lm.cost.latency_table import PHASES, Phase
from elastic_lm.decode.sampler import ENDLESS
from elastic_lm.decode.served import jit_prefill, jit_run
from elastic_lm.decode.settings import Settings, bucket, make_controls, pad_prompts
from elastic_lm.models.decoder import Params
from elastic_lm.models.registry import init_params
from elastic_lm.report.writers import Writer
from elastic_lm.width.slicing import slice_params

NEW_TOKENS = 32  # decoded after each prompt
GROUP = 4  # sub-networks that take turns with the full model

Progress = Callable[[int], Writer]  # number of timed calls -> what shows how many are done


@dataclasses.dataclass(frozen=True)
class Measured:
    """Times of some sub-networks.

    Attributes:
      full: phase -> milliseconds of the full model, per decoded step or per prompts of the whole batch.
      relative: phase -> [S] times of the sub-networks divided by the full model's.
    """

    full: Mapping[Phase, float]
    relative: Mapping[Phase, np.ndarray]


class Program:
    """One model's prefill and decoding, and the milliseconds of every run."""

    def __init__(self, config: ModelConfig, params: Params, load: Workload, seed: int) -> None:
        rng = np.random.default_rng(seed)
        self.config, self.params = config, params
        self.prompts = rng.integers(0, config.vocab_size, (load.batch, load.context)).tolist()
        self.capacity = bucket(load.context + NEW_TOKENS + WINDOW)
        self.controls = make_controls(
            config, self.prompts, NEW_TOKENS, self.capacity,
            settings=Settings(ignore_eos=True), policies=[None] * load.batch,
            lossless=np.zeros(load.batch, bool), adapt=True, fire_share=0.0, together=False,
            tick_costs=(1.0,) * WINDOW,
        )  # fmt: skip
        self.runs: dict[Phase, list[float]] = {phase: [] for phase in PHASES}

    def run(self) -> None:
        """Prefills and decodes once."""
        tokens, lengths = pad_prompts(self.config, self.prompts, NEW_TOKENS)  # anew: decoding donates them
        limits = jax.block_until_ready(lengths + NEW_TOKENS)
        began = time.perf_counter()
        state = jit_prefill(
            self.config, self.params, tokens, lengths, limits, jnp.int32(1),
            capacity=self.capacity, window=WINDOW, lookup=False,
        )  # fmt: skip
        jax.block_until_ready(state)
        prefilled = time.perf_counter()
        final = jit_run(self.config, self.params, state, self.controls, ENDLESS, "exact")
        jax.block_until_ready(final)
        decoded = time.perf_counter()
        self.runs["prefill"].append(1e3 * (prefilled - began))
        self.runs["decode"].append(1e3 * (decoded - prefilled) / NEW_TOKENS)


def measure(
    config: ModelConfig,
    params: Params | None,
    subnets: Sequence[Subnet],
    load: Workload,
    *,
    rounds: int,
    seed: int = 0,
    progress: Progress | None = None,
) -> Measured:
    """Times sub-networks against the full model.

    Args:
      config: the whole model; exits are left out.
      params: its canonical parameters; None = random ones, which take as long.
      subnets: what is timed.
      load: batch and context.
      rounds: timed runs of each; medians are reported.
      seed: of prompts and random parameters.
      progress: makes what shows how far it is; None = nothing does.

    Raises:
      ValueError: the prompts do not fit the model's `max_len`, or rounds is below 1.
    """
    config = config.with_exits(())
    most = config.max_len - NEW_TOKENS
    fix = f"must be from 1 to {most}: max_len={config.max_len} less the {NEW_TOKENS} tokens that are decoded"
    require(1 <= load.context <= most, "workload.context", load.context, fix)
    params = init_params(config, jax.random.key(seed)) if params is None else params
    full = Program(*slice_params(config, params, Subnet.full(config)), load, seed)
    groups = [subnets[i : i + GROUP] for i in range(0, len(subnets), GROUP)] or [[]]
    calls = (rounds + 1) * (len(subnets) + len(groups))
    relative: dict[Phase, list[float]] = {phase: [] for phase in PHASES}
    with contextlib.closing(progress(calls)) if progress else contextlib.nullcontext() as writer:
        done = 0
        for group in groups:
            sliced = [Program(*slice_params(config, params, s), load, seed) for s in group]
            done = _take_turns([full, *sliced], rounds, writer, done)
            for phase in PHASES:
                ours = np.asarray(full.runs[phase][-rounds:])
                ratios = [np.asarray(p.runs[phase][-rounds:]) / ours for p in sliced]
                relative[phase] += [float(np.median(r)) for r in ratios]
    timed = {phase: np.reshape(full.runs[phase], (len(groups), rounds + 1))[:, 1:] for phase in PHASES}
    return Measured(
        {phase: float(np.median(timed[phase])) for phase in PHASES},
        {phase: np.asarray(relative[phase]) for phase in PHASES},
    )


def _take_turns(programs: Sequence[Program], rounds: int, writer: Writer | None, done: int) -> int:
    """Runs every program once, then `rounds` times; the first of them is the full model.

    Returns:
      `done`, the calls that were made before, plus those made here.
    """
    before = done

    def turn(program: Program) -> None:
        nonlocal done
        program.run()
        done += 1
        compiling, round_ended = done - before <= len(programs), (done - before) % len(programs) == 0
        if writer is not None and (compiling or round_ended):
            writer.write(done, {"full model, ms per step": programs[0].runs["decode"][-1]})

    interleave({str(i): functools.partial(turn, p) for i, p in enumerate(programs)}, rounds)
    return done
