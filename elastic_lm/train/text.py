"""A run of a decoder on text, at step 0: tokenizer, model, method and batches."""

import dataclasses
import functools
from collections.abc import Iterable
from pathlib import Path

import jax
from jax.sharding import Mesh

from elastic_lm.checkpoints.loading import load_decoder
from elastic_lm.checkpoints.native import MENU_FILE, load_menu
from elastic_lm.config.checks import require
from elastic_lm.config.model import ModelConfig
from elastic_lm.config.subnet import Menu
from elastic_lm.data import pipeline
from elastic_lm.data.sharded import rows_alone
from elastic_lm.data.tokenizer import Tokenizer
from elastic_lm.files.fingerprints import weights_fingerprint
from elastic_lm.files.hub import local_model
from elastic_lm.models.decoder import Params, unstack_layers
from elastic_lm.models.exits import attach_exits, extract
from elastic_lm.models.registry import init_params
from elastic_lm.models.sharding import (
    batch_sharding,
    check_columns,
    check_rows,
    param_shardings,
    stack_onto,
    stacked_shardings,
)
from elastic_lm.processes import local_rows
from elastic_lm.train.config import RunConfig
from elastic_lm.train.method import Arrays, RunData
from elastic_lm.train.prepared import Prepared, check_new_model, learned_tokenizer
from elastic_lm.train.registry import method_class, names_with
from elastic_lm.train.step import place_batch


def prepare_text(config: RunConfig, workdir: Path, mesh: Mesh) -> Prepared:
    """Everything that a run on text needs, at step 0.

    Args:
      config: the whole run.
      workdir: the learned tokenizer of a run that has begun is read here.
      mesh: from `sharding.make_mesh`.

    Returns:
      The run, its parameters stacked: training scans over the layers, so that programs stay small.

    Raises:
      FileNotFoundError: data, tokenizer or initial checkpoint do not exist.
      ValueError: something does not fit; names field, value and fix.
    """
    rows = config.data.batch_size
    # Before a tokenizer is learned, which takes memory by the size of the vocabulary.
    pipeline.check_batch(config.data)
    if config.model is not None and not config.train.init_from:
        check_new_model("model", config.model)
    check_rows("data.batch_size", rows, mesh, config.train.accumulate)
    check_columns("data.seq_len", config.data.seq_len, mesh)
    if config.model is not None and not config.train.init_from:
        _check_length(config, config.model)  # before a tokenizer is learned
    tokenizer = prepare_tokenizer(config, workdir)
    model, params, weights = prepare_model(config, tokenizer, mesh)

    shardings = stacked_shardings(param_shardings(model, mesh))
    params = jax.device_put(params, shardings) if "layers" in params else stack_onto(params, shardings)

    cls = method_class(config.method.name)
    method, params = cls.create(config.method, model, params, config.train, mesh)

    pipeline.check_learnable(config.data, tokenizer)
    own = local_rows(batch_sharding(mesh), rows)
    data = RunData(
        train=pipeline.train_batches(config.data, tokenizer, own),
        held_out=functools.partial(held_out, config, tokenizer, own),
        mesh=mesh,
        place=functools.partial(place_batch, batch=cls.batch),
        seed=config.data.seed or 0,
    )
    return Prepared(
        method=method,
        params=params,
        tokenizer=tokenizer,
        data=data,
        per_step=rows * config.data.seq_len,
        menu=initial_menu(config),
        canonical=unstack_layers,
        learned=not (config.data.tokenizer or config.train.init_from),
        weights=weights,
    )


def prepare_tokenizer(config: RunConfig, workdir: Path) -> Tokenizer:
    """The configured tokenizer, that of the initial checkpoint, or a BPE learned from the training text.

    Args:
      config: the whole run.
      workdir: the learned tokenizer of a run that has begun is read here.

    Raises:
      FileNotFoundError: the configured tokenizer, or the text to learn one from, does not exist.
    """
    source = config.data.tokenizer or config.train.init_from
    if source:
        return Tokenizer.load(source)

    assert config.model is not None
    return learned_tokenizer(workdir, lambda: pipeline.file_texts(config.data), config.model.vocab_size)


