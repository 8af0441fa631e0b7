"""Exits that learn from the model they sit in: no labels, the backbone frozen.

With z the full model's logits, z_i those of exit i (divided by its temperature), p = softmax(z),
q = softmax(z_i), y = arg max z, and a mean over counted tokens that never looks at their targets:

    minimise over the exits' parameters:  (1/E) sum_i (L_i + G_i)

    kl          L = sum_v p_v (log p_v - log q_v); with top_k = K over the K likeliest tokens of p only,
                both distributions renormalised there
    argmax      L = -log q_y
    penalised   L = alpha (-log q_y) + (1 - alpha) [arg max z_i != y] (log V - entropy(q))

The penalty is KL(q || uniform) on the tokens that the exit gets wrong, which are held fixed: there it is
drawn to be unsure, so that confidence tells right from wrong. The penalised loss that goes with
arXiv 2407.21082 has the same purpose; its exact form could not be verified, this one is ours.

A gate (`ExitConfig.gate`) learns whether its exit is right, from the exit's features held fixed:

    G = BCE(gate, [arg max z_i = y]);  balanced: the mean over right tokens and the mean over wrong tokens
                                       count half each, where a batch has both

What the frozen layers compute may be kept (`cached_batches`) and read again for many epochs, which then cost
the exits alone. Balcony is a tied `block` exit with `kl`.

Papers: Self-Supervised Early Exits, arXiv 2407.21082; Balcony, arXiv 2503.05005; CALM (gates),
arXiv 2207.07061.
"""

import dataclasses
import functools
import itertools
from collections.abc import Iterable, Iterator
from typing import Any, get_args

import flax.struct
import jax
import jax.numpy as jnp

from elastic_lm.config.checks import NOT_NEGATIVE, require, require_choice, require_defaults, require_each
from elastic_lm.config.model import ExitConfig, ExitKind, ModelConfig
from elastic_lm.data.batch import Batch
from elastic_lm.depth.cached_taps import CachedBatches, Taps
from elastic_lm.depth.ee_tuning import check_exits, split_exits
from elastic_lm.depth.fitting import fit_state
from elastic_lm.models.decoder import Decoder, Params, vocab_logits
from elastic_lm.nn.block import Tap
from elastic_lm.train.losses import LOSS_CHUNK, Metrics, Objective, imitation_loss, sum_over_chunks
from elastic_lm.train.method import Method, MethodConfig, RunData
from elastic_lm.train.state import TrainState


@dataclasses.dataclass(frozen=True, kw_only=True)
class SelfSupervisedConfig(MethodConfig):
    """Options of `SelfSupervisedExits`, the `method` section of a run's config.

    Raises:
      ValueError: an option is out of its range, or not read with the others; names field, value and fix.

    Example:
      ```python
      import elastic_lm as el

      method = el.depth.SelfSupervisedConfig(objective="kl", cached_batches=64)
      ```
    """

    trains_exits = True
    trains_gates = True

    name: str = "self_supervised_exits"
    objective: Objective = "kl"  # L
    top_k: int = 0  # kl: K, over the likeliest tokens of the full model only; 0 = all
    alpha: float = 0.9  # penalised: share of imitation
    balance_gates: bool = True  # tokens where the exit is right, and wrong, weigh the same for its gate
    cached_batches: int = 0  # batches that pass the frozen layers once, and train for many epochs; 0 = none

    def __post_init__(self) -> None:
        require_choice("method.objective", self.objective, get_args(Objective))
        require_each(self, "method.", ("top_k", "cached_batches"), *NOT_NEGATIVE)
        require(0 <= self.alpha <= 1, "method.alpha", self.alpha, "must be in [0, 1]")
        for field, objective in (("top_k", "kl"), ("alpha", "penalised")):
            if self.objective != objective:
                unread = f"not read with method.objective={self.objective!r}, only with {objective}; set"
                require_defaults(self, "method.", (field,), unread)


