"""Exits in closed form: one pass over text, one linear solve, no training.

With u the normalised state after layer l (Norm(h_l) with scale 1 and no bias) and f the features that the
full model's vocabulary head reads at the same token, a `linear` exit is the ridge regression

    minimise over A, b:  mean_t |A u_t + b - f_t|^2 + lambda |A|^2

so that its tied head sees the features it was made for. Where an MLP stands beside the map, f_t - MLP(u_t)
takes the place of f_t. The sums that the solution needs are those of [u; 1] [u; 1]^T and [u; 1] f^T over the
tokens, (D + 1)^2 + (D + 1) D numbers per exit whatever the text's length; they are added up and solved in
float64. lambda is the one of `RIDGES` that predicts the features of every tenth batch best, which does not
take part in the sums.

The other kinds start from their copied modules and fit the scale (and the bias) of their norm, channel by
channel, which is the same regression with a diagonal A.

Papers: Tuned Lens, arXiv 2303.08112; Jump to Conclusions (linear shortcuts), arXiv 2303.09435.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg

from elastic_lm.config.checks import require, require_not_negative
from elastic_lm.config.model import ExitConfig, ModelConfig
from elastic_lm.data.batch import Arrays, Batch, as_batches
from elastic_lm.depth.cached_taps import Taps, read_taps
from elastic_lm.models.decoder import Decoder, Params
from elastic_lm.models.finite import overflow_error
from elastic_lm.nn.exit_head import unit_norm
from elastic_lm.processes import on_host

RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # candidates for lambda; u has a mean square of 1
HELD_OUT = 10  # one batch of so many chooses lambda
FIT_TOKENS = 2**16  # of a training run's text that its exits are fitted on


@flax.struct.dataclass
class Sums:
    """What the regression of one exit needs, added up over counted tokens.

    Attributes:
      uu: [D + 1, D + 1] sum of [u; 1] [u; 1]^T; for a diagonal map [D, 3] sums of u^2, u and 1.
      uf: [D + 1, D] sum of [u; 1] f^T; for a diagonal map [D, 2] sums of u f and f.
      ff: [] sum of |f|^2.
    """

    uu: Any
    uf: Any
    ff: Any


def fit_exits(
    config: ModelConfig,
    params: Params,
    batches: Iterable[Batch | Arrays | Taps],
    *,
    layers: Sequence[int] = (),
    ridge: float | None = None,
) -> Params:
    """Fits exits to the features of the full model in closed form, in one pass over text.

    Args:
      config: the model with its exits; static under `jit`.
      params: its parameters, canonical or stacked; on a mesh, the sums are computed there.
      batches: packed batches, or dicts of their fields, or what the layers gave for them (`cached_taps`);
        targets are not read. A thousand tokens per hundred channels are a start, ten times as many are
        better.
      layers: the exits to fit, by their layers; () = those with `init="fit"`, or all where none has it.
      ridge: lambda; None = chosen on every tenth batch (1e-2 where there are fewer).

    Returns:
      The parameters with new arrays for these exits; all others are the same objects.

    Raises:
      ValueError: there is no such exit, one is named twice or has nothing to fit, the ridge is negative, or
        no token counts.

    Example:
      ```python
      import jax
      import jax.numpy as jnp
      import elastic_lm as el
      from elastic_lm.testing import random_params, random_tokens, tiny_config

      config = tiny_config()
      exits = [el.ExitConfig(2, kind="linear", tied=True, init="fit")]
      config, params = el.attach_exits(config, random_params(config), exits, jax.random.key(0))

      tokens = random_tokens(config, batch=8, length=17)
      ones = jnp.ones((8, 16), jnp.int32)
      batch = el.data.Batch(tokens[:, :-1], tokens[:, 1:], 1.0 * ones, jnp.cumsum(ones, 1) - 1, ones)
      params = el.depth.fit_exits(config, params, [batch])
      ```
    """
    require(len(set(layers)) == len(layers), "layers", tuple(layers), "name each exit once")
    if ridge is not None:
        require_not_negative("ridge", ridge)
    chosen = _chosen(config, layers)
    kept = [config.exits.index(e) for e in chosen]
    config = dataclasses.replace(config, exits=tuple(chosen))  # nothing of the others is computed
    plain = {**params, **{e.name: _without_fit(config, e, params[e.name]) for e in chosen}}

    def taps() -> Iterator[Taps]:
        for batch in batches:
            if isinstance(batch, Taps):
                yield dataclasses.replace(batch, exits=tuple(batch.exits[i] for i in kept))
            else:
                (packed,) = as_batches([batch])
                yield _read(config, plain, packed)

    fitted, held_out, weight = _add_up(config, plain, taps())
    return {
        **params,
        **{
            e.name: _solved(config, e, params[e.name], sums, kept, ridge, weight)
            for e, sums, kept in zip(chosen, fitted, held_out, strict=True)
        },
    }


def fit_state(
    config: ModelConfig, trainable: Params, frozen: Params, batches: Iterator[Any], tokens: int = FIT_TOKENS
) -> Params:
    """The trainable parameters of a run at its first start, with the exits fitted that ask for it.

    Args:
      config: of the model.
      trainable: exits, and whatever else trains.
      frozen: the rest.
      batches: of the training text, on the mesh: without an end, or what the frozen layers gave for some.
      tokens: that the exits are fitted on, about; at least two batches.

    Returns:
      Trainable parameters in the same places on the mesh.
    """
    chosen = [e for e in config.exits if e.init == "fit" and e.name in trainable]
    if not chosen:
        return trainable
    first = next(batches)
    count = max(2, -(-tokens // first.weights.size))
    some = itertools.chain([first], itertools.islice(batches, count - 1))
    fitted = fit_exits(config, {**frozen, **trainable}, some, layers=[e.layer for e in chosen])
    placed = {
        e.name: jax.tree.map(
            lambda new, old: jax.device_put(new, old.sharding), fitted[e.name], trainable[e.name]
        )
        for e in chosen
    }
    return {**trainable, **placed}


def above_chance(config: ModelConfig, metrics: Mapping[str, float]) -> str:
    """What to do about exits that start a training run with a higher loss than a uniform guess.

    Args:
      config: of the model.
      metrics: of the first steps, with `loss/exit_<layer>` in nats per token.

    Returns:
      One sentence or two; "" where no exit that copies modules of the model does.
    """
    chance = math.log(config.vocab_size)
    losses = {e: metrics.get(f"loss/{e.name}", 0.0) for e in config.exits if e.init == "copy"}
    lost = [e for e, loss in losses.items() if loss > chance]
    if not lost:
        return ""
    found = ", ".join(f"loss/{e.name} is {losses[e]:.2f}" for e in lost)
    return (
        f"exits start above chance: {found}, and a uniform guess costs at most ln V = {chance:.2f}. Their "
        "heads read states that they were not made for; fit them in closed form first, with exits like "
        f'ExitConfig({lost[0].layer}, kind="linear", tied=True, init="fit")'
    )


def _chosen(config: ModelConfig, layers: Sequence[int]) -> list[ExitConfig]:
    """The exits to fit."""
    asked = [e for e in config.exits if e.init == "fit"] or list(config.exits)
    by_layer = {e.layer: e for e in config.exits}
    unknown = [layer for layer in layers if layer not in by_layer]
    if unknown or not asked:
        raise ValueError(
            f"layers={tuple(layers)}: the model has exits after layers {tuple(by_layer)}; attach exits "
            "first, with el.attach_exits"
        )
    chosen = [by_layer[layer] for layer in layers] if layers else asked
    for e in chosen:
        if e.kind == "embedding":
            raise ValueError(
                f"exit.kind='embedding' after layer {e.layer}: has nothing to fit; choose linear, or norm"
            )
    return sorted(chosen, key=lambda e: e.layer)


def _without_fit(config: ModelConfig, e: ExitConfig, exit_params: Params) -> Params:
    """The exit without what is fitted: its features are u, and those of a `linear` exit what its MLP adds."""
    if e.kind == "linear":
        return {**exit_params, "map": jax.tree.map(jnp.zeros_like, exit_params["map"])}
    norm = {"scale": jnp.full_like(exit_params["norm"]["scale"], 1.0 - config.norm_offset)}
    if "bias" in exit_params["norm"]:
        norm["bias"] = jnp.zeros_like(exit_params["norm"]["bias"])
    return {**exit_params, "norm": norm}


# Static: the config. Traced: parameters and batch.
_read = jax.jit(read_taps, static_argnames="config")


@functools.partial(jax.jit, static_argnames="config")
def _batch_sums(config: ModelConfig, params: Params, taps: Taps) -> tuple[tuple[Sums, ...], jax.Array]:
    """The sums over one batch, float32, and the weight of its tokens. Static: the config."""
    decoder = Decoder(config).bind({"params": params})
    weight = taps.weights.reshape(-1, 1).astype(jnp.float32)
    weight = (weight > 0).astype(jnp.float32)
    product = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)

    def flat(x_BTD: jax.Array) -> jax.Array:
        return x_BTD.reshape(-1, x_BTD.shape[-1]).astype(jnp.float32)

    f = flat(taps.features)
    all_sums = []
    for i, e in enumerate(config.exits):
        tap, target = taps.tap(i), f
        if e.kind == "linear":
            if e.hidden:
                # The map gives what the MLP beside it leaves.
                target = f - flat(decoder.exit_features(i, tap, taps.positions, taps.segments))
            u = flat(unit_norm(config, tap.hidden))
            u1 = jnp.concatenate([u, jnp.ones_like(weight)], axis=1)
            uu, uf = product("nd,ne->de", u1 * weight, u1), product("nd,ne->de", u1 * weight, target)
        else:
            u = flat(decoder.exit_features(i, tap, taps.positions, taps.segments))
            ones = jnp.ones_like(u)
            uu = jnp.stack([jnp.sum(weight * x, axis=0) for x in (u * u, u, ones)], axis=1)
            uf = jnp.stack([jnp.sum(weight * x, axis=0) for x in (u * f, f)], axis=1)
        all_sums.append(Sums(uu, uf, jnp.sum(weight * target * target)))
    return tuple(all_sums), jnp.sum(weight)


def _add_up(
    config: ModelConfig, params: Params, batches: Iterable[Taps]
) -> tuple[list[Sums], list[Sums], float]:
    """Float64 sums of nine batches in ten, those of every tenth, and the tokens of the former."""
    zero = [Sums(0.0, 0.0, 0.0) for _ in config.exits]
    totals, weights = [zero, zero], [0.0, 0.0]
    for i, taps in enumerate(batches):
        sums, weight = on_host(_batch_sums(config, params, taps))
        part = int(i % HELD_OUT == HELD_OUT - 1)
        totals[part] = jax.tree.map(
            lambda old, new: old + np.asarray(new, np.float64), totals[part], list(sums)
        )
        weights[part] += float(weight)
    if not weights[0]:
        raise ValueError("batches: no token counts; give text with weights above 0")
    if not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(totals)):
        raise overflow_error("batches: states or features of the exits", params, config.dtype)
    return totals[0], totals[1], weights[0]


def _solved(
    config: ModelConfig,
    e: ExitConfig,
    exit_params: Params,
    sums: Sums,
    held_out: Sums,
    ridge: float | None,
    weight: float,
) -> Params:
    """The exit with what the regression gives."""
    if e.kind != "linear":
        scale, bias = _diagonal(sums, with_bias="bias" in exit_params["norm"])
        norm = {"scale": scale - config.norm_offset} | (
            {"bias": bias} if "bias" in exit_params["norm"] else {}
        )
        return {**exit_params, "norm": _like(norm, exit_params["norm"])}

    chooses = ridge is None and np.ndim(held_out.uu) > 0
    candidates = RIDGES if chooses else (1e-2 if ridge is None else ridge,)
    maps = [_ridge(sums, value, weight) for value in candidates]
    best = min(maps, key=lambda found: _residual(held_out, found)) if chooses else maps[0]
    own = {"map": {"kernel": best[:-1].T, "bias": best[-1]}}
    return {**exit_params, **_like(own, exit_params)}


def _ridge(sums: Sums, ridge: float, weight: float) -> np.ndarray:
    """[D + 1, D] float64: A^T and b."""
    penalty = np.full(len(sums.uu), ridge)
    penalty[-1] = 1e-12  # the constant is free
    scale = np.mean(np.diag(sums.uu)[:-1]) / weight
    return scipy.linalg.solve(sums.uu / weight + np.diag(penalty * scale), sums.uf / weight, assume_a="pos")


def _residual(sums: Sums, found: np.ndarray) -> float:
    """sum_t |A u_t + b - f_t|^2, from the sums alone."""
    return float(sums.ff - 2 * np.sum(found * sums.uf) + np.sum(found * (sums.uu @ found)))


def _diagonal(sums: Sums, with_bias: bool) -> tuple[np.ndarray, np.ndarray]:
    """Scale and bias [D] of every channel's own regression."""
    square, first, count = sums.uu.T
    product, target = sums.uf.T
    tiny = 1e-6 * count  # a channel that is always 0 keeps a scale of 0
    if not with_bias:
        return product / (square + tiny), np.zeros_like(product)
    variance = square - first**2 / count
    scale = (product - first * target / count) / (variance + tiny)
    return scale, (target - scale * first) / count


def _like(new: Params, old: Params) -> Params:
    """Arrays in the dtypes of those that they replace."""
    return {
        name: _like(tree, old[name]) if isinstance(tree, dict) else jnp.asarray(tree, old[name].dtype)
        for name, tree in new.items()
    }
