"""Speed and text of several ways to decode, measured side by side."""

import dataclasses
import functools
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence

from elastic_lm.bench.timing import time_once
from elastic_lm.decode.read_bytes import gb_per_s
from elastic_lm.decode.results import Sample
from elastic_lm.decode.sampler import Sampler

FEWEST_ROUNDS = 5  # that a median is taken of, where the time allows it
FEWEST_FOR_SPREAD = 3
Tell = Callable[[str, float, float | None], None]  # what, done, total


@dataclasses.dataclass(frozen=True)
class Generation:
    """What one sampler did with all prompts.

    Attributes:
      samples: one continuation per prompt.
      seconds: of each round, all prompts together, prefill included.
    """

    samples: list[Sample]
    seconds: list[float]

    @property
    def texts(self) -> list[list[int]]:
        """Token ids of every continuation."""
        return [sample.tokens for sample in self.samples]

    @property
    def depths(self) -> list[int]:
        """Depth of every generated token."""
        return [depth for sample in self.samples for depth in sample.exit_layers]

    @property
    def mean_layers(self) -> float:
        """Mean depth of the generated tokens."""
        return statistics.mean(self.depths)

    @property
    def tokens_per_s(self) -> float:
        """Generated tokens per second; median over rounds."""
        return len(self.depths) / statistics.median(self.seconds)

    @property
    def gb_per_s(self) -> float | None:
        """Gigabytes of weights and caches per second, at least (`decode.read_bytes`); None = not known."""
        read = [sample.stats.read_bytes for sample in self.samples]
        known = [each for each in read if each is not None]
        return gb_per_s(sum(known) if len(known) == len(read) else None, statistics.median(self.seconds))

    @property
    def tokens_per_pass(self) -> float:
        """Generated tokens per pass through the deepest layers."""
        return len(self.depths) / sum(sample.stats.segment_ticks[-1] for sample in self.samples)

    def speedup(self, full: "Generation") -> float:
        """How much faster than `full` this was, which took turns with it; median over rounds of the ratio."""
        return statistics.median(self._ratios(full))

    def spread(self, full: "Generation") -> float:
        """Half of what the middle half of the rounds' speed-ups spans; 0 where there are too few."""
        ratios = self._ratios(full)
        if len(ratios) < FEWEST_FOR_SPREAD:
            return 0.0
        low, _, high = statistics.quantiles(ratios, n=4, method="inclusive")
        return (high - low) / 2

    def _ratios(self, full: "Generation") -> list[float]:
        return [a / b for a, b in zip(full.seconds, self.seconds, strict=True)]


def generate(
    samplers: Mapping[str, Sampler],
    prompts: Sequence[list[int]],
    new_tokens: int,
    rounds: int,
    *,
    seconds: float = math.inf,
    tell: Tell = lambda *_: None,
) -> dict[str, Generation]:
    """Greedy continuations at batch 1; samplers take turns at every prompt, odd rounds in reverse order.

    Each sampler continues the first prompt once before, untimed, to compile. The first turn then says how
    many prompts and rounds fit into what is left of the time, and no round begins that would end after it.

    Args:
      samplers: name -> sampler.
      prompts: token ids, all of one bucket of lengths.
      new_tokens: tokens per prompt; end tokens do not stop a row.
      rounds: timed rounds at most.
      seconds: how long all of this may take, at least one round aside.
      tell: told what is done.

    Returns:
      {name: Generation}, of the first prompts.
    """
    end = time.monotonic() + seconds
    results: dict[str, dict[int, Sample]] = {name: {} for name in samplers}

    def run(name: str, i: int) -> None:
        results[name][i] = samplers[name].sample(prompts[i], new_tokens, ignore_eos=True)

    def turn(i: int, backwards: bool) -> dict[str, float]:
        names = list(samplers)[:: -1 if backwards else 1]
        return {name: time_once(functools.partial(run, name, i)) for name in names}

    for i, name in enumerate(samplers):
        tell(f"compiling {name}", i, len(samplers))
        run(name, 0)

    tell("timing in turns", 0, rounds * len(prompts))
    first = turn(0, backwards=False)
    count, rounds = _fitting(len(prompts), rounds, end - time.monotonic(), sum(first.values()))
    rows: list[dict[str, float]] = []
    for r in range(rounds):
        turns = [first] if r == 0 else []
        for i in range(len(turns), count):
            tell("timing in turns", r * count + i, rounds * count)
            turns.append(turn(i, backwards=r % 2 == 1))
        rows.append({name: sum(seconds[name] for seconds in turns) for name in samplers})

        if end - time.monotonic() < sum(rows[-1].values()):
            break
    return {
        name: Generation([found[i] for i in range(count)], [row[name] for row in rows])
        for name, found in results.items()
    }


def _fitting(prompts: int, rounds: int, left: float, turn: float) -> tuple[int, int]:
    """How many prompts and rounds fit into `left` seconds, where a turn of all samplers takes `turn`.

    Prompts are given up first, as far as one, then rounds; one turn is done already.
    """
    turns = 1 + left / turn if math.isfinite(left) else math.inf
    if turns >= prompts * rounds:
        return prompts, rounds
    fewest = min(rounds, FEWEST_ROUNDS)
    count = min(prompts, max(1, int(turns / fewest)))
    return count, max(1, min(rounds, int(turns / count)))
