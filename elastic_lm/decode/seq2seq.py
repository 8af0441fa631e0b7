"""`TextToText`: source texts in, target texts out, with the scores of every token."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from elastic_lm.config.checks import AT_LEAST_1, POSITIVE, require
from elastic_lm.data.padding import filled
from elastic_lm.decode.prefill import split_rows, stack_rows
from elastic_lm.decode.results import Detokenizer, TextTokenizer
from elastic_lm.decode.seq2seq_loop import Request, Targets, encode, generate, label_scores
from elastic_lm.decode.settings import Settings, bucket, check_ids, make_settings, pad_rows, stop_array
from elastic_lm.models.decoder import Params
from elastic_lm.models.encoder_decoder import EncoderDecoder
from elastic_lm.models.registry import Model

LONGEST = 4096  # tokens of a source

# Static: the config, the capacity. Traced: everything else.
jit_generate = jax.jit(generate, static_argnames=("config", "capacity"))
jit_label_scores = jax.jit(label_scores, static_argnames="config")
jit_encode = jax.jit(encode, static_argnames="config")


@dataclasses.dataclass(frozen=True)
class Encoded:
    """A source that the encoder has read, from which targets are generated without reading it again.

    Attributes:
      tokens: of the source.
      hidden: [S, D] the encoder's output; what stands after the tokens means nothing.
      logits: [n_labels] float32 of the head on the encoder.
    """

    tokens: list[int]
    hidden: jax.Array
    logits: np.ndarray


Source = str | Sequence[int] | Encoded


@dataclasses.dataclass(frozen=True)
class Text2TextResult:
    """One generated target; M tokens.

    Attributes:
      text: decoded target, without the end token, cut before a stop string.
      tokens: emitted token ids, up to and including the end token or the end of a stop string.
      energy: [M] float32, -T logsumexp(logits / T) where each token was chosen; see `decode.scores`.
      max_prob: [M] float32, the largest probability there.
      entropy: [M] float32, entropy in nats there.
      margin: [M] float32, difference of the two largest probabilities there.
    """

    text: str
    tokens: list[int]
    energy: np.ndarray
    max_prob: np.ndarray
    entropy: np.ndarray
    margin: np.ndarray

    @property
    def mean_energy(self) -> float:
        """Energy of the target, the mean over its tokens (E-LANG, arXiv 2203.00748)."""
        return float(np.mean(self.energy))


@dataclasses.dataclass(frozen=True)
class Classification:
    """Labels of N sources among C.

    Attributes:
      labels: the likeliest label of each source, counted from 0.
      log_probs: [N, C] float32, log probability (natural) of the label as target, end token included.
      energy: [N] float32, energy of the first target position over the whole vocabulary.
    """

    labels: list[int]
    log_probs: np.ndarray
    energy: np.ndarray


class TextToText:
    """Generates and scores targets with an encoder-decoder model, at any batch size.

    One program is compiled per bucket: numbers of rows and lengths are rounded up to powers of two. Sampling
    settings and limits are traced: changing them compiles nothing.
    """

    def __init__(
        self, model: Model, params: Params, tokenizer: TextTokenizer | None = None, *, max_len: int = LONGEST
    ):
        """Creates one.

        Args:
          model: an encoder-decoder; its config is static.
          params: canonical parameters.
          tokenizer: needed for text; token-id sources work without and give empty text.
          max_len: tokens of a source at most. The model sets no limit, but attention over S tokens takes
            memory for 4 S^2 bytes per row and head.

        Raises:
          ValueError: the model is of another kind, or max_len is below 1.
        """
        if not isinstance(model, EncoderDecoder):
            kind = type(model).__name__
            raise ValueError(f"model={kind}: must be an EncoderDecoder, such as T5; decoders run in Sampler")
        require(AT_LEAST_1[0](max_len), "max_len", max_len, AT_LEAST_1[1])
        self.config, self.params, self.tokenizer, self.max_len = model.config, params, tokenizer, max_len

    def generate(
        self,
        sources: Source | Sequence[Source],
        max_new_tokens: int = 64,
        *,
        energy_temperature: float = 1.0,
        **settings: Any,
    ) -> list[Text2TextResult]:
        """Generates a target for every source.

        Args:
          sources: texts, each given the model's end token, or token ids, taken as they are, or what `encode`
            makes of either; one or a list.
          max_new_tokens: tokens to emit per row at most.
          energy_temperature: T of the energies.
          **settings: fields of `requests.Settings`: temperature, top_k, top_p, min_p, repetition_penalty,
            seed, stop, stop_tokens, ignore_eos. Stop strings cut what was generated.

        Returns:
          One result per source, in their order.

        Raises:
          ValueError: an empty or too long source, an unknown setting, or a value out of range.
        """
        how = make_settings(settings)
        rows = self._encode(sources)
        require(AT_LEAST_1[0](max_new_tokens), "max_new_tokens", max_new_tokens, AT_LEAST_1[1])
        tokens, lengths = _pad(rows)
        hidden = _hidden(sources, *tokens.shape)
        request = Request(
            limit=jnp.int32(max_new_tokens),
            stop_tokens=stop_array(self.config.eos_ids, how),
            sampling=_fill(how.arrays(len(rows)), len(lengths) - len(rows)),
            energy_temperature=_temperature(energy_temperature),
        )
        reader = self._reader(how)
        capacity = bucket(max_new_tokens)
        targets = jit_generate(self.config, self.params, tokens, lengths, request, hidden, capacity=capacity)
        return _collect(targets, len(rows), reader)

    def classify(
        self,
        sources: Source | Sequence[Source],
        labels: Sequence[Source],
        *,
        energy_temperature: float = 1.0,
    ) -> Classification:
        """Chooses a label for every source by the probability of its text as the target.

        Args:
          sources: as in `generate`.
          labels: the possible targets, texts (each given the model's end token) or token ids.
          energy_temperature: T of the energies.

        Returns:
          Labels, their log probabilities and the energies that E-LANG routes by.

        Raises:
          ValueError: an empty or too long source or label, or a label that is there twice.
        """
        require(not isinstance(labels, str), "labels", labels, "must be a list of labels")
        rows, targets = self._encode(sources), self._encode(list(labels), "label")
        distinct = len(set(map(tuple, targets))) == len(targets)
        require(distinct, "labels", list(labels), "two have the same tokens; each must be there once")
        label_tokens, label_lengths = pad_rows(targets, len(targets), _power_of_2(max(map(len, targets))))
        tokens, lengths = _pad(rows)
        log_probs, energy = jax.device_get(
            jit_label_scores(
                self.config, self.params, tokens, lengths, label_tokens, label_lengths,
                _temperature(energy_temperature), _hidden(sources, *tokens.shape),
            )
        )  # fmt: skip
        log_probs = log_probs[: len(rows)]
        return Classification(np.argmax(log_probs, axis=-1).tolist(), log_probs, energy[: len(rows)])

    def encode(self, sources: Source | Sequence[Source]) -> list[Encoded]:
        """Reads sources with the encoder and the head on it; nothing is decoded.

        Args:
          sources: texts or token ids, as in `generate`.

        Returns:
          What `generate` and `classify` go on from, one per source.

        Raises:
          ValueError: an empty or too long source, or the model has no such head.
        """
        rows = self._encode(sources)
        hidden, logits = jit_encode(self.config, self.params, *_pad(rows))
        found = zip(rows, split_rows(hidden), jax.device_get(logits), strict=False)
        return [Encoded(*one) for one in found]

    def encoder_logits(self, sources: Source | Sequence[Source]) -> np.ndarray:
        """[N, n_labels] float32 logits of the head on the encoder; arguments and errors as in `encode`."""
        return np.stack([one.logits for one in self.encode(sources)])

    @staticmethod
    def compilations() -> int:
        """Programs compiled so far in this process for encoder-decoder models."""
        jitted: tuple[Any, ...] = (jit_generate, jit_label_scores, jit_encode)
        return sum(function._cache_size() for function in jitted)

    def _encode(self, sources: Any, what: str = "source") -> list[list[int]]:
        """Token ids per row, checked."""
        if isinstance(sources, np.ndarray | jax.Array):
            sources = np.asarray(sources).tolist()
        one = isinstance(sources, str | Encoded)
        one = one or (len(sources) > 0 and isinstance(sources[0], int | np.integer))
        rows = []
        for i, item in enumerate([sources] if one else sources):
            if isinstance(item, str):
                item = self._tokens(f"{what} {i}", item)
            item = item.tokens if isinstance(item, Encoded) else item
            ids = [int(token) for token in item]
            require(bool(ids), f"{what} {i}", ids, "is empty: give at least one token")
            fix = f"is more than max_len={self.max_len}: shorten it, or give TextToText a larger max_len"
            require(len(ids) <= self.max_len, f"{what} {i}: tokens", len(ids), fix)
            check_ids(f"{what} {i}", ids, self.config.vocab_size)
            rows.append(ids)
        require(bool(rows), f"{what}s", rows, "give at least one")
        return rows

    def _tokens(self, what: str, text: str) -> list[int]:
        if self.tokenizer is None:
            raise ValueError("tokenizer=None: text needs one; give token ids or a tokenizer")
        require(bool(text), what, text, "is empty: give at least one character of text")
        return [*self.tokenizer.encode(text), *self.config.eos_ids[:1]]

    def _reader(self, how: Settings) -> Detokenizer:
        reader = Detokenizer(self.tokenizer, (*self.config.eos_ids, *how.stop_tokens), how.stop_strings())
        if reader.stops and self.tokenizer is None:
            raise ValueError(f"stop={how.stop!r}: stop strings need a tokenizer; use stop_tokens without one")
        return reader


def _power_of_2(size: int) -> int:
    return 1 << (size - 1).bit_length()


def _pad(rows: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Rows in a bucket of rows and a bucket of lengths."""
    return pad_rows(rows, _power_of_2(len(rows)), bucket(max(map(len, rows))))


def _hidden(sources: Any, count: int, width: int) -> jax.Array | None:
    """[count, width, D] the encoder's output for sources that it has read; None = it has not."""
    given = [sources] if isinstance(sources, Encoded) else sources
    read = [isinstance(one, Encoded) for one in given]
    if not any(read):
        return None
    require(all(read), "sources", f"{sum(read)} of {len(read)} encoded", "encode all of them, or none")

    def fit(hidden_SD: jax.Array) -> jax.Array:
        hidden_SD = hidden_SD[:width]
        return jnp.pad(hidden_SD, ((0, width - hidden_SD.shape[0]), (0, 0)))

    return stack_rows([fit(one.hidden) for one in filled(given, count)])


def _fill(rows: Any, more: int) -> Any:
    """Every array with its last row repeated `more` times."""
    return jax.tree.map(lambda x: np.pad(np.asarray(x), (0, more), mode="edge"), rows)


def _temperature(value: float) -> jax.Array:
    require(POSITIVE[0](value), "energy_temperature", value, POSITIVE[1])
    return jnp.float32(value)


def _collect(targets: Targets, count: int, reader: Detokenizer) -> list[Text2TextResult]:
    """Brings tokens and scores to the host, once."""
    tokens, lengths, s = jax.device_get((targets.tokens, targets.length, targets.scores))
    results = []
    for i in range(count):
        emitted = tokens[i, 1 : lengths[i] + 1].tolist()
        emitted = emitted[: reader.stops_after([], emitted)]
        scores = [x[i, : len(emitted)] for x in (s.energy, s.max_prob, s.entropy, s.margin)]
        results.append(Text2TextResult(reader.text([], emitted), emitted, *scores))
    return results
