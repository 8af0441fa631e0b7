"""An encoder with a task head as a model of a cascade (E-LANG with BERT, arXiv 2203.00748).

A Swift may be the lowest layers of the Super with a head of their own, an exit. Records that it passes on
then continue from its hidden states:

    h = layers_1..l (x)        Swift = head_l(h)        Super = head(layers_l+1..L (h))
"""

import functools
import time
from collections.abc import Sequence

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from elastic_lm.cascade.answerer import Answer, Record, failed, text_in
from elastic_lm.cascade.batching import ProgramShape, answer_by_shape, shape_or_none
from elastic_lm.cascade.scores import PLAIN, Scoring, logit_scores
from elastic_lm.config.cascade import BATCH_SIZE
from elastic_lm.config.checks import require, require_at_least_1
from elastic_lm.config.encoder import EncoderConfig
from elastic_lm.cost.sequences import encoder_flops
from elastic_lm.data.padding import filled, padded
from elastic_lm.data.tokenizer import Tokenizer
from elastic_lm.decode.prefill import PromptState, split_rows, stack_rows
from elastic_lm.decode.settings import bucket
from elastic_lm.models.decoder import Params
from elastic_lm.models.encoder import Encoder
from elastic_lm.models.finite import overflow_once

TokensAndTypes = tuple[list[int], list[int]]  # token ids, token types


class Classifier:
    """An encoder that labels records of one text or two.

    The output is the index of the likeliest class, or the value of a regression, which has no scores.

    Attributes:
      names: names of the classes; () = they have none.
      classes: number of classes; 0 = a regression.
      weights: what those have in common that continue from each other (`shared_model`); None = unknown.

    Example:
      ```python
      import jax

      import elastic_lm as el
      from elastic_lm.cascade import Classifier
      from elastic_lm.data import train_bpe

      shape = {"vocab_size": 260, "d_model": 16, "n_layers": 1, "n_heads": 2, "d_mlp": 32, "max_len": 64}
      config = el.EncoderConfig(**shape, n_labels=2, labels=("ham", "spam"))
      params = el.init_params(config, jax.random.key(0))  # `el.load(folder)` gives a trained model
      tokenizer = train_bpe(["some text"], 260)

      classifier = Classifier(el.Encoder(config), params, tokenizer, text_field="mail", batch_size=1)
      (answer,) = classifier.answer([{"mail": "You won!"}])
      assert classifier.names[answer.output] in ("ham", "spam")
      assert {"energy", "max_prob", "margin", "entropy"} == set(answer.scores)
      ```
    """

    def __init__(
        self,
        model: Encoder,
        params: Params,
        tokenizer: Tokenizer,
        *,
        text_field: str = "text",
        pair_field: str | None = None,
        max_len: int | None = None,
        scoring: Scoring = PLAIN,
        batch_size: int = BATCH_SIZE,
        keep_state: bool = False,
    ) -> None:
        """Creates an answerer; nothing is compiled yet.

        Args:
          model: with a task head; its config is static under jit.
          params: canonical parameters.
          tokenizer: of the model.
          text_field: field of a record with its text.
          pair_field: field with the second text; None = there is one text.
          max_len: tokens that are read of a record; longer texts lose their end. None = the model's.
          scoring: of the energy; static under jit.
          batch_size: records per program; the last batch is filled up.
          keep_state: hand over the last hidden state, from which a `Classifier` with more layers above the
            same ones resumes.

        Raises:
          ValueError: the model has no task head, or an argument is out of range.
        """
        config = model.config
        longest = config.max_len if max_len is None else max_len
        require(config.n_labels > 0, "n_labels", config.n_labels, "the model has no task head; train one")
        require(
            1 <= longest <= config.max_len,
            "max_len",
            longest,
            f"must be at least 1 and at most the model's {config.max_len}",
        )
        require_at_least_1("batch_size", batch_size)

        self.weights: object | None = None
        self.scoring, self.names = scoring, config.labels
        self.classes = config.n_labels if config.problem == "classification" else 0
        self._config, self._params, self._tokenizer = config, params, tokenizer
        self._overflow = overflow_once(params, config.dtype)
        self._text_field, self._pair_field, self._longest = text_field, pair_field, longest
        self._batch_size, self._keep_state = batch_size, keep_state

    def bucket(self, record: Record) -> int | None:
        """Columns of the program that reads a record; None = the record will fail."""
        shape = shape_or_none((record, None), self._encode)
        return shape.width if shape else None

    def answer(self, records: Sequence[Record]) -> list[Answer]:
        """Answers records, as in `Answerer.answer`."""
        inputs = [(record, None) for record in records]
        return answer_by_shape(inputs, self._encode, self._answer_batch, self._batch_size)

    def resume(self, records: Sequence[Record], swift_answers: Sequence[Answer]) -> list[Answer]:
        """Continues from what a Swift of this model's own lowest layers has handed over."""
        inputs = [(record, a.handover) for record, a in zip(records, swift_answers, strict=True)]
        return answer_by_shape(inputs, self._encode, self._answer_batch, self._batch_size)

    def _encode(
        self, given: tuple[Record, PromptState | None]
    ) -> tuple[ProgramShape, tuple[TokensAndTypes, PromptState | None]]:
        record, state = given
        text = text_in(record, self._text_field)
        pair = None if self._pair_field is None else text_in(record, self._pair_field)
        ids, types = self._tokenizer.encode_pair(text, pair, max_len=self._longest)
        width = min(bucket(len(ids)), self._config.max_len)
        return ProgramShape(width, state.layers if state else 0), ((ids, types), state)

    def _answer_batch(
        self, shape: ProgramShape, batch: list[tuple[TokensAndTypes, PromptState | None]]
    ) -> list[Answer]:
        began, size = time.perf_counter(), self._batch_size
        rows = filled(batch, size)
        tokens = padded([ids for (ids, _), _ in rows], size, shape.width, self._config.pad_id)
        types = padded([types for (_, types), _ in rows], size, shape.width)
        mask = padded([[1] * len(ids) for (ids, _), _ in rows], size, shape.width).astype(bool)
        states = [state.hidden for _, state in rows if state]  # all rows have one, or none has
        found = classify(
            self._config,
            self._params,
            tokens,
            mask,
            types,
            stack_rows(states) if states else None,
            scoring=self.scoring,
            layers_done=shape.layers_done,
            keep_state=self._keep_state,
        )

        handovers: list[PromptState | None] = [None] * len(batch)
        if found.hidden is not None:
            handovers = [PromptState(self._config.n_layers, own) for own in split_rows(found.hidden)]
        logits, scores = jax.device_get((found.logits, found.scores))
        seconds = (time.perf_counter() - began) / len(batch)

        answers = []
        for i, ((ids, _), _) in enumerate(batch):
            if not np.isfinite(logits[i]).all():
                error = self._overflow()
                answers.append(failed(error, seconds))
                continue
            output, own_scores = self._read(logits[i], {name: values[i] for name, values in scores.items()})
            flops = encoder_flops(self._config, len(ids), self._config.n_layers - shape.layers_done)
            answers.append(Answer(output, own_scores, float(flops), seconds=seconds, handover=handovers[i]))
        return answers

    def _read(
        self, logits_C: np.ndarray, scores: dict[str, np.ndarray]
    ) -> tuple[int | float | list[float], dict[str, float]]:
        """The output and the scores of one record."""
        if self._config.problem == "regression":
            values = logits_C.tolist()
            return values[0] if len(values) == 1 else values, {}
        return int(np.argmax(logits_C)), {name: float(value) for name, value in scores.items()}


