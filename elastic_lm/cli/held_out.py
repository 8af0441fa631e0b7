"""Held-out text as `calibrate` and `evaluate` name it: flags, options, and the batches that they describe."""

import argparse
import dataclasses
import itertools
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING

from elastic_lm.cli.parser import CommandOptions, add_data, add_model, require_flag
from elastic_lm.config.data import JSONL_SUFFIXES, TEXT_SUFFIXES, DataConfig, DataSource
from elastic_lm.quickstart.options import HELD_OUT_TOKENS

if TYPE_CHECKING:
    from elastic_lm.data.batch import Batch
    from elastic_lm.data.stdlib import Split
    from elastic_lm.data.tokenizer import Tokenizer

ROWS = 8  # rows per batch


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeldOutOptions(CommandOptions):
    """A model, and the text that it is measured on."""

    model: str | None = None  # folder; None = the embedded model
    data: tuple[str, ...] = ()  # text files and folders, or JSON lines; () = the Python standard library
    tokens: int = HELD_OUT_TOKENS  # most tokens to read
    seq_len: int = 256  # tokens per row

    def __post_init__(self) -> None:
        for flag, value in (("--tokens", self.tokens), ("--seq-len", self.seq_len)):
            require_flag(value >= 1, flag, value, "must be at least 1")
        kinds = {path.endswith(JSONL_SUFFIXES) for path in self.data}
        require_flag(len(kinds) < 2, "--data", " ".join(self.data), "give text files or JSON lines, not both")

    @property
    def source(self) -> DataSource:
        """Where `DataConfig` finds the text."""
        if not self.data:
            return "stdlib"
        return "jsonl" if self.data[0].endswith(JSONL_SUFFIXES) else "text"


def add_held_out(parser: argparse.ArgumentParser, purpose: str) -> None:
    """Adds the flags of `HeldOutOptions`.

    Args:
      parser: of the command.
      purpose: what the command uses the text for.
    """
    add_model(parser)
    add_data(parser, purpose)
    add, defaults = parser.add_argument, HeldOutOptions
    add("--tokens", type=int, metavar="N", help=f"tokens to read of it (default: {defaults.tokens})")
    add("--seq-len", type=int, metavar="T", help=f"tokens per row (default: {defaults.seq_len})")


def held_out_batches(
    options: HeldOutOptions, tokenizer: "Tokenizer", split: "Split", independent: bool = False
) -> "tuple[Iterable[Batch], str]":
    """Batches of the text that --data names, or of a split of the Python standard library.

    Args:
      options: which text, and how much of it.
      tokenizer: of the model.
      split: used where --data is empty.
      independent: rows should be independent of each other: JSON lines are kept whole, each in one row, and
        text cut from fewer files than there are rows is warned about.

    Returns:
      (packed batches, a description of the text).

    Raises:
      FileNotFoundError: a file does not exist.
    """
    from elastic_lm.data import pipeline
    from elastic_lm.data.batch import Batch

    paths, count = options.data, -(-options.tokens // (options.seq_len * ROWS))
    data = DataConfig(
        source=options.source,
        paths=paths,
        eval_paths=paths,
        seq_len=options.seq_len,
        batch_size=ROWS,
    )
    if independent:
        data = independent_rows(data, count * ROWS, split)

    arrays = itertools.islice(pipeline.eval_batches(data, tokenizer, split), count)
    name = " ".join(paths) or f"{split} split of the Python standard library"
    return (Batch(**fields) for fields in arrays), f"{name}, up to {options.tokens} tokens"


def independent_rows(data: DataConfig, rows: int, split: "Split") -> DataConfig:
    """JSON lines are kept whole, each in one row; text files are cut, with a warning where they are few."""
    if data.source == "jsonl":
        return dataclasses.replace(data, packing="first_fit")
    from elastic_lm.data.sources import find_files
    from elastic_lm.data.stdlib import stdlib_files

    files = find_files(data.paths, TEXT_SUFFIXES) if data.paths else stdlib_files(split)
    if len(files) < rows:
        print(
            f"up to {rows} rows are cut from {len(files)} files, and rows of one file are not "
            "independent as the guarantee assumes: JSON lines with one document each are safer",
            file=sys.stderr,
        )
    return data
