"""Multiple choice with a decoder-only model: every choice is read after the prompt, the likeliest one wins.

Of a row with a prompt and choices c_1 .. c_C, whose M_c tokens follow the prompt,

    f_c = sum_m ln p(token m | prompt, tokens before m)        / M_c  (or / bytes, or not divided)

answers argmax f, and f is what the energy reads as the row's logits. Prompt, separator and choice are
tokenised as one text, as many tokenizers begin every text with a space. The choice's tokens are those after
the longest beginning that this has in common with the prompt's own tokens.

Paper: E-LANG, arXiv 2203.00748, for the energy. Tasks in this form: PIQA, ARC, HellaSwag.
"""

import dataclasses
import itertools
import time
from collections.abc import Sequence
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np

from elastic_lm.cascade.answerer import Answer, Record
from elastic_lm.cascade.batching import answer_alike, shape_or_none
from elastic_lm.cascade.known_tokens import Part, Reading, read, width_of
from elastic_lm.cascade.scores import PLAIN, Scoring, logit_scores
from elastic_lm.config.cascade import Normalise
from elastic_lm.config.checks import AT_LEAST_1, require, require_choice
from elastic_lm.config.subnet import Subnet
from elastic_lm.cost.sequences import head_flops
from elastic_lm.data.padding import filled, padded
from elastic_lm.decode.prefill import split_rows, stack_rows
from elastic_lm.decode.results import TextTokenizer
from elastic_lm.models.decoder import Decoder, Params

Shape = tuple[int, int]  # columns of the program, layers that have run before

_scores = jax.jit(logit_scores, static_argnames="scoring")  # one program per number of choices


@dataclasses.dataclass(frozen=True)
class Question:
    """A row as token ids."""

    sequences: list[list[int]]  # the prompt and a choice each
    starts: list[int]  # tokens of each that come before its choice
    sizes: list[float]  # what each choice's log-likelihood is divided by
    width: int  # columns of the program that reads it

    @property
    def answered(self) -> int:
        """Tokens of all choices."""
        return sum(map(len, self.sequences)) - sum(self.starts)


@dataclasses.dataclass(frozen=True)
class Begun:
    """A row whose first layers have run.

    Attributes:
      layers: that have run.
      hidden: [T, D] state after them, one array per choice.
    """

    layers: int
    hidden: list[jax.Array]


