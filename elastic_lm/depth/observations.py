"""What every exit would say about every held-out token, as a handful of scalars per token.

Teacher-forced: the text is given, so one forward pass sees all depths. With z_j the logits of exit j
and z those of the full model, every token x_{t+1} with a positive weight leaves

    confidence_j,    agrees_j = [argmax z_j = argmax z],    correct = [argmax z = x_{t+1}],
    nats = logsumexp z - z[x_{t+1}]

(the last two per exit and for the full model). Logits stay on the device and are made for `chunk`
columns of one depth at a time.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Iterable, Sequence

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from elastic_lm.config.exit_policy import DEFAULT_METRIC, GATE_METRIC
from elastic_lm.config.model import ModelConfig
from elastic_lm.data.batch import Arrays, Batch, as_batches
from elastic_lm.depth.confidence import Evidence, confidence_by_index, metric_index, state_confidence
from elastic_lm.models.decoder import Decoder, Params, vocab_logits
from elastic_lm.models.finite import overflow_error
from elastic_lm.models.placement import rows_beside
from elastic_lm.nn.block import Tap
from elastic_lm.nn.vocab_head import Head
from elastic_lm.processes import all_or_none, arrays_of_all, is_spread, on_host


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
      position: [N] int32, place in its document of the token before. None = not observed.
      source: [N] int32, number of the file that a token comes from. None = the batches do not say.

    Example:
      ```python
      import jax.numpy as jnp
      import elastic_lm as el
      from elastic_lm.testing import random_params, random_tokens, tiny_config

      config = tiny_config(exits=(2,))
      tokens = random_tokens(config, batch=4, length=17)
      ones = jnp.ones((4, 16), jnp.int32)
      batch = el.data.Batch(tokens[:, :-1], tokens[:, 1:], 1.0 * ones, jnp.cumsum(ones, 1) - 1, ones)

      seen = el.depth.observe(config, random_params(config), [batch])
      choosing, measuring = seen.halves()
      assert (seen.tokens, choosing.tokens, measuring.tokens) == (64, 32, 32)
      ```
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
    position: np.ndarray | None = None
    source: np.ndarray | None = None

    @property
    def tokens(self) -> int:
        """Number of counted tokens."""
        return len(self.sequence)

    def rows(self, sequences: np.ndarray) -> "Observations":
        """The tokens of some sequences only."""
        keep = np.isin(self.sequence, sequences)
        names = ("confidence", "agrees", "correct", "nats", "weights", "targets", "sequence")
        names += tuple(name for name in ("gate", "position", "source") if getattr(self, name) is not None)
        return dataclasses.replace(self, **{name: getattr(self, name)[keep] for name in names})

    def gated(self, gates: Sequence[float]) -> "Observations":
        """The same observations, with exits silenced where their gate gives less than `gates` [E]."""
        if self.gate is None:
            return self
        shut = self.gate < np.asarray(gates, np.float32)
        # A confidence below 0 reaches no threshold, not even one of 0, which always exits.
        return dataclasses.replace(self, confidence=np.where(shut, np.float32(-1.0), self.confidence))

    def halves(self, seed: int = 0) -> tuple["Observations", "Observations"]:
        """Splits whole sequences at random into two halves.

        Args:
          seed: of the split.

        Returns:
          (one half, the other half).

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
    """`Observations` of one batch on the device.

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
      Observations of all tokens with a positive weight. Where several processes call this with the same
      batches and each has all parameters, each reads its part of them, and all get all observations.

    Raises:
      ValueError: a batch is larger than the first one or longer than the model, no token counts, the
        metric needs gates that the exits do not have, or logits or confidences are not finite; the message
        then names the first weight that is not, or the dtype that was exceeded.

    Example:
      ```python
      import jax.numpy as jnp
      import elastic_lm as el
      from elastic_lm.testing import random_params, random_tokens, tiny_config

      config = tiny_config(exits=(1, 3))
      tokens = random_tokens(config, batch=4, length=17)
      ones = jnp.ones((4, 16), jnp.int32)
      batch = el.data.Batch(tokens[:, :-1], tokens[:, 1:], 1.0 * ones, jnp.cumsum(ones, 1) - 1, ones)

      seen = el.depth.observe(config, random_params(config), [batch], metric="max_prob")
      assert seen.confidence.shape == (64, 2)
      print(seen.agrees.mean(axis=0))  # how often each exit's token is the full model's
      ```
    """
    index = jnp.int32(metric_index(metric))
    check_gates(config, metric)

    processes = 1 if is_spread(params) else jax.process_count()
    with all_or_none() if processes > 1 else contextlib.nullcontext():
        parts = _parts(config, params, batches, index, chunk, processes)
    if processes > 1:
        parts = _parts_of_all(parts)

    if not any(len(part["sequence"]) for part in parts):
        raise ValueError(f"{len(parts)} held-out batches without a counted token: give more text")

    layers = tuple(e.layer for e in config.exits)
    columns = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    return Observations(layers=layers, n_layers=config.n_layers, **columns)


