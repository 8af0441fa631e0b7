"""A run that learns a task from labelled records, at step 0: tokenizer, model, method and records."""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from elastic_lm.checkpoints.loading import load
from elastic_lm.config.encoder_decoder import EncoderDecoderConfig
from elastic_lm.data import labelled, pairs
from elastic_lm.data.sharded import rows_alone
from elastic_lm.data.tokenizer import Tokenizer
from elastic_lm.files.fingerprints import weights_fingerprint
from elastic_lm.files.hub import local_model
from elastic_lm.models import registry
from elastic_lm.models.sharding import batch_sharding, check_rows, param_shardings
from elastic_lm.processes import local_rows
from elastic_lm.train.config import TaskRun
from elastic_lm.train.method import RunData
from elastic_lm.train.prepared import Prepared, check_new_model, learned_tokenizer
from elastic_lm.train.registry import method_class
from elastic_lm.train.step import place_batch
from elastic_lm.train.tasks.answers import load_of
from elastic_lm.train.tasks.models import check_length, prepare_model

Params = dict[str, Any]


def prepare_task(run: TaskRun, workdir: Path, mesh: Mesh) -> Prepared:
    """Everything that a run on labelled records needs, at step 0.

    Args:
      run: the whole run.
      workdir: a learned tokenizer is written here, or read where one lies there already.
      mesh: from `sharding.make_mesh`.

    Returns:
      The run. Encoders and encoder-decoders train unrolled, in the form that they are saved in: they have few
      layers, and no second form of their parameters is needed.

    Raises:
      FileNotFoundError: data, tokenizer, initial checkpoint or teacher do not exist.
      ValueError: something does not fit; names field, value and fix.
    """
    task = run.task
    for field in ("encoder", "encoder_decoder"):
        if (new := getattr(run, field)) is not None:
            check_new_model(field, new)
    check_rows("task.batch_size", task.batch_size, mesh, run.train.accumulate)
    tokenizer = prepare_tokenizer(run, workdir)

    if task.problem == "text_to_text":
        config, params, weights = prepare_writer(run, tokenizer, mesh)
        pair_data = task, config, tokenizer
        train: Any = pairs.train_pairs(*pair_data)
        held_out: Any = functools.partial(pairs.eval_pairs, *pair_data)
    else:
        labels = labelled.classes(task)
        config, params, weights = prepare_model(run, tokenizer, labels, mesh)
        reads = config if isinstance(config, EncoderDecoderConfig) else None
        labelled_data = task, tokenizer, labels, config.pad_id, reads
        train = labelled.train_batches(*labelled_data)
        held_out = functools.partial(labelled.eval_batches, *labelled_data)

    cls = method_class(run.method.name)
    method, params = cls.create(run.method, config, params, run.train, mesh)

    # Every process reads all records, which are few: what a batch is padded to depends on all of its rows.
    own = local_rows(batch_sharding(mesh), task.batch_size)
    data = RunData(
        train=rows_alone(train, own),
        held_out=(lambda: rows_alone(held_out(), own)) if task.eval_paths else lambda: (),
        mesh=mesh,
        place=functools.partial(place_batch, batch=method.batch),
        seed=task.seed or 0,
    )
    return Prepared(
        method=method,
        params=params,
        tokenizer=tokenizer,
        data=data,
        per_step=task.batch_size,
        rate="records_per_s",
        learned=not (task.tokenizer or run.train.init_from),
        weights=weights,
    )


def prepare_tokenizer(run: TaskRun, workdir: Path) -> Tokenizer:
    """The configured tokenizer, that of the initial checkpoint, or a BPE learned from both texts of pairs."""
    if source := run.task.tokenizer or run.train.init_from:
        if not run.task.tokenizer and not local_model(source, weights=False).exists():
            load(source)  # says how to get a model
        return Tokenizer.load(source)

    assert run.encoder_decoder is not None
    return learned_tokenizer(workdir, lambda: pairs.pair_texts(run.task), run.encoder_decoder.vocab_size)


def prepare_writer(
    run: TaskRun, tokenizer: Tokenizer, mesh: Mesh
) -> tuple[EncoderDecoderConfig, Params, str]:
    """An encoder-decoder that writes texts, on the mesh, and the fingerprint of one that was loaded.

    Raises:
      FileNotFoundError: the initial checkpoint does not exist.
      ValueError: it is no encoder-decoder, or the vocabulary does not fit.
    """
    train = run.train
    if run.encoder_decoder is not None:
        config = dataclasses.replace(run.encoder_decoder, eos_ids=tokenizer.eos_ids)
        params, weights = registry.init_params(config, jax.random.key(train.seed or 0)), ""
    else:
        kind, dtype = EncoderDecoderConfig, train.param_dtype or None
        config, params = load_of(kind, "train.init_from", train.init_from, dtype, mesh)
        weights = weights_fingerprint(params)

    for field in ("max_len", "max_target"):
        check_length(field, getattr(run.task, field), config)
    tokenizer.check_vocabulary(config.vocab_size)
    config = dataclasses.replace(config, dtype=train.dtype or config.dtype)
    return config, jax.device_put(params, param_shardings(config, mesh)), weights
