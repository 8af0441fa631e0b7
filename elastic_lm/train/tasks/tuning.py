"""Fine-tuning an encoder on labelled records, alone or towards a larger model's answers.

The encoder of an encoder-decoder can learn a head of its own, and nothing else (as in E-LANG).

With f the logits of a record, y its class, g the logits of the model it learns from, T a temperature:

    L = (1 - d) CE(y, f) + d T^2 KL(softmax(g/T) || softmax(f/T)) + z logsumexp(f)^2

d = 0 is plain fine-tuning (BERT, arXiv 1810.04805, sec. 4), d > 0 distillation (Hinton et al., arXiv
1503.02531, sec. 2). Neither CE nor KL sees a constant that is added to all logits, while energy does: z, of
the order of 1e-4, keeps the normaliser near 0, so that energies of different records can be compared (the
cascade of E-LANG, arXiv 2203.00748, decides by them). Regression has no z:

    L = (1 - d) (f - y)^2 + d (f - g)^2

An encoder with exits, heads of their own after layers l_i, learns sum_i w_i L_i + L, all of it or its exits
alone over layers that stay as they are (the second stage of DeeBERT, arXiv 2004.12993, and EE-Tuning, arXiv
2402.00518), which leaves L out.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from elastic_lm.config.checks import require
from elastic_lm.config.encoder import EncoderConfig
from elastic_lm.config.encoder_decoder import EncoderDecoderConfig
from elastic_lm.models.encoder import Encoder, exit_name
from elastic_lm.models.encoder_decoder import EncoderDecoder
from elastic_lm.train.losses import Metrics
from elastic_lm.train.method import TEACHER, Finished, Method, MethodConfig, RunData, options
from elastic_lm.train.tasks.answers import answers_of, check_same_answers, load_of
from elastic_lm.train.tasks.config import TaskTuningConfig
from elastic_lm.train.tasks.seq2seq import SequenceToSequence

HEAD = ("pooler", "head")  # keys of what a task's head is made of
ENCODER_HEAD = ("encoder_head",)  # likewise, of an encoder-decoder
Params = Mapping[str, Any]
Config = EncoderConfig | EncoderDecoderConfig


@flax.struct.dataclass
class TaskBatch:
    """Padded records with their targets.

    Attributes:
      tokens: [B, T] int32.
      mask: [B, T] bool, False where a row is filled up.
      types: [B, T] int32, 0 for the first text of a pair and 1 for the second.
      targets: [B] int32 classes, or float32 numbers of a regression.
      weights: [B] float32, how much each record counts (0 = filled up).
    """

    tokens: jax.Array
    mask: jax.Array
    types: jax.Array
    targets: jax.Array
    weights: jax.Array


@dataclasses.dataclass(frozen=True)
class TaskTuning(TaskTuningConfig, Method[TaskBatch]):
    """Trains an encoder with a task head, or parts of it (BERT, arXiv 1810.04805; DeeBERT, 2004.12993).

    Example:
      ```python
      import elastic_lm as el

      shape = {"vocab_size": 64, "d_model": 16, "n_layers": 2, "n_heads": 2, "d_mlp": 32, "n_labels": 2}
      config = el.EncoderConfig(**shape)
      method = el.train.TaskTuning(config, tuned="head")
      trainable, frozen = method.split(el.testing.random_params(config))
      assert trainable.keys() == {"pooler", "head"}
      ```
    """

    section = TaskTuningConfig
    batch = TaskBatch

    config: Config  # the model; static
    teacher: Config | None = None  # the model that it learns from; static

    def __post_init__(self) -> None:
        super().__post_init__()

        require(
            isinstance(self.config, EncoderConfig) or self.tuned == "head",
            "method.tuned",
            self.tuned,
            "must be 'head' for an encoder-decoder, whose decoder has no part in the loss",
        )

        require(
            self.tuned != "exits" or bool(self.exits),
            "method.tuned",
            self.tuned,
            "the model has no exits; name their layers in exits",
        )

        require(
            len(self.exit_weights) in (0, len(self.exits)),
            "method.exit_weights",
            self.exit_weights,
            f"needs one weight for each of the exits {self.exits or 'none'} that train, or none at all",
        )

    @classmethod
    def create(
        cls, section: MethodConfig, model: Config, params: Any, train: Any, mesh: Mesh
    ) -> "tuple[Method[Any], Any]":
        """The method for a model and, under `TEACHER`, the parameters of the model that it learns from.

        Raises:
          FileNotFoundError: there is no such teacher.
          ValueError: the teacher answers another task, or is of another kind; names the field.
        """
        assert isinstance(section, TaskTuningConfig)
        writes = isinstance(model, EncoderDecoderConfig) and section.tuned != "head"
        method: Any = SequenceToSequence if writes else cls

        teacher = None
        if section.teacher_from:
            field, folder = "method.teacher_from", section.teacher_from
            teacher, theirs = load_of(type(model), field, folder, None, mesh)
            # A writer's divergence is over its vocabulary, whatever task its teacher answers.
            if not writes:
                check_same_answers(field, folder, teacher, model)

            require(
                teacher.vocab_size == model.vocab_size,
                field,
                folder,
                f"reads {teacher.vocab_size} token ids, not {model.vocab_size}: both models need one "
                "tokenizer",
            )

            params = {**params, TEACHER: theirs}
        return method(model, teacher, **options(method, section, train)), params

    @property
    def exits(self) -> tuple[int, ...]:
        """Layers whose exits train."""
        if isinstance(self.config, EncoderDecoderConfig) or self.tuned == "head":
            return ()
        return self.config.exits

    def split(self, params: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Everything trains but the teacher, which is under `TEACHER`; or only the head, or the exits."""
        head = HEAD if isinstance(self.config, EncoderConfig) else ENCODER_HEAD
        parts = {
            "all": [name for name in params if name != TEACHER],
            "head": [name for name in params if name in head],
            "exits": [exit_name(layer) for layer in self.exits],
        }
        trains = parts[self.tuned]
        frozen = {name: tree for name, tree in params.items() if name not in trains}
        return {name: params[name] for name in trains}, frozen

    def for_evaluation(self) -> "TaskTuning":
        """The task's own loss, without a teacher."""
        return dataclasses.replace(self, teacher=None, distil=0.0, z_loss=0.0)

    def finish(self, params: Any, data: RunData) -> Finished:
        """The model without its teacher."""
        return Finished({name: tree for name, tree in params.items() if name != TEACHER})

    def loss(
        self, trainable: Params, frozen: Params, batch: TaskBatch, step: jax.Array
    ) -> tuple[jax.Array, Metrics]:
        """Mean loss per counted record (see the top of this file).

        Args:
          trainable: first result of `split`.
          frozen: second result of `split`.
          batch: records.
          step: not used.

        Returns:
          (scalar float32, metrics `loss`, and where classes are told apart `accuracy` of the head and
          `accuracy/exit_<layer>` of exits, of those that are in the loss).
        """
        teacher_BC = None
        if self.teacher is not None:
            teacher_BC = jax.lax.stop_gradient(task_logits(self.teacher, frozen[TEACHER], batch))

        classes = answers_of(self.config)[0] == "classification"
        count = jnp.maximum(jnp.sum(batch.weights), 1.0)
        total_B, metrics = jnp.zeros_like(batch.weights), {}
        for name, (weight, logits_BC) in self._heads({**frozen, **trainable}, batch).items():
            total_B += weight * self._loss(logits_BC, teacher_BC, batch)
            if classes:
                right_B = jnp.argmax(logits_BC, axis=-1) == batch.targets
                metrics[f"accuracy{name}"] = jnp.sum(right_B * batch.weights) / count

        loss = jnp.sum(total_B * batch.weights) / count
        return loss, {"loss": loss, **metrics}

    def _heads(self, params: Params, batch: TaskBatch) -> dict[str, tuple[float, jax.Array]]:
        """Weight and [B, C] logits of every head in the loss, by the suffix of its metrics' names."""
        if not self.exits:
            return {"": (1.0, task_logits(self.config, params, batch))}

        names = [f"/{exit_name(layer)}" for layer in self.exits]
        weights = self.exit_weights or (1.0,) * len(names)
        whole = self.tuned == "all"
        logits = exit_logits(self.config, params, batch, last=whole)
        if whole:
            names, weights = [*names, ""], (*weights, 1.0)
        return dict(zip(names, zip(weights, logits, strict=True), strict=True))

    def _loss(self, logits_BC: jax.Array, teacher_BC: jax.Array | None, batch: TaskBatch) -> jax.Array:
        """[B] L of one head."""
        loss_B = (1 - self.distil) * task_loss(self.config, logits_BC, batch.targets)
        if teacher_BC is not None:
            loss_B += self.distil * distance(self.config, teacher_BC, logits_BC, self.temperature)
        if self.z_loss:
            loss_B += self.z_loss * jnp.square(jax.nn.logsumexp(logits_BC, axis=-1))
        return loss_B