def _parts(
    config: ModelConfig,
    params: Params,
    batches: Iterable[Batch | Arrays],
    index: jax.Array,
    chunk: int,
    processes: int,
) -> list[dict[str, np.ndarray]]:
    """Columns of `Observations` of the batches that this process reads, one batch after the other."""
    parts: list[dict[str, np.ndarray]] = []
    shape: tuple[int, ...] = ()
    first_row = 0
    for number, batch in enumerate(as_batches(batches)):
        rows = batch.tokens.shape[0]
        shape = shape or batch.tokens.shape
        if shape[1] > config.max_len:
            raise ValueError(
                f"held-out rows of seq_len={shape[1]}: above max_len={config.max_len}; shorten them"
            )

        if number % processes != jax.process_index() % processes:
            first_row += rows
            continue

        batch = pad_batch(batch, shape)
        read = dataclasses.replace(batch, sources=None)
        scalars = on_host(observe_batch(config, params, rows_beside(params, read), index, chunk))

        counted = np.asarray(batch.weights) > 0
        for values in (scalars.nats, scalars.confidence, scalars.gate):
            bad = ~np.isfinite(values).all(axis=-1) & counted
            if bad.any():
                what = f"held-out row {first_row + int(np.argmax(bad.any(axis=1)))}: the logits"
                raise overflow_error(what, params, config.dtype)
        row = np.broadcast_to(first_row + np.arange(shape[0])[:, None], shape)
        columns = {
            **{field.name: getattr(scalars, field.name) for field in dataclasses.fields(scalars)},
            **{"weights": batch.weights, "targets": batch.targets, "sequence": row},
            **{"position": batch.positions},
            **({} if batch.sources is None else {"source": batch.sources}),
        }
        parts.append({name: np.asarray(column)[counted] for name, column in columns.items()})
        first_row += rows
    return parts


def _parts_of_all(parts: list[dict[str, np.ndarray]]) -> list[dict[str, np.ndarray]]:
    """The parts of all processes, in the order of the batches; each process has every so many of them."""
    own = {f"{i}/{name}": column for i, part in enumerate(parts) for name, column in part.items()}
    found: list[list[dict[str, np.ndarray]]] = []
    for columns in arrays_of_all(own):
        names = [name.partition("/") for name in columns]
        count = 1 + max((int(number) for number, _, _ in names), default=-1)
        found.append([{} for _ in range(count)])
        for number, slash, name in names:
            found[-1][int(number)][name] = columns[number + slash + name]
    longest = max(map(len, found))
    return [of_process[i] for i in range(longest) for of_process in found if i < len(of_process)]


def check_gates(config: ModelConfig, metric: str) -> None:
    """Checks that the exits have what a metric reads.

    Raises:
      ValueError: the metric reads gates, and an exit has none.
    """
    without = tuple(e.layer for e in config.exits if not e.gate)
    if metric == GATE_METRIC and without:
        raise ValueError(
            f"metric={metric!r}: the exits after layers {without} have no gate; attach them with "
            "ExitConfig(gate=width) and tune the gates, or choose a metric that reads logits"
        )


