"""Decoding targets with an encoder-decoder model: each function here is one compiled program.

The source is encoded once, and the keys and values that its decoder layers see are computed once. All rows
are at the same place of their targets, so one scalar says where the caches are written. Layers are unrolled:
a loop over stacked weights would copy each of them at every step (`models.decoder`).
"""

import dataclasses

import flax.struct
import jax
import jax.numpy as jnp

from elastic_lm.config.encoder_decoder import EncoderDecoderConfig
from elastic_lm.decode import cache
from elastic_lm.decode.sampling import Sampling, sample
from elastic_lm.decode.token_scores import TokenScores, free_energy, token_scores
from elastic_lm.models.decoder import Params
from elastic_lm.models.encoder_decoder import EncoderDecoder
from elastic_lm.nn.attention import KeyValues


@flax.struct.dataclass
class Request:
    """What a caller may change without recompilation; every field is traced.

    Attributes:
      limit: int32 scalar, tokens to emit per row at most.
      stop_tokens: [E] int32 tokens that end a row; -1 = unused.
      sampling: how tokens are drawn.
      energy_temperature: float32 scalar, T of the energy.
    """

    limit: jax.Array
    stop_tokens: jax.Array
    sampling: Sampling
    energy_temperature: jax.Array


@flax.struct.dataclass
class Targets:
    """Targets being decoded.

    Attributes:
      tokens: [B, C + 1] int32, the start token and what was emitted; `pad_id` from a row's end on.
      length: [B] int32, emitted tokens.
      scores: [B, C] each, of the emitted tokens; what stands after a row's end means nothing.
      alive: [B] bool, the row still runs.
      place: int32 scalar, where the newest token of living rows stands.
      cache: one LayerCache per decoder layer; entry s is of place s.
    """

    tokens: jax.Array
    length: jax.Array
    scores: TokenScores
    alive: jax.Array
    place: jax.Array
    cache: tuple[cache.LayerCache, ...]


def generate(
    config: EncoderDecoderConfig,
    params: Params,
    source_BS: jax.Array,
    length_B: jax.Array,
    request: Request,
    hidden_BSD: jax.Array | None = None,
    *,
    capacity: int,
) -> Targets:
    """Emits a target for every source, until all rows have ended.

    Args:
      config: static.
      params: canonical parameters.
      source_BS: int32 sources, padded on the right.
      length_B: int32 their lengths; a row of length 0 emits nothing.
      request: its `limit` is at most `capacity`.
      hidden_BSD: from `encode`, where the sources have been read before.
      capacity: C, tokens that the caches have room for; static.

    Returns:
      Targets in which no row is alive.
    """
    source = _see(config, params, source_BS, length_B, hidden_BSD)

    def step(state: Targets) -> Targets:
        model = _bind(config, params)
        done_B = jnp.broadcast_to(state.place, length_B.shape)
        token_B = jax.lax.dynamic_index_in_dim(state.tokens, state.place, axis=1, keepdims=False)
        past = [cache.past(layer, done_B) for layer in state.cache]
        logits_BV, new_kv = model.step(token_B, state.place, past, source)
        start = cache.after(logits_BV[:, None], state.place)[0]
        layers = tuple(cache.write(c, kv, start) for c, kv in zip(state.cache, new_kv, strict=True))
        return _emit(config, dataclasses.replace(state, cache=layers), logits_BV, request)

    start = _start(config, length_B, capacity)
    return jax.lax.while_loop(lambda state: jnp.any(state.alive), step, start)


