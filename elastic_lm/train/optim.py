"""AdamW or Muon with warm-up, decay and clipping, composed from optax."""

from typing import Any

import jax
import optax
from optax.contrib import MuonDimensionNumbers, muon

from elastic_lm.models.decoder import Params
from elastic_lm.train.config import TrainConfig
from elastic_lm.width.router_training import ROUTERS, SURROGATE

DECAYED = ("kernel", "table")
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
        after = optax.linear_schedule(config.lr, low, decay, transition_begin=rest - decay)
    else:
        after = optax.constant_schedule(config.lr)
    if not config.warmup:
        return after
    return optax.join_schedules(
        [optax.linear_schedule(0.0, config.lr, config.warmup), after], [config.warmup]
    )


def make_optimizer(config: TrainConfig) -> optax.GradientTransformation:
    """Clips by global norm, then AdamW or Muon; kernels and tables decay, with Muon the layers' kernels.

    Muon's updates are scaled to AdamW's size (arXiv 2502.16982, sec. 2.2), so that one learning rate
    serves both and the parameters that AdamW keeps: tables, vocabulary heads, norms and biases.
    """
    make = _muon if config.optimizer == "muon" else _adamw
    optimizer = make(config)
    if config.router_lr != 1.0:
        optimizer = optax.chain(optimizer, optax.masked(optax.scale(config.router_lr), routing))
    return optax.chain(optax.clip_by_global_norm(config.clip), optimizer) if config.clip else optimizer


def decayed(params: Params) -> Params:
    """True for the parameters that weight decay applies to: the model's kernels and tables."""
    routers = routing(params)
    kernels = jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key in DECAYED, params)
    return jax.tree.map(lambda kernel, router: kernel and not router, kernels, routers)


def routing(params: Params) -> Params:
    """True for the parameters of routers and of the surrogate that trains them."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path[0].key in (ROUTERS, SURROGATE), params)


def matrices(params: Any) -> Any:
    """Which axes of a parameter Muon orthogonalises, None where AdamW updates it."""

    def axes(path: tuple[Any, ...], leaf: jax.Array) -> Any:
        names = [entry.key for entry in path]
        inner = names[-1] == "kernel" and "head" not in names and leaf.ndim >= 2
        inner = inner and names[0] not in (ROUTERS, SURROGATE)
        return MuonDimensionNumbers(reduction_axis=-1, output_axis=-2) if inner else None

    return jax.tree_util.tree_map_with_path(axes, params)


def _adamw(config: TrainConfig) -> optax.GradientTransformation:
    return optax.adamw(
        learning_rate(config),
        b1=config.b1,
        b2=config.b2,
        eps=config.eps,
        weight_decay=config.weight_decay,
        mask=decayed,
    )


def _muon(config: TrainConfig) -> optax.GradientTransformation:
    return muon(
        learning_rate(config),
        eps=config.eps,
        weight_decay=config.weight_decay,
        adam_b1=config.b1,
        adam_b2=config.b2,
        muon_weight_dimension_numbers=matrices,
        consistent_rms=ADAMW_RMS,
    )
