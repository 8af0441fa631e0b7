"""Text from a decoder-only model, with scores of what it generated and of its prompt.

A prompt is read once, which gives its scores ("prompt_energy", ...), and generating goes on from that state.
After a batch is generated, one forward pass reads prompts and continuations again (`reading.read`) for the
scores of the distributions that generated tokens were drawn from, at full depth. Where nothing reads scores,
`scored=False` saves both readings of vocabulary heads and this pass, which costs count. Costs are those of
full depth, also where the sampler exits early; prompts of such a sampler are read a second time.
"""

import dataclasses
import time
import zlib
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from elastic_lm.cascade.answerer import Answer, Record
from elastic_lm.cascade.batching import answer_alike, shape_or_none
from elastic_lm.cascade.known_tokens import Part, read, width_of
from elastic_lm.cascade.scores import PLACES, PLAIN, Scoring, pooled_scores
from elastic_lm.config.checks import AT_LEAST_1, require
from elastic_lm.config.subnet import Budget, Subnet
from elastic_lm.cost.sequences import generation_flops, head_flops, layer_flops
from elastic_lm.data.padding import filled, padded
from elastic_lm.decode.prefill import PromptState, split_rows, stack_rows
from elastic_lm.decode.results import Sample
from elastic_lm.decode.sampler import Sampler
from elastic_lm.decode.settings import bucket, make_settings
from elastic_lm.models.decoder import Params

Shape = tuple[int, ...]  # columns of the prompt, positions of the caches[, layers that have run before]


