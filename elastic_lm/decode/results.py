"""What a call of the sampler returns: tokens as text, their depths, and what they cost."""

import dataclasses
import functools
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from elastic_lm.config.subnet import Budget, Subnet
from elastic_lm.data.tokenizer import Tokenizer
from elastic_lm.decode import logprobs
from elastic_lm.decode.drafting import DRAFTER
from elastic_lm.decode.logprobs import Ranked
from elastic_lm.decode.read_bytes import gb_per_s, read_bytes
from elastic_lm.decode.sampling import BROKEN
from elastic_lm.decode.segment import PREVIEW
from elastic_lm.decode.served import Served
from elastic_lm.decode.settings import Settings
from elastic_lm.decode.state import DecodeState
from elastic_lm.models.finite import overflow_error
from elastic_lm.processes import on_host
from elastic_lm.report import colour


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
      seconds: wall-clock time of prefill and decoding, with slicing and compilation where they happened.
      tokens_per_s: tokens / seconds.
      mean_layers: mean depth, in layers, at which emitted tokens were chosen.
      exit_counts: emitted tokens per depth.
      segment_ticks: how often each segment ran, from the lowest to the deepest.
      subnet: the sub-network that ran; None = the whole model, or a model whose routers chose its widths
        while it decoded.
      budget: the budget that those routers kept; None = no routers chose.
      drafted: tokens that lossless rows drafted and the full model verified.
      accepted: drafted tokens that the full model accepted.
      wasted: drafted tokens that it rejected.
      copied: accepted tokens that were copied from the row's own text (`DecodeOptions.lookup`).
      verifications: how often the deepest segment ran over positions of a row while rows were verified.
      read_bytes: bytes of weights and caches that decoding has read, at least (`decode.read_bytes`); None =
        they are not known.
      drafter_ticks: how often the sub-network ran that drafts (`DecodeOptions.drafter`).

    Example:
      ```python
      import elastic_lm as el
      from elastic_lm.testing import random_params, tiny_config

      config = tiny_config(n_layers=2, exits=(1,))
      options = el.DecodeOptions(exit=el.StaticExit(1, layers=(1,)), window=2)
      sampler = el.Sampler(el.Decoder(config), random_params(config), options=options)

      stats = sampler.sample([1, 2, 3], max_new_tokens=8).stats
      print(f"{stats.tokens} tokens at {stats.mean_layers:.1f} of {config.n_layers} layers")
      print("tokens per depth:", stats.exit_counts, "ticks per segment:", stats.segment_ticks)
      ```
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
    copied: int = 0
    verifications: int = 0
    read_bytes: int | None = None
    drafter_ticks: int = 0

    @property
    def gb_per_s(self) -> float | None:
        """Gigabytes of weights and caches per second, at least, with the seconds of `tokens_per_s`."""
        return gb_per_s(self.read_bytes, self.seconds)

    @property
    def acceptance(self) -> float:
        """Share of the drafted tokens that were accepted; 1 where none were drafted."""
        return self.accepted / self.drafted if self.drafted else 1.0

    @property
    def accepted_per_verification(self) -> float:
        """Drafted tokens that were accepted in one verification, on average; 0 where nothing is verified."""
        return self.accepted / self.verifications if self.verifications else 0.0


@dataclasses.dataclass(frozen=True)
class Sample:
    """One generated continuation.

    Attributes:
      text: decoded continuation, without the prompt, without the stop token, cut before a stop string.
      tokens: emitted token ids, up to and including a stop token or the end of a stop string.
      exit_layers: layers that ran before each emitted token was chosen; layers that a sub-network leaves out
        do not count, and a token that was copied from the text has 0. Those of a lossless row depend on the
        other rows of its batch, unlike its tokens.
      stats: what the call cost; the rows of a batch share it.
      logprobs: natural log-probability of each emitted token under the distribution that it was taken from,
        before temperature, penalties and truncation: that of the exit at which it left, or of the full model.
        Tokens that the full model has verified are its own. None = not asked for.
      top_logprobs: (token id, log-probability) of the likeliest tokens at each place, likeliest first; None =
        not asked for.

    Example:
      ```python
      import elastic_lm as el
      from elastic_lm.testing import random_params, tiny_config

      config = tiny_config(n_layers=2, exits=(1,))
      sampler = el.Sampler(el.Decoder(config), random_params(config), window=2)

      first, second = sampler.sample([[1, 2, 3], [4, 5]], max_new_tokens=8)
      print(first.tokens, first.exit_layers)  # without a policy, every token comes from full depth
      assert first.stats is second.stats
      ```
    """

    text: str
    tokens: list[int]
    exit_layers: list[int]
    stats: SampleStatistics
    logprobs: list[float] | None = None
    top_logprobs: list[Ranked] | None = None


