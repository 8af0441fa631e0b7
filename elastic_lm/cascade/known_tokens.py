"""One forward pass over known tokens: what a model, or a part of it, thinks of each of them.

A part is the whole model, its layers up to an exit, or a sub-network; and it may go on from a state that an
earlier part left. Programs take the whole model's parameters in every case: a sub-network is sliced inside
them layer by layer, so that beside the model one layer's slice lies in memory, and that of the vocabulary
head where channels are cut.
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

CHUNK = 64  # columns of logits alive at once


@dataclasses.dataclass(frozen=True)
class Part:
    """What of a checkpoint reads; static under jit."""

    config: ModelConfig  # of the whole checkpoint
    exit: int | None = None  # layer whose exit reads; None = the last layer
    subnet: Subnet | None = None  # sliced inside the program; None = nothing is left out
    begun: int = 0  # layers that have run before

    def __post_init__(self) -> None:
        if self.subnet is not None:
            self.subnet.check(self.config)
        c = self.model
        layers = tuple(e.layer for e in c.exits)
        fix = f"the model that reads has exits after layers {layers or 'none'}"
        require(self.exit is None or self.exit in layers, "exit", self.exit, fix)
        fix = f"{self.begun} of them have run already"
        require(0 <= self.begun < self.layers, "layers", self.layers, fix)

    @property
    def model(self) -> ModelConfig:
        """The model that reads: the whole one, or what slicing makes of it."""
        return self.config if self.subnet is None else self.subnet.sliced(self.config)

    @property
    def layers(self) -> int:
        """Layers of it up to where it reads."""
        return self.model.n_layers if self.exit is None else self.exit

    def flops(self, tokens: int) -> int:
        """FLOPs of its layers that have not run before, over one sequence of so many tokens."""
        return layer_flops(self.model, tokens, self.begun, self.layers)


@flax.struct.dataclass
class Reading:
    """What a part thinks of a batch of sequences.

    Attributes:
      log_prob: [B, T] float32, nats of the token that follows each position.
      scores: {kind: [B, T] float32} of the distributions at each position.
      hidden: [B, T, D] state after the last layer that ran.
      kv: keys and values of each layer that ran, [B, K, T, H] each.
    """

    log_prob: jax.Array
    scores: dict[str, jax.Array]
    hidden: jax.Array
    kv: tuple[LayerCache, ...]


@functools.partial(jax.jit, static_argnames=("part", "scoring", "keep"))
def read(
    part: Part,
    params: Params,
    tokens_BT: jax.Array,
    entering_BTD: jax.Array | None = None,
    at_BN: jax.Array | None = None,
    *,
    scoring: Scoring,
    keep: bool = False,
) -> Reading:
    """Runs a part over known tokens.

    Args:
      part: static.
      params: canonical parameters of the whole checkpoint.
      tokens_BT: int32, padded on the right with anything.
      entering_BTD: state that enters the first layer to run; None = the embedded tokens.
      at_BN: int32 positions whose distributions are read, in place of all T.
      scoring: of the energy; static.
      keep: give back states, keys and values too, to go on from; static.

    Returns:
      Reading; with arrays of no size as states, keys and values unless `keep`.
    """
    config, whole = part.model, params
    if part.subnet is not None:  # of layers, no more than exits read
        params = slice_params(part.config, params, part.subnet)[1]
    decoder = Decoder(config).bind({"params": params})
    positions = default_positions(tokens_BT, None)
    hidden = decoder.embed(tokens_BT, positions) if entering_BTD is None else entering_BTD
    if part.subnet is None:
        tap, new_kv = decoder.run_layers(hidden, positions, part.begun, part.layers)
    else:
        tap, new_kv = _run_slices(part, part.subnet, whole, tokens_BT, hidden)
    if part.exit is None:
        features, kernel, temperature = decoder.final_features(tap.hidden), decoder.final_kernel(), 1.0
    else:
        index = [e.layer for e in config.exits].index(part.exit)
        features, kernel = decoder.exit_features(index, tap, positions), decoder.exit_kernel(index)
        temperature = config.exits[index].temperature

    def columns(xs: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, dict[str, jax.Array]]:
        logits = vocab_logits(config, xs[0], kernel, temperature)
        target = jnp.take_along_axis(logits, xs[1][..., None], axis=-1)[..., 0]
        return target - jax.nn.logsumexp(logits, axis=-1), logit_scores(logits, scoring)

    following = jnp.roll(tokens_BT, -1, axis=1)
    if at_BN is not None:
        features = jnp.take_along_axis(features, at_BN[..., None], axis=1)
        following = jnp.take_along_axis(following, at_BN, axis=1)
    log_prob, scores = _over_columns(columns, (features, following))
    kept = (tap.hidden, tuple(new_kv)) if keep else (jnp.zeros(0), ())
    return Reading(log_prob, scores, *kept)


def _run_slices(
    part: Part, subnet: Subnet, params: Params, tokens_BT: jax.Array, hidden_BTD: jax.Array
) -> tuple[Tap, list[NewKeyValues]]:
    """`Decoder.run_layers` over layers that are sliced one after the other; arguments as in `read`.

    Each is sliced inside a conditional, which begins when the state is there: XLA's CPU backend would slice
    all layers first, as nothing has to be waited for. The condition always holds, which XLA cannot know.
    """
    tap, new_kv, always, positions_BT = None, [], jnp.all(tokens_BT >= 0), default_positions(tokens_BT, None)
    for i in range(part.begun, part.layers):

        def layer(hidden_BTD: jax.Array, i: int = i) -> tuple[Tap, list[NewKeyValues]]:
            own = slice_layer(part.config, params, subnet, i)
            return Decoder(part.model).bind({"params": own}).run_layers(hidden_BTD, positions_BT, i, i + 1)

        def nothing(hidden_BTD: jax.Array, layer: Any = layer) -> tuple[Tap, list[NewKeyValues]]:
            shapes = jax.eval_shape(layer, hidden_BTD)
            return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

        tap, kv = jax.lax.cond(always, layer, nothing, hidden_BTD)
        hidden_BTD, new_kv = tap.hidden, [*new_kv, *kv]
    assert tap is not None
    return tap, new_kv


def _over_columns(function: Callable[[Any], Any], arrays: Any) -> Any:
    """`function` of [B, T, ...] arrays, `CHUNK` columns after the other."""
    b, t = jax.tree.leaves(arrays)[0].shape[:2]
    chunk = min(CHUNK, t)

    def split(x: jax.Array) -> jax.Array:
        x = jnp.pad(x, [(0, 0), (0, -t % chunk)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(b, -1, chunk, *x.shape[2:]), 1, 0)

    parts = jax.lax.map(function, jax.tree.map(split, arrays))
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(b, -1)[:, :t], parts)


def width_of(config: ModelConfig, tokens: int) -> int:
    """Columns of the program that reads a sequence of so many tokens.

    Raises:
      ValueError: the model does not read so many.
    """
    fix = f"is more than max_len={config.max_len} of the model: shorten the row"
    require(tokens <= config.max_len, "tokens", tokens, fix)
    return min(bucket(tokens), config.max_len)