@dataclasses.dataclass(frozen=True)
class State:
    """What the first layers gave for a row's prompt.

    Attributes:
      layers: that ran.
      hidden: [T, D] state after them.
      kv: their keys and values, [K, T, H] each.
    """

    layers: int
    hidden: jax.Array
    kv: tuple[tuple[jax.Array, jax.Array], ...]


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
          reads: what scores, with its parameters; its layers are those that the sampler runs. None = what the
            sampler runs.
          keep_state: answers keep what a whole model goes on from (`nested`); needs `scored`.
          **settings: fields of `requests.Settings`. Where tokens are drawn, a row's seed is a hash of its
            prompt plus `seed`, so that its answer does not depend on what it is batched with.

        Raises:
          ValueError: an argument is out of range, the sampler has no tokenizer, or routers that choose
            widths token by token, or another part than it runs is to score.
        """
        require(AT_LEAST_1[0](max_new_tokens), "max_new_tokens", max_new_tokens, AT_LEAST_1[1])
        require(AT_LEAST_1[0](batch_size), "batch_size", batch_size, AT_LEAST_1[1])
        require(sampler.tokenizer is not None, "sampler.tokenizer", None, "give the sampler a tokenizer")
        fix = "widths that routers choose token by token have no one cost; give a subnet, or no budget"
        require(not isinstance(sampler.runs, Budget), "sampler.budget", sampler.runs, fix)
        subnet = sampler.runs if isinstance(sampler.runs, Subnet) else None
        self._runs = Part(sampler.config, subnet=subnet)
        self._reads, self._params = reads or (self._runs, sampler.params)
        fix = f"must be the {self._runs.layers} that the sampler runs"
        require((self._reads.begun, self._reads.layers) == (0, self._runs.layers), "reads", self._reads, fix)
        self._seed = settings.pop("seed", 0)
        make_settings(settings)
        self._sampler, self._most, self._settings = sampler, max_new_tokens, settings
        self._field, self.scoring, self._batch_size = prompt_field, scoring, batch_size
        self._scored, self._keep = scored, keep_state and scored
        self._goes_on = not self._runs.model.exits  # from the state of a prompt, which is read first

    def bucket(self, row: Record) -> Shape | None:
        """The shape of the programs that generate from a row; None = the row will fail."""
        return shape_or_none(row, self._encode)

    def answer(self, rows: Sequence[Record]) -> list[Answer]:
        """See `answerers.Answerer`."""
        return answer_alike([(row, None) for row in rows], self._encode_begun, self._batch, self._batch_size)

    def resume(self, rows: Sequence[Record], begun: Sequence[Answer]) -> list[Answer]:
        """See `answerers.Resumes`; states are `State`, of the first layers of this sampler's whole model."""
        given = [(row, answer.state) for row, answer in zip(rows, begun, strict=True)]
        return answer_alike(given, self._encode_begun, self._batch, self._batch_size)

    def previews(self, score: str) -> bool:
        """See `answerers.Previews`."""
        return self._scored and score.startswith(PLACES[1])

    def preview(self, rows: Sequence[Record]) -> list[Answer]:
        """See `answerers.Previews`; what is begun are `State`, of all layers."""
        given = [(row, None) for row in rows]
        return answer_alike(given, self._encode_begun, self._preview, self._batch_size)

    def finish(self, rows: Sequence[Record], begun: Sequence[Answer]) -> list[Answer]:
        """See `answerers.Previews`."""

        def encode(given: tuple[Record, Answer]) -> tuple[Shape, tuple[list[int], Answer]]:
            shape, ids = self._encode(given[0])
            return shape, (ids, given[1])

        return answer_alike(zip(rows, begun, strict=True), encode, self._finish, self._batch_size)

    def _encode(self, row: Record) -> tuple[Shape, list[int]]:
        assert self._sampler.tokenizer is not None
        ids = self._sampler.tokenizer.encode(row[self._field], bos=True)
        require(bool(ids), self._field, row[self._field], "needs at least one token")
        longest = len(ids) + self._most
        fix = f"with max_new_tokens={self._most} these are more than max_len={self._sampler.config.max_len}"
        require(longest <= self._sampler.config.max_len, "prompt tokens", len(ids), fix)
        return (bucket(len(ids)), bucket(longest + self._sampler.window)), ids

    def _encode_begun(
        self, given: tuple[Record, State | None]
    ) -> tuple[Shape, tuple[list[int], State | None]]:
        shape, ids = self._encode(given[0])
        return (*shape, given[1].layers if given[1] else 0), (ids, given[1])

    def _batch(self, shape: Shape, rows: list[tuple[list[int], State | None]]) -> list[Answer]:
        """Answers to at most a batch of prompts of one shape, all begun or none."""
        prompts = [ids for ids, _ in rows]
        if self._scored:
            return self._finish(shape, list(zip(prompts, self._preview(shape, rows), strict=True)))
        began = time.perf_counter()
        samples = self._sample(shape, prompts, [state for _, state in rows if state])
        each = (time.perf_counter() - began) / len(prompts)
        return [
            Answer(sample.text, {}, self._flops(prompt, sample, shape[2]), each)
            for prompt, sample in zip(prompts, samples, strict=True)
        ]

    def _preview(self, shape: Shape, rows: list[tuple[list[int], State | None]]) -> list[Answer]:
        """What prompts of one shape say, read by the layers that have not run before."""
        began = time.perf_counter()
        prompts, states = [ids for ids, _ in rows], [state for _, state in rows if state]
        part = dataclasses.replace(self._reads, begun=shape[2])
        width = min(shape[0], part.model.max_len)
        before = _begun(filled(states, self._batch_size), width) if states else None
        tokens, entering = jnp.asarray(padded(prompts, self._batch_size, width)), before and before.hidden
        keep = self._keep or self._goes_on
        reading = read(part, self._params, tokens, entering, scoring=self.scoring, keep=keep)
        scores = self._by_row(_of_prompts(reading.scores, self._column(map(len, prompts))))
        all_kv = (*(before.kv if before else ()), *reading.kv)
        kept = [State(part.layers, *own) for own in split_rows((reading.hidden, all_kv))] if keep else []
        each = (time.perf_counter() - began) / len(prompts)
        return [
            Answer(
                None,
                own,
                float(part.flops(len(prompt)) + head_flops(part.model, len(prompt))),
                each,
                state=kept[i] if self._keep else None,
                begun=kept[i] if self._goes_on else None,
            )
            for i, (prompt, own) in enumerate(zip(prompts, scores, strict=False))
        ]

    def _finish(self, shape: Shape, rows: list[tuple[list[int], Answer]]) -> list[Answer]:
        """Answers to prompts of one shape that have been previewed."""
        began = time.perf_counter()
        prompts, states = [ids for ids, _ in rows], [before.begun for _, before in rows if before.begun]
        samples = self._sample(shape, prompts, states)
        scores = self._score(prompts, samples)
        each, saved = (time.perf_counter() - began) / len(prompts), self._runs.layers if states else 0
        return [
            Answer(
                sample.text,
                {**own, **before.scores},
                before.cost + self._flops(prompt, sample, saved),
                before.seconds + each,
                state=before.state,
                preview=dataclasses.replace(before, state=None, begun=None),
            )
            for (prompt, before), sample, own in zip(rows, samples, scores, strict=True)
        ]

    def _sample(self, shape: Shape, prompts: list[list[int]], states: list[State]) -> list[Sample]:
        """Generates from prompts, which all have a state or none."""
        begun = _begun(filled(states, self._batch_size), shape[0]) if states else None
        every = filled(prompts, self._batch_size)
        seeds = [(zlib.crc32(np.asarray(ids).tobytes()) + self._seed) % 2**32 for ids in every]
        named: dict[str, Any] = {**self._settings, "seed": seeds, "prompt_state": begun}
        return self._sampler.sample(every, self._most, **named)[: len(prompts)]

    def _flops(self, prompt: list[int], sample: Sample, saved: int) -> float:
        """Of what generates, without the layers that ran over the prompt before, and what scores that."""
        tokens, emitted = len(prompt), len(sample.tokens)
        total = generation_flops(self._runs.model, tokens, emitted)
        total -= layer_flops(self._runs.model, tokens, 0, saved)
        if self._scored:
            total += self._reads.flops(tokens + emitted) + head_flops(self._reads.model, emitted)
        return float(total)

    def _score(self, prompts: list[list[int]], samples: list[Sample]) -> list[dict[str, float]]:
        """Pooled scores of what was generated, of every row."""
        sequences = [[*p, *s.tokens] for p, s in zip(prompts, samples, strict=True)]
        scores: list[dict[str, float]] = [{} for _ in prompts]
        widths = [width_of(self._reads.model, len(ids)) for ids in sequences]
        for width in sorted(set(widths)):
            group = [i for i, own in enumerate(widths) if own == width]
            tokens = jnp.asarray(padded([sequences[i] for i in group], self._batch_size, width))
            first_B1 = self._column(len(prompts[i]) - 1 for i in group)
            at_BN = jnp.minimum(first_B1 + jnp.arange(self._most), width - 1)
            reading = read(self._reads, self._params, tokens, at_BN=at_BN, scoring=self.scoring)
            emitted = self._column(len(samples[i].tokens) for i in group)
            for i, own in zip(group, self._by_row(_of_generated(reading.scores, emitted)), strict=False):
                scores[i] = own
        return scores

    def _column(self, values: Iterable[int]) -> jax.Array:
        """[B, 1] int32, a value per row, zero where a batch is filled up."""
        given = list(values)
        return jnp.asarray([*given, *[0] * (self._batch_size - len(given))], jnp.int32)[:, None]

    def _by_row(self, scores: dict[str, jax.Array]) -> list[dict[str, float]]:
        values = jax.device_get(scores)
        return [{name: float(column[i]) for name, column in values.items()} for i in range(self._batch_size)]


