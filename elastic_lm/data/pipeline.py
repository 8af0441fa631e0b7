"""Documents to packed batches: source -> shuffle, repeat -> tokenise -> pack -> batch, all in grain.

The iterator's position is part of a training checkpoint, so a resumed run reads the very next batch.
"""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grain
import numpy as np

from elastic_lm.config.data import RECORD_SUFFIXES, TEXT_SUFFIXES, DataConfig
from elastic_lm.data.conversations import (
    Alpaca,
    Conversation,
    Conversations,
    encode_conversation,
    for_tokenizer,
)
from elastic_lm.data.sharded import ShardedBatches, rows_alone
from elastic_lm.data.sources import Document, JsonLines, TextFiles, find_files
from elastic_lm.data.stdlib import Split, stdlib_files
from elastic_lm.data.tokenizer import Tokenizer
from elastic_lm.report.machine import require_memory

BINS = 32  # rows that first-fit packing fills at a time
FIELDS = ("tokens", "targets", "weights")
SOURCES = "sources"  # further field of batches that say which file each token is from
TOKEN_BYTES = 20  # of a token of a batch: five numbers of four bytes


def documents(config: DataConfig, split: Split) -> TextFiles | JsonLines | Conversations | Alpaca:
    """The documents of one split.

    Args:
      config: where they are.
      split: "train" reads `paths`, the others `eval_paths`; stdlib has three splits of its own.

    Returns:
      A random-access sequence of `Document`; text files give one per piece of about `span` bytes. Of chats
      one of `Conversation`.

    Raises:
      FileNotFoundError: a file or folder does not exist.
      ValueError: a file is empty, or `eval_paths` is needed and missing.
    """
    if config.source == "stdlib":
        files = [file for file in stdlib_files(split) if file.stat().st_size]
        return TextFiles(files, config.span)
    paths = config.paths if split == "train" else config.eval_paths
    if not paths:
        raise ValueError(f"data.eval_paths=(): name held-out files for the {split} split")
    if config.source == "text":
        return TextFiles(find_files(paths, TEXT_SUFFIXES), config.span)
    files = find_files(paths, RECORD_SUFFIXES)
    if config.source == "messages":
        return Conversations(files, config.messages_field)
    if config.source == "alpaca":
        return Alpaca(files)
    if config.source == "jsonl":
        return JsonLines(files, config.text_field)
    return JsonLines(files, config.response_field, config.prompt_field)


def train_batches(
    config: DataConfig, tokenizer: Tokenizer, rows: tuple[int, ...] | None = None
) -> grain.IterDataset | ShardedBatches:
    """Endless shuffled batches of the training split.

    Args:
      config: where the documents are, and the shape of a batch.
      tokenizer: of the model.
      rows: which rows of every batch are kept, as where other processes have the rest; None = all.

    Returns:
      A dataset of dicts with the fields of `losses.Batch`, [batch_size, seq_len] NumPy arrays.

    Raises:
      FileNotFoundError: see `documents`.
      ValueError: see `documents`.

    Example:
      ```python
      import elastic_lm as el

      tokenizer = el.Tokenizer.load(el.embedded_model())
      config = el.DataConfig(source="stdlib", seq_len=32, batch_size=2)
      batch = next(iter(el.data.train_batches(config, tokenizer)))
      assert batch["tokens"].shape == (2, 32)
      ```
    """
    source = _source(config, tokenizer, "train")
    shuffled = grain.MapDataset.source(source).seed(config.seed or 0).shuffle().repeat()
    encoded = functools.partial(encode, config, tokenizer)

    def shard(number: int) -> grain.IterDataset:
        # Cut after `repeat`: every document is read once in every pass, whatever the number of shards.
        part = shuffled if config.shards == 1 else shuffled[number :: config.shards]
        size = config.batch_size // config.shards
        return _pack(config, part.map(encoded)).batch(size, drop_remainder=True).map(_as_batch)

    if config.shards == 1:
        return rows_alone(shard(0), rows)
    return ShardedBatches(shard, config.shards, config.batch_size, rows)


