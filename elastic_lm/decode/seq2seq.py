"""`TextToText`: source texts in, target texts out, with the scores of every token."""

import dataclasses
import numbers
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from elastic_lm.config.checks import require, require_at_least_1, require_positive, require_type
from elastic_lm.config.decoding import MAX_NEW_TOKENS
from elastic_lm.config.encoder_decoder import EncoderDecoderConfig
from elastic_lm.data.padding import filled
from elastic_lm.decode.cache import cache_bytes
from elastic_lm.decode.prefill import split_rows, stack_rows
from elastic_lm.decode.results import Detokenizer, TextTokenizer, make_detokenizer
from elastic_lm.decode.sampling import BROKEN
from elastic_lm.decode.seq2seq_loop import Request, Targets, encode, generate, label_scores
from elastic_lm.decode.settings import (
    bucket,
    check_ids,
    is_several,
    make_settings,
    pad_rows,
    stop_array,
    token_ids,
)
from elastic_lm.models.decoder import Params
from elastic_lm.models.encoder_decoder import EncoderDecoder
from elastic_lm.models.finite import overflow_error
from elastic_lm.models.registry import Model, check_params
from elastic_lm.report.machine import require_memory

LONGEST = 4096  # tokens of a source, unless `max_len` says otherwise

# Static: the config, the capacity. Traced: everything else.
jit_generate = jax.jit(generate, static_argnames=("config", "capacity"))
jit_label_scores = jax.jit(label_scores, static_argnames="config")
jit_encode = jax.jit(encode, static_argnames="config")


@dataclasses.dataclass(frozen=True)
class Encoded:
    """A source that the encoder has read, so that `generate` and `classify` need not read it again.

    Attributes:
      tokens: token ids of the source.
      hidden: [S, D] output of the encoder; entries after the tokens mean nothing.
      logits: [n_labels] float32 logits of the head on the encoder.
    """

    tokens: list[int]
    hidden: jax.Array
    logits: np.ndarray


Source = str | Sequence[int] | Encoded


@dataclasses.dataclass(frozen=True)
class Text2TextResult:
    """One generated target of M tokens, with scores of the distributions that they were drawn from.

    Tokens that the model never emits (`suppressed_ids`) have no probability in them. Where it forces a token,
    the scores are of what it would have drawn from.

    Attributes:
      text: decoded target, without the end token, cut before a stop string.
      tokens: emitted token ids, up to and including the end token or the end of a stop string.
      energy: [M] float32, -T logsumexp(logits / T); lower is surer (E-LANG, arXiv 2203.00748).
      max_prob: [M] float32, largest probability, in [0, 1].
      entropy: [M] float32, entropy in nats.
      margin: [M] float32, difference of the two largest probabilities, in [0, 1].

    Example:
      ```python
      import elastic_lm as el
      from elastic_lm.testing import random_params

      config = el.EncoderDecoderConfig(vocab_size=48, d_model=32, n_layers=2, n_heads=4, d_mlp=64)
      model = el.TextToText(el.EncoderDecoder(config), random_params(config))

      (result,) = model.generate([3, 4, 5], max_new_tokens=4)
      print(result.tokens, result.mean_energy, result.max_prob)
      ```
    """

    text: str
    tokens: list[int]
    energy: np.ndarray
    max_prob: np.ndarray
    entropy: np.ndarray
    margin: np.ndarray

    @property
    def mean_energy(self) -> float:
        """The energy of the whole target: the mean over its tokens (E-LANG, arXiv 2203.00748)."""
        return float(np.mean(self.energy))


