"""Decoding targets with an encoder-decoder model: each public function here is one compiled program.

A source is encoded once, and the keys and values that the decoder's layers see of it are computed once. All
rows are at the same position of their targets, so one scalar says where the caches are written. The layers
are unrolled, because a loop over stacked weights would copy each of them at every step.
"""

import dataclasses

import flax.struct
import jax
import jax.numpy as jnp

from elastic_lm.config.encoder_decoder import EncoderDecoderConfig
from elastic_lm.decode import cache
from elastic_lm.decode.sampling import BROKEN, Sampling, sample
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
      tokens: [B, C + 1] int32, the start token and the emitted ones (`sampling.BROKEN` where logits were
        not finite); `pad_id` after the end of a row.
      length: [B] int32, number of emitted tokens.
      scores: [B, C] each, of the emitted tokens; entries after the end of a row mean nothing.
      alive: [B] bool, the row still runs.
      position: int32 scalar, of the newest token of the rows that are alive.
      cache: one LayerCache per decoder layer.
    """

    tokens: jax.Array
    length: jax.Array
    scores: TokenScores
    alive: jax.Array
    position: jax.Array
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
      length_B: int32 lengths of the sources; a row of length 0 emits nothing.
      request: its `limit` is at most `capacity`.
      hidden_BSD: what `encode` gave for the sources, or None to encode them here.
      capacity: C, tokens that the caches have room for; static.

    Returns:
      Targets in which no row is alive.
    """
    source = _source_key_values(config, params, source_BS, length_B, hidden_BSD)

    def step(state: Targets) -> Targets:
        model = _bind(config, params)
        done_B = jnp.broadcast_to(state.position, length_B.shape)
        token_B = jax.lax.dynamic_index_in_dim(state.tokens, state.position, axis=1, keepdims=False)
        past = [cache.past(layer, done_B) for layer in state.cache]
        logits_BV, new_kv = model.step(token_B, state.position, past, source)

        # Written after all reads, so that XLA writes in place.
        start = cache.after(logits_BV[:, None], state.position)[0]
        layers = tuple(cache.write(c, kv, start) for c, kv in zip(state.cache, new_kv, strict=True))
        return _emit(config, dataclasses.replace(state, cache=layers), logits_BV, request)

    empty = _empty_targets(config, length_B, capacity)
    return jax.lax.while_loop(lambda state: jnp.any(state.alive), step, empty)


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
    """How likely each of C targets is for each source.

    Args:
      config: static.
      params: canonical parameters.
      source_BS: int32 sources, padded on the right.
      length_B: int32 lengths of the sources.
      labels_CT: int32 targets, padded on the right.
      label_length_C: int32 lengths of the targets, end tokens included.
      energy_temperature: float32 scalar, T of the energy.
      hidden_BSD: what `encode` gave for the sources, or None to encode them here.

    Returns:
      (log probabilities [B, C] float32, energy [B] float32 of the first target position, behind a start token
      of targets, which is the same for all labels).
    """
    model, b = _bind(config, params), source_BS.shape[0]
    source = _source_key_values(config, params, source_BS, length_B, hidden_BSD)

    # Where every target has the same start token (BART), that one tells nothing of the source.
    first = 0 if config.text_start_id is None else min(1, labels_CT.shape[1] - 1)
    first_C1 = jnp.full((labels_CT.shape[0], 1), config.decoder_start_id, jnp.int32)
    inputs_CT = jnp.concatenate([first_C1, labels_CT[:, :-1]], axis=1)
    counted_CT = jnp.arange(labels_CT.shape[1]) < label_length_C[:, None]

    def score(label: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        inputs_T, label_T, counted_T = label
        decoded_BTD = model.decode(jnp.broadcast_to(inputs_T, (b, *inputs_T.shape)), source)
        logits_BTV = allowed(config, model.logits(decoded_BTD))
        index_BT1 = jnp.broadcast_to(label_T, logits_BTV.shape[:2])[..., None]
        taken_BT = jnp.take_along_axis(jax.nn.log_softmax(logits_BTV), index_BT1, axis=-1)[..., 0]
        total_B = jnp.sum(jnp.where(counted_T, taken_BT, 0.0), axis=-1)
        return total_B, free_energy(logits_BTV[:, first], energy_temperature)

    # One label after the other, so that only the logits [B, T, V] of one label are in memory.
    totals_CB, energy_CB = jax.lax.map(score, (inputs_CT, labels_CT, counted_CT))
    return totals_CB.T, energy_CB[0]


def encode(
    config: EncoderDecoderConfig, params: Params, source_BS: jax.Array, length_B: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Encodes sources, padded on the right to `source_BS` of lengths `length_B`, without decoding.

    Returns:
      (the encoder's output [B, S, D], logits [B, n_labels] float32 of the head on it).
    """
    model, mask_BS = _bind(config, params), _mask(source_BS, length_B)
    hidden = model.encode(source_BS, mask_BS)
    return hidden, model.encoder_logits(hidden, mask_BS)


def allowed(config: EncoderDecoderConfig, logits: jax.Array) -> jax.Array:
    """Float32 logits [..., V] in which the tokens that the model never emits have no probability."""
    if not config.suppressed_ids:
        return logits
    return logits.at[..., jnp.asarray(config.suppressed_ids)].set(-jnp.inf)


def _bind(config: EncoderDecoderConfig, params: Params) -> EncoderDecoder:
    return EncoderDecoder(config).bind({"params": params})


def _mask(source_BS: jax.Array, length_B: jax.Array) -> jax.Array:
    return jnp.arange(source_BS.shape[1]) < length_B[:, None]


def _source_key_values(
    config: EncoderDecoderConfig,
    params: Params,
    source_BS: jax.Array,
    length_B: jax.Array,
    hidden_BSD: jax.Array | None,
) -> list[KeyValues]:
    """What each layer of the decoder sees of the sources."""
    model, mask_BS = _bind(config, params), _mask(source_BS, length_B)
    hidden = model.encode(source_BS, mask_BS) if hidden_BSD is None else hidden_BSD
    return model.source(hidden, mask_BS)


def _empty_targets(config: EncoderDecoderConfig, length_B: jax.Array, capacity: int) -> Targets:
    b = length_B.shape[0]
    tokens = jnp.full((b, capacity + 1), config.pad_id, jnp.int32).at[:, 0].set(config.decoder_start_id)
    scores = TokenScores(*(jnp.zeros((b, capacity), jnp.float32) for _ in range(4)))
    zeros = jnp.zeros((b, config.n_heads, capacity, config.head_dim), config.dtype)
    return Targets(
        tokens=tokens,
        length=jnp.zeros((b,), jnp.int32),
        scores=scores,
        alive=length_B > 0,
        position=jnp.int32(0),
        cache=tuple((zeros, zeros) for _ in range(config.n_decoder_layers)),
    )


def _emit(config: EncoderDecoderConfig, state: Targets, logits_BV: jax.Array, request: Request) -> Targets:
    """Appends a token and its scores to the rows that are alive."""
    position = state.position + 1
    position_B = jnp.broadcast_to(position, state.length.shape)
    allowed_BV = allowed(config, logits_BV)
    token_B = sample(allowed_BV, state.tokens, position_B, request.sampling)
    token_B = _forced(config, token_B, position, request.limit)
    token_B = jnp.where(state.alive, token_B, config.pad_id)

    scores = token_scores(allowed_BV, request.energy_temperature)
    ends_B = jnp.any(token_B[:, None] == request.stop_tokens, axis=-1) | (token_B == BROKEN)
    ends_B |= position >= request.limit

    def append(all_BC: jax.Array, new_B: jax.Array) -> jax.Array:
        return all_BC.at[:, state.position].set(new_B)

    return dataclasses.replace(
        state,
        tokens=state.tokens.at[:, position].set(token_B),
        length=state.length + state.alive,
        scores=jax.tree.map(append, state.scores, scores),
        alive=state.alive & ~ends_B,
        position=position,
    )


def _forced(
    config: EncoderDecoderConfig, token_B: jax.Array, position: jax.Array, limit: jax.Array
) -> jax.Array:
    """The tokens, or those that the model wants at the beginning and at the end of a target that is cut."""
    found_B, broken_B = token_B, token_B == BROKEN
    if config.forced_bos_id is not None:
        token_B = jnp.where(position == 1, config.forced_bos_id, token_B)
    if config.forced_eos_id is not None:
        token_B = jnp.where(position >= limit, config.forced_eos_id, token_B)
    return jnp.where(broken_B, found_B, token_B)
