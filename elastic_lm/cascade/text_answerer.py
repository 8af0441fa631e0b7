"""An encoder-decoder model as a model of a cascade (E-LANG with T5, arXiv 2203.00748)."""

import dataclasses
import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from elastic_lm.cascade.answerer import Answer, Record, text_in
from elastic_lm.cascade.batching import answer_by_shape, shape_or_none
from elastic_lm.cascade.scores import PLAIN, Scoring, logit_scores, pooled_scores
from elastic_lm.config.cascade import ANSWER_TOKENS, BATCH_SIZE, KINDS, PLACES, SOURCE_TOKENS
from elastic_lm.config.checks import require, require_at_least_1
from elastic_lm.cost.sequences import text_to_text_flops
from elastic_lm.data.padding import filled
from elastic_lm.decode.seq2seq import Encoded, Text2TextResult, TextToText
from elastic_lm.decode.settings import bucket


class _Fields(dict[str, Any]):
    """The fields of a record for a template. One that is missing, or holds no value, is refused."""

    def __missing__(self, field: str) -> Any:
        raise ValueError(f"the record has no {field!r}, which the template reads; found: {', '.join(self)}")

    def __getitem__(self, field: str) -> Any:
        value = super().__getitem__(field)
        missing = value is None or (isinstance(value, float) and not math.isfinite(value))
        # Other values stay what they are: a template may ask for digits of a number, or an item of a list.
        return text_in(self, field) if missing or isinstance(value, str | bool) else value


Sources = Sequence[list[int]] | Sequence[Encoded]  # token ids, or what the encoder has made of them

_row_scores = jax.jit(logit_scores, static_argnames="scoring")
_pooled_scores = jax.jit(pooled_scores)