@jax.jit
def _of_prompts(scores: dict[str, jax.Array], length_B1: jax.Array) -> dict[str, jax.Array]:
    """Pooled scores of prompts, read at each of their positions, by name; [B] float32 each."""
    position = jnp.arange(next(iter(scores.values())).shape[1])
    return pooled_scores(scores, position < length_B1, PLACES[1])


@jax.jit
def _of_generated(scores: dict[str, jax.Array], emitted_B1: jax.Array) -> dict[str, jax.Array]:
    """Pooled scores of generated tokens, read where they were drawn, by name; [B] float32 each."""
    return pooled_scores(scores, jnp.arange(next(iter(scores.values())).shape[1]) < emitted_B1)


def _begun(states: list[State], width: int) -> PromptState:
    """What the first layers gave for a batch of prompts, cut to the prompts' columns."""

    def cut(x: jax.Array, axis: int) -> jax.Array:
        missing = width - x.shape[axis]
        if missing > 0:  # max_len is below the bucket
            return jnp.pad(x, [(0, missing if i == axis else 0) for i in range(x.ndim)])
        return jax.lax.slice_in_dim(x, 0, width, axis=axis)

    rows = [(cut(s.hidden, 0), tuple((cut(k, 1), cut(v, 1)) for k, v in s.kv)) for s in states]
    return PromptState(states[0].layers, *stack_rows(rows))
