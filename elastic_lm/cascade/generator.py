"""Text from a decoder-only model, with scores of what it generated and of its prompt.

A prompt is read once, which gives its scores ("prompt_energy", ...), and generation continues from the state
of that pass. After a batch is generated, one forward pass reads prompts and continuations again
(`known_tokens.score_tokens`), for the scores of the distributions that the tokens were drawn from, at full
depth. Where nothing reads the scores, `scored=False` saves that pass and the vocabulary head over the prompt,
both of which count as cost.

Costs are those of full depth, also where the sampler exits early. A sampler with exits reads its prompts a
second time, because its exits may have caches of their own.
"""

import dataclasses
import time
import zlib
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from elastic_lm.cascade.answerer import Answer, Record, text_in
from elastic_lm.cascade.batching import answer_by_shape, shape_or_none
from elastic_lm.cascade.known_tokens import ModelPart, padded_width, score_tokens
from elastic_lm.cascade.scores import PLAIN, Scoring, pooled_scores
from elastic_lm.config.cascade import BATCH_SIZE, PLACES
from elastic_lm.config.checks import require, require_at_least_1
from elastic_lm.config.decoding import MAX_NEW_TOKENS
from elastic_lm.config.subnet import Budget, Subnet
from elastic_lm.cost.sequences import generation_flops, head_flops, layer_flops
from elastic_lm.data.padding import filled, padded
from elastic_lm.decode.prefill import PromptState, split_rows, stack_rows
from elastic_lm.decode.results import Sample
from elastic_lm.decode.sampler import Sampler
from elastic_lm.decode.settings import bucket, make_settings
from elastic_lm.models.decoder import Params
from elastic_lm.models.finite import NotFiniteError, overflow_once


class GenerationShape(NamedTuple):
    """What decides which compiled programs generate from a prompt."""

    width: int  # columns of the prompt
    capacity: int  # positions of the caches
    layers_done: int = 0  # layers that an earlier model has run over the prompt


