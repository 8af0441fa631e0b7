"""Describes what a model answers (classes, a number or a text), and loads models of the kind needed."""

from typing import Any, TypeVar

from jax.sharding import Mesh

from elastic_lm.checkpoints.loading import load
from elastic_lm.config.checks import require
from elastic_lm.config.encoder import EncoderConfig, TaskProblem
from elastic_lm.config.encoder_decoder import EncoderDecoderConfig
from elastic_lm.data.tokenizer import Tokenizer
from elastic_lm.models.registry import KINDS, kind_of

Params = dict[str, Any]
TaskHead = tuple[TaskProblem, int, tuple[str, ...]]  # problem, outputs, names of the classes
Kind = TypeVar("Kind", bound=EncoderConfig | EncoderDecoderConfig)


def answers_of(config: EncoderConfig | EncoderDecoderConfig) -> TaskHead:
    """(problem, outputs, names of the classes) of a model's head."""
    problem = "classification" if isinstance(config, EncoderDecoderConfig) else config.problem
    return problem, config.n_labels, config.labels


def same_answers(some: TaskHead, others: TaskHead) -> bool:
    """Whether two heads have the same problem and outputs and, if both name their classes, the same names."""
    named = bool(some[2]) and bool(others[2])
    return some[:2] == others[:2] and (not named or some[2] == others[2])


def load_any(
    field: str, folder: str, dtype: str | None = None, mesh: Mesh | None = None
) -> tuple[EncoderConfig | EncoderDecoderConfig, Params]:
    """An encoder or an encoder-decoder from its folder; raises like `load_of`."""
    model, params = load(folder, dtype=dtype, mesh=mesh)
    config: Any = model.config
    require(
        isinstance(config, EncoderConfig | EncoderDecoderConfig),
        field,
        folder,
        f"holds a {kind_of(config).name}, where an encoder or encoder-decoder is needed",
    )
    return config, params


def load_of(
    kind: type[Kind], field: str, folder: str, dtype: str | None = None, mesh: Mesh | None = None
) -> tuple[Kind, Params]:
    """A model of one kind from its folder.

    Args:
      kind: class of its config.
      field: names `folder` in messages.
      folder: Hugging Face folder or checkpoint of this package.
      dtype: see `load`.
      mesh: where the parameters go.

    Raises:
      FileNotFoundError: there is no such folder.
      ValueError: it holds another kind of model.
    """
    model, params = load(folder, dtype=dtype, mesh=mesh)
    config: Any = model.config
    wanted = next(k.name for k in KINDS.values() if k.config is kind)
    require(
        isinstance(config, kind),
        field,
        folder,
        f"holds a model of kind {kind_of(config).name}, where one of kind {wanted} is needed",
    )
    return config, params


def check_vocabulary(tokenizer: Tokenizer, size: int) -> None:
    """Refuses a tokenizer with more ids than the model has embeddings."""
    require(
        tokenizer.vocab_size <= size,
        "model.vocab_size",
        size,
        f"the tokenizer has more ids ({tokenizer.vocab_size}): name the one that belongs to the model",
    )


def check_same_answers(field: str, folder: str, theirs: Any, ours: Any) -> None:
    """Refuses the model in `folder`, which `field` names, where it answers another task than ours."""
    given, due = answers_of(theirs), answers_of(ours)
    require(same_answers(given, due), field, folder, f"answers {given}, not {due}; tune it on the task")
