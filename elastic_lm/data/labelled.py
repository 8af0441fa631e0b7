"""Labelled records to padded batches: source -> shuffle, repeat -> tokenise -> batch, all in grain.

The iterator's position is part of a training checkpoint, so a resumed run reads the very next batch.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import grain
import numpy as np

from elastic_lm.config.checks import require
from elastic_lm.config.encoder_decoder import EncoderDecoderConfig
from elastic_lm.config.task import TaskConfig
from elastic_lm.data.grouping import batches_of_similar_size
from elastic_lm.data.padding import padded
from elastic_lm.data.pairs import encode_text, source_of
from elastic_lm.data.records import Record, Records, class_names, class_number, label_of, text_of
from elastic_lm.data.tokenizer import Tokenizer

WIDTH = 16  # batches are padded to a multiple of so many tokens, each multiple being one compiled program
Example = dict[str, Any]


def classes(config: TaskConfig) -> tuple[str, ...]:
    """Names of the classes, in the order of their numbers.

    Args:
      config: the task; where it names no labels the training files are read.

    Returns:
      () for regression; numbers in the files come in the order of their values, before texts.

    Raises:
      FileNotFoundError: a file does not exist.
      ValueError: a record has no label, one stands for a missing value, or all have the same.
    """
    if config.problem != "classification" or config.labels:
        return config.labels
    records = Records(config.paths)
    found: dict[str, str] = {}
    for i in range(len(records)):
        where, record = records[i]
        found.setdefault(label_of(where, record, config.label_field), where)
    require(len(found) > 1, f"task.label_field={config.label_field}", sorted(found), "is the same everywhere")
    return class_names(found)


def train_batches(
    config: TaskConfig,
    tokenizer: Tokenizer,
    labels: Sequence[str],
    pad_id: int,
    model: EncoderDecoderConfig | None = None,
) -> grain.IterDataset:
    """Endless shuffled batches of the training files, those of 16 batches grouped by length (`grouping`).

    Args:
      config: where the records are, and how many make a batch.
      tokenizer: of the model.
      labels: from `classes`.
      pad_id: of the model, whose positions may depend on where it stands.
      model: an encoder-decoder, which reads what it reads of pairs (`data.pairs`); None = an encoder does.

    Returns:
      A dataset of dicts with the fields of `train.tasks.tuning.TaskBatch`: NumPy arrays of batch_size rows.
    """
    rows = grain.MapDataset.source(Records(config.paths)).seed(config.seed or 0).shuffle().repeat()
    stream = _stream(rows.map(functools.partial(example, config, tokenizer, tuple(labels), model)))
    batches = batches_of_similar_size(stream, config.batch_size, _width, config.seed or 0)
    return batches.map(_padder(config, pad_id))


def eval_batches(
    config: TaskConfig,
    tokenizer: Tokenizer,
    labels: Sequence[str],
    pad_id: int,
    model: EncoderDecoderConfig | None = None,
) -> grain.IterDataset:
    """One pass over the held-out files in their order; the last batch is filled up with rows of weight 0."""
    rows = grain.MapDataset.source(Records(config.eval_paths))
    stream = _stream(rows.map(functools.partial(example, config, tokenizer, tuple(labels), model)))
    return stream.batch(config.batch_size, batch_fn=_padder(config, pad_id))


def example(
    config: TaskConfig,
    tokenizer: Tokenizer,
    labels: tuple[str, ...],
    model: EncoderDecoderConfig | None,
    item: tuple[str, Record],
) -> Example:
    """One record as ids, token types and target.

    Args:
      config: fields to read.
      tokenizer: of the model.
      labels: from `classes`.
      model: see `train_batches`.
      item: (where the record stands, its fields).

    Returns:
      {"ids", "types": lists of ints, "target": class number or number}.

    Raises:
      ValueError: a field is missing, or the label is no class or no number; names the record.
    """
    where, record = item
    if model is None:
        ids, types = tokenizer.encode_pair(*texts(config, where, record), max_len=config.max_len)
    else:
        ids = encode_text(model, tokenizer, source_of(config, item), config.max_len)
        types = [0] * len(ids)
    if config.problem == "classification":
        label = label_of(where, record, config.label_field)
        target = class_number(label, labels)
        fix = f"is no class of the task; choose from {', '.join(labels)}, or name them in task.labels"
        require(target is not None, f"{where}: {config.label_field}", label, fix)
        return {"ids": ids, "types": types, "target": target}
    label = text_of(where, record, config.label_field)
    return {"ids": ids, "types": types, "target": _number(f"{where}: {config.label_field}", label)}


def texts(config: TaskConfig, where: str, record: Record) -> tuple[str, str | None]:
    """(first text, second text or None) of a record."""
    second = text_of(where, record, config.pair_field) if config.pair_field else None
    return text_of(where, record, config.text_field), second


def _padder(config: TaskConfig, pad_id: int) -> Any:
    """What makes a batch of examples."""
    dtype = np.int32 if config.problem == "classification" else np.float32

    def batch(examples: Sequence[Example]) -> dict[str, np.ndarray]:
        longest = max(len(e["ids"]) for e in examples)
        width = min(max(map(_width, examples)), max(config.max_len, longest))
        missing = config.batch_size - len(examples)
        filled = [*examples, *[examples[0]] * missing]
        return {
            "tokens": padded([e["ids"] for e in filled], config.batch_size, width, pad_id),
            "mask": padded([[1] * len(e["ids"]) for e in filled], config.batch_size, width).astype(bool),
            "types": padded([e["types"] for e in filled], config.batch_size, width),
            "targets": np.asarray([e["target"] for e in filled], dtype),
            "weights": np.asarray([1.0] * len(examples) + [0.0] * missing, np.float32),
        }

    return batch


def _width(one: Example) -> int:
    """Tokens that an example is padded to."""
    return -(-len(one["ids"]) // WIDTH) * WIDTH


def _stream(rows: grain.MapDataset) -> grain.IterDataset:
    return rows.to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=256))


def _number(where: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    require(math.isfinite(value), where, text, "must be a number, which regression learns")
    return value
