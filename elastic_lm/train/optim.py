"""AdamW with warm-up, decay and clipping, composed from optax."""

import jax
import optax

from elastic_lm.config import TrainConfig
from elastic_lm.models.decoder import Params

DECAYED = ("kernel", "table")


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
    """Clips by global norm, then AdamW; only kernels and tables decay."""
    adamw = optax.adamw(
        learning_rate(config),
        b1=config.b1,
        b2=config.b2,
        eps=config.eps,
        weight_decay=config.weight_decay,
        mask=decayed,
    )
    return optax.chain(optax.clip_by_global_norm(config.clip), adamw) if config.clip else adamw


def decayed(params: Params) -> Params:
    """True for the parameters that weight decay applies to."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key in DECAYED, params)
