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

With `candidates`, p and q of kl are estimated from a part of the vocabulary (`depth.vocabulary_sample`); its
products are most of what a step costs where vocabularies are large.

What the frozen layers compute may be kept (`cached_batches`) and read again for many epochs, which then cost
the exits alone. Balcony is a tied `block` exit with `kl`.

Papers: Self-Supervised Early Exits, arXiv 2407.21082; Balcony, arXiv 2503.05005; CALM (gates),
arXiv 2207.07061.
"""

import dataclasses
import functools
import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, get_args

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from elastic_lm.config.checks import (
    AT_LEAST_1,
    NOT_NEGATIVE,
    require,
    require_choice,
    require_defaults,
    require_each,
)
from elastic_lm.config.model import ExitConfig, ModelConfig
from elastic_lm.data.batch import Batch
from elastic_lm.depth.cached_taps import CachedBatches, Taps, read_taps
from elastic_lm.depth.ee_tuning import check_exits, split_exits
from elastic_lm.depth.fitting import FIT_TOKENS, above_chance, fit_state
from elastic_lm.depth.vocabulary_sample import RANDOM_SHARE, columns, likeliest, nearness
from elastic_lm.models.decoder import Decoder, Params, vocab_logits
from elastic_lm.models.sharding import batch_sharding
from elastic_lm.processes import host_rows
from elastic_lm.train.losses import (
    LOSS_CHUNK,
    Metrics,
    Objective,
    eagerly,
    imitation_loss,
    losses_over_chunks,
)
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
    candidates: int = 0  # kl: columns of the vocabulary that a step reads, the rest is estimated; 0 = all
    alpha: float = 0.9  # penalised: share of imitation
    balance_gates: bool = True  # tokens where the exit is right, and wrong, weigh the same for its gate
    cached_batches: int = 0  # batches that pass the frozen layers once, and train for many epochs; 0 = none
    fit_tokens: int = FIT_TOKENS  # of the text that exits with init="fit" are fitted on before

    def __post_init__(self) -> None:
        require_choice("method.objective", self.objective, get_args(Objective))
        require_each(self, "method.", ("top_k", "candidates", "cached_batches"), *NOT_NEGATIVE)
        require_each(self, "method.", ("fit_tokens",), *AT_LEAST_1)
        require(0 <= self.alpha <= 1, "method.alpha", self.alpha, "must be in [0, 1]")
        require(
            not (self.top_k and self.candidates),
            "method.top_k",
            self.top_k,
            f"not read with method.candidates={self.candidates}; set one of them to 0",
        )
        for field, objective in (("top_k", "kl"), ("candidates", "kl"), ("alpha", "penalised")):
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
    seed: int = 0  # of the columns that are drawn
    loss_chunk: int = LOSS_CHUNK  # columns of logits alive at once, of the full model and of one exit

    def __post_init__(self) -> None:
        super().__post_init__()
        check_exits(self.config)
        gated = tuple(e.layer for e in self.config.exits if e.gate)
        if gated and self.candidates:
            raise ValueError(
                f"method.candidates={self.candidates}: the exits after layers {gated} have gates, which "
                "learn whether the exit's choice among all tokens is right; set it to 0"
            )

    def split(self, params: Params) -> tuple[Params, Params]:
        """The exits and their gates train, everything else is frozen.

        Raises:
          ValueError: the exits own no parameters.
        """
        return split_exits(params, self.config.exits)

    def for_evaluation(self) -> "SelfSupervisedExits":
        """The same method, which reads the whole vocabulary."""
        return dataclasses.replace(self, candidates=0)

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
        return CachedBatches(cache_taps(self, frozen, data.placed(first), data.mesh), data.seed)

    def begin(self, state: TrainState, frozen: Params, data: RunData) -> TrainState:
        """Fits the exits that ask for it (`depth.fitting`), to cached batches where there are any."""
        cached = data.read.taps if isinstance(data.read, CachedBatches) else iter(data.train)
        fitted = fit_state(self.config, state.params, frozen, data.placed(cached), self.fit_tokens)
        return dataclasses.replace(state, params=fitted)

    def remark(self, metrics: Mapping[str, float]) -> str:
        """What to do about exits that start above chance (`depth.fitting`)."""
        return above_chance(self.config, metrics)

    def loss(
        self, trainable: Params, frozen: Params, batch: Batch | Taps, step: jax.Array
    ) -> tuple[jax.Array, Metrics]:
        """Mean over the exits of what they and their gates have to learn, in nats per counted token.

        Args:
          trainable: first result of `split`; the only parameters with a gradient.
          frozen: second result of `split`.
          batch: packed tokens and weights, targets are not read; or what the frozen layers gave for them.
          step: int32 scalar; decides which columns of the vocabulary are drawn.

        Returns:
          (scalar float32, metrics `loss`, for every exit `loss/exit_<layer>` and `agreement/exit_<layer>`
          with the full model, for every gate `gate_loss/exit_<layer>` and `gate_accuracy/exit_<layer>`). With
          `candidates`, the agreement is among the tokens that are read, and so an upper bound.
        """
        # Whether a batch holds taps is static: batches and taps compile to programs of their own.
        taps = batch if isinstance(batch, Taps) else self.taps(frozen, batch)
        return self.loss_from_taps(trainable, frozen, taps, step)

    def taps(self, frozen: Params, batch: Batch) -> Taps:
        """Runs the frozen layers, once, for all exits and the full model.

        Args:
          frozen: second result of `split`.
          batch: packed tokens and weights; targets are not read.

        Returns:
          What the exits and the full model's head read, in the dtype of activations.
        """
        return self.sampled(frozen, read_taps(self.config, jax.lax.stop_gradient(frozen), batch))

    def sampled(self, frozen: Params, taps: Taps) -> Taps:
        """Adds the tokens whose columns of the vocabulary steps read, where `candidates` limits them.

        Args:
          frozen: second result of `split`.
          taps: what the frozen layers gave for a batch.
        """
        rows, vocab = taps.features.shape[0], self.config.vocab_size
        if not 0 < self.candidates < vocab:
            return taps
        count = min(max(1, (self.candidates - self._drawn()) // rows), vocab)
        head = Decoder(self.config).bind({"params": frozen}).final_head()

        def of_row(features_TD: jax.Array) -> jax.Array:
            # A row whose length is no multiple of a chunk is filled up with its last column, which adds none.
            filled = jnp.pad(features_TD, [(0, -len(features_TD) % self.loss_chunk), (0, 0)], mode="edge")
            chunks = filled.reshape(-1, self.loss_chunk, filled.shape[1])
            near = jax.lax.map(lambda x: nearness(vocab_logits(self.config, x[None], head)[0]), chunks)
            return likeliest(jnp.max(near, axis=0)[None], count)[0]

        # Logits of one row and one chunk of columns at a time.
        return dataclasses.replace(taps, likeliest=jax.lax.map(of_row, taps.features))

    def _drawn(self) -> int:
        """R, columns that are drawn."""
        return max(1, self.candidates // RANDOM_SHARE)

    def loss_from_taps(
        self, trainable: Params, frozen: Params, taps: Taps, step: jax.Array | int = 0
    ) -> tuple[jax.Array, Metrics]:
        """`loss` without running the frozen layers.

        Args:
          trainable: first result of `split`; the only parameters with a gradient.
          frozen: second result of `split`.
          taps: what the frozen layers gave for a batch, from `taps`.
          step: as in `loss`.

        Returns:
          As `loss`.
        """
        params = {**jax.lax.stop_gradient(frozen), **trainable}
        decoder = Decoder(self.config).bind({"params": params})
        exits = self.config.exits

        # What precedes the vocabulary: features of all columns at once. A gate does not train the features.
        taps = jax.lax.stop_gradient(taps)
        features = [
            decoder.exit_features(i, taps.tap(i), taps.positions, taps.segments) for i in range(len(exits))
        ]
        gates = [
            decoder.exit_gate(i, jax.lax.stop_gradient(x)) if exits[i].gate else None
            for i, x in enumerate(features)
        ]
        own = [None if e.tied else decoder.exit_head(i) for i, e in enumerate(exits)]
        teacher_head, offsets = decoder.final_head(), None
        if taps.likeliest is not None:
            key = jax.random.fold_in(jax.random.key(self.seed), step)
            part = columns(taps.likeliest, self.config.vocab_size, self._drawn(), key)
            teacher_head, offsets = teacher_head.rows(part.ids), part.offsets
            own = [None if head is None else head.rows(part.ids) for head in own]

        # Logits exist for one chunk of columns only: the teacher's, once for all exits, and those of an exit.
        def divergence(learned: tuple[Any, Any], given: tuple[Any, Any]) -> tuple[jax.Array, Any]:
            (own, features), ((teacher_head, offsets), (teacher_BTD, weights)) = learned, given
            teacher = vocab_logits(self.config, teacher_BTD, teacher_head)
            total, tokens = jnp.zeros((), jnp.float32), []
            for e, x, head in zip(exits, features, own, strict=True):
                imitate = eagerly(functools.partial(self._imitate, e))
                loss, found = imitate((head, x), (teacher_head, offsets, teacher, weights))
                total, tokens = total + loss, [*tokens, found]
            return total, tokens

        given = (teacher_head, offsets), (taps.features, taps.weights)
        total, tokens = losses_over_chunks(
            divergence, (own, features), jax.lax.stop_gradient(given), self.loss_chunk
        )

        count = jnp.maximum(jnp.sum(taps.weights), 1.0)  # a batch of padding alone has no tokens
        total, metrics = total / count, {}
        for e, gate, (loss, right) in zip(exits, gates, tokens, strict=True):
            metrics[f"loss/{e.name}"] = jnp.sum(loss * taps.weights) / count
            metrics[f"agreement/{e.name}"] = jnp.sum(right * taps.weights) / count
            if gate is not None:
                gate_loss, correct = self._gate_loss(gate, right, taps.weights)
                total += gate_loss
                metrics |= {f"gate_loss/{e.name}": gate_loss, f"gate_accuracy/{e.name}": correct}
        total /= len(exits)
        return total, {"loss": total, **metrics}

    def _imitate(self, e: ExitConfig, learned: Any, given: Any) -> tuple[jax.Array, Any]:
        """sum_t weight_t L_t of one exit over a chunk of columns, L [B, T], and where it is right [B, T]."""
        (head, features_BTD), (teacher_head, offsets_V, teacher_BTV, weights_BT) = learned, given
        head = teacher_head if head is None else head
        student = vocab_logits(self.config, features_BTD, head, e.temperature)
        # Every exit shares the arg max of the full model; one of its own would take as long as the softmax.
        choice_BT = jnp.argmax(teacher_BTV, axis=-1)
        chosen = jnp.take_along_axis(student, choice_BT[..., None], axis=-1)[..., 0]
        right = chosen >= jnp.max(student, axis=-1)
        if offsets_V is not None:
            student, teacher_BTV = student + offsets_V, teacher_BTV + offsets_V
        loss = imitation_loss(self.objective, teacher_BTV, student, self.top_k, self.alpha)
        return jnp.sum(loss * weights_BT), (loss, right)

    def _gate_loss(
        self, gate_BT: jax.Array, right_BT: jax.Array, weights_BT: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """G of one exit, and the share of the tokens where its gate, cut at 1/2, is correct."""
        entropy = gate_cross_entropy(gate_BT, right_BT) * weights_BT
        count = jnp.maximum(jnp.sum(weights_BT), 1.0)
        correct = jnp.sum(weights_BT * ((gate_BT > 0.5) == right_BT)) / count
        if not self.balance_gates:
            return jnp.sum(entropy) / count, correct

        right, wrong = jnp.sum(weights_BT * right_BT), jnp.sum(weights_BT * ~right_BT)
        right_mean = jnp.sum(entropy * right_BT) / jnp.maximum(right, 1.0)
        wrong_mean = jnp.sum(entropy * ~right_BT) / jnp.maximum(wrong, 1.0)
        # Half of each where a batch has right and wrong tokens, all of the one that it has otherwise.
        kinds = jnp.maximum((right > 0).astype(jnp.float32) + (wrong > 0), 1.0)
        return (right_mean + wrong_mean) / kinds, correct


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


def cache_taps(
    method: SelfSupervisedExits, frozen: Params, batches: Iterable[Batch], mesh: Mesh | None = None
) -> list[Taps]:
    """Runs the frozen layers over the data, once.

    Args:
      method: which exits; static.
      frozen: second result of `split`.
      batches: what to run them over.
      mesh: where the batches are; needed where several processes have parts of it.

    Returns:
      One `Taps` of host (numpy) arrays per batch, in the dtype of activations: for every token D numbers
      for the full model and D to 2 D per exit. Of several processes each keeps the rows of its own devices.
    """
    if jax.process_count() > 1 and mesh is not None:
        run = jax.jit(method.taps, out_shardings=batch_sharding(mesh))
    else:
        run = jax.jit(method.taps)
    return [jax.tree.map(host_rows, run(frozen, batch)) for batch in batches]
