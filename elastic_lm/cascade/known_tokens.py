"""Scores given tokens in one forward pass, by a whole model or a part of it.

A part is the whole model, its layers up to an exit, or a sub-network. It may start from the hidden state that
an earlier pass through its lowest layers has left.

Programs take the whole model's parameters in every case. A sub-network is sliced inside them, layer by layer,
so that no more than one layer's slice lies in memory beside the model, and the slice of the vocabulary head
where channels are cut.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from elastic_lm.cascade.scores import Scoring, logit_scores
from elastic_lm.config.checks import require
from elastic_lm.config.model import ModelConfig
from elastic_lm.config.subnet import Subnet
from elastic_lm.cost.sequences import layer_flops
from elastic_lm.decode.cache import LayerCache
from elastic_lm.decode.settings import bucket
from elastic_lm.models.decoder import Decoder, Params, default_positions, vocab_logits
from elastic_lm.nn.attention import NewKeyValues
from elastic_lm.nn.block import Tap
from elastic_lm.width.slicing import slice_layer, slice_params

CHUNK = 64  # columns whose logits, [B, CHUNK, V], are in memory at once


@dataclasses.dataclass(frozen=True)
class ModelPart:
    """Which part of a checkpoint runs; static under jit."""

    config: ModelConfig  # of the whole checkpoint
    exit: int | None = None  # layer whose exit is read; None = the last layer
    subnet: Subnet | None = None  # sliced inside the program; None = nothing is left out
    layers_done: int = 0  # layers that an earlier pass has run

    def __post_init__(self) -> None:
        if self.subnet is not None:
            self.subnet.check(self.config)
        exits = tuple(e.layer for e in self.model.exits)
        require(
            self.exit is None or self.exit in exits,
            "exit",
            self.exit,
            f"the model that reads has exits after layers {exits or 'none'}",
        )
        require(
            0 <= self.layers_done < self.layers,
            "layers",
            self.layers,
            f"{self.layers_done} of them have run already",
        )

    @property
    def model(self) -> ModelConfig:
        """The model that runs: the whole one, or what slicing makes of it."""
        return self.config if self.subnet is None else self.subnet.sliced(self.config)

    @property
    def layers(self) -> int:
        """How many of its layers lie below the head that is read."""
        return self.model.n_layers if self.exit is None else self.exit

    def flops(self, tokens: int) -> int:
        """FLOPs of the layers that are left to run, over one sequence of so many tokens."""
        return layer_flops(self.model, tokens, self.layers_done, self.layers)


@flax.struct.dataclass
class ScoredTokens:
    """What a model's part says about a batch of sequences.

    Attributes:
      log_prob: [B, T] float32, nats of the token that follows each position.
      scores: {kind: [B, T] float32} of the distribution at each position.
      hidden: [B, T, D] state after the last layer that ran; None unless it is kept.
      kv: keys and values of each layer that ran in this pass, [B, K, T, H] each; () unless they are kept.
    """

    log_prob: jax.Array
    scores: dict[str, jax.Array]
    hidden: jax.Array | None
    kv: tuple[LayerCache, ...]


@functools.partial(jax.jit, static_argnames=("part", "scoring", "keep_state"))
def score_tokens(
    part: ModelPart,
    params: Params,
    tokens_BT: jax.Array,
    length_B1: jax.Array,
    entering_BTD: jax.Array | None = None,
    at_BN: jax.Array | None = None,
    *,
    scoring: Scoring,
    keep_state: bool = False,
) -> ScoredTokens:
    """Scores tokens that are known, in one pass.

    Args:
      part: what runs; static.
      params: canonical parameters of the whole checkpoint.
      tokens_BT: int32, padded on the right with anything: no position sees what is to its right.
      length_B1: int32 tokens of each row, by which LongRoPE rotates.
      entering_BTD: state that enters the first layer to run; None = the embedded tokens.
      at_BN: int32 positions whose distributions are read, instead of all T.
      scoring: of the energy; static.
      keep_state: also return hidden states, keys and values; static.

    Returns:
      ScoredTokens, with N in place of T in `log_prob` and `scores` where `at_BN` is given.
    """
    config, whole = part.model, params
    if part.subnet is not None:
        # Only embeddings, heads and exits are read from this slice, and XLA does not compute what nothing
        # reads. The layers are sliced one by one below.
        params = slice_params(part.config, params, part.subnet)[1]
    decoder = Decoder(config).bind({"params": params})

    positions = default_positions(tokens_BT, None)
    hidden = decoder.embed(tokens_BT, positions) if entering_BTD is None else entering_BTD
    if part.subnet is None:
        tap, new_kv = decoder.run_layers(
            hidden, positions, part.layers_done, part.layers, lengths_BT=length_B1
        )
    else:
        tap, new_kv = _run_slices(part, part.subnet, whole, tokens_BT, length_B1, hidden)

    if part.exit is None:
        features, head, temperature = decoder.final_features(tap.hidden), decoder.final_head(), 1.0
    else:
        index = [e.layer for e in config.exits].index(part.exit)
        features = decoder.exit_features(index, tap, positions, lengths_BT=length_B1)
        head = decoder.exit_head(index)
        temperature = config.exits[index].temperature

    following = jnp.roll(tokens_BT, -1, axis=1)
    if at_BN is not None:
        features = jnp.take_along_axis(features, at_BN[..., None], axis=1)
        following = jnp.take_along_axis(following, at_BN, axis=1)

    def read_columns(columns: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, dict[str, jax.Array]]:
        features, following = columns
        logits = vocab_logits(config, features, head, temperature)
        target = jnp.take_along_axis(logits, following[..., None], axis=-1)[..., 0]
        return target - jax.nn.logsumexp(logits, axis=-1), logit_scores(logits, scoring)

    log_prob, scores = _over_columns(read_columns, (features, following))
    state = (tap.hidden, tuple(new_kv)) if keep_state else (None, ())
    return ScoredTokens(log_prob, scores, *state)


def _run_slices(
    part: ModelPart,
    subnet: Subnet,
    params: Params,
    tokens_BT: jax.Array,
    length_B1: jax.Array,
    hidden_BTD: jax.Array,
) -> tuple[Tap, list[NewKeyValues]]:
    """`Decoder.run_layers` for a sub-network, sliced one layer after the other.

    Args:
      part: what runs.
      subnet: the part's sub-network.
      params: canonical parameters of the whole checkpoint.
      tokens_BT: int32.
      length_B1: as in `score_tokens`.
      hidden_BTD: state that enters the first layer to run.
    """
    positions_BT = default_positions(tokens_BT, None)
    # Each layer is sliced inside a conditional, which can begin only when the layer before is done. Without
    # one, XLA's CPU backend slices all layers first, as their slices wait for nothing. The condition always
    # holds, which XLA cannot know.
    always = jnp.all(tokens_BT >= 0)
    tap, new_kv = None, []
    for i in range(part.layers_done, part.layers):

        def layer(hidden_BTD: jax.Array, i: int = i) -> tuple[Tap, list[NewKeyValues]]:
            own = slice_layer(part.config, params, subnet, i)
            decoder = Decoder(part.model).bind({"params": own})
            return decoder.run_layers(hidden_BTD, positions_BT, i, i + 1, lengths_BT=length_B1)

        def nothing(hidden_BTD: jax.Array, layer: Any = layer) -> tuple[Tap, list[NewKeyValues]]:
            shapes = jax.eval_shape(layer, hidden_BTD)
            return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

        tap, kv = jax.lax.cond(always, layer, nothing, hidden_BTD)
        hidden_BTD, new_kv = tap.hidden, [*new_kv, *kv]
    assert tap is not None
    return tap, new_kv


def _over_columns(function: Callable[[Any], Any], arrays: Any) -> Any:
    """Applies `function` to [B, T, ...] arrays, `CHUNK` columns at a time, and joins its [B, T] results.

    The logits of all columns would be the largest array of the program by far.
    """
    b, t = jax.tree.leaves(arrays)[0].shape[:2]
    chunk = min(CHUNK, t)

    def split(x: jax.Array) -> jax.Array:
        x = jnp.pad(x, [(0, 0), (0, -t % chunk)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(b, -1, chunk, *x.shape[2:]), 1, 0)

    parts = jax.lax.map(function, jax.tree.map(split, arrays))
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(b, -1)[:, :t], parts)


def padded_width(config: ModelConfig, tokens: int) -> int:
    """Columns of the program that reads a sequence of so many tokens.

    Raises:
      ValueError: the model does not read so many.
    """
    require(
        tokens <= config.max_len,
        "tokens",
        tokens,
        f"is more than max_len={config.max_len} of the model: shorten the record",
    )
    return min(bucket(tokens), config.max_len)