@dataclasses.dataclass(frozen=True)
class Detokenizer:
    """Turns emitted tokens into text, and knows where text ends."""

    tokenizer: TextTokenizer | None  # None = every text is empty
    end_tokens: tuple[int, ...]  # end a text and are not part of it
    stops: tuple[str, ...]  # stop strings, which end a text and are not part of it either

    def text(self, prompt: list[int], emitted: list[int]) -> str:
        """Text of the emitted tokens, cut before the first stop string."""
        shown, marked = self._split_stops
        text = self._decode(prompt, emitted)
        cuts = [text.find(stop) for stop in shown if stop in text]
        if marked:
            with_marks = self._decode(prompt, emitted, special=True)
            places = [with_marks.find(stop) for stop in marked if stop in with_marks]
            cuts += [self._shown_before(prompt, emitted, place) for place in places]
        return text[: min(cuts)] if cuts else text

    def settled(self, prompt: list[int], emitted: list[int], text: str) -> str:
        """The part of the text that later tokens cannot change: no half character, no start of a stop.

        Args:
          prompt: what comes before.
          emitted: token ids.
          text: of these tokens, from `text`.
        """
        shown, marked = self._split_stops
        text = held_back(text, shown)
        if marked:
            with_marks = self._decode(prompt, emitted, special=True)
            safe = held_back(with_marks, marked)
            text = text[: self._shown_before(prompt, emitted, len(safe))]
        return text

    def stops_after(self, prompt: list[int], emitted: list[int]) -> int | None:
        """The number of emitted tokens at which their text first contains a stop string, or None."""
        if not self._stopped(prompt, emitted):
            return None
        return next(n for n in range(1, len(emitted) + 1) if self._stopped(prompt, emitted[:n]))

    def _stopped(self, prompt: list[int], emitted: list[int]) -> bool:
        """Whether the text of the emitted tokens contains a stop string."""
        shown, marked = self._split_stops
        text = self._decode(prompt, emitted) if shown else ""
        with_marks = self._decode(prompt, emitted, special=True) if marked else ""
        return any(stop in text for stop in shown) or any(stop in with_marks for stop in marked)

    @functools.cached_property
    def _split_stops(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Stop strings that are looked for in the text, and those with special tokens, which it omits."""
        special = getattr(self.tokenizer, "special_tokens", ()) if self.stops else ()
        marked = tuple(stop for stop in self.stops if any(token in stop for token in special))
        return tuple(stop for stop in self.stops if stop not in marked), marked

    def _shown_before(self, prompt: list[int], emitted: list[int], place: int) -> int:
        """Characters of the text that come before a place in the text with special tokens."""
        whole = len(emitted)
        while len(self._decode(prompt, emitted[:whole], special=True)) > place:
            whole -= 1
        # The place is at the end of a token, or within one that is no special token.
        rest = place - len(self._decode(prompt, emitted[:whole], special=True))
        return len(self._decode(prompt, emitted[:whole])) + rest

    def _decode(self, prompt: list[int], emitted: list[int], special: bool = False) -> str:
        """Text of the emitted tokens in the context of their prompt, without the stop token.

        Args:
          prompt: what comes before.
          emitted: token ids.
          special: special tokens are written out; only for tokenizers that say which ones they have.
        """
        if self.tokenizer is None:
            return ""
        decode: Any = self.tokenizer.decode
        if special:
            decode = functools.partial(decode, special=True)
        elif emitted and emitted[-1] in self.end_tokens:
            emitted = emitted[:-1]

        # Some tokens decode to other text after a prompt than alone, such as those that begin with a space.
        before, text = decode(prompt), decode([*prompt, *emitted])
        return text[len(before) :] if text.startswith(before) else decode(emitted)


def make_detokenizer(
    tokenizer: TextTokenizer | None, eos_ids: tuple[int, ...], settings: Settings
) -> Detokenizer:
    """The detokenizer for a call with these settings; `eos_ids` are the model's own end tokens.

    Raises:
      ValueError: the settings have stop strings, and there is no tokenizer.
    """
    stops = settings.stop_strings()
    if stops and tokenizer is None:
        raise ValueError(
            f"stop={settings.stop!r}: stop strings need a tokenizer; use stop_tokens without one"
        )
    return Detokenizer(tokenizer, (*eos_ids, *settings.stop_tokens), stops)


def collect(
    state: DecodeState,
    prompts: list[list[int]],
    detokenizer: Detokenizer,
    started: float,
    model: Served,
) -> list[Sample]:
    """Brings tokens and depths to the host, once.

    Args:
      state: between two iterations, or at the end.
      prompts: token ids per row.
      detokenizer: of the call.
      started: `time.perf_counter()` at the start of the call.
      model: that ran.

    Returns:
      One sample per row.

    Raises:
      NotFiniteError: a token could not be drawn, because its logits were not finite.
    """
    rows = on_host((state.tokens, state.exit_layers, state.length, state.logprobs))
    counters = (state.ticks, state.drafted, state.accepted, state.copied, state.verifications)
    ticks, drafted, accepted, copied, verifications = on_host(counters)
    drafter_ticks = 0 if state.drafting is None else int(on_host(state.drafting.ticks))
    tokens, depths, lengths, bits = rows
    check_drawn(prompts, tokens, lengths, model)
    seconds = time.perf_counter() - started

    emitted, exit_layers = [], []
    for row, prompt in enumerate(prompts):
        span = slice(len(prompt), int(lengths[row]))
        ids = tokens[row, span].tolist()
        ids = ids[: detokenizer.stops_after(prompt, ids)]
        emitted.append(ids)
        exit_layers.append(depths[row, span].tolist()[: len(ids)])

    counts = Counter(depth for row in exit_layers for depth in row)
    total = sum(counts.values())
    spans = [(len(prompt), len(ids)) for prompt, ids in zip(prompts, emitted, strict=True)]
    stats = SampleStatistics(
        tokens=total,
        prompt_tokens=sum(map(len, prompts)),
        seconds=seconds,
        tokens_per_s=total / seconds,
        mean_layers=sum(depth * n for depth, n in counts.items()) / max(total, 1),
        exit_counts=dict(sorted(counts.items())),
        segment_ticks=tuple(ticks.tolist()),
        subnet=model.subnet,
        budget=model.budget,
        drafted=int(drafted.sum()),
        accepted=int(accepted.sum()),
        wasted=int((drafted - accepted).sum()),
        copied=int(copied.sum()),
        verifications=int(verifications.sum()),
        read_bytes=read_bytes(
            model,
            ticks.tolist(),
            counts,
            spans,
            verifies=bool(verifications.any()),
            drafter_ticks=drafter_ticks,
        ),
        drafter_ticks=drafter_ticks,
    )
    samples = [
        Sample(detokenizer.text(prompt, ids), ids, layers, stats)
        for prompt, ids, layers in zip(prompts, emitted, exit_layers, strict=True)
    ]
    if bits is None:
        return samples
    return [
        _with_logprobs(sample, row[len(prompt) : len(prompt) + len(sample.tokens)])
        for sample, prompt, row in zip(samples, prompts, bits, strict=True)
    ]


def _with_logprobs(sample: Sample, bits_TC: np.ndarray) -> Sample:
    """A sample with what the loop has kept about its tokens."""
    values, ranked = logprobs.read(bits_TC)
    return dataclasses.replace(
        sample, logprobs=values, top_logprobs=ranked if bits_TC.shape[-1] > 1 else None
    )


def check_drawn(
    prompts: Sequence[Sequence[int]], tokens: np.ndarray, lengths: Sequence[int], model: Served
) -> None:
    """Refuses rows with a token that could not be drawn.

    Args:
      prompts: token ids per row.
      tokens: [B, S] int32 tokens of the rows, on the host.
      lengths: of the rows.
      model: that drew them.

    Raises:
      NotFiniteError: names the row, and the first weight that is not finite or else the dtype.
    """
    for row, prompt in enumerate(prompts):
        broken = np.flatnonzero(tokens[row, len(prompt) : int(lengths[row])] == BROKEN)
        if len(broken):
            what = f"prompt {row}: the logits after {len(prompt) + int(broken[0])} tokens"
            # The margin of a preview may be infinite.
            weights = {name: part for name, part in model.params.items() if name not in (PREVIEW, DRAFTER)}
            raise overflow_error(what, weights, model.config.dtype)


def held_back(text: str, stops: tuple[str, ...]) -> str:
    """The part of `text` that later tokens cannot change: no half character, no start of a stop string."""
    # Tokenizers decode the first bytes of an unfinished character to U+FFFD.
    text = text.rstrip("\ufffd")
    longest = max((len(s) for s in stops), default=1) - 1
    for size in range(min(longest, len(text)), 0, -1):
        if any(s.startswith(text[-size:]) for s in stops):
            return text[:-size]
    return text


def sample_spans(tokenizer: Tokenizer, prompt: Sequence[int], sample: Sample) -> list[colour.Span]:
    """The text of a continuation of `prompt` (token ids), in runs of one depth."""
    return colour.spans(tokenizer.decode, sample.tokens, sample.exit_layers, prompt=prompt, text=sample.text)
