"""Models and held-out text as `calibrate`, `evaluate` and `generate` name them on the command line."""

import argparse
import dataclasses
import itertools
import sys
from collections.abc import Iterable

from elastic_lm.checkpoints.embedded import embedded_model
from elastic_lm.checkpoints.loading import load_decoder
from elastic_lm.config.data import DataConfig
from elastic_lm.data import pipeline
from elastic_lm.data.batch import Batch
from elastic_lm.data.sources import JSONL_SUFFIXES, TEXT_SUFFIXES, find_files
from elastic_lm.data.stdlib import Split, stdlib_files
from elastic_lm.data.tokenizer import Tokenizer
from elastic_lm.models.decoder import Decoder, Params

ROWS = 8  # rows per batch


def load_with_tokenizer(folder: str | None) -> tuple[Decoder, Params, Tokenizer, str]:
    """A model folder's model and tokenizer; None = the embedded model.

    Returns:
      (model, canonical parameters, tokenizer, the folder).
    """
    path = folder or str(embedded_model())
    model, params = load_decoder(path)
    return model, params, Tokenizer.load(path), path


def held_out_batches(
    args: argparse.Namespace, tokenizer: Tokenizer, split: Split, independent: bool = False
) -> tuple[Iterable[Batch], str]:
    """Batches of the text that --data names, or of a split of the Python standard library.

    Args:
      args: flags `data`, `tokens` and `seq_len`.
      tokenizer: of the model.
      split: used where --data is empty.
      independent: rows should be independent of each other: JSON lines are kept whole, each in one row, and
        text cut from fewer files than there are rows is warned about.

    Returns:
      (packed batches, a description of the text).

    Raises:
      FileNotFoundError: a file does not exist.
      ValueError: text and JSON lines are mixed, or a number is out of range.
    """
    if args.tokens < 1:
        raise ValueError(f"--tokens {args.tokens}: must be at least 1")
    sizes = {"seq_len": args.seq_len, "batch_size": ROWS}
    paths = tuple(args.data)
    if not paths:
        data = DataConfig(source="stdlib", **sizes)
    else:
        kinds = {path.endswith(JSONL_SUFFIXES) for path in paths}
        if len(kinds) > 1:
            raise ValueError(f"--data {' '.join(paths)}: give text files or JSON lines, not both")
        source = "jsonl" if kinds.pop() else "text"
        data = DataConfig(source=source, paths=paths, eval_paths=paths, **sizes)
    count = -(-args.tokens // (args.seq_len * ROWS))
    if independent and data.source == "jsonl":
        data = dataclasses.replace(data, packing="first_fit")
    elif independent:
        files = find_files(paths, TEXT_SUFFIXES) if paths else stdlib_files(split)
        if len(files) < count * ROWS:
            print(
                f"up to {count * ROWS} rows are cut from {len(files)} files, and rows of one file are not "
                "independent as the guarantee assumes: JSON lines with one document each are safer",
                file=sys.stderr,
            )
    arrays = itertools.islice(pipeline.eval_batches(data, tokenizer, split), count)
    name = " ".join(paths) or f"{split} split of the Python standard library"
    return (Batch(**fields) for fields in arrays), f"{name}, up to {args.tokens} tokens"
