"""Training an encoder-decoder model on pairs of texts (T5, arXiv 1910.10683, sec. 2.1 and 3.1.2).

With z the logits of the target y given the source and the target before, N the number of counted tokens, p
and q the teacher's and the model's softmax at temperature T:

    L = (1/N) sum_t [(1 - d) CE(z_t, y_t) + d T^2 KL(p_t || q_t) + c logsumexp(z_t)^2]

The last term keeps the offset of the logits near 0 (c = 1e-4 in T5's own code). Cross-entropy alone leaves
that free, and energies move with it (E-LANG, arXiv 2203.00748).
"""

import dataclasses

import flax.struct
import jax
import jax.numpy as jnp

from elastic_lm.config.checks import require
from elastic_lm.config.encoder_decoder import EncoderDecoderConfig
from elastic_lm.models.decoder import Params
from elastic_lm.models.encoder_decoder import EncoderDecoder
from elastic_lm.train.losses import LOSS_CHUNK, Metrics, sum_over_chunks
from elastic_lm.train.method import TEACHER, Finished, Method, RunData
from elastic_lm.train.tasks.config import TaskTuningConfig


@flax.struct.dataclass
class PairBatch:
    """Padded pairs.

    Attributes:
      source: [B, S] int32.
      source_mask: [B, S] bool, True for tokens that count.
      target_in: [B, T] int32, the target shifted right behind the start token.
      target: [B, T] int32.
      weights: [B, T] float32, how much each target token counts (0 = padding).
    """

    source: jax.Array
    source_mask: jax.Array
    target_in: jax.Array
    target: jax.Array
    weights: jax.Array


@flax.struct.dataclass
class PairSums:
    """Weighted sums over the target tokens of a batch.

    Attributes:
      cross_entropy: in nats.
      divergence: KL(teacher || model) at the temperature, in nats.
      offset: squared logsumexp of the logits.
      correct: weight where the arg max is the target.
    """

    cross_entropy: jax.Array
    divergence: jax.Array
    offset: jax.Array
    correct: jax.Array


@dataclasses.dataclass(frozen=True)
class SequenceToSequence(TaskTuningConfig, Method[PairBatch]):
    """Trains every parameter of an encoder-decoder but a head on its encoder (T5, arXiv 1910.10683)."""

    section = TaskTuningConfig
    batch = PairBatch

    config: EncoderDecoderConfig  # the model; static
    teacher: EncoderDecoderConfig | None = None  # what is distilled, its parameters under `TEACHER`; static
    loss_chunk: int = LOSS_CHUNK  # target positions per row whose logits are alive at once

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.loss_chunk >= 1, "loss_chunk", self.loss_chunk, "must be at least 1")

        require(
            (self.teacher is None) == (self.distil == 0),
            "method.distil",
            self.distil,
            "give a teacher exactly where distil is above 0",
        )

        if self.teacher is not None:
            theirs, ours = self.teacher.vocab_size, self.config.vocab_size
            require(theirs == ours, "teacher.vocab_size", theirs, f"must be the student's, {ours}")

    def split(self, params: Params) -> tuple[Params, Params]:
        """(all parameters but those of a head on the encoder, that head and the teacher's parameters).

        A bias of the logits stays as it is too: in transformers it is no parameter.
        """
        stay = ("encoder_head", "logits_bias", TEACHER)
        frozen = {name: tree for name, tree in params.items() if name in stay}
        return {name: tree for name, tree in params.items() if name not in frozen}, frozen

    def for_evaluation(self) -> "SequenceToSequence":
        """The task's own loss, without a teacher."""
        return dataclasses.replace(self, teacher=None, distil=0.0, z_loss=0.0)

    def finish(self, params: Params, data: RunData) -> Finished:
        """The model without its teacher."""
        return Finished({name: tree for name, tree in params.items() if name != TEACHER})

    def loss(
        self, trainable: Params, frozen: Params, batch: PairBatch, step: jax.Array
    ) -> tuple[jax.Array, Metrics]:
        """L in nats per counted token (see the top of this file).

        Args:
          trainable: first result of `split`.
          frozen: second result of `split`.
          batch: padded pairs.
          step: not used.

        Returns:
          (scalar float32, metrics `loss`, `cross_entropy`, `accuracy`, with a teacher also `divergence`).
        """
        sums = self._sums(trainable, frozen, batch)
        count = jnp.maximum(jnp.sum(batch.weights), 1.0)
        entropy, divergence = sums.cross_entropy / count, sums.divergence / count
        loss = (1 - self.distil) * entropy + self.distil * self.temperature**2 * divergence
        loss += self.z_loss * sums.offset / count
        metrics = {"loss": loss, "cross_entropy": entropy, "accuracy": sums.correct / count}
        return loss, metrics if self.teacher is None else {**metrics, "divergence": divergence}

    def _sums(self, trainable: Params, frozen: Params, batch: PairBatch) -> PairSums:
        """Sums over the batch; the logits of `loss_chunk` positions per row are in memory at once."""
        own = {name: tree for name, tree in frozen.items() if name != TEACHER}
        model = EncoderDecoder(self.config).bind({"params": {**own, **trainable}})
        hidden = _decoded(model, batch)
        arrays = {"hidden": hidden, "target": batch.target, "weights": batch.weights}
        teacher = None
        if self.teacher is not None:
            teacher = EncoderDecoder(self.teacher).bind({"params": frozen[TEACHER]})
            arrays["taught"] = _decoded(teacher, batch)

        def one(part: dict[str, jax.Array]) -> PairSums:
            taught = None if teacher is None else teacher.logits(part["taught"])
            logits = model.logits(part["hidden"])
            return pair_sums(logits, part["target"], part["weights"], taught, self.temperature)

        return sum_over_chunks(one, arrays, self.loss_chunk)


def _decoded(model: EncoderDecoder, batch: PairBatch) -> jax.Array:
    """The decoder's output [B, T, D] for whole targets."""
    source = model.source(model.encode(batch.source, batch.source_mask), batch.source_mask)
    return model.decode(batch.target_in, source)


def pair_sums(
    logits_BTV: jax.Array,
    target_BT: jax.Array,
    weights_BT: jax.Array,
    taught_BTV: jax.Array | None = None,
    temperature: float = 1.0,
) -> PairSums:
    """What the loss is made of.

    Args:
      logits_BTV: float32.
      target_BT: int32 tokens.
      weights_BT: float32, how much each target counts.
      taught_BTV: float32 logits of the teacher, or None.
      temperature: of the divergence.

    Returns:
      PairSums of float32 scalars; without a teacher the divergence is 0.
    """
    normaliser = jax.nn.logsumexp(logits_BTV, axis=-1)
    target = jnp.take_along_axis(logits_BTV, target_BT[..., None], axis=-1)[..., 0]

    divergence = jnp.float32(0)
    if taught_BTV is not None:
        log_p = jax.nn.log_softmax(jax.lax.stop_gradient(taught_BTV) / temperature)
        log_q = jax.nn.log_softmax(logits_BTV / temperature)
        divergence = jnp.sum(weights_BT * jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1))

    return PairSums(
        jnp.sum(weights_BT * (normaliser - target)),
        divergence,
        jnp.sum(weights_BT * jnp.square(normaliser)),
        jnp.sum(weights_BT * (target >= jnp.max(logits_BTV, axis=-1))),
    )
