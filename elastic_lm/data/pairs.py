"""Pairs of texts to padded batches: shuffle, repeat -> tokenise -> group by length -> batch, in grain.

The iterator's position is part of a training checkpoint, so a resumed run reads the very next batch.
"""

import csv
import dataclasses
import functools
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import grain
import numpy as np

from elastic_lm.data.sources import JSONL_SUFFIXES, Document, JsonLines, find_files, read_bytes
from elastic_lm.data.tokenizer import Tokenizer
from elastic_lm.encoder_decoder_config import EncoderDecoderConfig
from elastic_lm.plain import AT_LEAST_1, SEED, require, require_each

CSV_SUFFIXES = (".csv", ".csv.gz")
WINDOW = 16  # batches whose pairs are grouped by length
SHORTEST = 8  # columns of the narrowest batch

Pair = dict[str, list[int]]  # token ids of "source" and "target"


@dataclasses.dataclass(frozen=True)
class PairsConfig:
    """Where pairs of texts come from and how they become batches."""

    paths: tuple[str, ...]  # training files (.jsonl, .json, .csv, also .gz), or folders of them
    eval_paths: tuple[str, ...] = ()  # held-out files or folders
    source_field: str = "source"  # key or column of what is read
    target_field: str = "target"  # key or column of what is learned
    source_len: int = 512  # tokens of a source at most, its end token included; the rest is cut off
    target_len: int = 128  # tokens of a target at most, likewise
    batch_size: int = 16  # pairs per optimizer step, over all devices
    seed: int = 0  # of the shuffle

    def __post_init__(self) -> None:
        require(bool(self.paths), "data.paths", self.paths, "name at least one file or folder")
        require_each(self, "data.", ("source_len", "target_len", "batch_size"), *AT_LEAST_1)
        require_each(self, "data.", ("seed",), *SEED)


class CsvRows:
    """Rows of CSV files with a header, each with a source and a target, kept in memory."""

    def __init__(self, files: Sequence[Path], source_field: str, target_field: str) -> None:
        """Reads the files.

        Args:
          files: UTF-8 CSV with commas and a header, plain or .gz.
          source_field: column of sources.
          target_field: column of targets.

        Raises:
          ValueError: a file is empty or no CSV, lacks a column, or a row lacks a cell; names file and line.
        """
        self._rows = [row for file in files for row in _csv_rows(file, (source_field, target_field))]

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: Any) -> Document:
        return self._rows[index]


def train_pairs(config: PairsConfig, model: EncoderDecoderConfig, tokenizer: Tokenizer) -> grain.IterDataset:
    """Endless shuffled batches of the training files, padded to few different lengths.

    Pairs are shuffled by the seed, anew in every pass; those of `WINDOW` batches are grouped by the powers of
    two that their lengths are rounded up to, so that batches hold little padding.

    Args:
      config: where the pairs are, and the shape of a batch.
      model: gives the tokens that start, end and fill up.
      tokenizer: of the model.

    Returns:
      A dataset of dicts with the fields of `sequence_to_sequence.PairBatch`, NumPy arrays.

    Raises:
      FileNotFoundError: a file or folder does not exist.
      ValueError: a file is empty or malformed.
    """
    pairs = _documents(config, config.paths).seed(config.seed).shuffle().repeat()
    pairs = pairs.map(functools.partial(encode_pair, config, model, tokenizer))
    stream = pairs.to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=64))
    windows = stream.batch(WINDOW * config.batch_size, drop_remainder=True, batch_fn=list)
    batches = grain.experimental.FlatMapIterDataset(windows, _ByLength(config))
    return batches.map(functools.partial(pad_pairs, config, model))


def eval_pairs(config: PairsConfig, model: EncoderDecoderConfig, tokenizer: Tokenizer) -> grain.IterDataset:
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
    require(bool(config.eval_paths), "data.eval_paths", config.eval_paths, "name held-out files")
    pairs = _documents(config, config.eval_paths).map(
        functools.partial(encode_pair, config, model, tokenizer)
    )
    batches = pairs.batch(config.batch_size, batch_fn=list).to_iter_dataset()
    return batches.map(functools.partial(pad_pairs, config, model))