def prepare_model(config: RunConfig, tokenizer: Tokenizer, mesh: Mesh) -> tuple[ModelConfig, Params, str]:
    """Random or loaded parameters, with the configured exits attached.

    Args:
      config: the whole run.
      tokenizer: its special tokens go into a new model; its ids must fit the vocabulary.
      mesh: where loaded parameters go.

    Returns:
      (model config, parameters, canonical where they were loaded and stacked where they are new, fingerprint
      of those that were loaded, "" = none were).

    Raises:
      FileNotFoundError: the initial checkpoint does not exist.
      ValueError: vocabulary, rows, layers or exits do not fit the model or the method; names the field.
    """
    train, key, weights = config.train, jax.random.key(config.train.seed or 0), ""
    if train.init_from:
        decoder, params = load_decoder(train.init_from, dtype=train.param_dtype or None, mesh=mesh)
        model, weights = decoder.config, weights_fingerprint(params)
        if train.init_layers:
            model, params = extract(model, params, train.init_layers)

        if model.exits and not config.method.trains_exits:
            raise ValueError(
                f"method.name={config.method.name!r}: {train.init_from} has exits, which it does not train; "
                f"choose {names_with('trains_exits')}, or export the model without exits"
            )
    else:
        assert config.model is not None
        model = dataclasses.replace(config.model, bos_id=tokenizer.bos_id, eos_ids=tokenizer.eos_ids)
        # Only one that is loaded may have fewer rows than its tokenizer ids: tokens were added for padding.
        require(
            tokenizer.vocab_size <= model.vocab_size,
            "model.vocab_size",
            model.vocab_size,
            f"the tokenizer has {tokenizer.vocab_size} ids; raise it",
        )
        params = born(model, key, mesh)

    tokenizer.check_vocabulary(model.vocab_size)
    _check_length(config, model)
    if train.dtype:
        model = dataclasses.replace(model, dtype=train.dtype)
    if config.exits:
        model, params = attach_exits(model, params, config.exits, jax.random.fold_in(key, 1))
    return model, params, weights


def born(model: ModelConfig, key: jax.Array, mesh: Mesh) -> Params:
    """New parameters, stacked, every device with its own part from the beginning.

    Args:
      model: without exits that are attached later.
      key: typed PRNG key.
      mesh: from `sharding.make_mesh`.

    Returns:
      Parameters; canonical ones if layers differ in size, which training refuses.
    """
    shardings = param_shardings(model, mesh)
    if model.heterogeneous:
        return init_params(model, key, shardings=shardings)
    return init_params(model, key, shardings=stacked_shardings(shardings), stacked=True)


def _check_length(config: RunConfig, model: ModelConfig) -> None:
    """Refuses rows that are longer than the model's context."""
    fix = f"above model.max_len={model.max_len}; shorten it"
    require(config.data.seq_len <= model.max_len, "data.seq_len", config.data.seq_len, fix)


def held_out(
    config: RunConfig, tokenizer: Tokenizer, rows: tuple[int, ...] | None = None
) -> Iterable[Arrays]:
    """One pass over the held-out split.

    Args:
      config: the whole run; `data` is read.
      tokenizer: of the model.
      rows: those of every batch that this process has; None = all.

    Returns:
      Dicts with the fields of `Batch`, [batch_size, seq_len] NumPy arrays; none where no held-out text is
      named.
    """
    if config.data.source != "stdlib" and not config.data.eval_paths:
        return ()
    return rows_alone(pipeline.eval_batches(config.data, tokenizer), rows)


def initial_menu(config: RunConfig) -> Menu | None:
    """The widths that the initial checkpoint is elastic for, where all of its layers are kept."""
    folder = config.train.init_from
    if not folder or config.train.init_layers:
        return None
    if not (local_model(folder, weights=False) / MENU_FILE).is_file():
        return None
    return load_menu(folder)
