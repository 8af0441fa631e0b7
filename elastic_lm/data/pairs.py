"""Pairs of texts to padded batches: shuffle, repeat -> tokenise -> group by length -> batch, in grain.

The iterator's position is part of a training checkpoint, so a resumed run reads the very next batch.
"""

import functools
from collections.abc import Iterator

import grain
import numpy as np

from elastic_lm.config.checks import require
from elastic_lm.config.encoder_decoder import EncoderDecoderConfig
from elastic_lm.config.task import TaskConfig
from elastic_lm.data.grouping import batches_of_similar_size
from elastic_lm.data.padding import padded
from elastic_lm.data.records import Record, Records, text_of
from elastic_lm.data.tokenizer import Tokenizer

SHORTEST = 8  # columns of the narrowest batch

Pair = dict[str, list[int]]  # token ids of "source" and "target"


def train_pairs(config: TaskConfig, model: EncoderDecoderConfig, tokenizer: Tokenizer) -> grain.IterDataset:
    """Endless shuffled batches of the training files, padded to few different lengths.

    Pairs are shuffled by the seed, anew in every pass; those of 16 batches are grouped by the powers of two
    that their lengths are rounded up to (`grouping`), so that batches hold little padding.

    Args:
      config: where the pairs are, and the shape of a batch.
      model: gives the tokens that start, end and fill up.
      tokenizer: of the model.

    Returns:
      A dataset of dicts with the fields of `train.tasks.seq2seq.PairBatch`, NumPy arrays.

    Raises:
      FileNotFoundError: a file or folder does not exist.
      ValueError: a file is empty or malformed.
    """
    pairs = grain.MapDataset.source(Records(config.paths)).seed(config.seed or 0).shuffle().repeat()
    pairs = pairs.map(functools.partial(encode_pair, config, model, tokenizer))
    stream = pairs.to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=64))

    def size(pair: Pair) -> tuple[int, int]:
        source, target = pair["source"], pair["target"]
        return bucket(len(source), config.max_len), bucket(len(target), config.max_target)

    batches = batches_of_similar_size(stream, config.batch_size, size, config.seed or 0)
    return batches.map(functools.partial(pad_pairs, config, model))


def eval_pairs(config: TaskConfig, model: EncoderDecoderConfig, tokenizer: Tokenizer) -> grain.IterDataset:
    """One pass over the held-out files in their order; the last batch is filled up with rows of weight 0.

    Args:
      config: where the pairs are, and the shape of a batch.
      model: see `train_pairs`.
      tokenizer: of the model.

    Returns:
      As `train_pairs`, but finite.

    Raises:
      FileNotFoundError: a file or folder does not exist.
      ValueError: there are no held-out files, or one is empty or malformed.
    """
    require(bool(config.eval_paths), "task.eval_paths", config.eval_paths, "name held-out files")
    records = grain.MapDataset.source(Records(config.eval_paths))
    pairs = records.map(functools.partial(encode_pair, config, model, tokenizer))
    batches = pairs.batch(config.batch_size, batch_fn=list).to_iter_dataset()
    return batches.map(functools.partial(pad_pairs, config, model))


def encode_pair(
    config: TaskConfig, model: EncoderDecoderConfig, tokenizer: Tokenizer, item: tuple[str, Record]
) -> Pair:
    """Token ids of a pair, each text with its end token, cut to the lengths of `config`.

    Args:
      config: gives the fields, the prefix and the lengths.
      model: gives the end token.
      tokenizer: of the model.
      item: (where the record stands, its fields).

    Returns:
      {"source", "target"}: token ids.

    Raises:
      ValueError: a field is missing; names the record.
    """
    source, target = pair_of(config, item)
    return {
        "source": encode_text(model, tokenizer, source, config.max_len),
        "target": encode_text(model, tokenizer, target, config.max_target),
    }


def encode_text(model: EncoderDecoderConfig, tokenizer: Tokenizer, text: str, longest: int) -> list[int]:
    """Token ids of a source or target between its start and end tokens, at most `longest` of them."""
    return model.whole_text(tokenizer.encode(text)[: longest - len(model.whole_text([]))])


def pair_of(config: TaskConfig, item: tuple[str, Record]) -> tuple[str, str]:
    """(what is read, what is written) of a record."""
    return source_of(config, item), text_of(*item, config.label_field)


def source_of(config: TaskConfig, item: tuple[str, Record]) -> str:
    """What an encoder-decoder reads of a record."""
    return config.prefix + text_of(*item, config.text_field)


def pair_texts(config: TaskConfig) -> Iterator[str]:
    """Both texts of every training record, to learn a tokenizer from."""
    records = Records(config.paths)
    for i in range(len(records)):
        yield from pair_of(config, records[i])


def pad_pairs(config: TaskConfig, model: EncoderDecoderConfig, pairs: list[Pair]) -> dict[str, np.ndarray]:
    """A batch of pairs.

    Args:
      config: gives the number of rows and the largest lengths.
      model: gives the tokens that start and fill up.
      pairs: at most `batch_size` of them; further rows have weight 0.

    Returns:
      The fields of `train.tasks.seq2seq.PairBatch`; S and T are powers of two, or the largest lengths.
    """
    s = max(bucket(len(pair["source"]), config.max_len) for pair in pairs)
    t = max(bucket(len(pair["target"]), config.max_target) for pair in pairs)
    b = config.batch_size
    sources, targets = ([pair[name] for pair in pairs] for name in ("source", "target"))
    source, target = padded(sources, b, s, model.pad_id), padded(targets, b, t, model.pad_id)
    mask = padded([[1] * len(ids) for ids in sources], b, s).astype(bool)
    weights = padded([[1] * len(ids) for ids in targets], b, t).astype(np.float32)
    target_in = np.concatenate([np.full((b, 1), model.decoder_start_id, np.int32), target[:, :-1]], axis=1)
    return {
        "source": source,
        "source_mask": mask,
        "target_in": target_in,
        "target": target,
        "weights": weights,
    }


def bucket(length: int, longest: int) -> int:
    """Columns that a text of `length` tokens is padded to: a power of two, at most `longest`."""
    return min(max(SHORTEST, 1 << (length - 1).bit_length()), longest)