def encode_pair(
    config: PairsConfig, model: EncoderDecoderConfig, tokenizer: Tokenizer, document: Document
) -> Pair:
    """Token ids of a pair, each text with its end token, cut to the lengths of `config`.

    Args:
      config: gives the lengths.
      model: gives the end token.
      tokenizer: of the model.
      document: source as prompt, target as text.

    Returns:
      {"source", "target"}: token ids.
    """
    ends = list(model.eos_ids[:1])

    def encode(text: str, longest: int) -> list[int]:
        return [*tokenizer.encode(text)[: longest - len(ends)], *ends]

    return {
        "source": encode(document.prompt, config.source_len),
        "target": encode(document.text, config.target_len),
    }


def pad_pairs(config: PairsConfig, model: EncoderDecoderConfig, pairs: list[Pair]) -> dict[str, np.ndarray]:
    """A batch of pairs.

    Args:
      config: gives the number of rows and the largest lengths.
      model: gives the tokens that start and fill up.
      pairs: at most `batch_size` of them; further rows have weight 0.

    Returns:
      The fields of `sequence_to_sequence.PairBatch`; S and T are powers of two, or the largest lengths.
    """
    s = max(bucket(len(pair["source"]), config.source_len) for pair in pairs)
    t = max(bucket(len(pair["target"]), config.target_len) for pair in pairs)
    b = config.batch_size
    source, mask = np.full((b, s), model.pad_id, np.int32), np.zeros((b, s), bool)
    target, weights = np.full((b, t), model.pad_id, np.int32), np.zeros((b, t), np.float32)
    for i, pair in enumerate(pairs):
        n, m = len(pair["source"]), len(pair["target"])
        source[i, :n], mask[i, :n] = pair["source"], True
        target[i, :m], weights[i, :m] = pair["target"], 1.0
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


class _ByLength(grain.experimental.FlatMapTransform):
    """Windows of pairs to batches of similar lengths, in an order that does not follow the lengths."""

    max_fan_out = WINDOW

    def __init__(self, config: PairsConfig) -> None:
        self._config = config
        self._order = np.random.default_rng(config.seed).permutation(WINDOW)

    def flat_map(self, element: list[Pair]) -> list[list[Pair]]:
        """Splits a window; pairs of one bucket stay in their shuffled order."""
        c = self._config

        def size(pair: Pair) -> tuple[int, int]:
            source, target = pair["source"], pair["target"]
            return bucket(len(source), c.source_len), bucket(len(target), c.target_len)

        pairs = sorted(element, key=size)
        return [pairs[i * c.batch_size : (i + 1) * c.batch_size] for i in self._order]


def _documents(config: PairsConfig, paths: Sequence[str]) -> grain.MapDataset:
    """The pairs of all files, each a `Document` with the source as prompt."""
    files = find_files(paths, (*JSONL_SUFFIXES, *CSV_SUFFIXES))
    tables = [file for file in files if file.name.endswith(CSV_SUFFIXES)]
    lines = [file for file in files if file not in tables]
    sources = []
    if lines:
        sources.append(JsonLines(lines, config.target_field, config.source_field))
    if tables:
        sources.append(CsvRows(tables, config.source_field, config.target_field))
    return grain.MapDataset.concatenate([grain.MapDataset.source(source) for source in sources])


def _csv_rows(file: Path, fields: tuple[str, str]) -> list[Document]:
    text = bytes(read_bytes(file)).decode("utf-8-sig", errors="replace")
    reader = csv.DictReader(io.StringIO(text, newline=""))
    rows = []
    try:
        for row in reader:
            where = f"{file} line {reader.line_num}"
            for field in fields:
                if not isinstance(row.get(field), str):
                    found = ", ".join(filter(None, reader.fieldnames or ()))
                    raise ValueError(f"{where} has no text under {field!r}; columns: {found}")
            source, target = (row[field] for field in fields)
            rows.append(Document(source, target, True, True, where))
    except csv.Error as error:
        raise ValueError(f"{file} line {reader.line_num} is not CSV: {error}") from error
    if not rows:
        raise ValueError(f"{file} has no rows below its header: remove it from the data paths")
    return rows