def check_learnable(config: DataConfig, tokenizer: Tokenizer) -> None:
    """Refuses training text in which no token is learned; endless batches would never be filled.

    Args:
      config: where the documents are.
      tokenizer: of the model.

    Raises:
      ValueError: every document is too short, or is a prompt that fills seq_len.
    """
    source = _source(config, tokenizer, "train")
    learned = (encode(config, tokenizer, source[i])["weights"].any() for i in range(len(source)))
    if not any(learned):
        raise ValueError(
            f"data.paths={config.paths}: none of {len(source)} documents has a token to learn; give text of "
            f"at least two tokens, and prompts that leave room within data.seq_len={config.seq_len}"
        )


def eval_batches(
    config: DataConfig, tokenizer: Tokenizer, split: Split = "test", *, sources: bool = False
) -> grain.IterDataset:
    """One pass over a held-out split; the last batch is filled up with rows of weight 0.

    The pieces come in one fixed shuffled order, so that the first batches are a fair sample.

    Args:
      config: where the documents are, and the shape of a batch.
      tokenizer: of the model.
      split: which one; see `documents`.
      sources: batches say which file each token comes from, by its number among `eval_files`.

    Returns:
      As `train_batches`, but finite; padding has weight 0 and segment 0.

    Raises:
      FileNotFoundError: see `documents`.
      ValueError: see `documents`.

    Example:
      ```python
      import elastic_lm as el

      tokenizer = el.Tokenizer.load(el.embedded_model())
      config = el.DataConfig(source="stdlib", seq_len=32, batch_size=2)
      batch = next(iter(el.data.eval_batches(config, tokenizer, "calibration")))
      assert batch["weights"].shape == (2, 32)
      ```
    """
    source = _source(config, tokenizer, split)
    encoded = functools.partial(encode, config, tokenizer)
    if sources:
        source, encoded = WithFiles(source), functools.partial(_encode_with_file, encoded)
    rows = grain.MapDataset.source(source).shuffle(seed=0).map(encoded)
    rows = _pack(config, rows, (*FIELDS, SOURCES) if sources else FIELDS)
    fill = functools.partial(grain.experimental.batch_and_pad, batch_size=config.batch_size)
    return rows.batch(config.batch_size, batch_fn=fill).map(_as_batch)


def eval_files(config: DataConfig, split: Split = "test") -> list[str]:
    """The files that `sources` of `eval_batches` number, in this order.

    Args:
      config: where the documents are.
      split: which one; see `documents`.

    Raises:
      FileNotFoundError: see `documents`.
      ValueError: see `documents`.
    """
    return [str(file) for file in WithFiles(documents(config, split)).files]


class WithFiles:
    """Documents, each with the number of the file that it is in."""

    def __init__(self, source: Any) -> None:
        """Numbers the files by their first document.

        Args:
          source: from `documents`; its `file_of` names the file of a document.
        """
        self._source = source
        self._numbers: dict[Any, int] = {}
        for i in range(len(source)):
            self._numbers.setdefault(source.file_of(i), len(self._numbers))

    @property
    def files(self) -> list[Path]:
        """The files, in the order of their numbers."""
        return list(self._numbers)

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: Any) -> tuple[int, Any]:
        return self._numbers[self._source.file_of(index)], self._source[index]


def _encode_with_file(
    encoded: Callable[[Any], dict[str, np.ndarray]], document: tuple[int, Any]
) -> dict[str, np.ndarray]:
    """`encode`, and the number of the file for every token."""
    number, content = document
    arrays = encoded(content)
    return {**arrays, SOURCES: np.full(len(arrays["tokens"]), number, np.int32)}


