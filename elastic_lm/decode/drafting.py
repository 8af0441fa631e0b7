"""A sub-network drafts for the whole model: one set of weights, one set of caches, no second prefill.

A round of the loop has two parts. A sub-network (fewer layers, heads or neurons of the same model) draws up
to k tokens, one after the other; then the whole model runs over all of them at once, keeps those that it
would have drawn itself with the same noise, and adds one of its own (`lossless`).

The sub-network has no caches of its own. At the verified positions it reads what the whole model has written:
of the layers that it keeps, and of the key/value groups that it keeps of them. At the drafted positions it
writes its own keys and values into the same caches, where the whole model overwrites every one of them when
it verifies. What lies below a row's progress `done` is therefore always the whole model's own.

How many tokens are drafted follows acceptance and cost. Let q be the probability that the sub-network gives a
token, a(q) the share of drafts of such a probability that were accepted, a that of all drafts (both are
counted while the text is made, and old counts fade), and c_k the measured time of a round with k drafts
(`drafter_costs`). After k drafts with probabilities q_1 .. q_k, a round expects

    E_k = sum over rows ( 1 + a(q_1) + a(q_1) a(q_2) + ... + a(q_1) .. a(q_k) )

tokens, and goes on drafting while some longer draft is expected to give more tokens per second,

    max over m > k of  ( E_k + sum over rows a(q_1) .. a(q_k) (a + a^2 + ... + a^(m-k)) ) / c_m  >  E_k / c_k.

Where not even one draft pays, rounds at full depth follow without one: a rest, twice as long each time, after
which a few rounds draft again to see whether the text has changed. Nothing but speed depends on all this.

Papers: LayerSkip, arXiv 2404.16710; Draft & Verify, arXiv 2309.08168; SWIFT, arXiv 2410.06916; Kangaroo,
arXiv 2404.18911, stops a draft by its confidence.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from elastic_lm.config.drafter import Drafter
from elastic_lm.config.model import ModelConfig
from elastic_lm.decode import cache
from elastic_lm.decode.sampling import BROKEN, sample
from elastic_lm.decode.segment import PREVIEW
from elastic_lm.decode.state import Controls, DecodeState, Drafting
from elastic_lm.models.decoder import OUTSIDE, Decoder, Params, softcapped
from elastic_lm.nn.attention import AttentionContext, KeyValues, NewKeyValues, text_lengths
from elastic_lm.nn.preview import preview_logits
from elastic_lm.nn.rope import shared_rotations
from elastic_lm.width.slicing import slice_params

DRAFTER = "drafter"  # key of the sub-network's parameters beside those of the whole model
# Probabilities of drafts are told apart by these edges, and acceptance begins with this belief; the last one
# is of all drafts, whatever their probability.
EDGES = (0.1, 0.2, 0.35, 0.5, 0.7, 0.85, 0.95)
PRIOR = (0.1, 0.2, 0.3, 0.4, 0.55, 0.7, 0.85, 0.95, 0.7)
PRIOR_WEIGHT = 4.0  # tokens that this belief weighs
FADE = 0.98  # of the counts, per counted token
MOST = 0.995  # of the acceptance of all drafts, so that their geometric sums stay finite
PROBES = 4  # rounds at the beginning, and after each rest, that draft whatever is expected
FIRST_REST, LONGEST_REST = 16, 512  # rounds


def drafter_params(config: ModelConfig, params: Params, drafter: Drafter) -> Params:
    """The parameters of the whole model with those of its drafter beside them.

    Args:
      config: the whole model; static.
      params: its canonical parameters, concrete or traced.
      drafter: static.

    Returns:
      The same arrays under the same names, and the slice under `DRAFTER`. Layers that are kept whole are not
      copied, and neither is what lies outside the layers unless channels are cut.
    """
    config = config.with_exits(())
    own = {k: v for k, v in params.items() if k in OUTSIDE or k.startswith("layers_")}
    return {**params, DRAFTER: slice_params(config, own, drafter.subnet)[1]}


def with_drafting(state: DecodeState, window: int) -> DecodeState:
    """The state of rows for which a sub-network will draft, in windows of W positions (static)."""
    prior = PRIOR_WEIGHT * jnp.asarray(PRIOR, jnp.float32)
    drafting = Drafting(
        confidence=jnp.zeros((state.length.shape[0], window - 1), jnp.float32),
        hits=prior,
        trials=jnp.full_like(prior, PRIOR_WEIGHT),
        rest=jnp.int32(0),
        next_rest=jnp.int32(FIRST_REST),
        probes=jnp.int32(PROBES),
        ticks=jnp.int32(0),
    )
    return dataclasses.replace(state, drafting=drafting)


def tick_widths(window: int) -> tuple[int, ...]:
    """Widths for which the whole model's verification is compiled: a few positions, and the whole window."""
    return (*(width for width in (1, 2, 3, 4, 8) if width < window), window)


