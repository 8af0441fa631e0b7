"""Which halves of which layers draft best for a model that nobody trained to be elastic: a knapsack.

The halves of the layers, attention and MLP, are h_1 .. h_S in the order in which they run, with costs c_s and
with F_s the whole model's state after h_s. Over the text, H(s, c) is the state that some choice among the
first s halves leaves behind whose costs add up to c:

    H(s, c) = of  H(s - 1, c)                    h_s is left out
              and run_s(H(s - 1, c - c_s))       h_s runs
              the one whose mean cosine with F_s is larger

This is the table of a knapsack's dynamic program. What it holds are states and not sums of importances, so
that the halves that were left out before are felt by those that come after. Whole layers are the items where
attention and MLP of a layer read the same state (a parallel residual).

A drafted token's attention reads the whole model's keys and values of the tokens before it, and its own of
itself, as it does for the first token of a draft (`decode.drafting`). One pass of the whole model gives all
of them, and every position of the text is a draft of its own.

Papers: CLaSp, arXiv 2505.24196 (the state of a table's entry decides which layers are skipped); KnapSpec,
arXiv 2602.20217 (a knapsack over attention and MLP by their costs); SWIFT, arXiv 2410.06916.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from elastic_lm.config.checks import require
from elastic_lm.config.drafter import Drafter
from elastic_lm.config.model import ModelConfig
from elastic_lm.config.subnet import Subnet
from elastic_lm.cost.counted import Workload, attention_cost, mlp_cost
from elastic_lm.models.decoder import Decoder, Params, default_positions
from elastic_lm.nn.attention import AttentionContext, KeyValues, NewKeyValues, text_lengths
from elastic_lm.nn.block import Block
from elastic_lm.nn.rope import shared_rotations

LEVELS = 64  # of the cost of all halves together, in the table
MOST = 0.8  # of that cost, above which no drafter is looked for
CANDIDATES = 12  # drafters of different costs whose drafts are compared with the whole model's tokens

Half = Literal["attention", "mlp", "layer"]


@dataclasses.dataclass(frozen=True)
class DraftCandidate:
    """The best drafter found for one cost.

    Attributes:
      drafter: what it runs.
      share: of the cost of all layers that it keeps.
      similarity: mean cosine of its last state with the whole model's.
      acceptance: share of tokens at which its choice is the whole model's, given the text before.

    Example:
      ```python
      import elastic_lm as el

      drafter = el.Drafter(el.Subnet.uniform(el.testing.tiny_config(), layers=(0, 1, 3)))
      found = el.width.DraftCandidate(drafter, share=0.75, similarity=0.9, acceptance=0.6)
      print(f"{found.share:.0%} of the layers draft {found.acceptance:.0%} of the tokens right")
      ```
    """

    drafter: Drafter
    share: float
    similarity: float
    acceptance: float


@dataclasses.dataclass(frozen=True)
class _Item:
    """What is chosen or left out at once: a half of a layer, or a whole one; and what it costs."""

    layer: int
    half: Half
    cost: float


@dataclasses.dataclass(frozen=True)
class _Entry:
    """An entry of the table: the state [R, T, D], and which items it was run through."""

    state: jax.Array
    kept: frozenset[int]


def search_drafters(
    config: ModelConfig,
    params: Params,
    tokens_RT: np.ndarray,
    *,
    first: int = 0,
    workload: Workload | None = None,
    levels: int = LEVELS,
    most: float = MOST,
    candidates: int = CANDIDATES,
) -> list[DraftCandidate]:
    """The best drafters of several costs, by a dynamic program over the halves of the layers.

    Args:
      config: the model; its exits are not looked at.
      params: its canonical parameters.
      tokens_RT: int32 text, best the model's own, all rows equally long.
      first: the first position that counts, such as the last one of a prompt.
      workload: at which halves are counted in bytes; the context says what attention reads. None = that of
        one row at the end of the text.
      levels: of the cost of all layers together.
      most: share of that cost that a drafter may have.
      candidates: how many costs are looked at.

    Returns:
      Drafters in order of their cost, none as good as a cheaper one.

    Raises:
      ValueError: the text is empty, or no half fits.

    Example:
      ```python
      import elastic_lm as el

      config = el.testing.tiny_config()
      params = el.testing.random_params(config)
      text = el.testing.random_tokens(config, batch=2, length=12)
      for found in el.width.search_drafters(config, params, text):
          print(f"{found.share:.0%} of the layers: {found.acceptance:.0%} accepted", found.drafter)
      ```
    """
    config = config.with_exits(())
    tokens = jnp.asarray(tokens_RT, jnp.int32)
    require(tokens.ndim == 2 and tokens.size > 0, "tokens", tokens.shape, "must be rows of a text")
    require(0 <= first < tokens.shape[1], "first", first, f"the rows have {tokens.shape[1]} tokens")
    items = _items(config, workload or Workload(context=tokens.shape[1]))
    whole = _whole_pass(config, params, tokens)
    table = _table(config, params, items, whole, levels, most, first)

    found: list[DraftCandidate] = []
    total = sum(item.cost for item in items)
    for entry in _spread([table[cost] for cost in sorted(table) if table[cost].kept], candidates):
        drafter = _drafter(config, [items[i] for i in sorted(entry.kept)])
        choice = _choices(config, params, entry.state)
        agrees = float(jnp.mean((choice == whole.choice)[:, first:]))
        share = sum(items[i].cost for i in entry.kept) / total
        similarity = float(_similarity(entry.state, whole.after[-1], first))
        # A drafter that costs more has to be better.
        if not found or agrees > found[-1].acceptance:
            found.append(DraftCandidate(drafter, share, similarity, agrees))
    require(bool(found), "most", most, "no layer fits; raise it")
    return found


def _items(config: ModelConfig, workload: Workload) -> list[_Item]:
    """Halves of layers, or whole ones, in the order in which they run."""
    items = []
    for layer in range(config.n_layers):
        neurons, heads, groups = config.sizes(layer)
        attention = attention_cost(config, layer, heads // groups, groups, workload).read_bytes
        mlp = mlp_cost(config, neurons).read_bytes
        if config.parallel_residual or config.shared_norm:
            items.append(_Item(layer, "layer", attention + mlp))
        else:
            items += [_Item(layer, "attention", attention), _Item(layer, "mlp", mlp)]
    return items


@dataclasses.dataclass(frozen=True)
class _Whole:
    """What the whole model computes for the text.

    Attributes:
      embedded: [R, T, D] state that enters the first layer.
      after: state after every item.
      kv: keys and values of every layer.
      choice: [R, T] int32 likeliest token after each position.
    """

    embedded: jax.Array
    after: tuple[jax.Array, ...]
    kv: tuple[NewKeyValues, ...]
    choice: jax.Array


def _whole_pass(config: ModelConfig, params: Params, tokens_RT: jax.Array) -> _Whole:
    embedded, taps, kv, choice = _jit_whole(config, params, tokens_RT)
    halves = not (config.parallel_residual or config.shared_norm)
    after = [state for residual, hidden in taps for state in ((residual, hidden) if halves else (hidden,))]
    return _Whole(embedded, tuple(after), tuple(kv), choice)


@functools.partial(jax.jit, static_argnames="config")
def _jit_whole(config: ModelConfig, params: Params, tokens_RT: jax.Array) -> Any:
    """Static: the config. Traced: the rest."""
    decoder = Decoder(config).bind({"params": params})
    positions = default_positions(tokens_RT, None)
    hidden = embedded = decoder.embed(tokens_RT, positions)
    taps, all_kv = [], []
    for layer in range(config.n_layers):
        tap, kv = decoder.run_layers(hidden, positions, layer, layer + 1)
        hidden = tap.hidden
        taps.append((tap.residual, tap.hidden))
        all_kv += kv
    logits = decoder.final_logits(decoder.final_features(hidden))
    return embedded, taps, all_kv, jnp.argmax(logits, axis=-1)


def _table(
    config: ModelConfig,
    params: Params,
    items: Sequence[_Item],
    whole: _Whole,
    levels: int,
    most: float,
    first: int,
) -> dict[int, _Entry]:
    """The last row of the table: the best entry of every cost, in levels."""
    total = sum(item.cost for item in items)
    table = {0: _Entry(whole.embedded, frozenset())}
    for i, item in enumerate(items):
        cost = max(1, round(levels * item.cost / total))
        found = dict(table)
        for before, entry in table.items():
            if before + cost > most * levels:
                continue
            state = _run(config, params, item, entry.state, whole.kv[item.layer])
            ran = _Entry(state, entry.kept | {i})
            left_out = table.get(before + cost)
            if left_out is None or _closer(state, left_out.state, whole.after[i], first):
                found[before + cost] = ran
        table = found
    return table


def _closer(state: jax.Array, other: jax.Array, whole: jax.Array, first: int) -> bool:
    """Whether a state is more like the whole model's than another one."""
    return bool(_similarity(state, whole, first) > _similarity(other, whole, first))