@flax.struct.dataclass
class Classified:
    """What one program gives.

    Attributes:
      logits: [B, C] float32.
      scores: {kind: [B] float32}.
      hidden: [B, T, D] state after the last layer; None unless it is kept.
    """

    logits: jax.Array
    scores: dict[str, jax.Array]
    hidden: jax.Array | None


@functools.partial(jax.jit, static_argnames=("config", "scoring", "layers_done", "keep_state"))
def classify(
    config: EncoderConfig,
    params: Params,
    tokens_BT: jax.Array,
    mask_BT: jax.Array,
    types_BT: jax.Array,
    entering_BTD: jax.Array | None = None,
    *,
    scoring: Scoring,
    layers_done: int = 0,
    keep_state: bool = False,
) -> Classified:
    """Logits and scores of a batch.

    Args:
      config: with a task head; static.
      params: canonical parameters.
      tokens_BT: int32.
      mask_BT: bool, False where a row is filled up.
      types_BT: int32.
      entering_BTD: state after the first `layers_done` layers, where they have run before.
      scoring: of the energy; static.
      layers_done: number of layers that have run before; static.
      keep_state: also return the last hidden state; static.
    """
    encoder = Encoder(config).bind({"params": params})
    hidden = encoder.embed(tokens_BT, types_BT) if entering_BTD is None else entering_BTD
    hidden = encoder.run_layers(hidden, mask_BT, layers_done, config.n_layers)
    logits = jnp.asarray(encoder.task_logits(encoder.pool(hidden, mask_BT)), jnp.float32)
    return Classified(logits, logit_scores(logits, scoring), hidden if keep_state else None)