@flax.struct.dataclass
class _Round:
    """What changes while the sub-network drafts.

    Attributes:
      caches: of the whole model's layers that the sub-network keeps.
      tokens: [B, S] int32.
      exit_layers: [B, S] int32.
      length: [B] int32.
      active: [B] bool, rows that may draft one more token.
      confidence: [B, W - 1] float32, the sub-network's probability of each draft.
      reach: [B] float32, expected probability that all drafts of a row are right.
      expected: [B] float32, tokens that the round is expected to give.
      drafts: int32, k.
    """

    caches: tuple[cache.LayerCache, ...]
    tokens: jax.Array
    exit_layers: jax.Array
    length: jax.Array
    active: jax.Array
    confidence: jax.Array
    reach: jax.Array
    expected: jax.Array
    drafts: jax.Array


def draft(
    config: ModelConfig,
    params: Params,
    drafter: Drafter,
    state: DecodeState,
    controls: Controls,
    asking_B: jax.Array,
) -> DecodeState:
    """Appends drafts of the sub-network to the rows that ask for a token.

    Args:
      config: the whole model, without exits; static.
      params: from `drafter_params`.
      drafter: static.
      state: between two iterations, with a `drafting`.
      controls: traced; `lossless`, `adapt`, `stop_tokens`, `tick_costs` and `sampling` are read. The costs
        are those of rounds with 0 .. W - 1 drafts.
      asking_B: bool, rows whose newest token is about to enter the lowest layer.

    Returns:
      The state, in which drafts count as tokens, and whose caches hold stale entries behind `done`.
    """
    drafting = state.drafting
    assert drafting is not None
    rows_B = asking_B & controls.lossless
    layers, most = drafter.subnet.layers, drafting.confidence.shape[1]
    row = jnp.arange(rows_B.shape[0])
    capacity = state.tokens.shape[1]
    probing, resting = drafting.probes > 0, drafting.rest > 0

    def goes_on(now: _Round) -> jax.Array:
        pays = (_pays(now, drafting, controls, rows_B) | (probing & (now.drafts == 0))) & ~resting
        # Where the length is given, it is the same for all rows.
        wanted = jnp.where(controls.adapt, pays, now.drafts < state.draft[0])
        return jnp.any(now.active) & (now.drafts < most) & wanted

    def step(now: _Round) -> _Round:
        logits_BV, caches = _tick(config, params, drafter, now)
        drawn_B = sample(logits_BV, now.tokens, now.length, controls.sampling)

        # A token that ends the row is left to the whole model, and so is one that this drafter cannot draw:
        # layers that were left out may overflow where the whole model does not.
        stops_B = jnp.any(drawn_B[:, None] == controls.stop_tokens, axis=-1) | (drawn_B == BROKEN)
        drafts_B = now.active & ~stops_B
        position = jnp.where(drafts_B, now.length, capacity)  # others write out of bounds, which JAX drops
        length = now.length + drafts_B

        taken = jnp.take_along_axis(logits_BV, jnp.maximum(drawn_B, 0)[:, None], axis=1)[:, 0]
        confidence_B = jnp.exp(taken - jax.nn.logsumexp(logits_BV, axis=1))
        reach = jnp.where(drafts_B, now.reach * _acceptance(drafting)[_bin(confidence_B)], now.reach)
        return _Round(
            caches=caches,
            tokens=now.tokens.at[row, position].set(drawn_B, mode="drop"),
            exit_layers=now.exit_layers.at[row, position].set(len(layers), mode="drop"),
            length=length,
            active=drafts_B & (length < state.limit - 1),
            confidence=now.confidence.at[:, now.drafts].set(confidence_B),
            reach=reach,
            expected=now.expected + reach * drafts_B,
            drafts=now.drafts + 1,
        )

    begun = _Round(
        caches=tuple(state.cache[i] for i in layers),
        tokens=state.tokens,
        exit_layers=state.exit_layers,
        length=state.length,
        active=rows_B & (state.length < state.limit - 1),
        confidence=drafting.confidence,
        reach=jnp.ones(rows_B.shape, jnp.float32),
        expected=jnp.ones(rows_B.shape, jnp.float32),
        drafts=jnp.int32(0),
    )
    drafted = jax.lax.while_loop(goes_on, step, begun)

    caches = dict(enumerate(state.cache)) | dict(zip(layers, drafted.caches, strict=True))
    rested = _rested(drafting, controls, asks=jnp.any(begun.active), drafts=drafted.drafts)
    return dataclasses.replace(
        state,
        tokens=drafted.tokens,
        exit_layers=drafted.exit_layers,
        length=drafted.length,
        cache=tuple(caches[i] for i in range(len(state.cache))),
        drafting=dataclasses.replace(
            rested, confidence=drafted.confidence, ticks=rested.ticks + drafted.drafts
        ),
    )