class MultipleChoice:
    """A decoder-only model that chooses; the output is the index of the choice."""

    def __init__(
        self,
        model: Decoder,
        params: Params,
        tokenizer: TextTokenizer,
        *,
        exit: int | None = None,
        subnet: Subnet | None = None,
        normalise: Normalise = "tokens",
        separator: str = " ",
        prompt_field: str = "prompt",
        choices_field: str = "choices",
        scoring: Scoring = PLAIN,
        batch_size: int = 16,
        keep_state: bool = False,
    ) -> None:
        """Creates an answerer; nothing is compiled yet.

        Args:
          model: the decoder; its config is static.
          params: canonical parameters of the whole model, also where a part of it answers.
          tokenizer: of the model.
          exit: layer whose exit answers instead of the last one; static.
          subnet: a sub-network that answers instead of the whole model, sliced inside programs; static.
          normalise: what a choice's log-likelihood is divided by: its tokens, its UTF-8 bytes, or nothing.
          separator: between prompt and choice.
          prompt_field: of rows.
          choices_field: of rows; a list of texts.
          scoring: of the energy; static.
          batch_size: sequences per program; the last batch is filled up.
          keep_state: answers keep what another `MultipleChoice` on the same model goes on from (`nested`).

        Raises:
          ValueError: an argument is out of range, or the part is none of the model.
        """
        require_choice("normalise", normalise, get_args(Normalise))
        require(AT_LEAST_1[0](batch_size), "batch_size", batch_size, AT_LEAST_1[1])
        self.scoring, self._part = scoring, Part(model.config, exit, subnet)
        self._params, self._tokenizer, self._normalise = params, tokenizer, normalise
        self._separator, self._fields = separator, (prompt_field, choices_field)
        self._batch_size, self._keep = batch_size, keep_state

    def bucket(self, row: Record) -> int | None:
        """Columns of the program that reads a row; None = the row will fail."""
        shape = shape_or_none((row, None), self._encode)
        return shape[0] if shape else None

    def answer(self, rows: Sequence[Record]) -> list[Answer]:
        """See `answerers.Answerer`."""
        return answer_alike([(row, None) for row in rows], self._encode, self._read, max(len(rows), 1))

    def resume(self, rows: Sequence[Record], begun: Sequence[Answer]) -> list[Answer]:
        """See `answerers.Resumes`; states are `Begun`, of the same whole model."""
        given = [(row, answer.state) for row, answer in zip(rows, begun, strict=True)]
        return answer_alike(given, self._encode, self._read, max(len(rows), 1))

    def _encode(self, given: tuple[Record, Begun | None]) -> tuple[Shape, tuple[Question, Begun | None]]:
        row, state = given
        question = self._question(row)
        return (question.width, state.layers if state else 0), (question, state)

    def _question(self, row: Record) -> Question:
        prompt, choices = (row[name] for name in self._fields)
        right = isinstance(choices, Sequence) and not isinstance(choices, str) and len(choices) > 0
        require(right, self._fields[1], choices, "must be a list of at least one text")
        before = self._tokenizer.encode(prompt, bos=True)
        require(bool(before), self._fields[0], prompt, "needs at least one token")
        texts = [self._separator + choice for choice in choices]
        require(all(texts), self._fields[1], choices, "every choice needs at least one character")
        sequences = [self._tokenizer.encode(prompt + text, bos=True) for text in texts]
        starts = [_start(before, ids) for ids in sequences]
        tokens = [float(len(ids) - n) for n, ids in zip(starts, sequences, strict=True)]
        require(min(tokens) > 0, self._fields[1], choices, "every choice needs a token after the first one")
        counts = {
            "tokens": tokens,
            "bytes": [float(len(choice.encode())) or 1.0 for choice in choices],
            "none": [1.0] * len(sequences),
        }
        width = width_of(self._part.model, max(map(len, sequences)))
        return Question(sequences, starts, counts[self._normalise], width)

    def _read(self, shape: Shape, group: list[tuple[Question, Begun | None]]) -> list[Answer]:
        """Answers to questions of one width, all begun to the same layer."""
        began = time.perf_counter()
        width, part = shape[0], dataclasses.replace(self._part, begun=shape[1])
        sequences = [ids for question, _ in group for ids in question.sequences]
        entering = [hidden for _, state in group if state for hidden in state.hidden]
        log_probs, hidden = [], []
        for first in range(0, len(sequences), self._batch_size):
            rows = slice(first, first + self._batch_size)
            reading = self._program(part, width, sequences[rows], entering[rows])
            log_probs += list(np.asarray(reading.log_prob)[: len(sequences[rows])])
            hidden += split_rows(reading.hidden)[: len(sequences[rows])] if self._keep else []
        answers, at = [], 0
        for question, _ in group:
            rows = slice(at, at := at + len(question.sequences))
            answers.append(self._choose(part, question, log_probs[rows], hidden[rows]))
        each = (time.perf_counter() - began) / len(group)
        return [dataclasses.replace(answer, seconds=each) for answer in answers]

    def _program(
        self, part: Part, width: int, sequences: list[list[int]], entering: list[jax.Array]
    ) -> Reading:
        tokens = jnp.asarray(padded(sequences, self._batch_size, width))
        state = stack_rows(filled(entering, self._batch_size)) if entering else None
        return read(part, self._params, tokens, state, scoring=self.scoring, keep=self._keep)

    def _choose(
        self, part: Part, question: Question, log_probs: list[np.ndarray], hidden: list[jax.Array]
    ) -> Answer:
        rows = zip(question.sequences, question.starts, log_probs, question.sizes, strict=True)
        sums = [  # the token before a choice predicts its first one
            float(np.sum(nats[start - 1 : len(ids) - 1], dtype=np.float64)) / size
            for ids, start, nats, size in rows
        ]
        values = jax.device_get(_scores(jnp.asarray(sums, jnp.float32), scoring=self.scoring))
        cost = sum(part.flops(len(ids) - 1) for ids in question.sequences)
        cost += head_flops(part.model, question.answered)
        state = Begun(part.layers, hidden) if self._keep else None
        scores = {name: float(value) for name, value in values.items()}
        return Answer(int(np.argmax(sums)), scores, float(cost), state=state)


def _start(prompt: list[int], whole: list[int]) -> int:
    """Tokens of the whole before the choice: those that the prompt has too, at least 1, and not all."""
    alike = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(prompt, whole, strict=False))
    return max(1, min(len(list(alike)), len(whole) - 1))
