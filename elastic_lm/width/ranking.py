"""Sorts a pretrained model by importance on training text, before elastic training begins."""

import dataclasses
from collections.abc import Iterable

import jax

from elastic_lm.config.model import ModelConfig
from elastic_lm.data.batch import Batch
from elastic_lm.models.decoder import stack_layers, unstack_layers
from elastic_lm.train.state import TrainState
from elastic_lm.width.importance import permute, rank


def rank_state(config: ModelConfig, state: TrainState, batches: Iterable[Batch]) -> TrainState:
    """Sorts neurons and heads of a state at step 0 by importance; what the model computes stays the same.

    Args:
      config: the model, with the `elastic_groups` that its neurons are dealt out to.
      state: parameters in any order, stacked, and an optimizer state that has seen no gradient.
      batches: text to measure importance on, on the mesh of the state.

    Returns:
      The state with sorted parameters, where they were.
    """
    # Importance is measured, and sorted by, on canonical parameters; training stacks the layers.
    params = unstack_layers(state.params)
    importance = rank(config, params, batches)
    _, ranked = permute(config, params, importance, groups=config.elastic_groups)

    places = jax.tree.map(lambda leaf: leaf.sharding, state.params)
    return dataclasses.replace(state, params=jax.device_put(stack_layers(ranked), places))