def label_scores(
    config: EncoderDecoderConfig,
    params: Params,
    source_BS: jax.Array,
    length_B: jax.Array,
    labels_CT: jax.Array,
    label_length_C: jax.Array,
    energy_temperature: jax.Array,
    hidden_BSD: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """How likely each of several targets is.

    Args:
      config: static.
      params: canonical parameters.
      source_BS: int32 sources, padded on the right.
      length_B: int32 their lengths.
      labels_CT: int32 targets, padded on the right.
      label_length_C: int32 their lengths, end tokens included.
      energy_temperature: float32 scalar, T of the energy.
      hidden_BSD: as in `generate`.

    Returns:
      (log probabilities [B, C] float32, energy [B] float32 of the first target position, which no label
      has a part in).
    """
    model, b = _bind(config, params), source_BS.shape[0]
    source = _see(config, params, source_BS, length_B, hidden_BSD)
    first_C1 = jnp.full((labels_CT.shape[0], 1), config.decoder_start_id, jnp.int32)
    inputs_CT = jnp.concatenate([first_C1, labels_CT[:, :-1]], axis=1)
    counted_CT = jnp.arange(labels_CT.shape[1]) < label_length_C[:, None]

    def score(label: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        inputs_T, label_T, counted_T = label
        logits_BTV = model.logits(model.decode(jnp.broadcast_to(inputs_T, (b, *inputs_T.shape)), source))
        index_BT1 = jnp.broadcast_to(label_T, logits_BTV.shape[:2])[..., None]
        taken_BT = jnp.take_along_axis(jax.nn.log_softmax(logits_BTV), index_BT1, axis=-1)[..., 0]
        total_B = jnp.sum(jnp.where(counted_T, taken_BT, 0.0), axis=-1)
        return total_B, free_energy(logits_BTV[:, 0], energy_temperature)

    totals_CB, energy_CB = jax.lax.map(score, (inputs_CT, labels_CT, counted_CT))
    return totals_CB.T, energy_CB[0]


def encode(
    config: EncoderDecoderConfig, params: Params, source_BS: jax.Array, length_B: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Reads sources without decoding; arguments as in `generate`.

    Returns:
      (the encoder's output [B, S, D], logits [B, n_labels] float32 of the head on it).
    """
    model, mask_BS = _bind(config, params), _mask(source_BS, length_B)
    hidden = model.encode(source_BS, mask_BS)
    return hidden, model.encoder_logits(hidden, mask_BS)


def _bind(config: EncoderDecoderConfig, params: Params) -> EncoderDecoder:
    return EncoderDecoder(config).bind({"params": params})


def _mask(source_BS: jax.Array, length_B: jax.Array) -> jax.Array:
    return jnp.arange(source_BS.shape[1]) < length_B[:, None]


def _see(
    config: EncoderDecoderConfig,
    params: Params,
    source_BS: jax.Array,
    length_B: jax.Array,
    hidden_BSD: jax.Array | None,
) -> list[KeyValues]:
    """What the decoder's layers see of the sources."""
    model, mask_BS = _bind(config, params), _mask(source_BS, length_B)
    return model.source(model.encode(source_BS, mask_BS) if hidden_BSD is None else hidden_BSD, mask_BS)


def _start(config: EncoderDecoderConfig, length_B: jax.Array, capacity: int) -> Targets:
    b = length_B.shape[0]
    tokens = jnp.full((b, capacity + 1), config.pad_id, jnp.int32).at[:, 0].set(config.decoder_start_id)
    scores = TokenScores(*(jnp.zeros((b, capacity), jnp.float32) for _ in range(4)))
    room = jnp.zeros((b, config.n_heads, capacity, config.head_dim), config.dtype)
    caches = tuple((room, room) for _ in range(config.n_decoder_layers))
    return Targets(tokens, jnp.zeros((b,), jnp.int32), scores, length_B > 0, jnp.int32(0), caches)


def _emit(config: EncoderDecoderConfig, state: Targets, logits_BV: jax.Array, request: Request) -> Targets:
    """Appends a token, and what its logits say, to the living rows."""
    place = state.place + 1
    place_B = jnp.broadcast_to(place, state.length.shape)
    token_B = sample(logits_BV, state.tokens, place_B, request.sampling)
    token_B = jnp.where(state.alive, token_B, config.pad_id)
    scores = token_scores(logits_BV, request.energy_temperature)
    ends_B = jnp.any(token_B[:, None] == request.stop_tokens, axis=-1) | (place >= request.limit)
    return dataclasses.replace(
        state,
        tokens=state.tokens.at[:, place].set(token_B),
        length=state.length + state.alive,
        scores=jax.tree.map(lambda all_BC, new_B: all_BC.at[:, state.place].set(new_B), state.scores, scores),
        alive=state.alive & ~ends_B,
        place=place,
    )