def pad_batch(batch: Batch, shape: tuple[int, ...]) -> Batch:
    """Pads a batch to [B, T] = `shape` with tokens that do not count.

    Raises:
      ValueError: the batch does not fit into `shape`.
    """
    missing = [wanted - size for wanted, size in zip(shape, batch.tokens.shape, strict=True)]
    if min(missing) < 0:
        raise ValueError(f"batch of shape {batch.tokens.shape}: larger than the first one, {shape}")
    if not any(missing):
        return batch
    # Zeros: weight 0 does not count, and segment 0 is padding, which no token attends to.
    return jax.tree.map(
        lambda x: (np if isinstance(x, np.ndarray) else jnp).pad(x, [(0, n) for n in missing]), batch
    )


@functools.partial(jax.jit, static_argnames=("config", "chunk"))
def observe_batch(
    config: ModelConfig, params: Params, batch: Batch, metric: jax.Array, chunk: int
) -> TokenScalars:
    """Scalars of one batch.

    Args:
      config: the model; static.
      params: its parameters, canonical or stacked.
      batch: packed tokens.
      metric: int32 position in `METRICS`; traced.
      chunk: columns of logits alive at once; static.
    """
    decoder = Decoder(config).bind({"params": params})
    exits = list(enumerate(config.exits))

    # One forward pass gives the states at all depths.
    depths = (*(e.layer for e in config.exits), config.n_layers)
    taps = decoder.taps(batch.tokens, depths, batch.positions, batch.segments)
    features = [decoder.exit_features(i, taps[e.layer], batch.positions, batch.segments) for i, e in exits]
    evidence = [exit_evidence(decoder, i, taps[e.layer], features[i], metric) for i, e in exits]
    features.append(decoder.final_features(taps[config.n_layers].hidden))
    heads = [*(decoder.exit_head(i) for i, _ in exits), decoder.final_head()]

    # Logits of all columns would be [B, T, V] per depth; `map` holds those of one chunk at a time.
    b, t = batch.tokens.shape
    chunk = min(chunk, t)

    def chunks(x: jax.Array) -> jax.Array:
        x = jnp.pad(x, [(0, 0), (0, -t % chunk)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(b, -1, chunk, *x.shape[2:]), 1, 0)

    def one(piece: tuple[list[jax.Array], list[Evidence], jax.Array]) -> TokenScalars:
        features, evidence, targets = piece
        return chunk_scalars(
            config, features=features, heads=heads, evidence=evidence, targets=targets, metric=metric
        )

    stacked = jax.lax.map(one, jax.tree.map(chunks, (features, evidence, batch.targets)))
    columns = -(-t // chunk) * chunk
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(b, columns, *x.shape[3:])[:, :t], stacked)


def exit_evidence(decoder: Decoder, index: int, tap: Tap, features: jax.Array, metric: jax.Array) -> Evidence:
    """What exit `index` knows of each token [B, T] before its vocabulary head is read."""
    state = state_confidence(metric, tap.hidden, tap.entering)
    gate = decoder.config.exits[index].gate
    return Evidence(state, decoder.exit_gate(index, features) if gate else jnp.zeros_like(state))


def chunk_scalars(
    config: ModelConfig,
    *,
    features: Sequence[jax.Array],
    heads: Sequence[Head],
    evidence: Sequence[Evidence],
    targets: jax.Array,
    metric: jax.Array,
) -> TokenScalars:
    """Scalars of one chunk of columns, one depth after the other; the full model comes last."""
    best, nats, confidence = [], [], []
    temperatures = [*(e.temperature for e in config.exits), 1.0]
    for i, (x, head) in enumerate(zip(features, heads, strict=True)):
        logits = vocab_logits(config, x, head, temperatures[i])
        best.append(jnp.argmax(logits, axis=-1))
        target = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
        nats.append(jax.nn.logsumexp(logits, axis=-1) - target)
        if i < len(config.exits):
            confidence.append(confidence_by_index(metric, logits, evidence[i]))

    likeliest = jnp.stack(best, axis=-1)
    gates = [e.gate for e in evidence]
    no_exits = jnp.zeros((*targets.shape, 0))
    return TokenScalars(
        confidence=jnp.stack(confidence, axis=-1) if confidence else no_exits,
        agrees=likeliest[..., :-1] == likeliest[..., -1:],
        correct=likeliest == targets[..., None],
        nats=jnp.stack(nats, axis=-1),
        gate=jnp.stack(gates, axis=-1) if gates else no_exits,
    )
