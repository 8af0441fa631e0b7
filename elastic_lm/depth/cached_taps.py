"""Training exits from what the frozen layers computed once, over many epochs."""

import itertools
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from elastic_lm.data.batch import Batch
from elastic_lm.depth.self_supervised import SelfSupervisedExits, Taps, cache_taps
from elastic_lm.models.decoder import Params
from elastic_lm.models.sharding import batch_sharding
from elastic_lm.train.step import place_batch


class CachedBatches(Iterator[Taps]):
    """Batches of `Taps` in a new order every epoch, endlessly; stands in for a grain iterator."""

    def __init__(self, taps: list[Taps], seed: int):
        """Creates the iterator, at the beginning of its first epoch.

        Args:
          taps: host batches, from `cache_taps`.
          seed: of their order.
        """
        self._taps, self._seed, self._step = taps, seed, 0

    def __next__(self) -> Taps:
        epoch, place = divmod(self._step, len(self._taps))
        order = np.random.default_rng((self._seed, epoch)).permutation(len(self._taps))
        self._step += 1
        return self._taps[order[place]]

    def get_state(self) -> dict[str, int]:
        """Where the iterator stands."""
        return {"step": self._step}

    def set_state(self, state: dict[str, int]) -> None:
        """Moves the iterator to where another one stood."""
        self._step = int(state["step"])


def cached_batches(
    method: SelfSupervisedExits,
    frozen: Params,
    batches: Iterator[dict[str, np.ndarray]],
    count: int,
    mesh: Mesh,
    seed: int,
) -> CachedBatches:
    """Runs the frozen layers over the first batches of the training data.

    Args:
      method: which exits; static.
      frozen: second result of `split`.
      batches: training batches on the host.
      count: how many are kept; in memory, D numbers per token for the full model and D to 2 D per exit.
      mesh: from `sharding.make_mesh`.
      seed: of the order in which they come.

    Returns:
      The iterator; its batches are on the host.
    """
    placed: Iterator[Batch] = (place_batch(arrays, mesh) for arrays in itertools.islice(batches, count))
    return CachedBatches(cache_taps(method, frozen, placed), seed)


def place_taps(taps: Taps, mesh: Mesh) -> Any:
    """Puts host taps on the mesh, rows over data and fsdp.

    Args:
      taps: this process's rows, [B, T, ...] each.
      mesh: from `sharding.make_mesh`.

    Returns:
      `Taps` of global arrays.
    """
    sharding = batch_sharding(mesh)
    return jax.tree.map(lambda leaf: jax.make_array_from_process_local_data(sharding, leaf), taps)
