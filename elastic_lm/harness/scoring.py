"""Log-probabilities of given continuations at every depth of a model, in one pass.

For a continuation y_1 .. y_M of a context c, every depth d (the exits, then the last layer) gives

    nats_dm = -ln p_d(y_m | c, y_1 .. y_m-1),    greedy_dm = [argmax p_d = y_m]

and every exit its confidence at m. Two programs compute them. `read_depths` runs the layers over a batch of
rows; there is one for every width of rows. `read_heads` reads vocabulary heads at the `CHUNK` positions that
continuations are predicted from, and nowhere else; there is one in all, for every metric too.

Continuations whose inputs (the context and all of the continuation but its last token) are the same, such as
the letters of a multiple choice, share a row.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from elastic_lm.config.checks import require, require_at_least_1
from elastic_lm.config.exit_policy import DEFAULT_METRIC
from elastic_lm.config.model import ModelConfig
from elastic_lm.data.padding import padded
from elastic_lm.depth.confidence import Evidence, metric_index
from elastic_lm.depth.observations import TokenScalars, check_gates, chunk_scalars, exit_evidence
from elastic_lm.models.decoder import Decoder, Params, default_positions
from elastic_lm.models.finite import overflow_error

CHUNK = 64  # positions whose logits, [CHUNK, V] per depth, are in memory at once
SMALLEST_WIDTH = 16
STEPS = 4  # widths between a power of two and the next one

Progress = Callable[[int], object]  # is told how many continuations have been scored


@dataclasses.dataclass(frozen=True)
class Continuation:
    """Tokens to score, and those before them; each at least one."""

    before: tuple[int, ...]
    tokens: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class DepthScores:
    """What every depth says about one continuation of M tokens; E exits, column E is the last layer.

    Attributes:
      nats: [M, E + 1] float32.
      greedy: [M, E + 1] bool, the token is the likeliest one.
      confidence: [M, E] float32.
      gate: [M, E] float32, what each exit's gate gives; 0 where it has none.
      length: tokens of the row that was read.
    """

    nats: np.ndarray
    greedy: np.ndarray
    confidence: np.ndarray
    gate: np.ndarray
    length: int


class Scorer:
    """Scores continuations with one model; the results of earlier calls are kept where that is asked for.

    Example:
      ```python
      import numpy as np

      import elastic_lm as el
      from elastic_lm.harness.scoring import Continuation, Scorer
      from elastic_lm.testing import random_params, tiny_config

      config = tiny_config(exits=(2,))
      scorer = Scorer(config, random_params(config), batch_size=2)
      (scores,) = scorer.score([Continuation((1, 2, 3), (4, 5))])
      assert scores.nats.shape == (2, 2)  # two tokens, at the exit and at full depth
      ```
    """

    def __init__(
        self,
        config: ModelConfig,
        params: Params,
        *,
        metric: str = DEFAULT_METRIC,
        batch_size: int = 8,
        max_length: int | None = None,
        remember: bool = False,
    ) -> None:
        """Creates a scorer; nothing is compiled yet.

        Args:
          config: the model, with or without exits; static under jit.
          params: its canonical parameters.
          metric: of the exits' confidence; traced.
          batch_size: rows per program; static.
          max_length: tokens of a row at most; longer ones lose their beginning. None = what the model reads.
          remember: keep all scores, so that the same continuations are not read again.

        Raises:
          ValueError: an argument is out of range, or the metric reads gates that the exits do not have.
        """
        require_at_least_1("batch_size", batch_size)
        self.max_length = config.max_len if max_length is None else max_length
        right = 1 <= self.max_length <= config.max_len
        require(right, "max_length", max_length, f"must be from 1 to max_len={config.max_len} of the model")
        check_gates(config, metric)
        self.config, self.params = config, params
        self._metric = jnp.int32(metric_index(metric))
        self._batch_size = batch_size
        self._known: dict[Continuation, DepthScores] | None = {} if remember else None

    def score(
        self, continuations: Sequence[Continuation], progress: Progress | None = None
    ) -> list[DepthScores]:
        """Scores continuations, in their order.

        Args:
          continuations: contexts lose their beginning where they are too long.
          progress: is told after every batch how many more are done.

        Raises:
          ValueError: a context or a continuation is empty, a continuation is longer than the model reads, or
            logits are not finite; the message then names the first weight that is not.
        """
        known = self._known if self._known is not None else {}
        rows: dict[tuple[int, ...], list[Continuation]] = {}
        for one in dict.fromkeys(continuations):
            if one not in known:
                rows.setdefault(self._input(one), []).append(one)

        if progress is not None:
            progress(len(continuations) - sum(map(len, rows.values())))
        # The longest first: memory runs out at once or never, and a batch holds rows of similar length.
        longest_first = sorted(rows.items(), key=lambda row: -len(row[0]))
        for first in range(0, len(longest_first), self._batch_size):
            batch = longest_first[first : first + self._batch_size]
            for one, scores in self._read(batch):
                known[one] = scores
            if progress is not None:
                progress(sum(len(asked) for _, asked in batch))
        return [known[one] for one in continuations]

    def forget(self) -> None:
        """Drops the scores of earlier calls."""
        if self._known is not None:
            self._known.clear()

    def _input(self, one: Continuation) -> tuple[int, ...]:
        """The tokens that are read: the last one of the continuation only is predicted."""
        require(bool(one.before), "before", one.before, "a continuation needs a token before it")
        require(bool(one.tokens), "tokens", one.tokens, "a continuation needs a token")
        fix = f"a continuation has at most max_length={self.max_length} tokens; shorten it"
        require(len(one.tokens) <= self.max_length, "tokens", len(one.tokens), fix)
        return (*one.before, *one.tokens)[-self.max_length - 1 : -1]

    def _read(
        self, batch: list[tuple[tuple[int, ...], list[Continuation]]]
    ) -> Iterator[tuple[Continuation, DepthScores]]:
        """One batch of rows, and the continuations that end in each."""
        width = row_width(self.config, max(len(row) for row, _ in batch))
        tokens = jnp.asarray(padded([list(row) for row, _ in batch], self._batch_size, width))
        lengths = [len(row) for row, _ in batch] + [1] * (self._batch_size - len(batch))
        depths = read_depths(
            self.config, self.params, tokens, jnp.asarray(lengths, jnp.int32)[:, None], self._metric
        )

        asked = [(i, row, one) for i, (row, ones) in enumerate(batch) for one in ones]
        places = [
            (i, len(row) - len(one.tokens) + m, token)
            for i, row, one in asked
            for m, token in enumerate(one.tokens)
        ]
        scalars = self._read_heads(depths, np.asarray(places, np.int32))

        end = 0
        for _, row, one in asked:
            own = slice(end, end := end + len(one.tokens))
            yield (
                one,
                DepthScores(
                    nats=np.asarray(scalars.nats[own]),
                    greedy=np.asarray(scalars.correct[own]),
                    confidence=np.asarray(scalars.confidence[own]),
                    gate=np.asarray(scalars.gate[own]),
                    length=len(row),
                ),
            )

    def _read_heads(self, depths: "Depths", places: np.ndarray) -> TokenScalars:
        """Scalars [N, ...] on the host at places [N, 3]: row, column, and the token that follows."""
        parts = []
        for first in range(0, len(places), CHUNK):
            part = places[first : first + CHUNK]
            row, column, token = np.pad(part, [(0, CHUNK - len(part)), (0, 0)]).T
            here = jax.tree.map(lambda x, row=row, column=column: x[row, column], depths)
            scalars = read_heads(self.config, self.params, here, jnp.asarray(token), self._metric)
            count = len(part)  # without what fills the chunk up
            parts.append(jax.tree.map(lambda x, count=count: np.asarray(x)[:count], jax.device_get(scalars)))
        joined = jax.tree.map(lambda *xs: np.concatenate(xs), *parts)
        if not (np.isfinite(joined.nats).all() and np.isfinite(joined.confidence).all()):
            raise overflow_error("a continuation: the logits", self.params, self.config.dtype)
        return joined


# Features [B, T, D] of every depth, and what each exit knows before its head is read.
Depths = tuple[list[jax.Array], list[Evidence]]


@functools.partial(jax.jit, static_argnames="config")
def read_depths(
    config: ModelConfig, params: Params, tokens_BT: jax.Array, length_B1: jax.Array, metric: jax.Array
) -> Depths:
    """Runs the layers over a batch, and keeps what the vocabulary head of every depth reads.

    Args:
      config: the model; static.
      params: its canonical parameters.
      tokens_BT: int32, padded on the right with anything: no position sees what is to its right.
      length_B1: int32 tokens of each row, by which LongRoPE rotates.
      metric: int32 position in `METRICS`; traced.

    Returns:
      (features [B, T, D] of the exits and of the last layer, evidence [B, T] of the exits).
    """
    decoder = Decoder(config).bind({"params": params})
    positions = default_positions(tokens_BT, None)
    hidden = decoder.embed(tokens_BT, positions)

    features, evidence, start = [], [], 0
    for i, exit_ in enumerate(config.exits):
        tap, _ = decoder.run_layers(hidden, positions, start, exit_.layer, lengths_BT=length_B1)
        features.append(decoder.exit_features(i, tap, positions, lengths_BT=length_B1))
        evidence.append(exit_evidence(decoder, i, tap, features[i], metric))
        hidden, start = tap.hidden, exit_.layer
    if start < config.n_layers:
        tap, _ = decoder.run_layers(hidden, positions, start, config.n_layers, lengths_BT=length_B1)
        hidden = tap.hidden
    return [*features, decoder.final_features(hidden)], evidence


@functools.partial(jax.jit, static_argnames="config")
def read_heads(
    config: ModelConfig, params: Params, depths: Depths, targets_N: jax.Array, metric: jax.Array
) -> TokenScalars:
    """Scalars of `CHUNK` positions at every depth.

    Args:
      config: the model; static.
      params: its canonical parameters.
      depths: of `read_depths`, at N positions.
      targets_N: int32, the token that follows each position.
      metric: int32 position in `METRICS`; traced.

    Returns:
      `TokenScalars` with N in place of B and T.
    """
    decoder = Decoder(config).bind({"params": params})
    heads = [*(decoder.exit_head(i) for i in range(len(config.exits))), decoder.final_head()]
    features, evidence = depths
    return chunk_scalars(
        config, features=features, heads=heads, evidence=evidence, targets=targets_N, metric=metric
    )


def row_width(config: ModelConfig, tokens: int) -> int:
    """Columns of the program that reads a row of so many tokens: `STEPS` widths per power of two."""
    power = 1 << max(tokens - 1, 1).bit_length()
    step = max(power // (2 * STEPS), SMALLEST_WIDTH)
    return min(-(-tokens // step) * step, config.max_len)
