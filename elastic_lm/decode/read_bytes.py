"""How many bytes of weights and caches a call has read while it decoded, from what has run.

    sum over segments j of  ticks[j] (weights of its layers + keys and values of all rows)
    + one vocabulary head per iteration in which rows have emitted from an exit, or from the full model

Decoding waits for memory, so that these bytes per second beside the memory's bandwidth say how good it is.
What cannot be known afterwards is left out, so that the truth is never below: exits that were looked at in
vain, exits at which not all rows of a batch have left together, embeddings, and the prefill. Of several
devices, the bytes are those of one: its part of the weights, and an equal part of the caches.
"""

import math
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from elastic_lm.cost.counted import BYTES, attention_cost, mlp_cost
from elastic_lm.decode.segment import PREVIEW
from elastic_lm.decode.served import Served
from elastic_lm.decode.state import segments
from elastic_lm.width.nested_decoder import NestedConfig


def read_bytes(
    model: Served,
    ticks: Sequence[int],
    exit_counts: Mapping[int, int],
    lengths: Sequence[tuple[int, int]],
    verifies: bool = False,
    drafter_ticks: int = 0,
) -> int | None:
    """Bytes that a call has read at least, on one device.

    Args:
      model: that ran.
      ticks: how often each segment ran.
      exit_counts: emitted tokens per depth.
      lengths: (prompt tokens, emitted tokens) of each row.
      verifies: the full model has drawn its tokens at every position, as it does for lossless rows.
      drafter_ticks: how often the sub-network ran that drafts for the model.

    Returns:
      The bytes; None where the width of the layers is chosen for every token.
    """
    config = model.config
    if isinstance(config, NestedConfig):
        return None
    layers, head, exits, devices = _weights(model)

    total = 0
    for (start, stop), count in zip(segments(config), ticks, strict=True):
        total += count * sum(layers[i] + _cache(config, i, lengths) // devices for i in range(start, stop))

    rows = len(lengths)
    for e in config.exits:
        emitted = exit_counts.get(e.layer, 0) if e.layer < config.n_layers else 0
        total += math.ceil(emitted / rows) * exits[e.layer]
    always = verifies or len(ticks) == 1
    last = ticks[-1] if always else math.ceil(exit_counts.get(config.n_layers, 0) / rows)
    if drafter_ticks and model.drafter is not None:
        total += drafter_ticks * (_drafter(model, lengths) + head) // devices
    return total + last * head


def _drafter(model: Served, lengths: Sequence[tuple[int, int]]) -> int:
    """Bytes that one step of the drafter's layers reads, on all devices together."""
    config, drafter = model.config, model.drafter
    assert drafter is not None
    subnet = drafter.subnet
    small = subnet.sliced(config)
    weights = caches = 0
    for j, layer in enumerate(subnet.layers):
        if layer not in drafter.no_attention:
            weights += attention_cost(config, layer, subnet.heads[j], subnet.groups[j]).parameters
            caches += _cache(small, j, lengths)
        if layer not in drafter.no_mlp:
            weights += mlp_cost(config, subnet.mlp[j]).parameters
    return weights * BYTES[config.dtype] + caches


def gb_per_s(read: int | None, seconds: float) -> float | None:
    """Gigabytes per second; None where the bytes are not known."""
    return None if read is None else read / seconds / 1e9


def _cache(config: Any, layer: int, lengths: Sequence[tuple[int, int]]) -> int:
    """Bytes of keys and values of a layer that one tick reads: of every row, at half of what it emits."""
    window = config.window(layer)
    seen = [prompt + emitted / 2 for prompt, emitted in lengths]
    positions = sum(min(each, window) if window else each for each in seen)
    return round(2 * config.sizes(layer)[2] * config.head_dim * BYTES[config.dtype] * positions)


# Bytes of each layer, of the vocabulary head and of the exits by their layers; devices that divide them.
Weights = tuple[tuple[int, ...], int, dict[int, int], int]
_known: "weakref.WeakKeyDictionary[Served, Weights]" = weakref.WeakKeyDictionary()


def _weights(model: Served) -> Weights:
    if model not in _known:
        _known[model] = _counted(model)
    return _known[model]


def _counted(model: Served) -> Weights:
    config, params = model.config, model.params
    if model.subnet is None:
        layers = tuple(_nbytes(params[f"layers_{i}"]) for i in range(config.n_layers))
    else:
        # Its parameters may be those of the whole model, which its programs slice.
        sizes = [config.sizes(i) for i in range(config.n_layers)]
        layers = tuple(
            attention_cost(config, i, heads // groups, groups).read_bytes + mlp_cost(config, mlp).read_bytes
            for i, (mlp, heads, groups) in enumerate(sizes)
        )

    whole = params["embed"]["table"] if config.tied else params["head"]
    head = _nbytes(params.get(PREVIEW, whole))
    exits = {}
    for e in config.exits:
        own = _nbytes(params[e.name]) if e.name in params else 0
        exits[e.layer] = own + (head if e.tied else 0)
    places = {len(leaf.sharding.device_set) for leaf in jax.tree.leaves(whole) if isinstance(leaf, jax.Array)}
    return layers, head, exits, max(places, default=1)


def _nbytes(tree: Any) -> int:
    """Bytes of a tree of arrays on one device."""
    return sum(map(_of_leaf, jax.tree.leaves(tree)))


def _of_leaf(leaf: Any) -> int:
    if not isinstance(leaf, jax.Array):
        return leaf.nbytes
    return math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
