"""Importance of neurons, heads, groups, channels and layers, and the permutation that sorts by it.

On calibration text, with forward passes only and sums over its tokens (padding is left out):

    F_neuron(i)  = sum |act(W_gate x)_i (W_up x)_i|, or |act(W_up x)_i|          per layer
    F_head(h)    = sum || attention output of head h ||_2, before W_out          per layer
    F_group(k)   = sum over the heads of key/value group k of F_head             per layer
    F_channel(c) = sum over all norms of |norm(x)_c|                             one order for the model
    F_layer(j)   = sum (logits - logits without j)^2 / sum logits^2              after `removed` are gone

F_channel and F_layer are eq. 1 and 5 of Nemotron Elastic. Its eq. 2 scores neurons by the input of the
activation, |W x|, of MLPs without a gate. We score what enters W_down, because that is what the model loses
when a neuron is cut. The Flextron paper's own score of heads could not be verified; ours is the size of what
W_out reads. Flextron ranks heads of a model without groups. We rank query heads inside their key/value group,
so that the group's keys and values stay in use, and whole groups by themselves.

`permute` sorts without changing what the model computes (Flextron): neurons through W_up and
W_down, heads through W_qkv and W_out, channels through every tensor that touches the residual stream.
Rotary positions do not depend on a head's place, and norms do not depend on the order of channels. Where
ranked neurons are stored is described in `config.subnet`.

Papers: Flextron, arXiv 2406.10260; Nemotron Elastic, arXiv 2511.16664; Minitron, arXiv 2407.14679.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from elastic_lm.config.checks import require
from elastic_lm.config.model import ModelConfig
from elastic_lm.data.batch import Batch
from elastic_lm.models.decoder import Decoder, Params
from elastic_lm.nn.linear import Linear
from elastic_lm.nn.norm import Norm
from elastic_lm.width.axes import Edit, edit_params

STORAGE_GROUPS = 16  # of neurons; the number of devices that a tensor axis has must divide it

Scores = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Importance:
    """Scores in the order in which the model stores things; larger is more important.

    Attributes:
      neurons: {owner of an MLP: [F]}; owners are `layers_0`, `exit_2` (kind mlp, or linear with an MLP beside
        its map, which is scored but never sorted), `exit_2/block`.
      heads: {owner of an attention: [K, G]}.
      channels: [D].

    Example:
      ```python
      import jax.numpy as jnp
      import elastic_lm as el
      from elastic_lm.testing import random_params, random_tokens, tiny_config

      config = tiny_config()
      params = random_params(config)
      tokens = random_tokens(config, batch=2, length=17)  # in earnest: text like that of the training
      ones = jnp.ones((2, 16), jnp.int32)
      batch = el.data.Batch(tokens[:, :-1], tokens[:, 1:], 1.0 * ones, jnp.cumsum(ones, 1) - 1, ones)

      importance = el.width.rank(config, params, [batch])
      importance.neurons["layers_0"]  # [64] scores of the first layer's neurons
      importance.groups["layers_0"]  # [2] scores of its key/value groups
      ```
    """

    neurons: Scores
    heads: Scores
    channels: np.ndarray

    @property
    def groups(self) -> Scores:
        """{owner of an attention: [K]}."""
        return {owner: scores.sum(axis=1) for owner, scores in self.heads.items()}


def rank(config: ModelConfig, params: Params, batches: Iterable[Batch]) -> Importance:
    """Scores neurons, heads and channels, of the model and of its exits.

    Args:
      config: the model; static.
      params: canonical parameters, on one device or sharded over a mesh.
      batches: calibration text, rows sharded or not; one compiled pass each. Weights and targets are not
        read; tokens of segment 0 are padding and do not count.

    Returns:
      The scores, float64 sums over all tokens.

    Raises:
      ValueError: there are no batches, or no tokens in them.

    Example:
      ```python
      import jax.numpy as jnp
      import elastic_lm as el
      from elastic_lm.testing import random_params, random_tokens, tiny_config

      config = tiny_config()
      params = random_params(config)
      tokens = random_tokens(config, batch=2, length=17)  # in earnest: text like that of the training
      ones = jnp.ones((2, 16), jnp.int32)
      batch = el.data.Batch(tokens[:, :-1], tokens[:, 1:], 1.0 * ones, jnp.cumsum(ones, 1) - 1, ones)

      importance = el.width.rank(config, params, [batch])
      order = (-importance.neurons["layers_0"]).argsort()  # the most important neuron comes first
      ```
    """
    total: dict[str, np.ndarray] = {}
    scores = _compiled(_scores, _whole(params))
    for batch in batches:
        for name, value in jax.device_get(scores(config, params, batch)).items():
            total[name] = total.get(name, 0.0) + value.astype(np.float64)

    count = int(total.pop("tokens", np.zeros(())))
    require(count > 0, "batches", count, "hold no tokens; give calibration text")

    def of_kind(path: str) -> Scores:
        return {name.removesuffix(path): v for name, v in total.items() if name.endswith(path)}

    return Importance(neurons=of_kind("/mlp/down"), heads=of_kind("/attn/out"), channels=total["channels"])


@functools.cache
def _compiled(function: Callable[..., Any], place: NamedSharding | None) -> Any:
    """`function` of (static config, arrays...), jitted, with its results at `place`; None = anywhere."""
    return jax.jit(function, static_argnums=0, out_shardings=place)


def _whole(params: Params) -> NamedSharding | None:
    """Where every process can read a result: whole on every device of the mesh that holds `params`."""
    sharding = getattr(jax.tree.leaves(params)[0], "sharding", None)
    return NamedSharding(sharding.mesh, PartitionSpec()) if isinstance(sharding, NamedSharding) else None


def _scores(config: ModelConfig, params: Params, batch: Batch) -> dict[str, jax.Array]:
    """Sums over one batch: channels, tokens, and one entry per MLP and attention.

    An interceptor reads what enters `down` and `out` and what leaves the norms, so that ranking needs no
    forward pass of its own in code.
    """
    counted = (batch.segments > 0).astype(jnp.float32)
    found: dict[str, jax.Array] = {"channels": jnp.zeros((config.d_model,)), "tokens": jnp.sum(counted)}

    def total(x: jax.Array) -> jax.Array:
        return jnp.tensordot(counted, x, ((0, 1), (0, 1)))

    def watch(run: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        result, module = run(*args, **kwargs), context.module
        name = "/".join(module.path)
        if isinstance(module, Norm) and module.name not in ("q_norm", "k_norm"):  # those normalise heads
            found["channels"] += total(jnp.abs(result.astype(jnp.float32)))
        elif isinstance(module, Linear) and name.endswith("/mlp/down"):
            found[name] = total(jnp.abs(args[0].astype(jnp.float32)))
        elif isinstance(module, Linear) and name.endswith("/attn/out"):
            heads = args[0].astype(jnp.float32).reshape(*args[0].shape[:2], *_head_shape(config, name))
            found[name] = total(jnp.linalg.norm(heads, axis=-1))
        return result

    with nn.intercept_methods(watch):
        Decoder(config).apply({"params": params}, batch.tokens, batch.positions, batch.segments)
    return found


def _head_shape(config: ModelConfig, name: str) -> tuple[int, int, int]:
    """(K, G, H) of the attention that `name` belongs to."""
    _, heads, groups = config.sizes(_layer_of(name))
    return groups, heads // groups, config.head_dim


def _layer_of(name: str) -> int:
    """Layer, counted from 0, whose sizes an owner has: `layers_3` is 3, `exit_3` sits after 2."""
    kind, number = name.split("/")[0].split("_")
    return int(number) - (kind == "exit")


def layer_scores(
    config: ModelConfig, params: Params, batches: Iterable[Batch], removed: Sequence[int] = ()
) -> np.ndarray:
    """Scores layers by how much the logits change without each of them, to choose `Menu.dropped`.

    Nemotron Elastic removes one layer at a time: call this again with the lowest scored layer in `removed`.

    Args:
      config: the model; static.
      params: canonical parameters.
      batches: calibration text; L + 1 passes each.
      removed: layers, counted from 0, that are gone already.

    Returns:
      [L] float64, F_layer; infinite for `removed`.

    Raises:
      ValueError: there are no batches, or `removed` names a layer that the model lacks.

    Example:
      ```python
      import jax.numpy as jnp
      import elastic_lm as el
      from elastic_lm.testing import random_params, random_tokens, tiny_config

      config = tiny_config()
      params = random_params(config)
      tokens = random_tokens(config, batch=2, length=17)  # in earnest: text like that of the training
      ones = jnp.ones((2, 16), jnp.int32)
      batch = el.data.Batch(tokens[:, :-1], tokens[:, 1:], 1.0 * ones, jnp.cumsum(ones, 1) - 1, ones)

      scores = el.width.layer_scores(config, params, [batch])
      menu = el.Menu(dropped=(int(scores.argmin()),))  # the least important layer may be left out
      ```

    Paper: Nemotron Elastic, arXiv 2511.16664, eq. 5.
    """
    require(
        all(0 <= i < config.n_layers for i in removed),
        "removed",
        tuple(removed),
        f"the model has {config.n_layers} layers, counted from 0",
    )
    stays = np.ones(config.n_layers, bool)
    stays[list(removed)] = False

    change, size = np.zeros(config.n_layers), 0.0
    changes = _compiled(_changes, _whole(params))
    for batch in batches:
        batch_change, batch_size = jax.device_get(changes(config, params, batch, stays))
        change, size = change + batch_change.astype(np.float64), size + float(batch_size)
    require(size > 0, "batches", size, "hold no tokens; give calibration text")
    return np.where(stays, change / size, math.inf)


def _changes(
    config: ModelConfig, params: Params, batch: Batch, stays_L: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """(sum (M - M_-j)^2 for every layer j, sum M^2) of one batch; M are the logits with all layers."""
    decoder = Decoder(config).bind({"params": params})
    counted = (batch.segments > 0).astype(jnp.float32)[..., None]

    def logits(stays_L: jax.Array) -> jax.Array:
        keep = jnp.broadcast_to(stays_L[:, None], (config.n_layers, batch.tokens.shape[0]))
        taps = decoder.taps(batch.tokens, (config.n_layers,), batch.positions, batch.segments, keep)
        return decoder.final_logits(decoder.final_features(taps[config.n_layers].hidden)) * counted

    whole = logits(jnp.ones(config.n_layers, bool))

    def change(j: jax.Array) -> jax.Array:
        return jnp.sum(jnp.square(whole - logits(stays_L.at[j].set(False))))

    # One layer after the other by one program, so that two sets of logits exist at a time.
    stays_L = jnp.asarray(stays_L)
    return jax.lax.map(change, jnp.arange(config.n_layers)), jnp.sum(jnp.square(whole))


def permute(
    config: ModelConfig,
    params: Params,
    importance: Importance,
    *,
    groups: int = STORAGE_GROUPS,
    channels: bool = False,
) -> tuple[ModelConfig, Params]:
    """Sorts a model by importance; it computes what it did.

    Args:
      config: the model.
      params: its canonical parameters; every result lies where the original did.
      importance: from `rank` of this very model.
      groups: G, storage groups of neurons (and channels): tensor parallelism over a divisor of G then
        slices widths in place. It must divide the MLP width of every layer (and d_model).
      channels: sort the model's channels too.

    Returns:
      (config with `elastic_groups`, permuted canonical parameters).

    Raises:
      ValueError: G does not divide a width, the scores are of another model, or params are stacked.

    Example:
      ```python
      import jax.numpy as jnp
      import elastic_lm as el
      from elastic_lm.testing import random_params, random_tokens, tiny_config

      config = tiny_config()
      params = random_params(config)
      tokens = random_tokens(config, batch=2, length=17)  # in earnest: text like that of the training
      ones = jnp.ones((2, 16), jnp.int32)
      batch = el.data.Batch(tokens[:, :-1], tokens[:, 1:], 1.0 * ones, jnp.cumsum(ones, 1) - 1, ones)

      importance = el.width.rank(config, params, [batch])
      config, params = el.width.permute(config, params, importance, groups=16)
      half = el.Subnet.uniform(config, mlp=0.5)  # the better half of the neurons of every layer
      small, small_params = el.slice_params(config, params, half)
      ```
    """
    require("layers" not in params, "params", "stacked", "pass them through models.decoder.unstack_layers")
    new = dataclasses.replace(config, elastic_groups=groups)
    order_D = np.arange(config.d_model)
    if channels:
        require(
            config.d_model % max(groups, 1) == 0,
            "groups",
            groups,
            f"must divide d_model={config.d_model}; choose {math.gcd(groups, config.d_model)}",
        )
        order_D = storage_order(importance.channels, groups)
    _check_scores(config, params, importance)

    # The MLP beside an exit's affine map is never cut, so that its neurons stay in their order.
    linear = [e.name for e in config.exits if e.kind == "linear"]
    neurons = {owner: scores for owner, scores in importance.neurons.items() if owner not in linear}
    # A head's ALiBi slope follows from its place.
    heads = {} if config.position == "alibi" else importance.heads
    ranked = dataclasses.replace(importance, neurons=neurons, heads=heads)

    def permuted(name: str, tree: Params) -> Params:
        if name.startswith("exit_") and "block" in tree:
            rest = {key: value for key, value in tree.items() if key != "block"}
            block = edit_params(tree["block"], _sorting(new, ranked, f"{name}/block", order_D))
            return {**permuted(name, rest), "block": block}
        return edit_params(tree, _sorting(new, ranked, name, order_D), (name,))

    sorted_params = {name: permuted(name, tree) for name, tree in params.items()}
    return new, jax.tree.map(_where_it_was, sorted_params, params)


def _where_it_was(new: jax.Array, old: jax.Array) -> jax.Array:
    return jax.device_put(new, old.sharding) if isinstance(old, jax.Array) else new


def storage_order(scores: np.ndarray, groups: int) -> np.ndarray:
    """Which entry is stored at each place: rank r at place r // G of storage group r mod G.

    A narrower MLP is then a prefix of every group, which tensor parallelism over a divisor of G slices in
    place.

    Args:
      scores: [F]; of equal ones the first comes first.
      groups: G, divides F; 0 = 1, plain order of rank.
    """
    by_rank = np.argsort(-scores, kind="stable")
    return by_rank.reshape(-1, max(groups, 1)).T.reshape(-1)


def _sorting(config: ModelConfig, importance: Importance, owner: str, order_D: np.ndarray) -> Edit:
    """The edit that sorts one layer, one exit or the rest of the model."""
    edit = Edit(channels=functools.partial(_take, order=order_D))
    if owner in importance.neurons:
        order_F = storage_order(importance.neurons[owner], config.elastic_groups)
        edit = dataclasses.replace(edit, neurons=functools.partial(_take, order=order_F))
    # Heads that are normalised together cannot be cut (`Subnet.check`), and need no order.
    if owner not in importance.heads or config.qk_norm_whole:
        return edit

    # Groups are sorted by the sum of their heads' scores, and heads inside their group. W_qkv stores for
    # every group its G query heads, then its key and its value, which stay in their slots.
    scores_KG = importance.heads[owner]
    k, g = scores_KG.shape
    order_K = np.argsort(-scores_KG.sum(axis=1), kind="stable")
    order_KG = np.argsort(-scores_KG, axis=1, kind="stable")[order_K]
    slots = np.concatenate([order_KG, np.tile([g, g + 1], (k, 1))], axis=1)

    def qkv_heads(leaf: jax.Array, axis: int) -> jax.Array:
        rest = (1,) * (leaf.ndim - axis - 2)
        return jnp.take_along_axis(
            jnp.take(leaf, order_K, axis), slots.reshape(*slots.shape, *rest), axis + 1
        )

    def head_outputs(leaf: jax.Array, axis: int) -> jax.Array:
        places = order_K[:, None] * g + order_KG
        columns = places.reshape(-1, 1) * config.head_dim + np.arange(config.head_dim)
        return jnp.take(leaf, columns.reshape(-1), axis)

    return dataclasses.replace(edit, qkv_heads=qkv_heads, head_outputs=head_outputs)


def _take(leaf: jax.Array, axis: int, order: np.ndarray) -> jax.Array:
    return leaf if np.array_equal(order, np.arange(len(order))) else jnp.take(leaf, order, axis)


def _check_scores(config: ModelConfig, params: Params, importance: Importance) -> None:
    """Refuses scores of a model of another shape or with other exits."""
    owners = {name: tree for name, tree in params.items() if "mlp" in tree}
    owners |= {f"{name}/block": tree["block"] for name, tree in params.items() if "block" in tree}

    beside = {e.name: e.hidden for e in config.exits if e.kind == "linear"}

    def check(same: bool, field: str, value: object) -> None:
        require(
            same,
            f"importance.{field}",
            value,
            "scores are of another model: rank this one, with its exits",
        )

    check(set(importance.neurons) == set(owners), "neurons", sorted(importance.neurons))
    for owner, scores in importance.neurons.items():
        mlp, heads, groups = config.sizes(_layer_of(owner))
        check(scores.shape == (beside.get(owner, mlp),), f"neurons[{owner!r}]", scores.shape)

        shape = importance.heads[owner].shape if owner in importance.heads else None
        wanted = (groups, heads // groups) if "attn" in owners[owner] else None
        check(shape == wanted, f"heads[{owner!r}]", shape)
    check(len(importance.channels) == config.d_model, "channels", len(importance.channels))
