"""An encoder with a task head as a model of a cascade (E-LANG with BERT, arXiv 2203.00748).

A Swift may be the Super's lowest layers with a head of their own, an exit. Rows that go to the Super then
continue from the Swift's states:

    h = layers_1..l (x)        Swift = head_l(h)        Super = head(layers_l+1..L (h))
"""

import dataclasses
import functools
import time
from collections.abc import Sequence

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from elastic_lm.cascade.answerer import Answer, Record
from elastic_lm.cascade.batching import answer_alike, shape_or_none
from elastic_lm.cascade.scores import PLAIN, Scoring, logit_scores
from elastic_lm.config.checks import AT_LEAST_1, require
from elastic_lm.config.encoder import EncoderConfig
from elastic_lm.cost.sequences import encoder_flops
from elastic_lm.data.padding import filled, padded
from elastic_lm.data.tokenizer import Tokenizer
from elastic_lm.decode.prefill import split_rows, stack_rows
from elastic_lm.decode.settings import bucket
from elastic_lm.models.decoder import Params
from elastic_lm.models.encoder import Encoder

Pair = tuple[list[int], list[int]]  # token ids, token types
Shape = tuple[int, int]  # columns of the program, layers that have run before


@dataclasses.dataclass(frozen=True)
class Begun:
    """A row whose first layers have run.

    Attributes:
      layers: that have run.
      hidden: [T, D] state after them.
    """

    layers: int
    hidden: jax.Array


class Classifier:
    """An encoder that labels rows of one text or two.

    The output is the index of the likeliest class, or the value of a regression, which has no scores.

    Attributes:
      names: of the classes; () = they have none.
      classes: their number; 0 = a regression.
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
        batch_size: int = 16,
        keep_state: bool = False,
    ) -> None:
        """Creates an answerer; nothing is compiled yet.

        Args:
          model: with a task head; its config is static.
          params: canonical parameters.
          tokenizer: of the model.
          text_field: of rows.
          pair_field: of rows, the second text; None = there is one text.
          max_len: tokens that are read of a row, which lose the end of the longer text; None = the model's.
          scoring: of the energy; static.
          batch_size: rows per program; the last batch is filled up.
          keep_state: answers keep the last layer's state, from which a `Classifier` with more layers above
            the same ones goes on.

        Raises:
          ValueError: the model has no task head, or an argument is out of range.
        """
        config = model.config
        require(config.n_labels > 0, "n_labels", config.n_labels, "the model has no task head; train one")
        longest = config.max_len if max_len is None else max_len
        fix = f"must be at least 1 and at most the model's {config.max_len}"
        require(1 <= longest <= config.max_len, "max_len", longest, fix)
        require(AT_LEAST_1[0](batch_size), "batch_size", batch_size, AT_LEAST_1[1])
        self.scoring, self.names = scoring, config.labels
        self.classes = config.n_labels if config.problem == "classification" else 0
        self._config, self._params, self._tokenizer = config, params, tokenizer
        self._fields, self._longest, self._batch_size = (text_field, pair_field), longest, batch_size
        self._keep = keep_state

    def bucket(self, row: Record) -> int | None:
        """Columns of the program that reads a row; None = the row will fail."""
        shape = shape_or_none((row, None), self._encode)
        return shape[0] if shape else None

    def answer(self, rows: Sequence[Record]) -> list[Answer]:
        """See `answerers.Answerer`."""
        return answer_alike([(row, None) for row in rows], self._encode, self._batch, self._batch_size)

    def resume(self, rows: Sequence[Record], begun: Sequence[Answer]) -> list[Answer]:
        """See `answerers.Resumes`; states are `Begun`, of this model's own lowest layers."""
        given = [(row, answer.state) for row, answer in zip(rows, begun, strict=True)]
        return answer_alike(given, self._encode, self._batch, self._batch_size)

    def _encode(self, given: tuple[Record, Begun | None]) -> tuple[Shape, tuple[Pair, Begun | None]]:
        row, begun = given
        first, second = (None if name is None else row[name] for name in self._fields)
        ids, types = self._tokenizer.encode_pair(str_of(first), second, max_len=self._longest)
        width = min(bucket(len(ids)), self._config.max_len)
        return (width, begun.layers if begun else 0), ((ids, types), begun)

    def _batch(self, shape: Shape, group: list[tuple[Pair, Begun | None]]) -> list[Answer]:
        began, (width, layers) = time.perf_counter(), shape
        pairs, size = [pair for pair, _ in filled(group, self._batch_size)], self._batch_size
        tokens = padded([ids for ids, _ in pairs], size, width, self._config.pad_id)
        types = padded([kinds for _, kinds in pairs], size, width)
        mask = padded([[1] * len(ids) for ids, _ in pairs], size, width).astype(bool)
        states = [begun.hidden for _, begun in filled(group, self._batch_size) if begun]
        entering = stack_rows(states) if states else None
        how = {"scoring": self.scoring, "begun": layers, "keep": self._keep}
        found = classify(self._config, self._params, tokens, mask, types, entering, **how)
        hidden = split_rows(found.hidden)[: len(group)] if self._keep else [None] * len(group)
        logits, scores = jax.device_get((found.logits, found.scores))
        each = (time.perf_counter() - began) / len(group)
        answers = [
            self._one(len(ids), layers, i, logits, scores, each) for i, ((ids, _), _) in enumerate(group)
        ]
        states = [None if h is None else Begun(self._config.n_layers, h) for h in hidden]
        return [dataclasses.replace(a, state=state) for a, state in zip(answers, states, strict=True)]

    def _one(
        self,
        tokens: int,
        begun: int,
        i: int,
        logits: np.ndarray,
        scores: dict[str, np.ndarray],
        seconds: float,
    ) -> Answer:
        cost = float(encoder_flops(self._config, tokens, self._config.n_layers - begun))
        if self._config.problem == "regression":
            values = logits[i].tolist()
            return Answer(values[0] if len(values) == 1 else values, {}, cost, seconds)
        own = {name: float(values[i]) for name, values in scores.items()}
        return Answer(int(np.argmax(logits[i])), own, cost, seconds)


