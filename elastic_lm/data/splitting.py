"""A user's text in three disjoint parts, and prompts from the part that nothing was fitted on."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

from elastic_lm.config.data import RECORD_SUFFIXES, TEXT_SUFFIXES, DataConfig, holds_records
from elastic_lm.data import pipeline
from elastic_lm.data.sources import JsonLines, TextFiles, find_files, read_text
from elastic_lm.data.stdlib import Split
from elastic_lm.data.tokenizer import Tokenizer
from elastic_lm.files.atomic import write_text_whole

EVERY = 20  # of 20 consecutive pieces, the last is for testing and the one before it for calibration
MOST, LEAST = 2048, 256  # bytes per piece of a text file


def data_config(
    split: Split, paths: Sequence[str], folder: Path, *, seq_len: int, batch_size: int, seed: int = 0
) -> DataConfig:
    """Where the text of one split is; the user's own text is first cut into three files.

    Args:
      split: what the held-out side reads: "calibration" or "test".
      paths: the user's files and folders; () = the interpreter's own library.
      folder: train.txt, calibration.txt and test.txt are written here.
      seq_len: tokens per row.
      batch_size: rows per batch.
      seed: of the shuffle.

    Raises:
      FileNotFoundError: a path does not exist.
      ValueError: a file is empty, not text, or there is too little of it.
    """
    if not paths:
        return DataConfig(source="stdlib", seq_len=seq_len, batch_size=batch_size, seed=seed)
    files = split_text(paths, folder)
    return DataConfig(
        source="text",
        paths=(str(files["train"]),),
        eval_paths=(str(files[split]),),
        seq_len=seq_len,
        batch_size=batch_size,
        seed=seed,
    )


def split_text(paths: Sequence[str], folder: Path) -> dict[Split, Path]:
    """Cuts text into 90 % training, 5 % calibration and 5 % test, piece by piece.

    Args:
      paths: text files, folders, or JSON lines with a `text` field.
      folder: the three files go into a folder in it that is named after their content.

    Returns:
      The file of each split.

    Raises:
      ValueError: there are fewer than 20 pieces.
    """
    pieces = read_pieces(paths)
    if len(pieces) < EVERY:
        few = f"{len(pieces)} pieces of text are too few, at least {EVERY} are needed"
        raise ValueError(f"--data {' '.join(paths)}: {few}")
    parts: dict[Split, str] = {
        "train": "".join(piece for i, piece in enumerate(pieces) if i % EVERY < EVERY - 2),
        "calibration": "".join(pieces[EVERY - 2 :: EVERY]),
        "test": "".join(pieces[EVERY - 1 :: EVERY]),
    }
    folder = folder / hashlib.sha256("".join(pieces).encode()).hexdigest()[:12]
    for part, text in parts.items():
        if not (folder / f"{part}.txt").is_file():
            write_text_whole(folder / f"{part}.txt", text)
    return {part: folder / f"{part}.txt" for part in parts}


def read_pieces(paths: Sequence[str]) -> list[str]:
    """Text files cut at line ends, then JSON lines, each a piece.

    Args:
      paths: text files, folders, or JSON lines with a `text` field.

    Raises:
      FileNotFoundError: a path does not exist.
      ValueError: a file is empty, or no text.
    """
    files = find_files(paths, TEXT_SUFFIXES + RECORD_SUFFIXES)
    texts = [f for f in files if not holds_records(f)]
    span = min(MOST, max(LEAST, sum(len(read_text(f).data) for f in texts) // (10 * EVERY)))
    lines = JsonLines([f for f in files if holds_records(f)], "text")
    cut = TextFiles(texts, span)
    return [cut[i].text for i in range(len(cut))] + [lines[i].text + "\n" for i in range(len(lines))]


def held_out_prompts(config: DataConfig, tokenizer: Tokenizer, count: int, length: int) -> list[list[int]]:
    """Prompts spread evenly over the test split.

    Args:
      config: where the text is.
      tokenizer: of the model.
      count: prompts.
      length: tokens of each.

    Returns:
      `count` lists of `length` token ids.

    Raises:
      ValueError: the test text has too few pieces that long.
    """
    source = pipeline.documents(config, "test")
    assert isinstance(source, TextFiles | JsonLines)  # what `data_config` describes
    encoded = (tokenizer.encode(source[i].text, bos=True) for i in range(len(source)))
    long_enough = [ids[:length] for ids in encoded if len(ids) >= length]
    if len(long_enough) < count:
        raise ValueError(
            f"the held-out text has {len(long_enough)} pieces of {length} tokens, {count} are needed: "
            "give more text with --data"
        )
    return [long_enough[(2 * i + 1) * len(long_enough) // (2 * count)] for i in range(count)]
