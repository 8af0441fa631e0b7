"""Text from a decoder-only model, with scores of what it generated and of its prompt.

After a batch is generated, one forward pass reads prompts and continuations again (`reading.read`): scores
are those of the distributions that generated tokens were drawn from, at full depth, and of the prompt's
positions ("prompt_energy", ...). Where nothing reads scores, `scored=False` saves this pass, which costs
count. Costs are those of full depth, also where the sampler exits early.
"""

import dataclasses
import time
import zlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from elastic_lm.calibrate.routing_scores import PLAIN, Scoring, pooled_scores
from elastic_lm.data.padding import padded
from elastic_lm.decode.answerers import Answer, Row
from elastic_lm.decode.batches import answer_alike, filled, shape_or_none
from elastic_lm.decode.prefill import Begun
from elastic_lm.decode.reading import Part, Reading, apart, read, together, width_of
from elastic_lm.decode.requests import bucket, make_settings
from elastic_lm.decode.results import Sample
from elastic_lm.decode.sampler import Sampler
from elastic_lm.elastic import Budget, Subnet
from elastic_lm.models.decoder import Params
from elastic_lm.plain import AT_LEAST_1, require
from elastic_lm.sequence_cost import generation_flops, head_flops, layer_flops

Shape = tuple[int, int, int]  # columns of the prompt, positions of the caches, layers that have run before


@dataclasses.dataclass(frozen=True)
class State:
    """What the first layers gave for a row's prompt and continuation.

    Attributes:
      layers: that ran.
      hidden: [T, D] state after them.
      rows: their keys and values, [K, T, H] each.
    """

    layers: int
    hidden: jax.Array
    rows: tuple[tuple[jax.Array, jax.Array], ...]


