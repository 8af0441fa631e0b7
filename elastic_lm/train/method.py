"""What a training method is: its options, what it trains, and on which loss.

A method owns everything that only it needs. A run (`train.run.fit`) calls it in this order:

    create             makes the method for a model, and adds parameters of its own (a teacher's)
    split              says which parameters train, and which are frozen
    parameter_groups   names the parameters that the optimizer treats differently
    for_evaluation     gives the method whose loss is measured on held-out data
    batches            gives what the steps read: the data as it comes, or what the method makes of it
    begin              changes the state, at the first start of a run alone (neurons sorted by importance)
    loss               of one batch; compiled with its gradient, and run in every step
    remark             says what the first line of metrics should make the user do
    finish             separates the model from what only training needed, and names files to save beside it

A new method is a file with two classes, a `MethodConfig` (the `method` section of a run's config) and a
`Method`, and one row in `train.registry`, or a call of `train.registry.register` from outside the package.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, Generic, Literal, Self, TypeVar

import grain
import jax
import numpy as np
from jax.sharding import Mesh

from elastic_lm.config.checks import require
from elastic_lm.config.subnet import Menu
from elastic_lm.data.batch import Batch
from elastic_lm.data.sharded import ShardedBatches
from elastic_lm.models.decoder import Params
from elastic_lm.train import registry
from elastic_lm.train.losses import Metrics
from elastic_lm.train.state import TrainState

Arrays = Mapping[str, np.ndarray]
AnyBatch = TypeVar("AnyBatch")

TEACHER = "teacher"  # top-level key of the parameters of a frozen teacher


@dataclasses.dataclass(frozen=True, kw_only=True)
class MethodConfig:
    """Options of a training method, the `method` section of a run's config; a method's own class adds fields.

    Attributes:
      name: of the method, a row of `train.registry`; static, like every option.

    Example:
      ```python
      import dataclasses

      import elastic_lm as el


      @dataclasses.dataclass(frozen=True, kw_only=True)
      class NormOnlyConfig(el.train.MethodConfig):
          name: str = "norm_only"
          smoothing: float = 0.0


      assert NormOnlyConfig(smoothing=0.1).name == "norm_only"
      ```
    """

    name: str

    data: ClassVar[Literal["text", "records"]] = "text"  # whether runs have a `data` or a `task` section
    trains_exits: ClassVar[bool] = False  # exit heads of the model may take part
    trains_gates: ClassVar[bool] = False  # and so may their gates

    @classmethod
    def resolve(cls, values: Any, where: str) -> type["MethodConfig"]:
        """The class of the options that `values` names.

        Args:
          values: a mapping with the key `name`.
          where: path of the section, for messages.

        Raises:
          ValueError: there is no name, or no method of that name.
        """
        name = values.get("name") if isinstance(values, Mapping) else None
        choices = ", ".join(registry.names())
        require(isinstance(name, str), where, values, f"must be a mapping with a name: one of {choices}")
        return registry.method_class(str(name)).section

    def check(self, run: Any) -> None:
        """Refuses the other sections of a run that these options do not go with.

        Args:
          run: a `RunConfig` or `TaskRun`.

        Raises:
          ValueError: names field, value and fix.
        """


@dataclasses.dataclass(frozen=True)
class RunData:
    """What a run reads.

    Attributes:
      train: batches without an end, from the beginning with every `iter`.
      held_out: makes one pass over the held-out batches; none where no held-out data is named.
      mesh: where batches go.
      place: puts a host batch on the mesh.
      seed: of the order of the data.
      read: what the steps read, from `Method.batches`, once it is there.
    """

    train: grain.IterDataset | ShardedBatches
    held_out: Callable[[], Iterable[Arrays]]
    mesh: Mesh
    place: Callable[[Any, Mesh], Any]
    seed: int
    read: Any = None

    def placed(self, batches: Iterable[Any]) -> Iterator[Any]:
        """Host batches on the mesh, one after the other."""
        return (self.place(batch, self.mesh) for batch in batches)


@dataclasses.dataclass(frozen=True)
class Finished:
    """What training leaves.

    Attributes:
      params: the model's own parameters, in the form that they trained in.
      menu: the widths that the model is elastic for; None = those of the checkpoint that it began with.
      beside: writes more files into the model's folder; None = nothing.
    """

    params: Params
    menu: Menu | None = None
    beside: Callable[[Path], None] | None = None


@dataclasses.dataclass(frozen=True)
class ParameterGroup:
    """Parameters that AdamW updates without weight decay, whichever optimizer the run has.

    Attributes:
      names: top-level keys of the trainable parameters.
      lr: their learning rate, as a multiple of the run's.
    """

    names: tuple[str, ...]
    lr: float = 1.0


class Method(Generic[AnyBatch]):
    """Base of training methods. Subclasses are frozen dataclasses, static under `jit`.

    The fields of a subclass are `config` (of the model), those of its `section`, and any of the run-wide
    options `seed`, `steps`, `loss_chunk` and `remat` that it reads.

    Example:
      ```python
      import dataclasses

      import jax.numpy as jnp

      import elastic_lm as el


      @dataclasses.dataclass(frozen=True)
      class SmallLogits(el.train.PretrainingConfig, el.train.Method):
          section = el.train.PretrainingConfig
          config: el.ModelConfig

          def loss(self, trainable, frozen, batch, step):
              loss = jnp.mean(el.Decoder(self.config).apply({"params": trainable}, batch.tokens).logits ** 2)
              return loss, {"loss": loss}


      method = SmallLogits(el.testing.tiny_config())
      assert method.split({"embed": {}}) == ({"embed": {}}, {})  # everything trains
      ```
    """

    section: ClassVar[type[MethodConfig]]  # class of the options
    batch: ClassVar[type] = Batch  # what the arrays of a host batch become

    config: Any

    @classmethod
    def create(
        cls, section: MethodConfig, model: Any, params: Params, train: Any, mesh: Mesh
    ) -> tuple[Self, Params]:
        """The method that the options describe, for a model.

        Args:
          section: the options, of the class `cls.section`.
          model: config of the model, with its exits.
          params: its parameters, on the mesh.
          train: the run's `TrainConfig`.
          mesh: where parameters live.

        Returns:
          (method, `params` and what the method adds to them).

        Raises:
          ValueError: the options do not fit the model; names field, value and fix.
        """
        return cls(config=model, **options(cls, section, train)), params  # pyright: ignore[reportCallIssue]

    def split(self, params: Params) -> tuple[Params, Params]:
        """Splits parameters into (trainable, frozen), two trees with disjoint top-level keys."""
        return params, {}

    def parameter_groups(self) -> tuple[ParameterGroup, ...]:
        """Parameters that the optimizer treats differently from the rest."""
        return ()

    def for_evaluation(self) -> "Method[Any]":
        """The method whose loss held-out data is measured with."""
        return self

    def batches(self, batches: Iterator[Any], frozen: Params, data: RunData) -> Any:
        """What the training steps read; it has `get_state` and `set_state`, so that a run can resume.

        Args:
          batches: host batches of the data, in order.
          frozen: second result of `split`.
          data: what the run reads.

        Raises:
          ValueError: the method needs data that the run lacks.
        """
        return batches

    def begin(self, state: TrainState, frozen: Params, data: RunData) -> TrainState:
        """Changes the state of a run at its first start.

        Args:
          state: at step 0, on the mesh.
          frozen: second result of `split`.
          data: what the run reads, with what `batches` made of it.
        """
        return state

    def loss(
        self, trainable: Params, frozen: Params, batch: AnyBatch, step: jax.Array
    ) -> tuple[jax.Array, Metrics]:
        """What is minimised; pure and traced.

        Args:
          trainable: first result of `split`; the gradient is taken with respect to it.
          frozen: second result of `split`.
          batch: rows, with the `weights` of what counts.
          step: int32 scalar, optimizer steps done; the largest int32 in evaluation.

        Returns:
          (scalar float32, float32 scalars by name), each per counted token or row of the batch.
        """
        raise NotImplementedError(f"{type(self).__name__} has no loss")

    def remark(self, metrics: Mapping[str, float]) -> str:
        """What a user should know who starts a run whose first metrics are these; "" = nothing.

        Args:
          metrics: means over the steps of the first line that is logged.
        """
        return ""

    def finish(self, params: Params, data: RunData) -> Finished:
        """Separates the model from what only training needed.

        Args:
          params: everything, trained and frozen.
          data: what the run reads.
        """
        return Finished(params)


def options(method: type[Method[Any]], section: MethodConfig, train: Any) -> dict[str, Any]:
    """Keyword arguments of a method: its section's fields, and those of `train` that it has too.

    Args:
      method: class of the method.
      section: its options.
      train: a `TrainConfig`.
    """
    own = {field.name: getattr(section, field.name) for field in dataclasses.fields(section)}
    wide = [field.name for field in dataclasses.fields(train) if field.name not in own]
    fields = {field.name for field in dataclasses.fields(method)}  # pyright: ignore[reportArgumentType]
    given = {name: getattr(train, name) for name in wide if name in fields}
    # A seed that is not set yet is that of the method's own default.
    return {**own, **{name: value for name, value in given.items() if value is not None}}