class TextAnswerer:
    """An encoder-decoder model that answers records with texts, or with the likeliest of some labels.

    The scores of a text are pooled over its tokens. Among labels, the energy is that of the first target
    position over the whole vocabulary, and the other scores are computed from the labels' probabilities. A
    model with a head on its encoder can add the scores of that head ("encoder_energy", ...), which are known
    before anything is decoded.

    Example:
      ```python
      import jax

      import elastic_lm as el
      from elastic_lm.cascade import TextAnswerer
      from elastic_lm.data import train_bpe

      config = el.EncoderDecoderConfig(vocab_size=260, d_model=16, n_layers=1, n_heads=2, d_mlp=32)
      params = el.init_params(config, jax.random.key(0))  # `el.load(folder)` gives a trained model
      model = el.TextToText(el.EncoderDecoder(config), params, train_bpe(["some text"], 260))

      answerer = TextAnswerer(model, template="review: {text}", labels=("good", "bad"), batch_size=1)
      (answer,) = answerer.answer([{"text": "I would buy it again."}])
      assert answer.output in (0, 1)  # the index of a label
      ```
    """

    def __init__(
        self,
        model: TextToText,
        max_new_tokens: int = ANSWER_TOKENS,
        *,
        template: str = "{text}",
        max_len: int = SOURCE_TOKENS,
        labels: Sequence[str] | None = None,
        encoder_head: bool = False,
        scoring: Scoring = PLAIN,
        batch_size: int = BATCH_SIZE,
    ) -> None:
        """Creates an answerer; nothing is compiled yet.

        Args:
          model: with its tokenizer.
          max_new_tokens: tokens of an answer at most.
          template: makes a record's source of its fields, as `str.format` does: "sst2 sentence: {text}".
          max_len: tokens that are read of a source, its end token included; longer ones lose their end, as
            in training.
          labels: the only texts that may be answered; the output is then the index of one.
          encoder_head: add the scores of the head on the encoder.
          scoring: of the energy; only its temperature can be chosen here.
          batch_size: records per program; the last batch is filled up.

        Raises:
          ValueError: an argument is out of range, energies are to be centred, or there is no such head.
        """
        require(model.tokenizer is not None, "model.tokenizer", None, "give it a tokenizer")
        for name, value in (("max_new_tokens", max_new_tokens), ("batch_size", batch_size)):
            require_at_least_1(name, value)
        around = len(model.config.whole_text([]))
        require(
            around < max_len <= model.max_len,
            "max_len",
            max_len,
            f"must be above the {around} end tokens and at most the model's {model.max_len}",
        )
        require(
            scoring.centre == "none",
            "centre",
            scoring.centre,
            "energies of encoder-decoder models are not centred; fit thresholds per checkpoint",
        )
        require(
            model.config.n_labels > 0 or not encoder_head,
            "encoder_head",
            encoder_head,
            "the model has none; train one with tuned='head'",
        )

        self.scoring = scoring
        # Those of `labels` alone: a head on the encoder may name other classes than the model writes.
        self.names = tuple(labels or ())
        self._model, self._max_new_tokens, self._template = model, max_new_tokens, template
        self._longest = max_len - around
        self._batch_size, self._encoder_head = batch_size, encoder_head

    def bucket(self, record: Record) -> int | None:
        """Columns of the program that reads a record; None = the record will fail."""
        return shape_or_none(record, self._encode)

    def answer(self, records: Sequence[Record]) -> list[Answer]:
        """Answers records, as in `Answerer.answer`."""
        return answer_by_shape(records, self._encode, self._answer_batch, self._batch_size)

    def previews(self, score: str) -> bool:
        """Whether this score is known before the answer: those of the head on the encoder are."""
        return self._encoder_head and score.startswith(PLACES[2])

    def preview(self, records: Sequence[Record]) -> list[Answer]:
        """Scores records by the head on the encoder; what it prepares is the encoder's output."""
        return answer_by_shape(records, self._encode, self._preview_batch, self._batch_size)

    def finish(self, records: Sequence[Record], previews: Sequence[Answer]) -> list[Answer]:
        """Decodes records that have been previewed."""

        def encode(preview: Answer) -> tuple[int, Answer]:
            return bucket(len(preview.prepared.tokens)), preview

        return answer_by_shape(previews, encode, self._finish_batch, self._batch_size)

    def _encode(self, record: Record) -> tuple[int, list[int]]:
        assert self._model.tokenizer is not None
        source = self._template.format_map(_Fields(record))
        require(bool(source), "source", source, "is empty: give at least one character")
        ids = self._model.config.whole_text(self._model.tokenizer.encode(source)[: self._longest])
        return bucket(len(ids)), ids

    def _answer_batch(self, width: int, sources: list[list[int]]) -> list[Answer]:
        if self._encoder_head:
            return self._finish_batch(width, self._preview_batch(width, sources))
        return self._decode(sources)

    def _preview_batch(self, width: int, sources: list[list[int]]) -> list[Answer]:
        """Encodes sources, and scores them by the head on the encoder."""
        began = time.perf_counter()
        encoded = self._model.encode(filled(sources, self._batch_size))
        logits = jnp.asarray(np.stack([one.logits for one in encoded]))
        columns = jax.device_get(_row_scores(logits, scoring=self.scoring))
        scores = _by_row({f"{PLACES[2]}{kind}": x for kind, x in columns.items()}, len(sources))
        seconds = (time.perf_counter() - began) / len(sources)
        return [
            Answer(None, own_scores, self._flops(one, 0), seconds=seconds, prepared=one)
            for one, own_scores in zip(encoded, scores, strict=False)
        ]

    def _finish_batch(self, width: int, previews: list[Answer]) -> list[Answer]:
        """Decodes from what the encoder has made of sources."""
        answers = self._decode([preview.prepared for preview in previews])
        return [
            dataclasses.replace(
                answer,
                scores={**answer.scores, **preview.scores},
                seconds=preview.seconds + answer.seconds,
                preview=dataclasses.replace(preview, prepared=None),
            )
            for preview, answer in zip(previews, answers, strict=True)
        ]

    def _decode(self, sources: Sources) -> list[Answer]:
        return self._choose(sources) if self.names else self._generate(sources)

    def _generate(self, sources: Sources) -> list[Answer]:
        """Answers with texts."""
        began = time.perf_counter()
        rows, temperature = filled(sources, self._batch_size), self.scoring.temperature
        results = self._model.generate(rows, self._max_new_tokens, energy_temperature=temperature)
        results = results[: len(sources)]
        scores = self._text_scores(results)
        seconds = (time.perf_counter() - began) / len(sources)
        return [
            Answer(result.text, own_scores, self._flops(source, len(result.tokens)), seconds=seconds)
            for source, result, own_scores in zip(sources, results, scores, strict=True)
        ]

    def _text_scores(self, results: list[Text2TextResult]) -> list[dict[str, float]]:
        """Scores of texts, pooled over their tokens; of one shape, so that one program pools them."""
        shape = (self._batch_size, bucket(self._max_new_tokens))
        columns = {kind: np.zeros(shape, np.float32) for kind in KINDS}
        counted = np.zeros(shape, bool)
        for i, result in enumerate(results):
            # Results hold energy and entropy as the paper defines them, where lower is surer.
            surer = {
                "energy": -result.energy,
                "max_prob": result.max_prob,
                "entropy": 1.0 - result.entropy / np.log(self._model.config.vocab_size),
                "margin": result.margin,
            }
            counted[i, : len(result.tokens)] = True
            for kind, values in surer.items():
                columns[kind][i, : len(values)] = values
        return _by_row(jax.device_get(_pooled_scores(columns, counted)), len(results))

    def _choose(self, sources: Sources) -> list[Answer]:
        """Answers with the likeliest label."""
        began = time.perf_counter()
        rows, temperature = filled(sources, self._batch_size), self.scoring.temperature
        found = self._model.classify(rows, self.names, energy_temperature=temperature)
        columns = {**jax.device_get(_row_scores(jnp.asarray(found.log_probs))), "energy": -found.energy}
        scores = _by_row(columns, len(sources))
        seconds = (time.perf_counter() - began) / len(sources)
        return [
            Answer(found.labels[i], scores[i], self._flops(source, 1), seconds=seconds)
            for i, source in enumerate(sources)
        ]

    def _flops(self, source: list[int] | Encoded, emitted: int) -> float:
        """FLOPs of encoding a source and emitting so many tokens; E-LANG counts one token for labels."""
        config, ids = self._model.config, source.tokens if isinstance(source, Encoded) else source
        head = 2 * config.d_model * config.n_labels if self._encoder_head else 0
        return float(text_to_text_flops(config, len(ids), emitted) + head)


def _by_row(columns: Mapping[str, np.ndarray], rows: int) -> list[dict[str, float]]:
    return [{name: float(column[i]) for name, column in columns.items()} for i in range(rows)]