def task_logits(config: Config, params: Params, batch: TaskBatch) -> jax.Array:
    """[B, C] float32 logits of a task head; an encoder-decoder is not decoded."""
    own = {name: tree for name, tree in params.items() if name != TEACHER}
    if isinstance(config, EncoderDecoderConfig):
        model = EncoderDecoder(config).bind({"params": own})
        return model.encoder_logits(model.encode(batch.tokens, batch.mask), batch.mask)
    output: Any = Encoder(config).apply({"params": own}, batch.tokens, batch.mask, known_types(config, batch))
    return output.logits


def exit_logits(config: Config, params: Params, batch: TaskBatch, *, last: bool = True) -> list[jax.Array]:
    """[B, C] float32 logits of an encoder's exits, in order, and of its head.

    Args:
      config: an encoder with exits; static.
      params: its parameters, and maybe a teacher's.
      batch: records.
      last: with the head; else nothing above the last exit runs. Static.
    """
    assert isinstance(config, EncoderConfig)
    own = {name: tree for name, tree in params.items() if name != TEACHER}
    encoder = Encoder(config).bind({"params": own})
    return encoder.all_logits(batch.tokens, batch.mask, known_types(config, batch), last=last)


def known_types(config: EncoderConfig, batch: TaskBatch) -> jax.Array:
    """[B, T] token types; a model that knows fewer types than a pair has reads its last one for the rest."""
    return jnp.minimum(batch.types, max(config.type_vocab_size - 1, 0))


def task_loss(config: Config, logits_BC: jax.Array, targets_B: jax.Array) -> jax.Array:
    """[B] float32: cross-entropy in nats, or squared error of a regression."""
    if answers_of(config)[0] == "regression":
        return jnp.square(logits_BC[:, 0] - targets_B)
    chosen_B = jnp.take_along_axis(logits_BC, targets_B[:, None], axis=-1)[:, 0]
    return jax.nn.logsumexp(logits_BC, axis=-1) - chosen_B


def distance(config: Config, teacher_BC: jax.Array, logits_BC: jax.Array, temperature: float) -> jax.Array:
    """[B] float32: T^2 KL(softmax(g/T) || softmax(f/T)) in nats, or squared difference of a regression."""
    if answers_of(config)[0] == "regression":
        return jnp.square(logits_BC[:, 0] - teacher_BC[:, 0])
    aim, own = (jax.nn.log_softmax(x / temperature) for x in (teacher_BC, logits_BC))
    return temperature**2 * jnp.sum(jnp.exp(aim) * (aim - own), axis=-1)
