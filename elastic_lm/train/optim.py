"""AdamW, Muon or Adafactor with warm-up, decay and clipping, composed from optax."""

import functools
from collections.abc import Collection, Sequence
from typing import Any

import jax
import optax
from optax.contrib import MuonDimensionNumbers, muon

from elastic_lm.models.decoder import Params
from elastic_lm.train.config import TrainConfig
from elastic_lm.train.method import ParameterGroup
from elastic_lm.train.state import cast_params

DECAYED = ("kernel", "table")
DECAY_RATE = 0.8  # Adafactor remembers squared gradients of step t by 1 - t^-0.8
LARGEST_RMS = 1.0  # of an Adafactor update, in units of the learning rate
ADAMW_RMS = 0.2  # root mean square of an AdamW update, in units of the learning rate (arXiv 2502.16982)


def learning_rate(config: TrainConfig) -> optax.Schedule:
    """Learning rate at each step: linear warm-up from 0, then the configured shape down to min_lr.

    - cosine, linear: over all remaining steps.
    - wsd: constant, then linear over the last `decay_share` of all steps (warm-up, stable, decay).
    - constant: no decay.
    """
    rest = config.steps - config.warmup
    low = config.lr * config.min_lr

    if config.schedule == "cosine":
        after = optax.cosine_decay_schedule(config.lr, rest, config.min_lr)
    elif config.schedule == "linear":
        after = optax.linear_schedule(config.lr, low, rest)
    elif config.schedule == "wsd":
        decay = max(1, min(rest, round(config.decay_share * config.steps)))
        # `after` counts its steps from the end of the warm-up.
        after = optax.linear_schedule(config.lr, low, decay, transition_begin=rest - decay)
    else:
        after = optax.constant_schedule(config.lr)

    if not config.warmup:
        return after
    return optax.join_schedules(
        [optax.linear_schedule(0.0, config.lr, config.warmup), after], [config.warmup]
    )


def make_optimizer(
    config: TrainConfig, groups: Sequence[ParameterGroup] = ()
) -> optax.GradientTransformation:
    """Clips by global norm, then AdamW, Muon or Adafactor; kernels and tables decay.

    With Muon, the layers' kernels alone decay. Its updates are scaled to AdamW's size (arXiv 2502.16982,
    sec. 2.2), so that one learning rate serves both and the parameters that AdamW keeps: tables, vocabulary
    heads, norms and biases. Adafactor's (arXiv 1804.04235) have a root mean square of at most 1 before the
    learning rate.

    Args:
      config: optimizer, schedule and clipping.
      groups: parameters that AdamW updates without decay, with learning rates of their own.
    """
    names = {name for group in groups for name in group.names}
    optimizer = {"adamw": _adamw, "muon": _muon, "adafactor": _adafactor}[config.optimizer](config, names)

    # After AdamW, whose update does not change with the scale of a gradient.
    for group in groups:
        if group.lr != 1.0:
            scaled = optax.masked(optax.scale(group.lr), functools.partial(in_group, group.names))
            optimizer = optax.chain(optimizer, scaled)

    if config.clip:
        optimizer = optax.chain(optax.clip_by_global_norm(config.clip), optimizer)
    if config.nu_dtype not in ("", "float32"):
        optimizer = squares_in(config.nu_dtype, optimizer)
    return in_float32(optimizer)


def squares_in(dtype: str, optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """An optimizer that keeps Adam's mean squared gradients in a dtype, and computes with them in float32.

    What is remembered is rounded to the nearest number. In bfloat16 a mean that a step changes by less than
    0.2 to 0.4 % stays what it was; b2 must be small enough that it can still fall (`TrainConfig`).

    Args:
      dtype: in which they lie in memory.
      optimizer: with states of `optax.scale_by_adam`, at any depth.
    """

    def is_adam(state: Any) -> bool:
        return isinstance(state, optax.ScaleByAdamState)

    def cast(state: Any, dtype: str) -> Any:
        def one(part: Any) -> Any:
            return part._replace(nu=cast_params(part.nu, dtype)) if is_adam(part) else part

        return jax.tree.map(one, state, is_leaf=is_adam)

    def init(params: Any) -> Any:
        return cast(optimizer.init(params), dtype)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        updates, state = optimizer.update(updates, cast(state, "float32"), params)
        return updates, cast(state, dtype)

    return optax.GradientTransformation(init, update)


def in_float32(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """An optimizer that computes and remembers in float32, whatever dtype the parameters train in.

    Args:
      optimizer: makes its state in the dtype of the parameters that it is given.
    """

    def init(params: Any) -> Any:
        return optimizer.init(cast_params(params, "float32"))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        params = None if params is None else cast_params(params, "float32")
        return optimizer.update(cast_params(updates, "float32"), state, params)

    return optax.GradientTransformation(init, update)


def in_group(names: Collection[str], params: Params) -> Params:
    """True for the parameters under these top-level keys."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path[0].key in names, params)


def decayed(params: Params, without: Collection[str] = ()) -> Params:
    """True for the parameters that weight decay applies to: kernels and tables.

    Args:
      params: trainable parameters.
      without: top-level keys under which nothing decays.
    """

    def decays(path: tuple[Any, ...], leaf: jax.Array) -> bool:
        return path[-1].key in DECAYED and path[0].key not in without

    return jax.tree_util.tree_map_with_path(decays, params)


def matrices(params: Any, without: Collection[str] = ()) -> Any:
    """Which axes of a parameter Muon orthogonalises, None where AdamW updates it.

    Args:
      params: trainable parameters.
      without: top-level keys under which AdamW updates everything.
    """

    def axes(path: tuple[Any, ...], leaf: jax.Array) -> Any:
        names = [entry.key for entry in path]
        inner = names[-1] == "kernel" and "head" not in names and leaf.ndim >= 2
        if not inner or names[0] in without:
            return None
        return MuonDimensionNumbers(reduction_axis=-1, output_axis=-2)

    return jax.tree_util.tree_map_with_path(axes, params)


def _adamw(config: TrainConfig, without: Collection[str]) -> optax.GradientTransformation:
    return optax.adamw(
        learning_rate(config),
        b1=config.b1,
        b2=config.b2,
        eps=config.eps,
        weight_decay=config.weight_decay,
        mu_dtype=config.mu_dtype or None,
        mask=functools.partial(decayed, without=without),
    )


def _muon(config: TrainConfig, without: Collection[str]) -> optax.GradientTransformation:
    return muon(
        learning_rate(config),
        eps=config.eps,
        weight_decay=config.weight_decay,
        mu_dtype=config.mu_dtype or None,
        adam_b1=config.b1,
        adam_b2=config.b2,
        muon_weight_dimension_numbers=functools.partial(matrices, without=without),
        consistent_rms=ADAMW_RMS,
    )


def _adafactor(config: TrainConfig, without: Collection[str]) -> optax.GradientTransformation:
    optimizer = optax.chain(
        optax.scale_by_factored_rms(decay_rate=DECAY_RATE),
        optax.clip_by_block_rms(LARGEST_RMS),
        optax.add_decayed_weights(config.weight_decay, functools.partial(decayed, without=without)),
        optax.scale_by_learning_rate(learning_rate(config)),
    )
    if not without:
        return optimizer

    def labels(params: Params) -> Params:
        own = in_group(without, params)
        return jax.tree.map(lambda inside: "adamw" if inside else "adafactor", own)

    return optax.partition({"adamw": _adamw(config, without), "adafactor": optimizer}, labels)