def _tick(
    config: ModelConfig, params: Params, drafter: Drafter, now: _Round
) -> tuple[jax.Array, tuple[cache.LayerCache, ...]]:
    """Runs the sub-network over the newest token of every row: ([B, V] float32 logits, the caches)."""
    subnet = drafter.subnet
    small = subnet.sliced(config.with_exits(()))
    decoder = Decoder(small).bind({"params": params[DRAFTER]})
    newest_B = now.length - 1
    positions = newest_B[:, None]
    hidden = decoder.embed(jnp.take_along_axis(now.tokens, positions, axis=1), positions)

    # Groups are stored in order of rank, so that those which the sub-network keeps come first.
    past = [
        cache.past((keys[:, :kept], values[:, :kept]), newest_B)
        for (keys, values), kept in zip(now.caches, subnet.groups, strict=True)
    ]
    hidden, new_kv = _run_layers(decoder, drafter, hidden, positions, past)
    caches = _written(now.caches, new_kv, hidden, newest_B)

    features = decoder.final_features(hidden)
    preview = params.get(PREVIEW)
    if preview is None:
        return decoder.final_logits(features)[:, 0], caches
    previewed = preview_logits(preview, features, decoder.final_head())
    return softcapped(config, previewed.logits)[:, 0], caches


def _run_layers(
    decoder: Decoder,
    drafter: Drafter,
    hidden_B1D: jax.Array,
    positions_B1: jax.Array,
    past: Sequence[KeyValues],
) -> tuple[jax.Array, list[NewKeyValues | None]]:
    """Runs the drafter's layers, each without the halves that it leaves out: no keys where no attention."""
    n_layers = decoder.config.n_layers
    if not drafter.no_attention and not drafter.no_mlp:
        tap, new_kv = decoder.run_layers(hidden_B1D, positions_B1, 0, n_layers, past=past)
        return tap.hidden, [*new_kv]

    lengths = text_lengths(positions_B1, None, cached=True)
    rotations = shared_rotations(decoder.config, positions_B1, range(n_layers), lengths)
    all_kv: list[NewKeyValues | None] = []
    for j, layer in enumerate(drafter.subnet.layers):
        window = decoder.config.window(j)
        context = AttentionContext(positions_B1, None, window, past[j], rotation=rotations[j])
        block = decoder.layers[j]
        attention = functools.partial(block.attn, context=context)
        tap, kv = block.around(
            hidden_B1D,
            _no_attention if layer in drafter.no_attention else attention,
            jnp.zeros_like if layer in drafter.no_mlp else block.mlp,
        )
        hidden_B1D = tap.hidden
        all_kv.append(kv)
    return hidden_B1D, all_kv


def _no_attention(x_BTD: jax.Array) -> tuple[jax.Array, Any]:
    """In the place of a layer's attention that is left out."""
    return jnp.zeros_like(x_BTD), None