def _source(config: DataConfig, tokenizer: Tokenizer, split: Split) -> Any:
    """`documents`, of which chats are rows that the tokenizer's template can show."""
    source = documents(config, split)
    if isinstance(source, TextFiles | JsonLines):
        return source
    return for_tokenizer(source, tokenizer)


def encode(
    config: DataConfig, tokenizer: Tokenizer, document: Document | Conversation
) -> dict[str, np.ndarray]:
    """Inputs, the token that follows each, and whether that token is learned.

    Args:
      config: cuts documents to seq_len where rows keep documents whole.
      tokenizer: gives ids; beginning and ending ids go where the document begins and ends.
      document: the text, or a chat, whose template writes all special tokens.

    Returns:
      {"tokens", "targets"}: int32 and {"weights"}: float32, one entry per predicted token; weights
      are 0 where the predicted token belongs to the prompt.
    """
    if isinstance(document, Conversation):
        ids, learned = encode_conversation(tokenizer, document)
        if config.packing == "first_fit":
            ids, learned = ids[: config.seq_len + 1], learned[: config.seq_len + 1]
        tokens = np.asarray(ids, np.int32)
        weights = np.asarray(learned[1:], np.float32)
        return {"tokens": tokens[:-1], "targets": tokens[1:], "weights": weights}

    ids = tokenizer.encode(document.prompt, bos=document.starts) if document.prompt or document.starts else []
    read = max(len(ids), 1)  # the first token of all has nothing before it and is never predicted
    ids = ids + tokenizer.encode(document.text)
    if document.ends:
        ids = ids + list(tokenizer.eos_ids[:1])
        tokenizer.check_ids(ids[-1:])
    if config.packing == "first_fit":
        ids = ids[: config.seq_len + 1]
    weights = np.ones(max(len(ids) - 1, 0), np.float32)
    weights[: read - 1] = 0.0
    tokens = np.asarray(ids, np.int32)
    return {"tokens": tokens[:-1], "targets": tokens[1:], "weights": weights}


def file_texts(config: DataConfig, split: Split = "train") -> list[str]:
    """Every document of a split as plain text, to learn a tokenizer from.

    Args:
      config: where the documents are.
      split: which one; see `documents`.

    Returns:
      Prompt and text of each document, joined.

    Raises:
      FileNotFoundError: see `documents`.
      ValueError: see `documents`.
    """
    source = documents(config, split)
    if isinstance(source, Conversations | Alpaca):
        contents = (str(one.get("content") or "") for i in range(len(source)) for one in source[i].messages)
        return list(contents)
    return [source[i].prompt + source[i].text for i in range(len(source))]


def check_batch(config: DataConfig) -> None:
    """Refuses batches that no memory holds.

    Raises:
      ValueError: names rows and tokens.
    """
    needed = config.batch_size * config.seq_len * TOKEN_BYTES
    what = f"rows of data.seq_len={config.seq_len} tokens"
    require_memory("data.batch_size", config.batch_size, needed, what)


def _pack(config: DataConfig, rows: grain.MapDataset, fields: tuple[str, ...] = FIELDS) -> grain.IterDataset:
    check_batch(config)
    lengths: dict[str, int] = dict.fromkeys(fields, config.seq_len)
    stream = rows.to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=64))
    if config.packing == "concat":
        return grain.experimental.ConcatThenSplitIterDataset(stream, length_struct=lengths)
    return grain.experimental.FirstFitPackIterDataset(
        stream, length_struct=lengths, num_packing_bins=BINS, shuffle_bins=False
    )


def _as_batch(packed: dict[str, Any]) -> dict[str, np.ndarray]:
    """Keeps the fields of `losses.Batch`; padding has segment 0 and weight 0."""
    batch = {field: packed[field] for field in (*FIELDS, SOURCES) if field in packed}
    batch["positions"] = packed["tokens_positions"]
    batch["segments"] = packed["tokens_segment_ids"]
    return batch