class Generator:
    """A decoder-only model that continues a row's prompt; the output is the text."""

    def __init__(
        self,
        sampler: Sampler,
        max_new_tokens: int = 64,
        *,
        prompt_field: str = "prompt",
        scoring: Scoring = PLAIN,
        scored: bool = True,
        batch_size: int = 16,
        reads: tuple[Part, Params] | None = None,
        keep_state: bool = False,
        **settings: Any,
    ) -> None:
        """Creates an answerer; nothing is compiled yet.

        Args:
          sampler: of the model, with its tokenizer.
          max_new_tokens: tokens of an answer at most.
          prompt_field: of rows.
          scoring: of the energy; static.
          scored: answers have scores; a Super needs none.
          batch_size: rows per program; the last batch is filled up.
          reads: what scores, with its parameters; None = what the sampler runs.
          keep_state: answers keep what a whole model goes on from (`nested`); needs `scored`.
          **settings: fields of `requests.Settings`. Where tokens are drawn, a row's seed is a hash of its
            prompt plus `seed`, so that its answer does not depend on what it is batched with.

        Raises:
          ValueError: an argument is out of range, or the sampler has no tokenizer, or routers that choose
            widths token by token.
        """
        require(AT_LEAST_1[0](max_new_tokens), "max_new_tokens", max_new_tokens, AT_LEAST_1[1])
        require(AT_LEAST_1[0](batch_size), "batch_size", batch_size, AT_LEAST_1[1])
        require(sampler.tokenizer is not None, "sampler.tokenizer", None, "give the sampler a tokenizer")
        fix = "widths that routers choose token by token have no one cost; give a subnet, or no budget"
        require(not isinstance(sampler.runs, Budget), "sampler.budget", sampler.runs, fix)
        subnet = sampler.runs if isinstance(sampler.runs, Subnet) else None
        self._runs = Part(sampler.config, subnet=subnet)
        self._reads, self._params = reads or (self._runs, sampler.params)
        self._seed = settings.pop("seed", 0)
        make_settings(settings)
        self._sampler, self._most, self._settings = sampler, max_new_tokens, settings
        self._field, self.scoring, self._batch_size = prompt_field, scoring, batch_size
        self._scored, self._keep = scored, keep_state and scored

    def bucket(self, row: Row) -> Shape | None:
        """The shape of the programs that generate from a row; None = the row will fail."""
        return shape_or_none((row, None), self._encode)

    def answer(self, rows: Sequence[Row]) -> list[Answer]:
        """See `answerers.Answerer`."""
        return answer_alike([(row, None) for row in rows], self._encode, self._batch, self._batch_size)

    def resume(self, rows: Sequence[Row], begun: Sequence[Answer]) -> list[Answer]:
        """See `answerers.Resumes`; states are `State`, of the first layers of this sampler's whole model."""
        given = [(row, answer.state) for row, answer in zip(rows, begun, strict=True)]
        return answer_alike(given, self._encode, self._batch, self._batch_size)

    def _encode(self, given: tuple[Row, State | None]) -> tuple[Shape, tuple[list[int], State | None]]:
        row, state = given
        assert self._sampler.tokenizer is not None
        ids = self._sampler.tokenizer.encode(row[self._field], bos=True)
        require(bool(ids), self._field, row[self._field], "needs at least one token")
        longest = len(ids) + self._most
        fix = f"with max_new_tokens={self._most} these are more than max_len={self._sampler.config.max_len}"
        require(longest <= self._sampler.config.max_len, "prompt tokens", len(ids), fix)
        shape = bucket(len(ids)), bucket(longest + self._sampler.window), state.layers if state else 0
        return shape, (ids, state)

    def _batch(self, shape: Shape, rows: list[tuple[list[int], State | None]]) -> list[Answer]:
        """Answers to at most a batch of prompts of one shape, all begun or none."""
        began = time.perf_counter()
        prompts, states = [ids for ids, _ in rows], [state for _, state in rows if state]
        begun = _begun(filled(states, self._batch_size), shape[0]) if states else None
        every = filled(prompts, self._batch_size)
        seeds = [(zlib.crc32(np.asarray(ids).tobytes()) + self._seed) % 2**32 for ids in every]
        named: dict[str, Any] = {**self._settings, "seed": seeds, "begun": begun}
        samples = self._sampler.sample(every, self._most, **named)[: len(prompts)]
        scores, hidden = self._score(prompts, samples) if self._scored else ([{}] * len(prompts), [])
        each = (time.perf_counter() - began) / len(prompts)
        return [
            Answer(
                sample.text,
                scores[i],
                float(self._flops(len(prompt), len(sample.tokens), shape[2])),
                each,
                state=State(self._reads.layers, *hidden[i]) if self._keep else None,
            )
            for i, (prompt, sample) in enumerate(zip(prompts, samples, strict=True))
        ]

    def _flops(self, prompt: int, emitted: int, saved: int) -> int:
        """Of a row: what generates, without the layers that ran over the prompt before, and what scores."""
        total = generation_flops(self._runs.model, prompt, emitted)
        total -= layer_flops(self._runs.model, prompt, 0, saved)
        if self._scored:
            read_tokens = prompt + emitted
            total += self._reads.flops(read_tokens) + head_flops(self._reads.model, read_tokens)
        return total

    def _score(
        self, prompts: list[list[int]], samples: list[Sample]
    ) -> tuple[list[dict[str, float]], list[Any]]:
        """Pooled scores of every row, and (states, rows) of its layers where they are kept."""
        sequences = [[*p, *s.tokens] for p, s in zip(prompts, samples, strict=True)]
        scores: list[dict[str, float]] = [{} for _ in prompts]
        kept: list[Any] = [None for _ in prompts]
        widths = [width_of(self._reads.model, len(ids)) for ids in sequences]
        for width in sorted(set(widths)):
            group = [i for i, own in enumerate(widths) if own == width]
            tokens = jnp.asarray(padded([sequences[i] for i in group], self._batch_size, width))
            reading = read(self._reads, self._params, tokens, scoring=self.scoring, keep=self._keep)
            found = self._pool(reading, [len(prompts[i]) for i in group], [len(sequences[i]) for i in group])
            states = apart((reading.hidden, reading.rows)) if self._keep else [None] * len(group)
            for i, own, state in zip(group, found, states, strict=False):
                scores[i], kept[i] = own, state
        return scores, kept

    def _pool(self, reading: Reading, starts: list[int], ends: list[int]) -> list[dict[str, float]]:
        rows = self._batch_size - len(starts)
        start_B1 = jnp.asarray([*starts, *[1] * rows])[:, None]
        end_B1 = jnp.asarray([*ends, *[1] * rows])[:, None]
        values = jax.device_get(_pooled(reading.scores, start_B1, end_B1))
        return [{name: float(column[i]) for name, column in values.items()} for i in range(len(starts))]


@jax.jit
def _pooled(scores: dict[str, jax.Array], start_B1: jax.Array, end_B1: jax.Array) -> dict[str, jax.Array]:
    """Scores of generated tokens, and of the prompt's positions, by name; [B] float32 each.

    Position t gives the distribution of token t + 1: generated tokens start .. end - 1 were drawn at
    start - 1 .. end - 2, and the prompt's tokens are read at 0 .. start - 1.
    """
    position = jnp.arange(next(iter(scores.values())).shape[1])
    generated = (position >= start_B1 - 1) & (position < end_B1 - 1)
    return pooled_scores(scores, generated) | pooled_scores(scores, position < start_B1, "prompt_")


def _begun(states: list[State], width: int) -> Begun:
    """What the first layers gave for a batch of prompts, cut to the prompts' columns."""

    def cut(x: jax.Array, axis: int) -> jax.Array:
        missing = width - x.shape[axis]
        if missing > 0:  # max_len is below the bucket
            return jnp.pad(x, [(0, missing if i == axis else 0) for i in range(x.ndim)])
        return jax.lax.slice_in_dim(x, 0, width, axis=axis)

    rows = [(cut(s.hidden, 0), tuple((cut(k, 1), cut(v, 1)) for k, v in s.rows)) for s in states]
    return Begun(*together(rows))