def _written(
    caches: Sequence[cache.LayerCache],
    new_kv: Sequence[NewKeyValues | None],
    hidden_BTD: jax.Array,
    start_B: jax.Array,
) -> tuple[cache.LayerCache, ...]:
    """The caches with the new keys and values of the layers that have some."""
    some = [(layer, kv) for layer, kv in zip(caches, new_kv, strict=True) if kv is not None]
    if not some:
        return tuple(caches)
    before, new = zip(*some, strict=True)
    written = iter(cache.write_all(before, new, hidden_BTD, start_B))
    return tuple(layer if kv is None else next(written) for layer, kv in zip(caches, new_kv, strict=True))


def _bin(confidence_B: jax.Array) -> jax.Array:
    """[B] int32 in 0 .. 7: between which edges a probability lies."""
    return jnp.sum(confidence_B[..., None] >= jnp.asarray(EDGES), axis=-1)


def _acceptance(drafting: Drafting) -> jax.Array:
    """[N + 1] float32: share of accepted drafts by their probability, and of all of them."""
    return drafting.hits / jnp.maximum(drafting.trials, 1e-6)


def _pays(now: _Round, drafting: Drafting, controls: Controls, rows_B: jax.Array) -> jax.Array:
    """[] bool: whether some longer draft is expected to give more tokens per second."""
    costs = controls.tick_costs
    longer = jnp.arange(1, costs.shape[0])
    rate = jnp.minimum(_acceptance(drafting)[-1], MOST)
    more = rate * (1.0 - rate**longer) / (1.0 - rate)

    expected = jnp.sum(now.expected * rows_B)
    within = now.drafts + longer < costs.shape[0]
    later = costs[jnp.minimum(now.drafts + longer, costs.shape[0] - 1)]
    rates = jnp.where(within, (expected + jnp.sum(now.reach * now.active) * more) / later, 0.0)
    return jnp.max(rates, initial=0.0) > expected / costs[jnp.minimum(now.drafts, costs.shape[0] - 1)]


def _rested(drafting: Drafting, controls: Controls, *, asks: jax.Array, drafts: jax.Array) -> Drafting:
    """How long the rounds that follow rest, after one with so many drafts; `asks` says that some were due."""
    counts = asks & controls.adapt
    resting, probing = drafting.rest > 0, drafting.probes > 0
    begins = counts & ~resting & ~probing & (drafts == 0)
    rest = jnp.where(begins, drafting.next_rest, jnp.maximum(drafting.rest - counts, 0))

    probes = jnp.maximum(drafting.probes - (counts & ~resting), 0)
    doubled = jnp.minimum(2 * drafting.next_rest, LONGEST_REST)
    # Drafts that were expected to pay, and not only tried, end the growth.
    settled = jnp.where(counts & (drafts > 0) & ~probing, FIRST_REST, drafting.next_rest)
    return dataclasses.replace(
        drafting,
        rest=rest,
        next_rest=jnp.where(begins, doubled, settled),
        probes=jnp.where(resting & (rest == 0), PROBES, probes),
    )


def learn(state: DecodeState, before: DecodeState, drafted_B: jax.Array) -> DecodeState:
    """Counts which drafts of a round were accepted.

    Args:
      state: after the whole model has verified them.
      before: the state before the round.
      drafted_B: int32 drafts of each row.

    Returns:
      The state with new counts.
    """
    drafting = state.drafting
    assert drafting is not None
    accepted_B1 = (state.accepted - before.accepted)[:, None]
    index = jnp.arange(drafting.confidence.shape[1])

    # Nothing can be said of drafts behind the first wrong one.
    tried = (index < drafted_B[:, None]) & (index <= accepted_B1)
    right = tried & (index < accepted_B1)
    count = len(PRIOR) - 1
    of_bin = _bin(drafting.confidence)[..., None] == jnp.arange(count)
    of_bin = jnp.concatenate([of_bin, jnp.ones_like(of_bin[..., :1])], axis=-1)  # the last counts all

    trials = jnp.sum(tried[..., None] & of_bin, axis=(0, 1)).astype(jnp.float32)
    hits = jnp.sum(right[..., None] & of_bin, axis=(0, 1)).astype(jnp.float32)
    fade = FADE**trials
    counted = dataclasses.replace(
        drafting, hits=drafting.hits * fade + hits, trials=drafting.trials * fade + trials
    )
    return dataclasses.replace(state, drafting=counted)