@functools.partial(jax.jit, static_argnames="first")
def _similarity(state_RTD: jax.Array, whole_RTD: jax.Array, first: int) -> jax.Array:
    """Mean cosine over the positions that count. Static: the first of them."""
    x, y = (v[:, first:].astype(jnp.float32) for v in (state_RTD, whole_RTD))
    norms = jnp.linalg.norm(x, axis=-1) * jnp.linalg.norm(y, axis=-1)
    return jnp.mean(jnp.sum(x * y, axis=-1) / jnp.maximum(norms, 1e-9))


def _run(
    config: ModelConfig, params: Params, item: _Item, state_RTD: jax.Array, kv: NewKeyValues
) -> jax.Array:
    """The state after an item."""
    layer = item.layer
    window = config.window(layer)
    # Programs are shared by the layers that are alike.
    rotation = _rotation(config, layer, state_RTD.shape[:2])
    how = {"half": item.half, "window": window}
    return _jit_run(config.layer(layer), params[f"layers_{layer}"], state_RTD, kv, rotation, **how)


@functools.partial(jax.jit, static_argnames=("config", "layer", "shape"))
def _rotation(config: ModelConfig, layer: int, shape: tuple[int, int]) -> Any:
    """How the layer rotates positions 0 .. T - 1 of a text. Everything is static."""
    positions = default_positions(jnp.zeros(shape), None)
    lengths = text_lengths(positions, None, cached=True)
    return shared_rotations(config, positions, [layer], lengths)[0]


