"""What a call to the sampler gives back: tokens as text, their depths, and what they cost."""

import dataclasses
import time
from collections import Counter
from collections.abc import Sequence
from typing import Protocol

import jax

from elastic_lm.config.subnet import Budget, Subnet
from elastic_lm.data.tokenizer import Tokenizer
from elastic_lm.decode.state import DecodeState
from elastic_lm.report import colour as render


class TextTokenizer(Protocol):
    """What the sampler needs of a tokenizer."""

    def encode(self, text: str, *, bos: bool = False) -> list[int]:
        """Token ids of a text, after the beginning-of-text token if `bos` and the tokenizer has one."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids."""
        ...


@dataclasses.dataclass(frozen=True)
class SampleStatistics:
    """What one call cost.

    Attributes:
      tokens: emitted tokens of all rows.
      prompt_tokens: prompt tokens of all rows.
      seconds: wall-clock time of prefill and decoding; slicing and compilation included where they happened.
      tokens_per_s: tokens / seconds.
      mean_layers: mean depth at which emitted tokens were chosen.
      exit_counts: emitted tokens per depth.
      segment_ticks: how often each segment ran.
      subnet: the sub-network that ran; None = the whole model, or widths that routers chose meanwhile.
      budget: that these routers were given; None = no routers chose meanwhile.
      drafted: tokens that lossless rows drafted and the full model verified.
      accepted: those that stayed.
      wasted: those that did not.
    """

    tokens: int
    prompt_tokens: int
    seconds: float
    tokens_per_s: float
    mean_layers: float
    exit_counts: dict[int, int]
    segment_ticks: tuple[int, ...]
    subnet: Subnet | None = None
    budget: Budget | None = None
    drafted: int = 0
    accepted: int = 0
    wasted: int = 0

    @property
    def acceptance(self) -> float:
        """Share of the drafted tokens that stayed; 1 where none were drafted."""
        return self.accepted / self.drafted if self.drafted else 1.0


@dataclasses.dataclass(frozen=True)
class Sample:
    """One generated continuation.

    Attributes:
      text: decoded continuation, without the prompt, without the stop token, cut before a stop string.
      tokens: emitted token ids, up to and including a stop token or the end of a stop string.
      exit_layers: layers that ran before each emitted token was chosen; of a sub-network, those that it kept.
      stats: what the call that produced it cost (shared by the rows of a batch).
    """

    text: str
    tokens: list[int]
    exit_layers: list[int]
    stats: SampleStatistics


@dataclasses.dataclass(frozen=True)
class Detokenizer:
    """Reads emitted tokens as text."""

    tokenizer: TextTokenizer | None  # None = every text is empty
    ends: tuple[int, ...]  # tokens that end a text and are no part of it
    stops: tuple[str, ...]  # strings that end a text likewise

    def text(self, prompt: list[int], emitted: list[int]) -> str:
        """Text of the emitted tokens, cut before the first stop string."""
        text = self._decode(prompt, emitted)
        cuts = [text.find(stop) for stop in self.stops if stop in text]
        return text[: min(cuts)] if cuts else text

    def stops_after(self, prompt: list[int], emitted: list[int]) -> int | None:
        """Number of emitted tokens whose text first holds a stop string, or None."""
        if not any(stop in self._decode(prompt, emitted) for stop in self.stops):
            return None
        prefixes = (self._decode(prompt, emitted[:n]) for n in range(1, len(emitted) + 1))
        return next(n for n, text in enumerate(prefixes, 1) if any(stop in text for stop in self.stops))

    def _decode(self, prompt: list[int], emitted: list[int]) -> str:
        """Text of the emitted tokens in the context of their prompt, without the stop token."""
        if self.tokenizer is None:
            return ""
        if emitted and emitted[-1] in self.ends:
            emitted = emitted[:-1]
        before = self.tokenizer.decode(prompt)
        text = self.tokenizer.decode([*prompt, *emitted])
        return text[len(before) :] if text.startswith(before) else self.tokenizer.decode(emitted)


def collect(
    state: DecodeState,
    prompts: list[list[int]],
    reader: Detokenizer,
    began: float,
    subnet: Subnet | None = None,
    budget: Budget | None = None,
) -> list[Sample]:
    """Brings tokens and depths to the host, once.

    Args:
      state: between two iterations, or at the end.
      prompts: token ids per row.
      reader: reads the emitted tokens.
      began: `time.perf_counter()` when the call began.
      subnet: see `SampleStatistics`.
      budget: see `SampleStatistics`.

    Returns:
      One sample per row.
    """
    pulled = (state.tokens, state.exit_layers, state.length, state.ticks, state.drafted, state.accepted)
    tokens, depths, lengths, ticks, drafted, accepted = jax.device_get(pulled)
    seconds = time.perf_counter() - began
    spans = [slice(len(p), int(n)) for p, n in zip(prompts, lengths, strict=True)]
    emitted = [tokens[i, s].tolist() for i, s in enumerate(spans)]
    emitted = [ids[: reader.stops_after(p, ids)] for p, ids in zip(prompts, emitted, strict=True)]
    layers = [
        depths[i, s].tolist()[: len(ids)] for i, (s, ids) in enumerate(zip(spans, emitted, strict=True))
    ]
    counts = Counter(depth for row in layers for depth in row)
    total = sum(counts.values())
    stats = SampleStatistics(
        tokens=total,
        prompt_tokens=sum(map(len, prompts)),
        seconds=seconds,
        tokens_per_s=total / seconds,
        mean_layers=sum(depth * n for depth, n in counts.items()) / max(total, 1),
        exit_counts=dict(sorted(counts.items())),
        segment_ticks=tuple(ticks.tolist()),
        subnet=subnet,
        budget=budget,
        drafted=int(drafted.sum()),
        accepted=int(accepted.sum()),
        wasted=int((drafted - accepted).sum()),
    )
    texts = [reader.text(p, ids) for p, ids in zip(prompts, emitted, strict=True)]
    return [Sample(*row, stats) for row in zip(texts, emitted, layers, strict=True)]


def held_back(text: str, stops: tuple[str, ...]) -> str:
    """The part of `text` that later tokens cannot change: no half character, no started stop string."""
    text = text.rstrip("\ufffd")
    longest = max((len(s) for s in stops), default=1) - 1
    for size in range(min(longest, len(text)), 0, -1):
        if any(s.startswith(text[-size:]) for s in stops):
            return text[:-size]
    return text


def sample_spans(tokenizer: Tokenizer, prompt: Sequence[int], sample: Sample) -> list[render.Span]:
    """The text of a continuation of `prompt` (token ids), in runs of one depth."""
    return render.spans(tokenizer.decode, sample.tokens, sample.exit_layers, prompt=prompt, text=sample.text)
