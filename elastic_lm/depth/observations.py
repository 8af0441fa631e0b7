"""What every exit would say about every held-out token, as a handful of scalars per token.

Teacher-forced: the text is given, so one forward pass sees all depths. With z_j the logits of exit j
and z those of the full model, every token x_{t+1} with a positive weight leaves

    confidence_j,    agrees_j = [argmax z_j = argmax z],    correct = [argmax z = x_{t+1}],
    nats = logsumexp z - z[x_{t+1}]

(the last two per exit and for the full model). Logits stay on the device and are made for `chunk`
columns of one depth at a time.
"""

import dataclasses
import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from elastic_lm.config.model import ModelConfig
from elastic_lm.data.batch import Batch
from elastic_lm.depth.confidence import (
    DEFAULT_METRIC,
    Evidence,
    confidence_by_index,
    metric_index,
    state_similarity,
)
from elastic_lm.models.decoder import Decoder, Params, vocab_logits
from elastic_lm.nn.block import Tap

Arrays = Mapping[str, Any]  # the fields of a `Batch`, as the data pipeline yields them


@dataclasses.dataclass(frozen=True)
class Observations:
    """Per-token scalars on the host; E exits, N counted tokens, column E is the full model.

    Attributes:
      layers: the exits' layers, E of them.
      n_layers: layers of the full model.
      confidence: [N, E] float32.
      agrees: [N, E] bool, the exit's token is the full model's.
      correct: [N, E + 1] bool, the token is the text's.
      nats: [N, E + 1] float32 cross-entropy.
      weights: [N] float32, how much each token counts.
      targets: [N] int32, the text's tokens.
      sequence: [N] int32, the row that each token comes from.
      gate: [N, E] float32, what each exit's gate gives; 0 where it has none. None = not observed.
    """

    layers: tuple[int, ...]
    n_layers: int
    confidence: np.ndarray
    agrees: np.ndarray
    correct: np.ndarray
    nats: np.ndarray
    weights: np.ndarray
    targets: np.ndarray
    sequence: np.ndarray
    gate: np.ndarray | None = None

    @property
    def tokens(self) -> int:
        """Number of counted tokens."""
        return len(self.sequence)

    def rows(self, sequences: np.ndarray) -> "Observations":
        """The tokens of some sequences only."""
        keep = np.isin(self.sequence, sequences)
        names = ("confidence", "agrees", "correct", "nats", "weights", "targets", "sequence")
        names += () if self.gate is None else ("gate",)
        return dataclasses.replace(self, **{name: getattr(self, name)[keep] for name in names})

    def gated(self, gates: Sequence[float]) -> "Observations":
        """The same with exits whose gate gives less than `gates` [E] silenced: no threshold is reached."""
        if self.gate is None:
            return self
        shut = self.gate < np.asarray(gates, np.float32)
        return dataclasses.replace(self, confidence=np.where(shut, np.float32(-1.0), self.confidence))

    def halves(self, seed: int = 0) -> tuple["Observations", "Observations"]:
        """Splits whole sequences at random into two halves.

        Raises:
          ValueError: there is only one sequence.
        """
        sequences = np.unique(self.sequence)
        if len(sequences) < 2:
            raise ValueError(
                f"{len(sequences)} held-out sequence(s): at least 2 are needed, one half chooses the "
                "thresholds and the other measures them; give more text or shorter rows"
            )
        mixed = np.random.default_rng(seed).permutation(sequences)
        return self.rows(mixed[: len(mixed) // 2]), self.rows(mixed[len(mixed) // 2 :])


@flax.struct.dataclass
class TokenScalars:
    """`Observations` of one batch on the device; leading dimensions [B, T].

    Attributes:
      confidence: [B, T, E] float32.
      agrees: [B, T, E] bool.
      correct: [B, T, E + 1] bool.
      nats: [B, T, E + 1] float32.
      gate: [B, T, E] float32.
    """

    confidence: jax.Array
    agrees: jax.Array
    correct: jax.Array
    nats: jax.Array
    gate: jax.Array


def observe(
    config: ModelConfig,
    params: Params,
    batches: Iterable[Batch | Arrays],
    *,
    metric: str = DEFAULT_METRIC,
    chunk: int = 128,
) -> Observations:
    """Runs held-out text through the model once and keeps the scalars that calibration needs.

    Args:
      config: the model, with or without exits; static.
      params: its parameters, canonical or stacked.
      batches: packed batches, or dicts of their fields. One program is compiled, for the shape of
        the first; smaller ones are padded to it.
      metric: confidence metric; traced.
      chunk: columns of logits alive at once; static.

    Returns:
      Observations of all tokens with a positive weight.

    Raises:
      ValueError: a batch is larger than the first one or longer than the model, no token counts, or the
        metric needs gates that the exits do not have.
    """
    index = jnp.int32(metric_index(metric))
    check_gates(config, metric)
    parts: list[tuple[np.ndarray, ...]] = []
    shape: tuple[int, ...] = ()
    first_row = 0
    for given in batches:
        batch = Batch(**given) if isinstance(given, Mapping) else given
        rows = batch.tokens.shape[0]
        shape = shape or batch.tokens.shape
        if shape[1] > config.max_len:
            raise ValueError(
                f"held-out rows of seq_len={shape[1]}: above max_len={config.max_len}; shorten them"
            )
        batch = padded(batch, shape)
        scalars = jax.device_get(observe_batch(config, params, batch, index, chunk))
        counted = np.asarray(batch.weights) > 0
        row = np.broadcast_to(first_row + np.arange(shape[0])[:, None], shape)
        host = (*_fields(scalars), batch.weights, batch.targets, row, scalars.gate)
        parts.append(tuple(np.asarray(x)[counted] for x in host))
        first_row += rows
    if not any(len(part[0]) for part in parts):
        raise ValueError(f"{len(parts)} held-out batches without a counted token: give more text")
    columns = [np.concatenate(column) for column in zip(*parts, strict=True)]
    return Observations(tuple(e.layer for e in config.exits), config.n_layers, *columns)


def check_gates(config: ModelConfig, metric: str) -> None:
    """Checks that the exits have what a metric reads.

    Raises:
      ValueError: the metric is `learned` and an exit has no gate.
    """
    without = tuple(e.layer for e in config.exits if not e.gate)
    if metric == "learned" and without:
        raise ValueError(
            f"metric='learned': the exits after layers {without} have no gate; attach them with "
            "ExitConfig(gate=width) and tune the gates, or choose a metric that reads logits"
        )


def _fields(scalars: TokenScalars) -> tuple[jax.Array, ...]:
    return scalars.confidence, scalars.agrees, scalars.correct, scalars.nats


def padded(batch: Batch, shape: tuple[int, ...]) -> Batch:
    """Pads a batch with tokens that do not count.

    Raises:
      ValueError: the batch does not fit into `shape`.
    """
    missing = [want - have for want, have in zip(shape, batch.tokens.shape, strict=True)]
    if min(missing) < 0:
        raise ValueError(f"batch of shape {batch.tokens.shape}: larger than the first one, {shape}")
    if not any(missing):
        return batch
    return jax.tree.map(lambda x: jnp.pad(x, [(0, n) for n in missing]), batch)


@functools.partial(jax.jit, static_argnames=("config", "chunk"))
def observe_batch(
    config: ModelConfig, params: Params, batch: Batch, metric: jax.Array, chunk: int
) -> TokenScalars:
    """Scalars of one batch; `config` and `chunk` are static, the metric's index is traced."""
    decoder = Decoder(config).bind({"params": params})
    depths = (*(e.layer for e in config.exits), config.n_layers)
    taps = decoder.taps(batch.tokens, depths, batch.positions, batch.segments)
    features = [
        decoder.exit_features(i, taps[e.layer], batch.positions, batch.segments)
        for i, e in enumerate(config.exits)
    ]
    evidence = [_evidence(decoder, i, taps[e.layer], features[i]) for i, e in enumerate(config.exits)]
    features.append(decoder.final_features(taps[config.n_layers].hidden))
    kernels = [*(decoder.exit_kernel(i) for i in range(len(config.exits))), decoder.final_kernel()]
    b, t = batch.tokens.shape
    chunk = min(chunk, t)

    def chunks(x: jax.Array) -> jax.Array:
        x = jnp.pad(x, [(0, 0), (0, -t % chunk)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(b, -1, chunk, *x.shape[2:]), 1, 0)

    def one(xs: tuple[list[jax.Array], list[Evidence], jax.Array]) -> TokenScalars:
        return _chunk_scalars(config, xs[0], kernels, xs[1], xs[2], metric)

    stacked = jax.lax.map(one, jax.tree.map(chunks, (features, evidence, batch.targets)))
    columns = -(-t // chunk) * chunk
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(b, columns, *x.shape[3:])[:, :t], stacked)


def _evidence(decoder: Decoder, index: int, tap: Tap, features: jax.Array) -> Evidence:
    """What exit `index` knows of each token [B, T] before its vocabulary head is read."""
    similarity = state_similarity(tap.hidden, tap.entering)
    gate = decoder.config.exits[index].gate
    return Evidence(similarity, decoder.exit_gate(index, features) if gate else jnp.zeros_like(similarity))


def _chunk_scalars(
    config: ModelConfig,
    features: Sequence[jax.Array],
    kernels: Sequence[jax.Array],
    evidence: Sequence[Evidence],
    targets: jax.Array,
    metric: jax.Array,
) -> TokenScalars:
    """Scalars of one chunk of columns, one depth after the other."""
    best, nats, confidence = [], [], []
    temperatures = [*(e.temperature for e in config.exits), 1.0]
    for i, (x, kernel) in enumerate(zip(features, kernels, strict=True)):
        logits = vocab_logits(config, x, kernel, temperatures[i])
        best.append(jnp.argmax(logits, axis=-1))
        target = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
        nats.append(jax.nn.logsumexp(logits, axis=-1) - target)
        if i < len(config.exits):
            confidence.append(confidence_by_index(metric, logits, evidence[i]))
    choice = jnp.stack(best, axis=-1)
    learned = [e.learned for e in evidence]
    return TokenScalars(
        gate=jnp.stack(learned, axis=-1) if learned else jnp.zeros((*targets.shape, 0)),
        confidence=jnp.stack(confidence, axis=-1) if confidence else jnp.zeros((*targets.shape, 0)),
        agrees=choice[..., :-1] == choice[..., -1:],
        correct=choice == targets[..., None],
        nats=jnp.stack(nats, axis=-1),
    )
