"""Before elastic training: a pretrained model is sorted by importance, measured on training text."""

import dataclasses
import itertools

import jax
from jax.sharding import Mesh

from elastic_lm.config.model import ModelConfig
from elastic_lm.data import pipeline
from elastic_lm.data.tokenizer import Tokenizer
from elastic_lm.models.decoder import stack_layers, unstack_layers
from elastic_lm.train.config import RunConfig
from elastic_lm.train.state import TrainState
from elastic_lm.train.step import place_batch
from elastic_lm.width.importance import permute, rank


def rank_state(
    config: RunConfig, model: ModelConfig, tokenizer: Tokenizer, mesh: Mesh, state: TrainState
) -> TrainState:
    """Sorts neurons and heads of a state at step 0 by importance; the model computes what it did.

    Args:
      config: the whole run; `data` and `train.rank_batches` are read.
      model: the model, with the `elastic_groups` that its neurons are dealt out to.
      tokenizer: of the model.
      mesh: where the state lives.
      state: parameters in any order, stacked, and an optimizer state that has seen no gradient.

    Returns:
      The state with sorted parameters, where they were. Training batches are read from the beginning of the
      data, by an iterator of its own.
    """
    arrays = itertools.islice(iter(pipeline.train_batches(config.data, tokenizer)), config.train.rank_batches)
    params = unstack_layers(state.params)
    importance = rank(model, params, (place_batch(batch, mesh) for batch in arrays))
    _, ranked = permute(model, params, importance, groups=model.elastic_groups)
    places = jax.tree.map(lambda leaf: leaf.sharding, state.params)
    return dataclasses.replace(state, params=jax.device_put(stack_layers(ranked), places))
