"""An encoder-decoder model as a model of a cascade (E-LANG with T5, arXiv 2203.00748)."""

import dataclasses
import time
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from elastic_lm.cascade.answerer import Answer, Record
from elastic_lm.cascade.batching import answer_alike, shape_or_none
from elastic_lm.cascade.scores import PLACES, PLAIN, Scoring, logit_scores, pooled_scores
from elastic_lm.config.checks import AT_LEAST_1, require
from elastic_lm.cost.sequences import text_to_text_flops
from elastic_lm.data.padding import filled
from elastic_lm.decode.seq2seq import Encoded, Text2TextResult, TextToText
from elastic_lm.decode.settings import bucket

_row_scores = jax.jit(logit_scores, static_argnames="scoring")
_pooled = jax.jit(pooled_scores)


class TextAnswerer:
    """An encoder-decoder model that answers rows with texts, or with the likeliest of some labels.

    Scores of a text are pooled over its tokens. Among labels, the energy is that of the first target
    position over the whole vocabulary, and the other scores are those of the labels' probabilities. A
    model with a head on its encoder can add the scores of that head ("encoder_energy", ...), which are known
    before anything is decoded.
    """

    def __init__(
        self,
        model: TextToText,
        max_new_tokens: int = 32,
        *,
        template: str = "{text}",
        max_len: int = 512,
        labels: Sequence[str] | None = None,
        encoder_head: bool = False,
        scoring: Scoring = PLAIN,
        batch_size: int = 16,
    ) -> None:
        """Creates an answerer; nothing is compiled yet.

        Args:
          model: with its tokenizer.
          max_new_tokens: tokens of an answer at most.
          template: makes a row's source of its fields, as `str.format` does: "sst2 sentence: {text}".
          max_len: tokens that are read of a source, its end token included; longer ones lose their end, as
            in training.
          labels: the only texts that may be answered; the output is then the index of one.
          encoder_head: add the scores of the head on the encoder.
          scoring: of the energy; only its temperature can be chosen here.
          batch_size: rows per program; the last batch is filled up.

        Raises:
          ValueError: an argument is out of range, energies are to be centred, or there is no such head.
        """
        require(model.tokenizer is not None, "model.tokenizer", None, "give it a tokenizer")
        for name, value in (("max_new_tokens", max_new_tokens), ("batch_size", batch_size)):
            require(AT_LEAST_1[0](value), name, value, AT_LEAST_1[1])
        self._ends = list(model.config.eos_ids[:1])
        fix = f"must be above the {len(self._ends)} end tokens and at most the model's {model.max_len}"
        require(len(self._ends) < max_len <= model.max_len, "max_len", max_len, fix)
        self._longest = max_len - len(self._ends)
        fix = "energies of encoder-decoder models are not centred; fit thresholds per checkpoint"
        require(scoring.centre == "none", "centre", scoring.centre, fix)
        self.scoring, self.names = scoring, tuple(labels or ())
        self._model, self._most, self._template = model, max_new_tokens, template
        there = model.config.n_labels > 0 or not encoder_head
        require(there, "encoder_head", encoder_head, "the model has none; train one with tuned='head'")
        self._batch_size, self._encoder_head = batch_size, encoder_head

    def bucket(self, row: Record) -> int | None:
        """Columns of the program that reads a row; None = the row will fail."""
        return shape_or_none(row, self._encode)

    def answer(self, rows: Sequence[Record]) -> list[Answer]:
        """See `answerers.Answerer`."""
        return answer_alike(rows, self._encode, self._batch, self._batch_size)

    def previews(self, score: str) -> bool:
        """See `answerers.Previews`."""
        return self._encoder_head and score.startswith(PLACES[2])

    def preview(self, rows: Sequence[Record]) -> list[Answer]:
        """See `answerers.Previews`; what is begun are `text_to_text.Encoded`."""
        return answer_alike(rows, self._encode, self._preview, self._batch_size)

    def finish(self, rows: Sequence[Record], begun: Sequence[Answer]) -> list[Answer]:
        """See `answerers.Previews`."""
        return answer_alike(
            begun, lambda one: (bucket(len(one.begun.tokens)), one), self._finish, self._batch_size
        )

    def _encode(self, row: Record) -> tuple[int, list[int]]:
        assert self._model.tokenizer is not None
        source = self._template.format_map(row)
        require(bool(source), "source", source, "is empty: give at least one character")
        ids = [*self._model.tokenizer.encode(source)[: self._longest], *self._ends]
        return bucket(len(ids)), ids

    def _batch(self, width: int, sources: list[list[int]]) -> list[Answer]:
        if self._encoder_head:
            return self._finish(width, self._preview(width, sources))
        return self._decode(sources)

    def _preview(self, width: int, sources: list[list[int]]) -> list[Answer]:
        """What the head on the encoder says."""
        began = time.perf_counter()
        encoded = self._model.encode(filled(sources, self._batch_size))
        logits = jnp.asarray(np.stack([one.logits for one in encoded]))
        columns = jax.device_get(_row_scores(logits, scoring=self.scoring))
        scores = _by_row({f"{PLACES[2]}{kind}": x for kind, x in columns.items()}, len(sources))
        each = (time.perf_counter() - began) / len(sources)
        return [
            Answer(None, own, self._flops(one, 0), each, begun=one)
            for one, own in zip(encoded, scores, strict=False)
        ]

    def _finish(self, width: int, begun: list[Answer]) -> list[Answer]:
        return [
            dataclasses.replace(
                answer,
                scores={**answer.scores, **before.scores},
                seconds=before.seconds + answer.seconds,
                preview=dataclasses.replace(before, begun=None),
            )
            for before, answer in zip(begun, self._decode([one.begun for one in begun]), strict=True)
        ]

    def _decode(self, sources: Sequence[list[int]] | Sequence[Encoded]) -> list[Answer]:
        return self._choose(sources) if self.names else self._generate(sources)

    def _generate(self, sources: Sequence[list[int]] | Sequence[Encoded]) -> list[Answer]:
        began = time.perf_counter()
        results = self._model.generate(
            filled(sources, self._batch_size), self._most, energy_temperature=self.scoring.temperature
        )[: len(sources)]
        scores = self._pooled(results)
        each = (time.perf_counter() - began) / len(sources)
        return [
            Answer(result.text, own, self._flops(ids, len(result.tokens)), each)
            for ids, result, own in zip(sources, results, scores, strict=True)
        ]

    def _pooled(self, results: list[Text2TextResult]) -> list[dict[str, float]]:
        shape = (self._batch_size, bucket(self._most))
        kinds = {kind: np.zeros(shape, np.float32) for kind in ("energy", "max_prob", "entropy", "margin")}
        counted = np.zeros(shape, bool)
        for i, r in enumerate(results):
            entropy = 1.0 - r.entropy / np.log(self._model.config.vocab_size)
            own = {"energy": -r.energy, "max_prob": r.max_prob, "entropy": entropy, "margin": r.margin}
            counted[i, : len(r.tokens)] = True
            for kind, values in own.items():
                kinds[kind][i, : len(values)] = values
        return _by_row(jax.device_get(_pooled(kinds, counted)), len(results))

    def _choose(self, sources: Sequence[list[int]] | Sequence[Encoded]) -> list[Answer]:
        began = time.perf_counter()
        found = self._model.classify(
            filled(sources, self._batch_size), self.names, energy_temperature=self.scoring.temperature
        )
        columns = {**jax.device_get(_row_scores(jnp.asarray(found.log_probs))), "energy": -found.energy}
        scores = _by_row(columns, len(sources))
        each = (time.perf_counter() - began) / len(sources)
        return [
            Answer(found.labels[i], scores[i], self._flops(ids, 1), each) for i, ids in enumerate(sources)
        ]

    def _flops(self, source: list[int] | Encoded, emitted: int) -> float:
        """Of encoding a source and emitting so many tokens; E-LANG counts one where labels are scored."""
        config, ids = self._model.config, source.tokens if isinstance(source, Encoded) else source
        head = 2 * config.d_model * config.n_labels if self._encoder_head else 0
        return float(text_to_text_flops(config, len(ids), emitted) + head)


def _by_row(columns: Mapping[str, np.ndarray], rows: int) -> list[dict[str, float]]:
    return [{name: float(column[i]) for name, column in columns.items()} for i in range(rows)]
