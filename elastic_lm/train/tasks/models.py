"""The model that a task tunes: a pretrained one or a new one, with a head for the task."""

import dataclasses
from typing import Any

import jax
from jax.sharding import Mesh

from elastic_lm.config.checks import require
from elastic_lm.config.encoder import EncoderConfig
from elastic_lm.config.encoder_decoder import EncoderDecoderConfig
from elastic_lm.data.tokenizer import Tokenizer
from elastic_lm.files.fingerprints import weights_fingerprint
from elastic_lm.models.encoder_decoder import attach_encoder_head
from elastic_lm.models.registry import init_params
from elastic_lm.models.sharding import param_shardings
from elastic_lm.models.task_heads import attach_task_exits, attach_task_head, lowest_layers
from elastic_lm.train.config import TaskRun
from elastic_lm.train.tasks.answers import answers_of, load_any, same_answers
from elastic_lm.train.tasks.config import TaskTuningConfig, Tuned

Params = dict[str, Any]


def prepare_model(
    run: TaskRun, tokenizer: Tokenizer, labels: tuple[str, ...], mesh: Mesh
) -> tuple[EncoderConfig | EncoderDecoderConfig, Params, str]:
    """A loaded or new model with a head for the task, on the mesh.

    Args:
      run: the whole run, of a task that is no text to write.
      tokenizer: its ids must fit the vocabulary.
      labels: from `labelled.classes`.
      mesh: where the parameters go.

    Returns:
      (config, parameters, fingerprint of those that were loaded, "" = none were); a head for as many classes
      is kept, where it names none under these names, any other is drawn anew.

    Raises:
      FileNotFoundError: the initial checkpoint does not exist.
      ValueError: it has no encoder, or the task, vocabulary or length do not fit; names the field.
    """
    train, weights = run.train, ""
    if run.encoder is not None:
        config, places = run.encoder, param_shardings(run.encoder, mesh)
        params = init_params(config, jax.random.key(train.seed or 0), shardings=places)
    else:
        config, params = load_any("train.init_from", train.init_from, train.param_dtype or None, mesh)
        weights = weights_fingerprint(params)

    if isinstance(config, EncoderDecoderConfig):
        config, params = prepare_encoder_head(run, config, params, labels)
    else:
        config, params = prepare_encoder(run, config, params, labels)

    tokenizer.check_vocabulary(config.vocab_size)
    config = dataclasses.replace(config, dtype=train.dtype or config.dtype)
    return config, jax.device_put(params, param_shardings(config, mesh)), weights


def prepare_encoder_head(
    run: TaskRun, config: EncoderDecoderConfig, params: Params, labels: tuple[str, ...]
) -> tuple[EncoderDecoderConfig, Params]:
    """An encoder-decoder with a head on its encoder (E-LANG, arXiv 2203.00748).

    Args:
      run: the whole run.
      config: of `train.init_from`.
      params: its parameters, which are not copied.
      labels: from `labelled.classes`.

    Raises:
      ValueError: the run asks for more than a head that tells classes apart, or the model has another head.
    """
    train, task, tuned = run.train, run.task, tuned_of(run)
    holds = f"{train.init_from} holds an encoder-decoder"

    require(
        task.problem == "classification",
        "task.problem",
        task.problem,
        f"{holds}, whose head on the encoder tells classes apart; make classes of the numbers",
    )

    require(
        tuned == "head",
        "method.tuned",
        tuned,
        f"{holds}, which answers by writing: set task.problem='text_to_text', where labels are texts, or "
        "method.tuned='head', for a head on its encoder",
    )

    require(
        not task.pair_field,
        "task.pair_field",
        task.pair_field,
        f"{holds}, which reads one text: put both into one field, and leave this out",
    )
    require(
        not train.init_layers,
        "train.init_layers",
        train.init_layers,
        f"{holds}, of which no layers are left out; set 0",
    )
    require(not run.exits, "exits", run.exits, f"{holds}, which has no exits; leave them out")

    check_length("max_len", task.max_len, config)
    classes = len(labels)
    require(
        config.n_labels in (0, classes),
        "train.init_from",
        train.init_from,
        f"has a head of {config.n_labels} classes on its encoder, and the task {classes}; start from another "
        "model",
    )
    if not config.n_labels:
        key = jax.random.fold_in(jax.random.key(train.seed or 0), 1)
        return attach_encoder_head(config, params, classes, key, labels)

    require(
        same_answers(answers_of(config), ("classification", classes, labels)),
        "train.init_from",
        train.init_from,
        f"has a head on its encoder that tells {', '.join(config.labels)} apart, in this order, and the task "
        f"has {', '.join(labels)}; name the model's in task.labels, or start from another model",
    )
    return dataclasses.replace(config, labels=labels), params


def prepare_encoder(
    run: TaskRun, config: EncoderConfig, params: Params, labels: tuple[str, ...]
) -> tuple[EncoderConfig, Params]:
    """An encoder with a head for the task, and exits where the run names some.

    Args:
      run: the whole run.
      config: of a loaded or new encoder.
      params: its parameters, which are not copied.
      labels: from `labelled.classes`.

    Raises:
      ValueError: the task, its length, or options of exits do not fit; names the field.
    """
    train, task, tuned = run.train, run.task, tuned_of(run)
    assert task.problem != "text_to_text"
    require(not task.prefix, "task.prefix", task.prefix, "is read by encoder-decoders only; leave it out")

    if train.init_layers:
        require(
            train.init_layers <= config.n_layers,
            "train.init_layers",
            train.init_layers,
            f"the model has {config.n_layers} layers",
        )
        config, params = lowest_layers(config, params, train.init_layers)

    require(
        task.max_len <= config.max_len,
        "task.max_len",
        task.max_len,
        f"above the model's {config.max_len} positions; shorten it",
    )

    due = (task.problem, len(labels) or 1, labels)
    known = same_answers(answers_of(config), due)

    # Exits alone train over layers that stay as they are, which must have learned the task before.
    require(
        known or tuned != "exits",
        "method.tuned",
        tuned,
        f"{train.init_from or 'the new model'} answers {answers_of(config)}, not {due}: tune it on the task "
        "first, or set 'all'",
    )

    if known:
        config = dataclasses.replace(config, labels=labels)
    else:
        key = jax.random.fold_in(jax.random.key(train.seed or 0), 1)
        config, params = attach_task_head(config, params, due[1], task.problem, key, labels=labels)

    if run.exits:
        config, params = attach_task_exits(config, params, run.exits)
    return config, params


def check_length(field: str, length: int, config: EncoderDecoderConfig) -> None:
    """Refuses texts longer than a model with vectors of positions reads."""
    fix = f"above the model's {config.max_len} positions; shorten it"
    require(not config.max_len or length <= config.max_len, f"task.{field}", length, fix)


def tuned_of(run: TaskRun) -> Tuned:
    """What the run's method trains: all, unless it is `TaskTuning` and says otherwise."""
    return run.method.tuned if isinstance(run.method, TaskTuningConfig) else "all"
