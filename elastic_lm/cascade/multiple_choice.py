"""Multiple choice with a decoder-only model: every choice is read after the prompt, the likeliest one wins.

For a record with a prompt and choices c_1 .. c_C, whose M_c tokens follow the prompt,

    f_c = sum_m ln p(token m | prompt, tokens before m)        / M_c  (or / bytes, or not divided)

The output is argmax f, and the energy is computed from f as the record's logits. Prompt, separator and choice
are tokenised as one text, since many tokenizers begin every text with a space. The choice's tokens are those
after the longest beginning that this text has in common with the prompt's own tokens.

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

from elastic_lm.cascade.answerer import Answer, Record, choice_texts, failed, text_in
from elastic_lm.cascade.batching import ProgramShape, answer_by_shape, shape_or_none
from elastic_lm.cascade.known_tokens import ModelPart, ScoredTokens, padded_width, score_tokens
from elastic_lm.cascade.scores import PLAIN, Scoring, logit_scores
from elastic_lm.config.cascade import BATCH_SIZE, Normalise
from elastic_lm.config.checks import require, require_at_least_1, require_choice
from elastic_lm.config.subnet import Subnet
from elastic_lm.cost.sequences import head_flops
from elastic_lm.data.padding import filled, padded
from elastic_lm.decode.prefill import PromptState, split_rows, stack_rows
from elastic_lm.decode.results import TextTokenizer
from elastic_lm.models.decoder import Decoder, Params
from elastic_lm.models.finite import overflow_once

States = Sequence[PromptState]  # one per choice of a record; () = no layer has run yet

_scores = jax.jit(logit_scores, static_argnames="scoring")  # one program per number of choices


@dataclasses.dataclass(frozen=True)
class Question:
    """A record as token ids."""

    sequences: list[list[int]]  # the prompt and a choice each
    starts: list[int]  # how many tokens of each come before its choice
    sizes: list[float]  # what each choice's log-likelihood is divided by
    width: int  # columns of the program that reads them

    @property
    def choice_tokens(self) -> int:
        """Tokens of all choices together."""
        return sum(map(len, self.sequences)) - sum(self.starts)


class MultipleChoice:
    """A decoder-only model that chooses; the output is the index of the choice.

    Attributes:
      weights: what those have in common that continue from each other (`shared_model`); None = unknown.

    Example:
      ```python
      import elastic_lm as el
      from elastic_lm.cascade import MultipleChoice
      from elastic_lm.data import train_bpe
      from elastic_lm.testing import random_params, tiny_config

      config = tiny_config(n_layers=1, vocab_size=260)
      params = random_params(config)  # `el.load(folder)` gives a trained model
      tokenizer = train_bpe(["some text"], 260)
      chooser = MultipleChoice(el.Decoder(config), params, tokenizer, batch_size=2)

      (answer,) = chooser.answer([{"prompt": "The sky is", "choices": ["blue", "made of cheese"]}])
      assert answer.output in (0, 1)
      assert 0.5 <= answer.scores["max_prob"] <= 1.0
      ```
    """

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
        batch_size: int = BATCH_SIZE,
        keep_state: bool = False,
    ) -> None:
        """Creates an answerer; nothing is compiled yet.

        Args:
          model: the decoder; its config is static under jit.
          params: canonical parameters of the whole model, also where a part of it answers.
          tokenizer: of the model.
          exit: layer whose exit answers instead of the last layer; static under jit.
          subnet: a sub-network that answers instead of the whole model, sliced inside programs; static under
            jit.
          normalise: what a choice's log-likelihood is divided by: its tokens, its UTF-8 bytes, or nothing.
          separator: text between prompt and choice.
          prompt_field: field of a record with the prompt.
          choices_field: field with the choices, a list of texts.
          scoring: of the energy; static under jit.
          batch_size: sequences per program; the last batch is filled up.
          keep_state: hand over hidden states, from which another `MultipleChoice` of the same model resumes
            (`shared_multiple_choice`).

        Raises:
          ValueError: an argument is out of range, or the model has no such exit or sub-network.
        """
        require_choice("normalise", normalise, get_args(Normalise))
        require_at_least_1("batch_size", batch_size)
        self.weights: object | None = None
        self.scoring = scoring
        self._part = ModelPart(model.config, exit, subnet)
        self._params, self._tokenizer, self._normalise = params, tokenizer, normalise
        self._overflow = overflow_once(params, model.config.dtype)
        self._separator, self._prompt_field, self._choices_field = separator, prompt_field, choices_field
        self._batch_size, self._keep_state = batch_size, keep_state

    def bucket(self, record: Record) -> int | None:
        """Columns of the program that reads a record; None = the record will fail."""
        shape = shape_or_none((record, None), self._encode)
        return shape.width if shape else None

    def answer(self, records: Sequence[Record]) -> list[Answer]:
        """Answers records, as in `Answerer.answer`."""
        return self._answer_all([(record, None) for record in records])

    def resume(self, records: Sequence[Record], swift_answers: Sequence[Answer]) -> list[Answer]:
        """Continues from what a Swift that is an exit of the same model has handed over."""
        return self._answer_all(
            [(record, a.handover) for record, a in zip(records, swift_answers, strict=True)]
        )

    def _answer_all(self, inputs: list[tuple[Record, States | None]]) -> list[Answer]:
        # All records of one shape at once: `_answer_batch` makes batches of their sequences.
        return answer_by_shape(inputs, self._encode, self._answer_batch, max(len(inputs), 1))

    def _encode(self, given: tuple[Record, States | None]) -> tuple[ProgramShape, tuple[Question, States]]:
        record, states = given
        question = self._question(record)
        return ProgramShape(question.width, states[0].layers if states else 0), (question, states or ())

    def _question(self, record: Record) -> Question:
        prompt = text_in(record, self._prompt_field)
        choices = choice_texts(self._choices_field, record.get(self._choices_field, ()))
        before = self._tokenizer.encode(prompt, bos=True)
        require(bool(before), self._prompt_field, prompt, "needs at least one token")
        texts = [self._separator + choice for choice in choices]
        require(all(texts), self._choices_field, choices, "every choice needs at least one character")

        sequences = [self._tokenizer.encode(prompt + text, bos=True) for text in texts]
        starts = [_choice_start(before, ids) for ids in sequences]
        tokens = [float(len(ids) - start) for start, ids in zip(starts, sequences, strict=True)]
        require(
            min(tokens) > 0, self._choices_field, choices, "every choice needs a token after the first one"
        )

        sizes = {
            "tokens": tokens,
            "bytes": [float(len(choice.encode())) or 1.0 for choice in choices],
            "none": [1.0] * len(sequences),
        }
        width = padded_width(self._part.model, max(map(len, sequences)))
        return Question(sequences, starts, sizes[self._normalise], width)

    def _answer_batch(self, shape: ProgramShape, batch: list[tuple[Question, States]]) -> list[Answer]:
        """Answers questions of one width, all of which have run to the same layer."""
        began = time.perf_counter()
        part = dataclasses.replace(self._part, layers_done=shape.layers_done)
        sequences = [ids for question, _ in batch for ids in question.sequences]
        entering = [state.hidden for _, states in batch for state in states]  # one per sequence, or none

        log_probs: list[np.ndarray] = []
        hidden: list[jax.Array] = []
        for first in range(0, len(sequences), self._batch_size):
            rows = slice(first, first + self._batch_size)
            n = len(sequences[rows])  # without the rows that fill up the last batch
            scored = self._score(part, shape.width, sequences[rows], entering[rows])
            log_probs += list(np.asarray(scored.log_prob)[:n])
            hidden += split_rows(scored.hidden)[:n] if scored.hidden is not None else []

        answers, end = [], 0
        for question, _ in batch:
            rows = slice(end, end := end + len(question.sequences))
            answers.append(self._choose(part, question, log_probs[rows], hidden[rows]))
        seconds = (time.perf_counter() - began) / len(batch)
        return [dataclasses.replace(answer, seconds=seconds) for answer in answers]

    def _score(
        self, part: ModelPart, width: int, sequences: list[list[int]], entering: list[jax.Array]
    ) -> ScoredTokens:
        tokens = jnp.asarray(padded(sequences, self._batch_size, width))
        entering_BTD = stack_rows(filled(entering, self._batch_size)) if entering else None
        lengths = [*map(len, sequences), *[0] * (self._batch_size - len(sequences))]
        return score_tokens(
            part,
            self._params,
            tokens,
            jnp.asarray(lengths, jnp.int32)[:, None],
            entering_BTD,
            scoring=self.scoring,
            keep_state=self._keep_state,
        )

    def _choose(
        self, part: ModelPart, question: Question, log_probs: list[np.ndarray], hidden: list[jax.Array]
    ) -> Answer:
        rows = zip(question.sequences, question.starts, log_probs, question.sizes, strict=True)
        # The token before a choice predicts the choice's first one.
        logits = [
            float(np.sum(nats[start - 1 : len(ids) - 1], dtype=np.float64)) / size
            for ids, start, nats, size in rows
        ]
        if not np.isfinite(logits).all():
            return failed(self._overflow())
        scores = jax.device_get(_scores(jnp.asarray(logits, jnp.float32), scoring=self.scoring))
        flops = sum(part.flops(len(ids) - 1) for ids in question.sequences)  # nothing reads the last token
        flops += head_flops(part.model, question.choice_tokens)
        return Answer(
            int(np.argmax(logits)),
            {name: float(value) for name, value in scores.items()},
            float(flops),
            handover=[PromptState(part.layers, own) for own in hidden] or None,
        )


def _choice_start(prompt: list[int], whole: list[int]) -> int:
    """Tokens of `whole` before the choice: those that the prompt has too, at least 1, and not all."""
    common = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(prompt, whole, strict=False))
    return max(1, min(len(list(common)), len(whole) - 1))
