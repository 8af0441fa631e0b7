"""Text in shards: the same batches for every number of processes, and positions that move between them."""

import dataclasses
import functools
import itertools
from collections import Counter
from pathlib import Path

import chex
import grain
import numpy as np
import pytest

from elastic_lm.config.data import DataConfig
from elastic_lm.data import pipeline
from elastic_lm.data.pipeline import train_batches
from elastic_lm.data.sharded import take_rows
from elastic_lm.data.tokenizer import Tokenizer, train_bpe

SHARDS = 4
BATCHES = 5


@pytest.fixture
def tokenizer(text_file: Path) -> Tokenizer:
    return train_bpe([text_file.read_text()], 300)


@pytest.fixture
def config(text_file: Path) -> DataConfig:
    paths = (str(text_file),)
    return DataConfig(source="text", paths=paths, seq_len=16, batch_size=8, span=100, shards=SHARDS)


def rows_of(process: int, processes: int, config: DataConfig) -> tuple[int, ...]:
    size = config.batch_size // processes
    return tuple(range(process * size, (process + 1) * size))


@pytest.mark.parametrize("packing", ["concat", "first_fit"])
@pytest.mark.parametrize("processes", [2, 4, 8])
def test_processes_read_the_rows_of_one(
    config: DataConfig, tokenizer: Tokenizer, packing: str, processes: int
) -> None:
    config = dataclasses.replace(config, packing=packing)  # pyright: ignore[reportArgumentType]
    whole = itertools.islice(iter(train_batches(config, tokenizer)), BATCHES)
    rows = [rows_of(i, processes, config) for i in range(processes)]
    parts = [iter(train_batches(config, tokenizer, own)) for own in rows]
    for batch in whole:
        for own, part in zip(rows, parts, strict=True):
            chex.assert_trees_all_equal(next(part), take_rows(own, batch))


def test_one_shard_is_the_order_without_shards(config: DataConfig, tokenizer: Tokenizer) -> None:
    config = dataclasses.replace(config, shards=1)
    source = pipeline._source(config, tokenizer, "train")
    encoded = functools.partial(pipeline.encode, config, tokenizer)
    documents = grain.MapDataset.source(source).seed(config.seed or 0).shuffle().repeat().map(encoded)
    plain = pipeline._pack(config, documents).batch(config.batch_size, drop_remainder=True)
    rows = rows_of(1, 2, config)
    for due, whole, part in zip(
        itertools.islice(iter(plain.map(pipeline._as_batch)), BATCHES),
        iter(train_batches(config, tokenizer)),
        iter(train_batches(config, tokenizer, rows)),
        strict=False,
    ):
        chex.assert_trees_all_equal(whole, due)
        chex.assert_trees_all_equal(part, take_rows(rows, due))


def test_a_position_moves_to_other_numbers_of_processes(config: DataConfig, tokenizer: Tokenizer) -> None:
    straight = iter(train_batches(config, tokenizer))
    two = [iter(train_batches(config, tokenizer, rows_of(i, 2, config))) for i in range(2)]
    for _ in range(3):
        next(straight)
        for one in two:
            next(one)
    position = {"shards": {n: at for one in two for n, at in one.get_state()["shards"].items()}}
    assert sorted(position["shards"]) == ["0", "1", "2", "3"]

    with pytest.raises(ValueError, match=r"the position in the data lacks shards \[2, 3\]"):
        iter(train_batches(config, tokenizer)).set_state(two[0].get_state())
    due = [next(straight) for _ in range(3)]
    for processes in (1, 2, 4):
        parts = [
            iter(train_batches(config, tokenizer, rows_of(i, processes, config))) for i in range(processes)
        ]
        for part in parts:
            part.set_state(position)
        for batch in due:
            together = [next(part) for part in parts]
            found = {name: np.concatenate([part[name] for part in together]) for name in batch}
            chex.assert_trees_all_equal(found, batch)


def test_a_process_reads_its_shards_alone(config: DataConfig, tokenizer: Tokenizer) -> None:
    part = iter(train_batches(config, tokenizer, (2, 3)))  # of shard 1
    next(part)
    assert list(part.get_state()["shards"]) == ["1"]


def test_shards_read_every_document_once(tmp_path: Path) -> None:
    """In every pass: what the rows of one pass hold is the text, each piece once."""
    pieces = [f"{i:05d}" for i in range(64)]
    file = tmp_path / "numbers.txt"
    file.write_text("\n".join(pieces) + "\n")
    tokenizer = train_bpe([file.read_text()], 257)  # a token per byte
    data = {"source": "text", "paths": (str(file),), "seq_len": 6, "batch_size": 4, "span": 6}
    config = DataConfig(**data, packing="first_fit", shards=SHARDS)
    counts: Counter[str] = Counter()
    for batch in itertools.islice(iter(train_batches(config, tokenizer)), 3 * len(pieces) // 4):
        for tokens in batch["tokens"]:
            counts[tokenizer.decode(tokens.tolist())[:5]] += 1
    assert counts == dict.fromkeys(pieces, 3)


def test_shards_must_divide_the_batch(config: DataConfig) -> None:
    with pytest.raises(ValueError, match=r"data.shards=3: must divide data.batch_size=8"):
        dataclasses.replace(config, shards=3)
    with pytest.raises(ValueError, match=r"data.shards=0: must be at least 1"):
        dataclasses.replace(config, shards=0)
