"""What frozen layers computed once for a few batches, in a new order every epoch."""

from collections.abc import Iterator

import flax.struct
import jax
import numpy as np


@flax.struct.dataclass
class Taps:
    """What exits and the full model's head read of a batch, from the frozen layers below them.

    Attributes:
      exits: for every exit, the fields of its layer's `Tap` that an exit of its kind reads, [B, T, D] each.
      features: [B, T, D] input of the full model's head.
      weights: [B, T] float32, how much each token counts.
      positions: [B, T] int32.
      segments: [B, T] int32.
    """

    exits: tuple[dict[str, jax.Array], ...]
    features: jax.Array
    weights: jax.Array
    positions: jax.Array
    segments: jax.Array


class CachedBatches(Iterator[Taps]):
    """Batches of `Taps` in a new order every epoch, without an end; resumes as a grain iterator does."""

    def __init__(self, taps: list[Taps], seed: int) -> None:
        """Creates the iterator, at the beginning of its first epoch.

        Args:
          taps: host batches, from `self_supervised.cache_taps`.
          seed: of their order.
        """
        self._taps = taps
        self._seed = seed
        self._step = 0

    def __next__(self) -> Taps:
        # The order depends on seed and epoch alone, so that the number of steps says where a run stands.
        epoch, index = divmod(self._step, len(self._taps))
        order = np.random.default_rng((self._seed, epoch)).permutation(len(self._taps))

        self._step += 1
        return self._taps[order[index]]

    def get_state(self) -> dict[str, int]:
        """Where the iterator stands."""
        return {"step": self._step}

    def set_state(self, state: dict[str, int]) -> None:
        """Moves the iterator to where another one stood."""
        self._step = int(state["step"])
