"""EE-Tuning: early exits for a pretrained model whose own parameters never change.

With h_l the state after layer l, theta_l the parameters of the exit there and N counted tokens:

    minimise over theta:  sum_l w_l(step) L_l,    L_l = (1/N) sum_t omega_t CE(logits_l[t], x_{t+1})
    logits_l = exit(h_l; theta_l) / T_l,          omega_t = 1, or max_v softmax(logits_l[t])_v, detached
    w_l(r) = w_0 + (w_l - w_0) f(r),              r = min(step / warm-up steps, 1),
                                                  f(r) = r  or  (1 + cos(pi (r + 1))) / 2

The backbone runs forward only, and only up to the deepest exit whose weight is not zero. EE-LLM's
joint training of all parameters, L_final + sum_l w_l(step) L_l, is `JointTraining`. There, with `distil` = d,
exits also learn what the same model says at full depth, p = softmax(logits_L) held fixed, with their own
q_l = softmax(logits_l):

    L_l = (1/N) sum_t [ (1 - d) omega_t CE(logits_l[t], x_{t+1}) + d KL(p[t] || q_l[t]) ]

With d = 1 exits become likelier to agree with full depth, which text alone does not ask for.

Papers: EE-Tuning, arXiv 2402.00518; EE-LLM, arXiv 2312.04916; self-distillation, Zhang et al. 2019,
arXiv 1905.08094.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp

from elastic_lm.config.checks import NOT_NEGATIVE, require, require_choice, require_each
from elastic_lm.config.model import ExitConfig, ModelConfig
from elastic_lm.data.batch import Batch
from elastic_lm.depth.fitting import above_chance, fit_state
from elastic_lm.models.decoder import Decoder, Params, vocab_logits
from elastic_lm.nn.block import Tap
from elastic_lm.nn.remat import Remat, recomputed
from elastic_lm.train.losses import (
    LOSS_CHUNK,
    Metrics,
    TokenSums,
    chunked_cross_entropy,
    eagerly,
    imitation_loss,
    losses_over_chunks,
    token_losses,
)
from elastic_lm.train.method import Method, MethodConfig, RunData
from elastic_lm.train.state import TrainState

Warmup = Literal["linear", "cosine"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class EETuningConfig(MethodConfig):
    """Options of `EETuning`, the `method` section of a run's config.

    Raises:
      ValueError: an option is out of its range; names field, value and fix.

    Example:
      ```python
      import elastic_lm as el

      method = el.depth.EETuningConfig(weights=(1.0, 0.5), warmup_steps=50)
      ```
    """

    trains_exits = True

    name: str = "ee_tuning"
    weights: tuple[float, ...] = ()  # w_l per exit; 0 leaves that exit out; () = all 1
    warmup_steps: int = 0  # steps over which the weights move from warmup_from to their value
    warmup_from: float = 0.0  # w_0, every exit's weight at step 0 of the warm-up
    warmup: Warmup = "linear"  # f, shape of the warm-up
    dynamic_token_weights: bool = False  # omega_t is the exit's own confidence

    def __post_init__(self) -> None:
        require(
            all(0 <= w < math.inf for w in self.weights),
            "method.weights",
            self.weights,
            "must be at least 0 and finite",
        )
        if self.weights and not any(self.weights):
            raise ValueError(f"method.weights={self.weights}: at least one exit needs a weight above 0")
        require_each(self, "method.", ("warmup_from", "warmup_steps"), *NOT_NEGATIVE)
        require_choice("method.warmup", self.warmup, get_args(Warmup))


@dataclasses.dataclass(frozen=True)
class EETuning(EETuningConfig, Method[Batch]):
    """Trains the exits of a frozen model (EE-Tuning, arXiv 2402.00518).

    Static under `jit`; parameters, batches and the step are traced.

    Raises:
      ValueError: the model has no exits, or `weights` does not have one entry per exit.

    Example:
      ```python
      import jax.numpy as jnp
      import elastic_lm as el
      from elastic_lm.testing import random_params, random_tokens, tiny_config

      config = tiny_config(exits=(1, 3))
      tokens = random_tokens(config, batch=2, length=17)
      ones = jnp.ones((2, 16), jnp.int32)
      batch = el.data.Batch(tokens[:, :-1], tokens[:, 1:], 1.0 * ones, jnp.cumsum(ones, 1) - 1, ones)

      method = el.depth.EETuning(config, weights=(1.0, 0.5))
      exits, backbone = method.split(random_params(config))
      loss, metrics = method.loss(exits, backbone, batch, jnp.int32(0))
      ```
    """

    section = EETuningConfig

    config: ModelConfig  # the model with its exits; static
    loss_chunk: int = LOSS_CHUNK  # columns of logits alive at once
    remat: Remat = False  # recompute what an exit computes in its backward pass

    def __post_init__(self) -> None:
        super().__post_init__()
        check_exits(self.config)
        if len(self.weights) not in (0, len(self.config.exits)):
            layers = tuple(e.layer for e in self.config.exits)
            raise ValueError(
                f"method.weights={self.weights}: needs one entry per exit, after layers {layers}"
            )

    @property
    def active(self) -> tuple[int, ...]:
        """Indices into `config.exits` of the exits that train."""
        return tuple(i for i, w in enumerate(self._targets()) if w)

    def split(self, params: Params) -> tuple[Params, Params]:
        """Exits in use train, everything else is frozen.

        Raises:
          ValueError: the exits in use own no parameters.
        """
        return split_exits(params, [self.config.exits[i] for i in self.active])

    def begin(self, state: TrainState, frozen: Params, data: RunData) -> TrainState:
        """Fits the exits that ask for it (`depth.fitting`)."""
        fitted = fit_state(self.config, state.params, frozen, data.placed(iter(data.train)))
        return dataclasses.replace(state, params=fitted)

    def remark(self, metrics: Mapping[str, float]) -> str:
        """What to do about exits that start above chance (`depth.fitting`)."""
        return above_chance(self.config, metrics)

    def loss(
        self, trainable: Params, frozen: Params, batch: Batch, step: jax.Array
    ) -> tuple[jax.Array, Metrics]:
        """Weighted sum of the exits' losses, in nats per counted token.

        Args:
          trainable: first result of `split`; the only parameters with a gradient.
          frozen: second result of `split`.
          batch: packed tokens, targets and weights.
          step: int32 scalar, drives the warm-up.

        Returns:
          (scalar float32, metrics `loss`, `loss/exit_<layer>` and `accuracy/exit_<layer>`).
        """
        params = {**jax.lax.stop_gradient(frozen), **trainable}

        # The layers run up to the deepest exit that trains, and no further.
        depths = [self.config.exits[i].layer for i in self.active]
        taps = self._taps(params, depths, batch)

        total, metrics = self._exit_losses(params, taps, batch, step)
        return total, {"loss": total, **metrics}

    def exit_weights(self, step: jax.Array | int) -> jax.Array:
        """w_l(step) of every exit: [E] float32."""
        target = jnp.asarray(self._targets(), jnp.float32)
        if not self.warmup_steps:
            return target

        r = jnp.minimum(jnp.asarray(step, jnp.float32) / self.warmup_steps, 1.0)
        f = r if self.warmup == "linear" else (1.0 + jnp.cos(jnp.pi * (r + 1.0))) / 2.0
        # An exit that does not train has weight 0 during the warm-up, too.
        return jnp.where(target == 0, 0.0, self.warmup_from + (target - self.warmup_from) * f)

    def _targets(self) -> tuple[float, ...]:
        """w_l of every exit, where the warm-up ends."""
        return self.weights or (1.0,) * len(self.config.exits)

    def _taps(self, params: Params, depths: Sequence[int], batch: Batch) -> dict[int, Tap]:
        decoder = Decoder(self.config, self.remat).bind({"params": params})
        return decoder.taps(batch.tokens, depths, batch.positions, batch.segments)

    def _exit_losses(
        self, params: Params, taps: dict[int, Tap], batch: Batch, step: jax.Array
    ) -> tuple[jax.Array, Metrics]:
        """sum_l w_l(step) L_l and metrics, one exit after the other so that only one holds logits."""
        weights = self.exit_weights(step)
        total, metrics = jnp.zeros((), jnp.float32), {}
        for i in self.active:
            e = self.config.exits[i]

            def token_sums(params: Params, tap: Tap, i: int = i) -> TokenSums:
                return self._token_sums(params, tap, i, batch)

            sums = recomputed(token_sums, self.remat)(params, taps[e.layer])
            count = jnp.maximum(sums.weight, 1.0)  # a batch of padding alone has no tokens
            total += weights[i] * sums.loss / count
            metrics[f"loss/{e.name}"] = sums.cross_entropy / count
            metrics[f"accuracy/{e.name}"] = sums.correct / count
        return total, metrics

    def _token_sums(self, params: Params, tap: Tap, index: int, batch: Batch) -> TokenSums:
        """Sums over the tokens of one exit."""
        decoder = Decoder(self.config).bind({"params": params})
        features = decoder.exit_features(index, tap, batch.positions, batch.segments)
        return chunked_cross_entropy(
            self.config,
            features,
            decoder.exit_head(index),
            batch,
            temperature=self.config.exits[index].temperature,
            confidence_weighted=self.dynamic_token_weights,
            chunk=self.loss_chunk,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class JointTrainingConfig(EETuningConfig):
    """Options of `JointTraining`: those of `EETuning`, and how much exits learn from full depth.

    Raises:
      ValueError: an option is out of its range; names field, value and fix.

    Example:
      ```python
      import elastic_lm as el

      method = el.depth.JointTrainingConfig(weights=(0.25, 0.5), distil=1.0)
      ```
    """

    name: str = "joint"
    distil: float = 0.0  # d, share of the divergence from full depth in an exit's loss

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 <= self.distil <= 1, "method.distil", self.distil, "must be in [0, 1]")


@dataclasses.dataclass(frozen=True)
class JointTraining(JointTrainingConfig, EETuning):
    """Trains all parameters, L_final + sum_l w_l(step) L_l (EE-LLM, arXiv 2312.04916).

    Static under `jit`; parameters, batches and the step are traced.

    Example:
      ```python
      import jax.numpy as jnp
      import elastic_lm as el
      from elastic_lm.testing import random_params, random_tokens, tiny_config

      config = tiny_config(exits=(2,))
      tokens = random_tokens(config, batch=2, length=17)
      ones = jnp.ones((2, 16), jnp.int32)
      batch = el.data.Batch(tokens[:, :-1], tokens[:, 1:], 1.0 * ones, jnp.cumsum(ones, 1) - 1, ones)

      method = el.depth.JointTraining(config, weights=(0.5,))
      trainable, frozen = method.split(random_params(config))  # everything, and nothing
      loss, metrics = method.loss(trainable, frozen, batch, jnp.int32(0))
      ```
    """

    section = JointTrainingConfig

    def split(self, params: Params) -> tuple[Params, Params]:
        """Everything trains."""
        return params, {}

    def remark(self, metrics: Mapping[str, float]) -> str:
        """Nothing: where the model itself learns, its exits start at chance with it."""
        return ""

    def loss(
        self, trainable: Params, frozen: Params, batch: Batch, step: jax.Array
    ) -> tuple[jax.Array, Metrics]:
        """L_final + sum_l w_l(step) L_l, in nats per counted token (EE-LLM, arXiv 2312.04916).

        Args:
          trainable: first result of `split`, all parameters.
          frozen: second result of `split`, empty.
          batch: packed tokens, targets and weights.
          step: int32 scalar, drives the warm-up.

        Returns:
          (scalar float32, metrics of `EETuning.loss` and `loss/final`, `accuracy/final`).
        """
        params: Params = {**jax.lax.stop_gradient(frozen), **trainable}
        depth = self.config.n_layers
        exits = {i: self.config.exits[i] for i in self.active}
        taps = self._taps(params, [*(e.layer for e in exits.values()), depth], batch)

        def features_of(i: int, params: Params, tap: Tap) -> jax.Array:
            decoder = Decoder(self.config).bind({"params": params})
            return decoder.exit_features(i, tap, batch.positions, batch.segments)

        # What precedes the vocabulary, of all columns at once.
        decoder = Decoder(self.config).bind({"params": params})
        final = decoder.final_features(taps[depth].hidden)
        features = {}
        for i, e in exits.items():
            of_exit = functools.partial(features_of, i)
            features[i] = recomputed(of_exit, self.remat)(params, taps[e.layer])
        own = {i: decoder.exit_head(i) for i, e in exits.items() if not e.tied}
        learned = (decoder.final_head(), own), (final, features)
        given = self.exit_weights(step), (batch.targets, batch.weights)

        total, tokens = losses_over_chunks(self._piece, learned, given, self.loss_chunk)

        count = jnp.maximum(jnp.sum(batch.weights), 1.0)  # a batch of padding alone has no tokens
        metrics = {}
        for name, (entropy, correct) in tokens.items():
            metrics[f"loss/{name}"] = jnp.sum(entropy * batch.weights) / count
            metrics[f"accuracy/{name}"] = jnp.sum(correct * batch.weights) / count
        return total / count, {"loss": total / count, **metrics}

    def _piece(self, learned: Any, given: Any) -> tuple[jax.Array, dict[str, Any]]:
        """Sum over a chunk's tokens of L_final + sum_l w_l L_l; cross-entropies and what is right."""
        ((head, own), (final_BTD, features)), (weights, (targets, counted)) = learned, given
        full_BTV = vocab_logits(self.config, final_BTD, head)
        full = token_losses(full_BTV, targets)
        total = jnp.sum(full.loss * counted)
        tokens = {"final": (full.cross_entropy, full.correct)}

        # The logits of an exit are gone before those of the next one are computed.
        teacher_BTV = jax.lax.stop_gradient(full_BTV)
        for i, features_BTD in features.items():
            exit_loss = eagerly(functools.partial(self._exit_piece, i))
            loss, tokens[self.config.exits[i].name] = exit_loss(
                (own.get(i, head), features_BTD), (teacher_BTV, targets, counted)
            )
            total += weights[i] * loss
        return total, tokens

    def _exit_piece(self, index: int, learned: Any, given: Any) -> tuple[jax.Array, Any]:
        """Sum over a chunk's tokens of one exit's L_l; its cross-entropies and where it is right."""
        (head, features_BTD), (teacher_BTV, targets, counted) = learned, given
        logits = vocab_logits(self.config, features_BTD, head, self.config.exits[index].temperature)
        found = token_losses(logits, targets, confidence_weighted=self.dynamic_token_weights)
        loss = found.loss
        if self.distil:
            loss = (1 - self.distil) * loss + self.distil * imitation_loss("kl", teacher_BTV, logits)
        return jnp.sum(loss * counted), (found.cross_entropy, found.correct)


def check_exits(config: ModelConfig) -> None:
    """Raises ValueError for a model without exits."""
    if not config.exits:
        raise ValueError("config.exits=(): attach exits first, with el.attach_exits or a run's `exits`")


def split_exits(params: Params, exits: Sequence[ExitConfig]) -> tuple[Params, Params]:
    """Splits parameters for methods that leave the backbone as it is.

    Args:
      params: of the model.
      exits: those that train.

    Returns:
      (parameters of these exits, all other parameters).

    Raises:
      ValueError: the exits own no parameters.
    """
    names = {e.name for e in exits}
    trainable = {name: tree for name, tree in params.items() if name in names}
    if not trainable:  # a tied `embedding` exit reads the model's table and has no norm
        layers = tuple(e.layer for e in exits)
        raise ValueError(
            f"exits after layers {layers}: tied `embedding` exits own nothing to train; untie them, give "
            "them a gate, or choose another kind"
        )
    return trainable, {name: tree for name, tree in params.items() if name not in names}
