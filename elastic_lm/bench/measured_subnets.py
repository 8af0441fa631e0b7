"""What a table of named sub-networks says was measured: loss on held-out text, and time per token.

A sub-network is measured as the ordinary smaller model that it is sliced to. A few of them at a time take
turns with the whole model, so that all see the same machine, and a speed-up is the median over the rounds of
their ratio. Loss is that of the last layer; exits play no part in either.
"""

import dataclasses
import datetime
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from elastic_lm.bench.timing import interleave
from elastic_lm.config.checks import require_at_least_1
from elastic_lm.config.model import ModelConfig
from elastic_lm.config.subnet import Subnet
from elastic_lm.config.subnet_table import MeasuredLoss, MeasuredTime, NamedSubnet, SubnetTable
from elastic_lm.data.batch import Batch
from elastic_lm.decode.sampler import Sampler
from elastic_lm.depth.observations import observe
from elastic_lm.depth.quality import by_depth
from elastic_lm.files.subnet_files import subnet_weights
from elastic_lm.models.decoder import Decoder, Params
from elastic_lm.report.machine import device_line
from elastic_lm.width.slicing import slice_params

ROUNDS = 3
NEW_TOKENS = 32
PROMPT = 16
TOGETHER = 4  # sub-networks that are in memory at a time


@dataclasses.dataclass(frozen=True)
class Timing:
    """How time is measured."""

    batch: int = 1  # texts that are written together
    prompt: int = PROMPT  # tokens of each prompt
    new_tokens: int = NEW_TOKENS  # that are written after it
    rounds: int = ROUNDS  # timed calls of each side

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            require_at_least_1(field.name, getattr(self, field.name))


def measure_subnets(
    config: ModelConfig,
    params: Params,
    table: SubnetTable,
    *,
    batches: Sequence[Batch] = (),
    text: str = "",
    timing: Timing | None = None,
    names: Iterable[str] | None = None,
    told: Callable[[NamedSubnet], Any] = lambda one: None,
) -> SubnetTable:
    """Measures named sub-networks.

    Args:
      config: the whole model; static.
      params: its canonical parameters.
      table: of its sub-networks.
      batches: packed held-out batches that losses are measured on; () = no loss is measured.
      text: which text they are, recorded.
      timing: how time is measured; None = it is not.
      names: of those that are measured; None = all.
      told: called with every entry as soon as it is measured.

    Returns:
      The table, with new numbers of these. Others keep theirs where they were measured on the same weights.

    Raises:
      ValueError: the table is another model's, a name is not in it, or no token counts.
    """
    table.check(config)
    table = table.of_weights(subnet_weights(config, params))
    chosen = [table.find(name) for name in (table if names is None else names)]
    measured = []
    for start in range(0, len(chosen), TOGETHER):
        some = chosen[start : start + TOGETHER]
        parts = {one.name: _sliced(config, params, one.subnet) for one in some}
        losses: dict[str, MeasuredLoss] = {}
        if batches:
            losses = {name: _loss(*part, batches, text) for name, part in parts.items()}
        times = _times(config, params, parts, timing) if timing else {}
        for one in some:
            found = dataclasses.replace(
                one, loss=losses.get(one.name, one.loss), time=times.get(one.name, one.time)
            )
            told(found)
            measured.append(found)
    return table.replacing(measured)


def _sliced(config: ModelConfig, params: Params, subnet: Subnet) -> tuple[ModelConfig, Params]:
    """The sub-network as a model without exits."""
    small, sliced = slice_params(config, params, subnet)
    return small.with_exits(()), sliced


def _loss(config: ModelConfig, params: Params, batches: Sequence[Batch], text: str) -> MeasuredLoss:
    seen = observe(config, params, batches)
    return MeasuredLoss(by_depth(seen)[-1].nats_per_token, seen.tokens, text, _now())


def _times(
    config: ModelConfig, params: Params, parts: dict[str, tuple[ModelConfig, Params]], timing: Timing
) -> dict[str, MeasuredTime]:
    """Milliseconds per token of some parts, in turns with the whole model."""
    draw = np.random.default_rng(0)
    prompts = draw.integers(0, config.vocab_size, (timing.batch, timing.prompt)).tolist()

    def side(config: ModelConfig, params: Params) -> Callable[[], Any]:
        sampler = Sampler(Decoder(config), params)
        return lambda: sampler.sample(prompts, timing.new_tokens, ignore_eos=True)

    bare = config.with_exits(())
    others = {name: side(*part) for name, part in parts.items() if part[0] != bare}
    seconds = interleave({"": side(bare, params), **others}, timing.rounds)
    whole = np.asarray(seconds[""])

    def measured(name: str) -> MeasuredTime:
        own = np.asarray(seconds.get(name, whole))
        return MeasuredTime(
            ms_per_token=1000 * float(np.median(own)) / timing.new_tokens,
            speedup=float(np.median(whole / own)),
            device=device_line(),
            batch=timing.batch,
            prompt=timing.prompt,
            new_tokens=timing.new_tokens,
            date=_now(),
        )

    return {name: measured(name) for name in parts}


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