@dataclasses.dataclass(frozen=True)
class Classification:
    """The labels of N sources, chosen from C.

    Attributes:
      labels: index of the likeliest label of each source, counted from 0.
      log_probs: [N, C] float32, natural log probability of each label as the target, end token included.
      energy: [N] float32, energy of the first target position over the whole vocabulary (E-LANG,
        arXiv 2203.00748); lower is surer.

    Example:
      ```python
      import elastic_lm as el
      from elastic_lm.testing import random_params

      config = el.EncoderDecoderConfig(vocab_size=48, d_model=32, n_layers=2, n_heads=4, d_mlp=64)
      model = el.TextToText(el.EncoderDecoder(config), random_params(config))

      result = model.classify([[3, 4, 5], [6]], labels=[[7, 1], [8, 1]])
      print(result.labels, result.log_probs, result.energy)
      ```
    """

    labels: list[int]
    log_probs: np.ndarray
    energy: np.ndarray


class TextToText:
    """Generates and scores targets with an encoder-decoder model such as T5, at any batch size.

    One program is compiled per bucket: numbers of rows and lengths are rounded up to powers of two. The
    settings and limits of a call are traced: changing them compiles nothing.

    Attributes:
      config: of the model; static.
      params: its canonical parameters.
      tokenizer: None = calls are about token ids.
      max_len: tokens of a source at most.

    Example:
      ```python
      import elastic_lm as el
      from elastic_lm.testing import random_params

      config = el.EncoderDecoderConfig(vocab_size=48, d_model=32, n_layers=2, n_heads=4, d_mlp=64)
      model = el.TextToText(el.EncoderDecoder(config), random_params(config))

      for result in model.generate([[3, 4, 5], [6, 7]], max_new_tokens=4, temperature=0.8, seed=1):
          print(result.tokens, result.energy)
      ```
    """

    def __init__(
        self, model: Model, params: Params, tokenizer: TextTokenizer | None = None, *, max_len: int = LONGEST
    ):
        """Creates the generator; nothing is compiled yet.

        Args:
          model: an encoder-decoder; its config is static.
          params: canonical parameters.
          tokenizer: needed for text; token-id sources work without one and give empty text.
          max_len: tokens of a source at most, at least 1; not more than a model with vectors of positions
            (BART, Marian) has. Others set no limit, but attention over S tokens takes 4 S^2 bytes of memory
            per row and head.

        Raises:
          ValueError: the model is of another kind, or max_len is below 1.
        """
        if not isinstance(model, EncoderDecoder):
            kind = type(model).__name__
            raise ValueError(f"model={kind}: must be an EncoderDecoder, such as T5; decoders run in Sampler")
        require_type("max_len", max_len, int)
        require_at_least_1("max_len", max_len)
        check_params(model.config, params)
        self.config = model.config
        max_len = min(max_len, model.config.max_len or max_len)
        self.params = params
        self.tokenizer = tokenizer
        self.max_len = max_len

    def generate(
        self,
        sources: Source | Sequence[Source],
        max_new_tokens: int = MAX_NEW_TOKENS,
        *,
        energy_temperature: float = 1.0,
        **settings: Any,
    ) -> list[Text2TextResult]:
        """Generates a target for every source.

        Args:
          sources: texts, to which the model's end token is added; or token ids, taken as they are; or what
            `encode` makes of either. One source or a list.
          max_new_tokens: tokens to emit per row at most, at least 1.
          energy_temperature: T of the energies, positive.
          **settings: how tokens are drawn and where text ends, one value or one per row: `temperature`
            (0 = greedy), `top_k`, `top_p`, `min_p`, `repetition_penalty`, `seed`; for all rows `stop`
            (strings, which cut the generated text), `stop_tokens` (ids), `ignore_eos`. See
            `decode.settings.Settings`.

        Returns:
          One result per source, in their order.

        Raises:
          ValueError: an empty or too long source, an unknown setting, or a value out of range.
        """
        call_settings = make_settings(settings)
        rows = self._encode(sources)
        require_type("max_new_tokens", max_new_tokens, int)
        require_at_least_1("max_new_tokens", max_new_tokens)
        longest = self.config.max_len
        fix = f"the model has {longest} positions: ask for fewer"
        require(not longest or max_new_tokens <= longest, "max_new_tokens", max_new_tokens, fix)
        if call_settings.stop_tokens:
            check_ids("stop_tokens", call_settings.stop_tokens, self.config.vocab_size)
        detokenizer = make_detokenizer(self.tokenizer, self.config.eos_ids, call_settings)

        tokens, lengths = self._pad(rows)
        hidden = _hidden(sources, *tokens.shape)
        request = Request(
            limit=jnp.int32(max_new_tokens),
            stop_tokens=stop_array(self.config.eos_ids, call_settings),
            sampling=_fill(call_settings.arrays(len(rows)), len(lengths) - len(rows)),
            energy_temperature=_temperature(energy_temperature),
        )
        capacity = bucket(max_new_tokens)
        needed = self.config.n_decoder_layers * cache_bytes(self.config.layer, len(lengths), capacity)
        require_memory("max_new_tokens", max_new_tokens, needed, "the caches")
        targets = jit_generate(self.config, self.params, tokens, lengths, request, hidden, capacity=capacity)
        return self._collect(targets, len(rows), detokenizer)

    def classify(
        self,
        sources: Source | Sequence[Source],
        labels: Sequence[Source],
        *,
        energy_temperature: float = 1.0,
    ) -> Classification:
        """Chooses a label for every source by the probability of the label's text as the target.

        Args:
          sources: as in `generate`.
          labels: the possible targets: texts, to which the model's end token is added, or token ids.
          energy_temperature: T of the energies, positive.

        Returns:
          The labels, their log probabilities, and the energies by which E-LANG decides whether a larger
          model is asked.

        Raises:
          ValueError: an empty or too long source or label, or two labels of the same tokens.
        """
        require(not isinstance(labels, str), "labels", labels, "must be a list of labels")
        rows, targets = self._encode(sources), self._encode(list(labels), "label")
        distinct = len(set(map(tuple, targets))) == len(targets)
        require(distinct, "labels", list(labels), "two have the same tokens; each must be there once")

        widest = _power_of_2(max(map(len, targets)))
        widest = min(widest, self.config.max_len or widest)
        label_tokens, label_lengths = pad_rows(targets, len(targets), widest)
        tokens, lengths = self._pad(rows)
        log_probs, energy = jax.device_get(
            jit_label_scores(
                self.config, self.params, tokens, lengths, label_tokens, label_lengths,
                _temperature(energy_temperature), _hidden(sources, *tokens.shape),
            )
        )  # fmt: skip

        log_probs = log_probs[: len(rows)]
        self._check_finite(log_probs, energy[: len(rows)])
        return Classification(np.argmax(log_probs, axis=-1).tolist(), log_probs, energy[: len(rows)])

    def encode(self, sources: Source | Sequence[Source]) -> list[Encoded]:
        """Reads sources with the encoder and the head on it; nothing is decoded.

        Args:
          sources: texts or token ids, as in `generate`.

        Returns:
          One `Encoded` per source, which `generate` and `classify` take in place of the source.

        Raises:
          ValueError: an empty or too long source, or the model has no head on its encoder.
        """
        rows = self._encode(sources)
        hidden, logits = jit_encode(self.config, self.params, *self._pad(rows))
        logits = jax.device_get(logits)
        self._check_finite(logits[: len(rows)])
        # Not strict: the arrays are padded with rows that are no sources.
        encoded = zip(rows, split_rows(hidden), logits, strict=False)
        return [Encoded(*one) for one in encoded]

    def encoder_logits(self, sources: Source | Sequence[Source]) -> np.ndarray:
        """Logits of the head on the encoder.

        Args:
          sources: texts or token ids, as in `generate`.

        Returns:
          [N, n_labels] float32.

        Raises:
          ValueError: an empty or too long source, or the model has no head on its encoder.
        """
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
        single = isinstance(sources, str | Encoded)
        right = single or is_several(sources)
        require(right, f"{what}s", sources, "must be text, token ids, or a list of either")
        single = single or (len(sources) > 0 and isinstance(sources[0], numbers.Integral))

        rows = []
        for i, item in enumerate([sources] if single else sources):
            if isinstance(item, str):
                item = self._tokens(f"{what} {i}", item)
            elif isinstance(item, Encoded):
                item = item.tokens
            ids = token_ids(f"{what} {i}", item)
            require(bool(ids), f"{what} {i}", ids, "is empty: give at least one token")
            require(
                len(ids) <= self.max_len,
                f"{what} {i}: tokens",
                len(ids),
                f"is more than max_len={self.max_len}: shorten it, or give TextToText a larger max_len",
            )
            check_ids(f"{what} {i}", ids, self.config.vocab_size)
            rows.append(ids)
        require(bool(rows), f"{what}s", rows, "give at least one")
        return rows

    def _check_finite(self, *results: np.ndarray) -> None:
        """Refuses results [N, ...] that hold NaN or infinity."""
        for values in results:
            bad = ~np.isfinite(values).reshape(len(values), -1).all(axis=1)
            if bad.any():
                what = f"source {int(np.argmax(bad))}: its scores"
                raise overflow_error(what, self.params, self.config.dtype)

    def _collect(self, targets: Targets, n_sources: int, detokenizer: Detokenizer) -> list[Text2TextResult]:
        """Brings tokens and scores to the host, once; the rows after the sources are padding."""
        tokens, lengths, scores = jax.device_get((targets.tokens, targets.length, targets.scores))
        results = []
        for i in range(n_sources):
            emitted = tokens[i, 1 : lengths[i] + 1].tolist()
            if BROKEN in emitted:
                what = f"source {i}: the logits after {emitted.index(BROKEN)} target tokens"
                raise overflow_error(what, self.params, self.config.dtype)

            emitted = emitted[: detokenizer.stops_after([], emitted)]
            n = len(emitted)
            result = Text2TextResult(
                text=detokenizer.text([], emitted[n_started(self.config, emitted) :]),
                tokens=emitted,
                energy=scores.energy[i, :n],
                max_prob=scores.max_prob[i, :n],
                entropy=scores.entropy[i, :n],
                margin=scores.margin[i, :n],
            )
            results.append(result)
        return results

    def _tokens(self, what: str, text: str) -> list[int]:
        if self.tokenizer is None:
            raise ValueError("tokenizer=None: text needs one; give token ids or a tokenizer")
        require(bool(text), what, text, "is empty: give at least one character of text")
        return self.config.whole_text(self.tokenizer.encode(text))

    def _pad(self, rows: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
        """The rows as one array, both sides of which are rounded up to powers of two, and their lengths."""
        width = bucket(max(map(len, rows)))
        return pad_rows(rows, _power_of_2(len(rows)), min(width, self.config.max_len or width))


def n_started(config: EncoderDecoderConfig, emitted: list[int]) -> int:
    """How many tokens at the beginning of a target are none of its text: 1 where it has a start token."""
    return int(emitted[:1] == [config.text_start_id])


def _power_of_2(size: int) -> int:
    return 1 << (size - 1).bit_length()


def _hidden(sources: Any, count: int, width: int) -> jax.Array | None:
    """[count, width, D]: the encoder's output for sources that it has read; None where it has not."""
    sources = [sources] if isinstance(sources, Encoded) else sources
    read = [isinstance(source, Encoded) for source in sources]
    if not any(read):
        return None
    require(all(read), "sources", f"{sum(read)} of {len(read)} encoded", "encode all of them, or none")

    def fit(hidden_SD: jax.Array) -> jax.Array:
        hidden_SD = hidden_SD[:width]
        return jnp.pad(hidden_SD, ((0, width - hidden_SD.shape[0]), (0, 0)))

    return stack_rows([fit(source.hidden) for source in filled(sources, count)])


def _fill(rows: Any, more: int) -> Any:
    """Every array with its last row repeated `more` times."""
    return jax.tree.map(lambda x: np.pad(np.asarray(x), (0, more), mode="edge"), rows)


def _temperature(value: float) -> jax.Array:
    require_positive("energy_temperature", value)
    return jnp.float32(value)