@dataclasses.dataclass(frozen=True)
class SelfSupervisedExits(SelfSupervisedConfig, Method[Batch | Taps]):
    """Trains the exits of a frozen model on the model's own predictions (arXiv 2407.21082).

    Static under `jit`; parameters, batches and the step are traced.

    Raises:
      ValueError: the model has no exits.

    Example:
      ```python
      import jax.numpy as jnp
      import elastic_lm as el
      from elastic_lm.testing import random_params, random_tokens, tiny_config

      config = tiny_config(exits=(2,))
      tokens = random_tokens(config, batch=2, length=17)
      ones = jnp.ones((2, 16), jnp.int32)
      batch = el.data.Batch(tokens[:, :-1], tokens[:, 1:], 1.0 * ones, jnp.cumsum(ones, 1) - 1, ones)

      method = el.depth.SelfSupervisedExits(config, objective="kl")
      exits, backbone = method.split(random_params(config))
      loss, metrics = method.loss(exits, backbone, batch, jnp.int32(0))
      ```
    """

    section = SelfSupervisedConfig

    config: ModelConfig  # the model with its exits; static
    loss_chunk: int = LOSS_CHUNK  # columns of logits alive at once, of the full model and of one exit

    def __post_init__(self) -> None:
        super().__post_init__()
        check_exits(self.config)

    def split(self, params: Params) -> tuple[Params, Params]:
        """The exits and their gates train, everything else is frozen.

        Raises:
          ValueError: the exits own no parameters.
        """
        return split_exits(params, self.config.exits)

    def batches(self, batches: Iterator[Any], frozen: Params, data: RunData) -> Any:
        """The data as it comes, or `cached_batches` of it as taps that come again in every epoch.

        Args:
          batches: host batches of the data, in order.
          frozen: second result of `split`.
          data: what the run reads.
        """
        if not self.cached_batches:
            return batches
        first = itertools.islice(batches, self.cached_batches)
        return CachedBatches(cache_taps(self, frozen, data.placed(first)), data.seed)

    def begin(self, state: TrainState, frozen: Params, data: RunData) -> TrainState:
        """Fits the exits that ask for it (`depth.fitting`)."""
        fitted = fit_state(self.config, state.params, frozen, data.placed(iter(data.train)))
        return dataclasses.replace(state, params=fitted)

    def loss(
        self, trainable: Params, frozen: Params, batch: Batch | Taps, step: jax.Array
    ) -> tuple[jax.Array, Metrics]:
        """Mean over the exits of what they and their gates have to learn, in nats per counted token.

        Args:
          trainable: first result of `split`; the only parameters with a gradient.
          frozen: second result of `split`.
          batch: packed tokens and weights, targets are not read; or what the frozen layers gave for them.
          step: not used.

        Returns:
          (scalar float32, metrics `loss`, for every exit `loss/exit_<layer>` and `agreement/exit_<layer>`
          with the full model, for every gate `gate_loss/exit_<layer>` and `gate_accuracy/exit_<layer>`).
        """
        # Whether a batch holds taps is static: batches and taps compile to programs of their own.
        taps = batch if isinstance(batch, Taps) else self.taps(frozen, batch)
        return self.loss_from_taps(trainable, frozen, taps)

    def taps(self, frozen: Params, batch: Batch) -> Taps:
        """Runs the frozen layers, once, for all exits and the full model.

        Args:
          frozen: second result of `split`.
          batch: packed tokens and weights; targets are not read.

        Returns:
          What the exits and the full model's head read, in the dtype of activations.
        """
        decoder = Decoder(self.config).bind({"params": jax.lax.stop_gradient(frozen)})
        depths = [*(e.layer for e in self.config.exits), self.config.n_layers]
        by_depth = decoder.taps(batch.tokens, depths, batch.positions, batch.segments)
        return Taps(
            exits=tuple({f: getattr(by_depth[e.layer], f) for f in READS[e.kind]} for e in self.config.exits),
            features=decoder.final_features(by_depth[self.config.n_layers].hidden),
            weights=batch.weights,
            positions=batch.positions,
            segments=batch.segments,
        )

    def loss_from_taps(self, trainable: Params, frozen: Params, taps: Taps) -> tuple[jax.Array, Metrics]:
        """`loss` without running the frozen layers.

        Args:
          trainable: first result of `split`; the only parameters with a gradient.
          frozen: second result of `split`.
          taps: what the frozen layers gave for a batch, from `taps`.

        Returns:
          As `loss`.
        """
        params = {**jax.lax.stop_gradient(frozen), **trainable}
        decoder = Decoder(self.config).bind({"params": params})
        exits = self.config.exits

        # What precedes the vocabulary: features of all columns at once. A gate does not train the features.
        features = [self._features(decoder, i, taps) for i in range(len(exits))]
        gates = [
            decoder.exit_gate(i, jax.lax.stop_gradient(x)) if exits[i].gate else None
            for i, x in enumerate(features)
        ]
        kernels = [decoder.exit_kernel(i) for i in range(len(exits))]
        teacher_VD = decoder.final_kernel()

        # Logits exist for one chunk of columns only: the teacher's, once for all exits, and those of an exit.
        # The backward pass computes the exits' logits again.
        def sums(piece: tuple) -> list[_ExitSums]:
            teacher_BTD, features, gates, weights = piece
            teacher = jax.lax.stop_gradient(vocab_logits(self.config, teacher_BTD, teacher_VD))
            each = zip(exits, features, kernels, gates, strict=True)
            return [
                jax.checkpoint(functools.partial(self._exit_sums, e))(x, kernel, gate, teacher, weights)
                for e, x, kernel, gate in each
            ]

        per_exit = sum_over_chunks(sums, (taps.features, features, gates, taps.weights), self.loss_chunk)

        total, metrics = jnp.zeros((), jnp.float32), {}
        for e, exit_sums in zip(exits, per_exit, strict=True):
            loss, named = self._exit_loss(e, exit_sums)
            total, metrics = total + loss / len(exits), metrics | named
        return total, {"loss": total, **metrics}

    def _features(self, decoder: Decoder, index: int, taps: Taps) -> jax.Array:
        """Features [B, T, D] of one exit."""
        stored = jax.lax.stop_gradient(taps.exits[index])
        # A `Tap` has all fields. Those that this kind of exit does not read are filled with any array.
        anything = next(iter(stored.values()))
        tap = Tap(**{f.name: stored.get(f.name, anything) for f in dataclasses.fields(Tap)})
        return decoder.exit_features(index, tap, taps.positions, taps.segments)

    def _exit_sums(
        self,
        e: ExitConfig,
        features_BTD: jax.Array,
        kernel_VD: jax.Array,
        gate_BT: jax.Array | None,
        teacher_BTV: jax.Array,
        weights_BT: jax.Array,
    ) -> "_ExitSums":
        """Sums of one exit over a chunk of columns."""
        student = vocab_logits(self.config, features_BTD, kernel_VD, e.temperature)
        loss = imitation_loss(self.objective, teacher_BTV, student, self.top_k, self.alpha)
        right = jnp.argmax(student, axis=-1) == jnp.argmax(teacher_BTV, axis=-1)

        gate_right = gate_wrong = gate_correct = jnp.zeros((), jnp.float32)
        if gate_BT is not None:
            entropy = gate_cross_entropy(gate_BT, right) * weights_BT
            gate_right, gate_wrong = jnp.sum(entropy * right), jnp.sum(entropy * ~right)
            gate_correct = jnp.sum(weights_BT * ((gate_BT > 0.5) == right))

        return _ExitSums(
            loss=jnp.sum(loss * weights_BT),
            right=jnp.sum(weights_BT * right),
            weight=jnp.sum(weights_BT),
            gate_right=gate_right,
            gate_wrong=gate_wrong,
            gate_correct=gate_correct,
        )

    def _exit_loss(self, e: ExitConfig, sums: "_ExitSums") -> tuple[jax.Array, Metrics]:
        """L + G of one exit, and its metrics."""
        count = jnp.maximum(sums.weight, 1.0)  # a batch of padding alone has no tokens
        loss = sums.loss / count
        metrics = {f"loss/{e.name}": loss, f"agreement/{e.name}": sums.right / count}
        if not e.gate:
            return loss, metrics

        gate = (sums.gate_right + sums.gate_wrong) / count
        if self.balance_gates:
            wrong = sums.weight - sums.right
            right_mean = sums.gate_right / jnp.maximum(sums.right, 1.0)
            wrong_mean = sums.gate_wrong / jnp.maximum(wrong, 1.0)
            # Half of each where a batch has right and wrong tokens, all of the one that it has otherwise.
            kinds = jnp.maximum((sums.right > 0).astype(jnp.float32) + (wrong > 0), 1.0)
            gate = (right_mean + wrong_mean) / kinds

        metrics |= {f"gate_loss/{e.name}": gate, f"gate_accuracy/{e.name}": sums.gate_correct / count}
        return loss + gate, metrics


