"""What frozen layers computed once for a few batches, in a new order every epoch."""

import dataclasses
from collections.abc import Iterator

import flax.struct
import jax
import numpy as np

from elastic_lm.config.model import ExitKind, ModelConfig
from elastic_lm.data.batch import Batch
from elastic_lm.models.decoder import Decoder, Params
from elastic_lm.nn.block import Tap

# Fields of a `Tap` that an exit reads; the others are not cached.
READS: dict[ExitKind, tuple[str, ...]] = {
    "embedding": ("hidden",),
    "norm": ("hidden",),
    "linear": ("hidden",),
    "mlp": ("residual", "mlp_input"),
    "block": ("hidden",),
}


@flax.struct.dataclass
class Taps:
    """What exits and the full model's head read of a batch, from the frozen layers below them.

    Attributes:
      exits: for every exit, the fields of its layer's `Tap` that an exit of its kind reads, [B, T, D] each.
      features: [B, T, D] input of the full model's head.
      weights: [B, T] float32, how much each token counts.
      positions: [B, T] int32.
      segments: [B, T] int32.
      likeliest: [B, K] int32 tokens (`vocabulary_sample.likeliest`); None = the whole vocabulary is read.
    """

    exits: tuple[dict[str, jax.Array], ...]
    features: jax.Array
    weights: jax.Array
    positions: jax.Array
    segments: jax.Array
    likeliest: jax.Array | None = None

    def tap(self, index: int) -> Tap:
        """What the layer of exit `index` offers, as far as the exit reads it."""
        stored = self.exits[index]
        # A `Tap` has all fields. Those that this kind of exit does not read are filled with any array.
        anything = next(iter(stored.values()))
        return Tap(**{f.name: stored.get(f.name, anything) for f in dataclasses.fields(Tap)})


def read_taps(config: ModelConfig, params: Params, batch: Batch) -> Taps:
    """Runs the layers of a model once, for all of its exits and the full model.

    Args:
      config: the model with its exits; static.
      params: its parameters, canonical or stacked; those of exits are not read.
      batch: packed tokens and weights; targets are not read.

    Returns:
      What the exits and the full model's head read, in the dtype of activations.
    """
    decoder = Decoder(config).bind({"params": params})
    depths = [*(e.layer for e in config.exits), config.n_layers]
    by_depth = decoder.taps(batch.tokens, depths, batch.positions, batch.segments)
    return Taps(
        exits=tuple({f: getattr(by_depth[e.layer], f) for f in READS[e.kind]} for e in config.exits),
        features=decoder.final_features(by_depth[config.n_layers].hidden),
        weights=batch.weights,
        positions=batch.positions,
        segments=batch.segments,
    )


class CachedBatches(Iterator[Taps]):
    """Batches of `Taps` in a new order every epoch, without an end; resumes as a grain iterator does.

    Attributes:
      taps: the batches of an epoch, on the host.
    """

    def __init__(self, taps: list[Taps], seed: int) -> None:
        """Creates the iterator, at the beginning of its first epoch.

        Args:
          taps: host batches, from `self_supervised.cache_taps`.
          seed: of their order.
        """
        self.taps = taps
        self._seed = seed
        self._step = 0

    def __next__(self) -> Taps:
        # The order depends on seed and epoch alone, so that the number of steps says where a run stands.
        epoch, index = divmod(self._step, len(self.taps))
        order = np.random.default_rng((self._seed, epoch)).permutation(len(self.taps))

        self._step += 1
        return self.taps[order[index]]

    def get_state(self) -> dict[str, int]:
        """Where the iterator stands."""
        return {"step": self._step}

    def set_state(self, state: dict[str, int]) -> None:
        """Moves the iterator to where another one stood."""
        self._step = int(state["step"])