class Generator:
    """A decoder-only model that continues a record's prompt; the output is the text.

    Attributes:
      weights: what those have in common that continue from each other (`shared_model`); None = unknown.

    Example:
      ```python
      import elastic_lm as el
      from elastic_lm.cascade import Generator
      from elastic_lm.data import train_bpe
      from elastic_lm.testing import random_params, tiny_config

      config = tiny_config(n_layers=1, vocab_size=260)
      params = random_params(config)  # `el.load(folder)` gives a trained model
      sampler = el.Sampler(el.Decoder(config), params, train_bpe(["some text"], 260), window=1)

      generator = Generator(sampler, max_new_tokens=4, batch_size=1)
      (answer,) = generator.answer([{"prompt": "import "}])
      print(repr(answer.output), answer.scores["energy"], answer.scores["prompt_energy"])
      ```
    """

    def __init__(
        self,
        sampler: Sampler,
        max_new_tokens: int = MAX_NEW_TOKENS,
        *,
        prompt_field: str = "prompt",
        scoring: Scoring = PLAIN,
        scored: bool = True,
        batch_size: int = BATCH_SIZE,
        scorer: tuple[ModelPart, Params] | None = None,
        keep_state: bool = False,
        **settings: Any,
    ) -> None:
        """Creates an answerer; nothing is compiled yet.

        Args:
          sampler: of the model, with its tokenizer.
          max_new_tokens: tokens of an answer at most.
          prompt_field: field of a record with the prompt.
          scoring: of the energy; static under jit.
          scored: whether answers have scores; a Super needs none.
          batch_size: records per program; the last batch is filled up.
          scorer: what computes the scores, and its parameters. It has as many layers as the sampler runs.
            None = what the sampler runs.
          keep_state: hand over the prompt's state, from which the whole model resumes (`shared_generator`);
            needs `scored`.
          **settings: fields of `decode.settings.Settings`. Where tokens are drawn, a record's seed is a hash
            of its prompt plus `seed`, so that its answer does not depend on what it is batched with.

        Raises:
          ValueError: an argument is out of range, the sampler has no tokenizer or has routers that choose
            widths token by token, or the scorer has another number of layers.
        """
        require_at_least_1("max_new_tokens", max_new_tokens)
        require_at_least_1("batch_size", batch_size)
        require(sampler.tokenizer is not None, "sampler.tokenizer", None, "give the sampler a tokenizer")
        require(
            not isinstance(sampler.runs, Budget),
            "sampler.budget",
            sampler.runs,
            "widths that routers choose token by token have no one cost; give a subnet, or no budget",
        )
        subnet = sampler.runs if isinstance(sampler.runs, Subnet) else None
        self._runs = ModelPart(sampler.config, subnet=subnet)
        self._scorer, self._params = scorer or (self._runs, sampler.params)
        self._overflow = overflow_once(self._params, self._scorer.config.dtype)
        require(
            (self._scorer.layers_done, self._scorer.layers) == (0, self._runs.layers),
            "scorer",
            self._scorer,
            f"must have the {self._runs.layers} layers that the sampler runs",
        )
        self._seed = settings.pop("seed", 0)
        make_settings(settings)  # only checks them

        self.weights: object | None = None
        self._sampler, self._max_new_tokens, self._settings = sampler, max_new_tokens, settings
        self._field, self.scoring, self._batch_size = prompt_field, scoring, batch_size
        self._scored = scored
        self._hands_over = keep_state and scored
        self._continues = not self._runs.model.exits  # generation, from the pass that scored the prompt

    def bucket(self, record: Record) -> GenerationShape | None:
        """The shape of the programs that generate from a record; None = the record will fail."""
        return shape_or_none((record, None), self._encode)

    def answer(self, records: Sequence[Record]) -> list[Answer]:
        """Answers records, as in `Answerer.answer`."""
        inputs = [(record, None) for record in records]
        return answer_by_shape(inputs, self._encode, self._answer_batch, self._batch_size)

    def resume(self, records: Sequence[Record], swift_answers: Sequence[Answer]) -> list[Answer]:
        """Continues from what a Swift of the first layers of this sampler's model has handed over."""
        inputs = [(record, a.handover) for record, a in zip(records, swift_answers, strict=True)]
        return answer_by_shape(inputs, self._encode, self._answer_batch, self._batch_size)

    def previews(self, score: str) -> bool:
        """Whether this score is known before the answer: those of the prompt are."""
        return self._scored and score.startswith(PLACES[1])

    def preview(self, records: Sequence[Record]) -> list[Answer]:
        """Scores prompts; what it prepares is their state after all layers."""
        inputs = [(record, None) for record in records]
        return answer_by_shape(inputs, self._encode, self._preview_batch, self._batch_size)

    def resume_preview(self, records: Sequence[Record], earlier: Sequence[Answer]) -> list[Answer]:
        """Scores prompts from what a member of the first layers of this sampler's model has handed over."""
        inputs = [(record, a.handover) for record, a in zip(records, earlier, strict=True)]
        return answer_by_shape(inputs, self._encode, self._preview_batch, self._batch_size)

    def finish(self, records: Sequence[Record], previews: Sequence[Answer]) -> list[Answer]:
        """Generates from prompts that have been previewed."""

        def encode(given: tuple[Record, Answer]) -> tuple[GenerationShape, tuple[list[int], Answer]]:
            record, preview = given
            shape, (ids, _) = self._encode((record, None))
            return shape, (ids, preview)

        inputs = zip(records, previews, strict=True)
        return answer_by_shape(inputs, encode, self._finish_batch, self._batch_size)

    def _encode(
        self, given: tuple[Record, PromptState | None]
    ) -> tuple[GenerationShape, tuple[list[int], PromptState | None]]:
        assert self._sampler.tokenizer is not None
        record, state = given
        text = text_in(record, self._field)
        ids = self._sampler.tokenizer.encode(text, bos=True)
        require(bool(ids), self._field, text, "needs at least one token")

        longest, max_len = len(ids) + self._max_new_tokens, self._sampler.config.max_len
        require(
            longest <= max_len,
            "prompt tokens",
            len(ids),
            f"with max_new_tokens={self._max_new_tokens} these are more than max_len={max_len}",
        )
        shape = GenerationShape(
            width=bucket(len(ids)),
            capacity=bucket(longest + self._sampler.options.window),
            layers_done=state.layers if state else 0,
        )
        return shape, (ids, state)

    def _answer_batch(
        self, shape: GenerationShape, batch: list[tuple[list[int], PromptState | None]]
    ) -> list[Answer]:
        """Answers at most a batch of prompts of one shape; all of them have a state, or none has."""
        prompts = [ids for ids, _ in batch]
        if self._scored:
            return self._finish_batch(
                shape, list(zip(prompts, self._preview_batch(shape, batch), strict=True))
            )

        began = time.perf_counter()
        samples = self._sample(shape, prompts, [state for _, state in batch if state])
        seconds = (time.perf_counter() - began) / len(prompts)
        return [
            Answer(sample.text, {}, self._flops(prompt, sample, shape.layers_done), seconds=seconds)
            for prompt, sample in zip(prompts, samples, strict=True)
        ]

    def _preview_batch(
        self, shape: GenerationShape, batch: list[tuple[list[int], PromptState | None]]
    ) -> list[Answer]:
        """Scores prompts of one shape, in a pass through the layers that have not run over them yet."""
        began = time.perf_counter()
        prompts, states = [ids for ids, _ in batch], [state for _, state in batch if state]
        part = dataclasses.replace(self._scorer, layers_done=shape.layers_done)
        width = min(shape.width, part.model.max_len)
        before = _stacked(filled(states, self._batch_size), width) if states else None
        scored = score_tokens(
            part,
            self._params,
            jnp.asarray(padded(prompts, self._batch_size, width)),
            self._column(map(len, prompts)),
            before.hidden if before else None,
            scoring=self.scoring,
            keep_state=self._hands_over or self._continues,
        )

        scores = self._by_row(_prompt_scores(scored.scores, self._column(map(len, prompts))), len(prompts))
        after: list[PromptState | None] = [None] * len(prompts)
        if scored.hidden is not None:
            kv = (*(before.kv if before else ()), *scored.kv)
            after = split_rows(PromptState(part.layers, scored.hidden, kv))
        seconds = (time.perf_counter() - began) / len(prompts)
        return [
            Answer(
                None,
                own_scores,
                float(part.flops(len(prompt)) + head_flops(part.model, len(prompt))),
                seconds=seconds,
                handover=state if self._hands_over else None,
                prepared=state if self._continues else None,
            )
            for prompt, own_scores, state in zip(prompts, scores, after, strict=False)
        ]

    def _finish_batch(self, shape: GenerationShape, batch: list[tuple[list[int], Answer]]) -> list[Answer]:
        """Generates from prompts of one shape that have been previewed, and scores what was generated."""
        began = time.perf_counter()
        prompts, states = [ids for ids, _ in batch], [p.prepared for _, p in batch if p.prepared]
        samples = self._sample(shape, prompts, states)
        scores = self._score(prompts, samples)
        seconds = (time.perf_counter() - began) / len(prompts)

        saved = self._runs.layers if states else 0
        return [
            Answer(
                sample.text,
                {**own_scores, **preview.scores},
                preview.cost + self._flops(prompt, sample, saved),
                seconds=preview.seconds + seconds,
                handover=preview.handover,
                preview=dataclasses.replace(preview, handover=None, prepared=None),
            )
            for (prompt, preview), sample, own_scores in zip(batch, samples, scores, strict=True)
        ]

    def _sample(
        self, shape: GenerationShape, prompts: list[list[int]], states: list[PromptState]
    ) -> list[Sample]:
        """Generates from prompts; all of them have a state, or none has."""
        rows = filled(prompts, self._batch_size)
        # A seed per prompt, so that draws do not depend on the row that the prompt has in a batch.
        seeds = [(zlib.crc32(np.asarray(ids).tobytes()) + self._seed) % 2**32 for ids in rows]
        state = _stacked(filled(states, self._batch_size), shape.width) if states else None
        settings: dict[str, Any] = {**self._settings, "seed": seeds, "prompt_state": state}
        return self._sampler.sample(rows, self._max_new_tokens, **settings)[: len(prompts)]

    def _score(self, prompts: list[list[int]], samples: list[Sample]) -> list[dict[str, float]]:
        """Pooled scores of what was generated, for every prompt."""
        sequences = [[*p, *s.tokens] for p, s in zip(prompts, samples, strict=True)]
        scores: list[dict[str, float]] = [{} for _ in prompts]
        widths = [padded_width(self._scorer.model, len(ids)) for ids in sequences]
        for width in sorted(set(widths)):
            group = [i for i, own in enumerate(widths) if own == width]
            tokens = jnp.asarray(padded([sequences[i] for i in group], self._batch_size, width))
            # The last token of a prompt predicts the first generated one.
            first_B1 = self._column(len(prompts[i]) - 1 for i in group)
            at_BN = jnp.minimum(first_B1 + jnp.arange(self._max_new_tokens), width - 1)
            # As while they were generated: nothing has read the last token.
            length_B1 = self._column(len(sequences[i]) - 1 for i in group)
            scored = score_tokens(
                self._scorer, self._params, tokens, length_B1, at_BN=at_BN, scoring=self.scoring
            )
            emitted = self._column(len(samples[i].tokens) for i in group)
            pooled = self._by_row(_generated_scores(scored.scores, emitted), len(group))
            for i, own in zip(group, pooled, strict=False):
                scores[i] = own
        return scores

    def _flops(self, prompt: list[int], sample: Sample, saved: int) -> float:
        """FLOPs of generating and of scoring what was generated, without those saved over the prompt.

        Args:
          prompt: its token ids.
          sample: what was generated.
          saved: number of layers that had run over the prompt before.
        """
        tokens, emitted = len(prompt), len(sample.tokens)
        total = generation_flops(self._runs.model, tokens, emitted)
        total -= layer_flops(self._runs.model, tokens, 0, saved)
        if self._scored:
            total += self._scorer.flops(tokens + emitted) + head_flops(self._scorer.model, emitted)
        return float(total)

    def _column(self, values: Iterable[int]) -> jax.Array:
        """[B, 1] int32, a value per row, and 0 in the rows that fill up a batch."""
        given = list(values)
        return jnp.asarray([*given, *[0] * (self._batch_size - len(given))], jnp.int32)[:, None]

    def _by_row(self, scores: dict[str, jax.Array], rows: int) -> list[dict[str, float]]:
        """Scores of every row; only the first `rows` of them are not there to fill the batch up."""
        values = jax.device_get(scores)
        if not all(np.isfinite(column[:rows]).all() for column in values.values()):
            raise NotFiniteError(str(self._overflow()))
        return [{name: float(column[i]) for name, column in values.items()} for i in range(self._batch_size)]