@functools.partial(jax.jit, static_argnames=("config", "half", "window"))
def _jit_run(
    config: ModelConfig,
    params: Params,
    state_RTD: jax.Array,
    kv: NewKeyValues,
    rotation: Any,
    *,
    half: Half,
    window: int,
) -> jax.Array:
    """Static: the layer's config, which half runs, and the window. Traced: the rest."""
    positions = default_positions(state_RTD, None)
    # Keys of the whole model are seen one position later than they stand, so that no token sees its own among
    # them; it sees that of the drafter instead, and no other one of it. (ALiBi then takes them for nearer by
    # one.)
    past = KeyValues(kv[0], kv[1], positions + 1)
    shifted = window - 1 if window > 1 else window
    context = AttentionContext(positions, positions, shifted, past, rotation=rotation)

    def run(block: Block) -> jax.Array:
        def attention(x_RTD: jax.Array) -> tuple[jax.Array, Any]:
            return (jnp.zeros_like(x_RTD), None) if half == "mlp" else block.attn(x_RTD, context)

        mlp = jnp.zeros_like if half == "attention" else block.mlp
        return block.around(state_RTD, attention, mlp)[0].hidden

    return nn.apply(run, Block(config, parent=None))({"params": params})


@functools.partial(jax.jit, static_argnames="config")
def _choices(config: ModelConfig, params: Params, hidden_RTD: jax.Array) -> jax.Array:
    """[R, T] int32 likeliest tokens after a last state. Static: the config."""
    decoder = Decoder(config).bind({"params": params})
    return jnp.argmax(decoder.final_logits(decoder.final_features(hidden_RTD)), axis=-1)


def _spread(entries: Sequence[_Entry], count: int) -> list[_Entry]:
    """At most `count` entries, evenly spread, with the first and the last."""
    places = np.linspace(0, len(entries) - 1, min(count, len(entries)))
    return [entries[i] for i in sorted({round(place) for place in places})]


def _drafter(config: ModelConfig, kept: Sequence[_Item]) -> Drafter:
    """The drafter that runs these items."""
    halves = {(item.layer, half) for item in kept for half in _halves(item.half)}
    layers = tuple(sorted({layer for layer, _ in halves}))
    without: list[tuple[int, ...]] = [
        tuple(layer for layer in layers if (layer, half) not in halves) for half in ("attention", "mlp")
    ]
    return Drafter(Subnet.uniform(config, layers=layers), *without)


def _halves(half: Half) -> tuple[Half, ...]:
    return ("attention", "mlp") if half == "layer" else (half,)
