"""The model that a task tunes: a pretrained one or a new one, with a head for the task."""

import dataclasses
from typing import Any

import jax
from jax.sharding import Mesh

from elastic_lm.config.checks import require
from elastic_lm.config.encoder import EncoderConfig
from elastic_lm.config.encoder_decoder import EncoderDecoderConfig
from elastic_lm.data.tokenizer import Tokenizer
from elastic_lm.models.encoder import init_params
from elastic_lm.models.encoder_decoder import attach_encoder_head
from elastic_lm.models.sharding import param_shardings
from elastic_lm.models.task_heads import attach_task_exits, attach_task_head, lowest_layers
from elastic_lm.train.config import TaskRun
from elastic_lm.train.tasks.answers import answers_of, check_vocabulary, load_any, same_answers

Params = dict[str, Any]


def prepare_model(
    run: TaskRun, tokenizer: Tokenizer, labels: tuple[str, ...], mesh: Mesh
) -> tuple[EncoderConfig | EncoderDecoderConfig, Params]:
    """A loaded or new model with a head for the task, on the mesh.

    Args:
      run: the whole run, of a task that is no text to write.
      tokenizer: its ids must fit the vocabulary.
      labels: from `labelled.classes`.
      mesh: where the parameters go.

    Returns:
      (config, parameters); a head for as many classes is kept, where it names none under these names, any
      other is drawn anew.

    Raises:
      FileNotFoundError: the initial checkpoint does not exist.
      ValueError: it has no encoder, or the task, vocabulary or length do not fit; names the field.
    """
    train = run.train
    if run.encoder is not None:
        config, params = run.encoder, init_params(run.encoder, jax.random.key(train.seed))
    else:
        config, params = load_any("train.init_from", train.init_from, train.param_dtype or None, mesh)
    if isinstance(config, EncoderDecoderConfig):
        config, params = prepare_encoder_head(run, config, params, labels)
    else:
        config, params = prepare_encoder(run, config, params, labels)
    check_vocabulary(tokenizer, config.vocab_size)
    config = dataclasses.replace(config, dtype=train.dtype or config.dtype)
    return config, jax.device_put(params, param_shardings(config, mesh))


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
    train, task, method = run.train, run.task, run.method
    fix = f"{train.init_from} holds an encoder-decoder, "
    numbers = fix + "whose head on the encoder tells classes apart; make classes of the numbers"
    require(task.problem == "classification", "task.problem", task.problem, numbers)
    write = fix + "which answers by writing: set task.problem='text_to_text', where labels are texts, or "
    write += "method.tuned='head', for a head on its encoder"
    require(method.tuned == "head", "method.tuned", method.tuned, write)
    one = "which reads one text: put both into one field, and leave this out"
    require(not task.pair_field, "task.pair_field", task.pair_field, fix + one)
    whole = "of which no layers are left out; set 0"
    require(not train.init_layers, "train.init_layers", train.init_layers, fix + whole)
    require(not run.exits, "exits", run.exits, fix + "which has no exits; leave them out")
    has, classes = config.n_labels, len(labels)
    other = f"has a head of {has} classes on its encoder, and the task {classes}; start from another model"
    require(has in (0, classes), "train.init_from", train.init_from, other)
    if not has:
        key = jax.random.fold_in(jax.random.key(train.seed), 1)
        return attach_encoder_head(config, params, classes, key, labels)
    other = f"has a head on its encoder that tells {', '.join(config.labels)} apart, in this order, and the "
    other += f"task has {', '.join(labels)}; name the model's in task.labels, or start from another model"
    same = same_answers(answers_of(config), ("classification", classes, labels))
    require(same, "train.init_from", train.init_from, other)
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
    train, task, method = run.train, run.task, run.method
    assert task.problem != "text_to_text"
    fix = "is read by encoder-decoders only; leave it out"
    require(not task.prefix, "task.prefix", task.prefix, fix)
    if train.init_layers:
        fix = f"the model has {config.n_layers} layers"
        require(train.init_layers <= config.n_layers, "train.init_layers", train.init_layers, fix)
        config, params = lowest_layers(config, params, train.init_layers)
    fix = f"above the model's {config.max_len} positions; shorten it"
    require(task.max_len <= config.max_len, "task.max_len", task.max_len, fix)
    wanted = len(labels) or 1
    known = same_answers(answers_of(config), (task.problem, wanted, labels))
    fix = f"{train.init_from or 'the new model'} answers {answers_of(config)}, not "
    fix += f"{(task.problem, wanted, labels)}: tune it on the task first, or set 'all'"
    require(known or method.tuned != "exits", "method.tuned", method.tuned, fix)
    if known:
        config = dataclasses.replace(config, labels=labels)
    else:
        key = jax.random.fold_in(jax.random.key(train.seed), 1)
        config, params = attach_task_head(config, params, wanted, task.problem, key, labels)
    if run.exits:
        config, params = attach_task_exits(config, params, run.exits)
    fix = "the model has no exits; name their layers in exits"
    require(method.tuned != "exits" or bool(config.exits), "method.tuned", method.tuned, fix)
    fix = f"needs one weight for each of the exits {config.exits or 'none'}, or none at all"
    counted = len(method.exit_weights) in (0, len(config.exits))
    require(counted, "method.exit_weights", method.exit_weights, fix)
    return config, params