# Fields of a `Tap` that an exit reads; the others are not cached.
READS: dict[ExitKind, tuple[str, ...]] = {
    "embedding": ("hidden",),
    "norm": ("hidden",),
    "linear": ("hidden",),
    "mlp": ("residual", "mlp_input"),
    "block": ("hidden",),
}


@flax.struct.dataclass
class _ExitSums:
    """Weighted sums over tokens for one exit, float32 scalars."""

    loss: jax.Array
    right: jax.Array  # weight of the tokens where the exit agrees with the full model
    weight: jax.Array
    gate_right: jax.Array  # the gate's cross-entropy where the exit is right
    gate_wrong: jax.Array  # the gate's cross-entropy where it is wrong
    gate_correct: jax.Array  # weight of the tokens where the gate, cut at 1/2, is correct


def gate_cross_entropy(probability: jax.Array, right: jax.Array) -> jax.Array:
    """Binary cross-entropy of a gate for every token: -log of the probability that it gives to the truth.

    Args:
      probability: [...] float32 in [0, 1], that the exit is right.
      right: [...] bool, whether the exit is right.

    Returns:
      [...] float32, in nats; finite even where the gate is certain and wrong.
    """
    # Below 1 by the smallest float32 step: log(1 - p) stays finite.
    return -jnp.where(
        right, jnp.log(jnp.maximum(probability, 1e-30)), jnp.log1p(-jnp.minimum(probability, 1 - 6e-8))
    )


def cache_taps(method: SelfSupervisedExits, frozen: Params, batches: Iterable[Batch]) -> list[Taps]:
    """Runs the frozen layers over the data, once.

    Args:
      method: which exits; static.
      frozen: second result of `split`.
      batches: what to run them over.

    Returns:
      One `Taps` of host (numpy) arrays per batch, in the dtype of activations: for every token D numbers
      for the full model and D to 2 D per exit.
    """
    run = jax.jit(method.taps)
    return [jax.device_get(run(frozen, batch)) for batch in batches]