@flax.struct.dataclass
class Classified:
    """What one program gives.

    Attributes:
      logits: [B, C] float32.
      scores: {kind: [B] float32}.
      hidden: [B, T, D] state after the last layer, or None.
    """

    logits: jax.Array
    scores: dict[str, jax.Array]
    hidden: jax.Array | None


@functools.partial(jax.jit, static_argnames=("config", "scoring", "begun", "keep"))
def classify(
    config: EncoderConfig,
    params: Params,
    tokens_BT: jax.Array,
    mask_BT: jax.Array,
    types_BT: jax.Array,
    entering_BTD: jax.Array | None = None,
    *,
    scoring: Scoring,
    begun: int = 0,
    keep: bool = False,
) -> Classified:
    """Logits and scores of rows.

    Args:
      config: with a task head; static.
      params: canonical parameters.
      tokens_BT: int32.
      mask_BT: bool, False where a row is filled up.
      types_BT: int32.
      entering_BTD: state after the first `begun` layers, where they have run before.
      scoring: of the energy; static.
      begun: layers that have run before; static.
      keep: also return the last state; static.
    """
    encoder = Encoder(config).bind({"params": params})
    hidden = encoder.embed(tokens_BT, types_BT) if entering_BTD is None else entering_BTD
    hidden = encoder.run_layers(hidden, mask_BT, begun, config.n_layers)
    logits = jnp.asarray(encoder.task_logits(encoder.pool(hidden, mask_BT)), jnp.float32)
    return Classified(logits, logit_scores(logits, scoring), hidden if keep else None)


def str_of(text: object) -> str:
    """A text.

    Raises:
      TypeError: it is none.
    """
    if not isinstance(text, str):
        raise TypeError(f"{text!r} is no text")
    return text
