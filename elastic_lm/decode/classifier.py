"""An encoder with a task head as a model of a cascade (E-LANG with BERT, arXiv 2203.00748)."""

import functools
import time
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from elastic_lm.calibrate.routing_scores import PLAIN, Scoring, logit_scores
from elastic_lm.data.tokenizer import Tokenizer
from elastic_lm.decode.answerers import Answer, Row
from elastic_lm.decode.batches import answer_alike, filled, shape_or_none
from elastic_lm.decode.requests import bucket
from elastic_lm.encoder_config import EncoderConfig
from elastic_lm.models.decoder import Params
from elastic_lm.models.encoder import Encoder
from elastic_lm.plain import AT_LEAST_1, require
from elastic_lm.sequence_cost import encoder_flops

Pair = tuple[list[int], list[int]]  # token ids, token types


class Classifier:
    """An encoder that labels rows of one text or two.

    The output is the index of the likeliest class, or the value of a regression, which has no scores.
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
        self._config, self._params, self._tokenizer = config, params, tokenizer
        self._fields, self._longest, self._batch_size = (text_field, pair_field), longest, batch_size

    def bucket(self, row: Row) -> int | None:
        """Columns of the program that reads a row; None = the row will fail."""
        return shape_or_none(row, self._encode)

    def answer(self, rows: Sequence[Row]) -> list[Answer]:
        """See `answerers.Answerer`."""
        return answer_alike(rows, self._encode, self._batch, self._batch_size)

    def _encode(self, row: Row) -> tuple[int, Pair]:
        first, second = (None if name is None else row[name] for name in self._fields)
        ids, types = self._tokenizer.encode_pair(str_of(first), second, max_len=self._longest)
        return min(bucket(len(ids)), self._config.max_len), (ids, types)

    def _batch(self, width: int, pairs: list[Pair]) -> list[Answer]:
        began = time.perf_counter()
        tokens = np.full((self._batch_size, width), self._config.pad_id, np.int32)
        mask, types = np.zeros(tokens.shape, bool), np.zeros(tokens.shape, np.int32)
        for i, (ids, kinds) in enumerate(filled(pairs, self._batch_size)):
            tokens[i, : len(ids)], types[i, : len(ids)], mask[i, : len(ids)] = ids, kinds, True
        found = jax.device_get(classify(self._config, self._params, tokens, mask, types, self.scoring))
        logits, scores = found
        each = (time.perf_counter() - began) / len(pairs)
        return [self._one(len(pairs[i][0]), i, logits, scores, each) for i in range(len(pairs))]

    def _one(
        self, tokens: int, i: int, logits: np.ndarray, scores: dict[str, np.ndarray], seconds: float
    ) -> Answer:
        cost = float(encoder_flops(self._config, tokens))
        if self._config.problem == "regression":
            values = logits[i].tolist()
            return Answer(values[0] if len(values) == 1 else values, {}, cost, seconds)
        own = {name: float(values[i]) for name, values in scores.items()}
        return Answer(int(np.argmax(logits[i])), own, cost, seconds)


@functools.partial(jax.jit, static_argnames=("config", "scoring"))
def classify(
    config: EncoderConfig,
    params: Params,
    tokens_BT: jax.Array,
    mask_BT: jax.Array,
    types_BT: jax.Array,
    scoring: Scoring,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """(logits [B, C] float32, {kind: [B] float32 score}); `config` and `scoring` are static."""
    logits = Encoder(config).bind({"params": params})(tokens_BT, mask_BT, types_BT).logits
    logits = jnp.asarray(logits, jnp.float32)
    return logits, logit_scores(logits, scoring)


def str_of(text: object) -> str:
    """A text.

    Raises:
      TypeError: it is none.
    """
    if not isinstance(text, str):
        raise TypeError(f"{text!r} is no text")
    return text