@jax.jit
def _prompt_scores(scores: dict[str, jax.Array], length_B1: jax.Array) -> dict[str, jax.Array]:
    """Pooled scores of prompts from those at each of their positions, by name; [B] float32 each."""
    position = jnp.arange(next(iter(scores.values())).shape[1])
    return pooled_scores(scores, position < length_B1, PLACES[1])


@jax.jit
def _generated_scores(scores: dict[str, jax.Array], emitted_B1: jax.Array) -> dict[str, jax.Array]:
    """Pooled scores of generated tokens from those where they were drawn, by name; [B] float32 each."""
    return pooled_scores(scores, jnp.arange(next(iter(scores.values())).shape[1]) < emitted_B1)


def _stacked(states: list[PromptState], width: int) -> PromptState:
    """The states of single prompts as one of a batch, with as many columns as its prompts have."""

    def resized(x: jax.Array, axis: int) -> jax.Array:
        missing = width - x.shape[axis]
        if missing > 0:  # the program that computed the state was only as wide as the model's max_len
            return jnp.pad(x, [(0, missing if i == axis else 0) for i in range(x.ndim)])
        return jax.lax.slice_in_dim(x, 0, width, axis=axis)

    rows = [
        PromptState(s.layers, resized(s.hidden, 0), tuple((resized(k, 1), resized(v, 1)) for k, v in s.kv))
        for s in states
    ]
    return stack_rows(rows)
