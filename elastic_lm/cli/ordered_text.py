"""Text files read in order, as published perplexities are computed."""

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from elastic_lm.cli.parser import require_flag
from elastic_lm.config.data import TEXT_SUFFIXES

if TYPE_CHECKING:
    from elastic_lm.data.batch import Batch
    from elastic_lm.data.tokenizer import Tokenizer

READ_TOKENS = 1024  # tokens that are seen at once where nothing else is said
BATCH_TOKENS = 2048  # of all rows of a batch together
LETTERS = 32  # per token: text beyond so many times the tokens that are read is not tokenised


def ordered_batches(
    paths: Sequence[str], tokenizer: "Tokenizer", tokens: int, context: int, stride: int | None
) -> "tuple[Iterator[Batch], str]":
    """Windows of text files, each file read in order from its beginning.

    Args:
      paths: text files and folders, in this order.
      tokenizer: of the model; the token that begins a text, where there is one, comes first in each file.
      tokens: most tokens to read of all files together.
      context: tokens that are seen at once.
      stride: tokens from the beginning of one window to the next; None = context.

    Returns:
      (batches of one shape, a description of what is read).

    Raises:
      FileNotFoundError: a file does not exist.
      ValueError: the files hold fewer than two tokens, or a number is out of its range.
    """
    from elastic_lm.data.batch import Batch
    from elastic_lm.data.ordered import windows
    from elastic_lm.data.sources import find_files

    require_flag(
        context >= 2, "--context", context, "must be at least 2: a token and the one that it predicts"
    )
    texts, left, whole = [], tokens, True
    for file in find_files(paths, TEXT_SUFFIXES):
        ids, complete = _ids(file, tokenizer, left)
        texts.append(ids)
        left, whole = left - len(ids), whole and complete
        if left <= 0:
            break
    texts = [ids for ids in texts if len(ids) > 1]
    if not texts:
        names = " ".join(paths)
        raise ValueError(f"{names}: holds fewer than two tokens, so that none is predicted; give more text")

    rows = max(1, BATCH_TOKENS // context)
    each = (batch for ids in texts for batch in windows(ids, context, stride, batch_size=rows))
    count = sum(map(len, texts))
    if not whole:
        print(f"the first {count} tokens are read; --tokens N reads more", file=sys.stderr)
    part = "all" if whole else "the first"
    how = f"{part} {count} tokens in order, context {context}, stride {stride or context}"
    return (Batch(**fields) for fields in each), f"{' '.join(paths)}, {how}"


def _ids(file: Path, tokenizer: "Tokenizer", most: int) -> tuple[list[int], bool]:
    """The first ids of a file, `most` of them at most, and whether those are all."""
    from elastic_lm.data.sources import read_text

    text = read_text(file).decode()
    # A tokenizer looks ahead, so that the last tokens before a cut may differ: far more text is read.
    ids = tokenizer.encode(text[: LETTERS * most], bos=True)
    if len(ids) < most and len(text) > LETTERS * most:
        ids = tokenizer.encode(text, bos=True)
    return ids[:most], len(ids) <= most and len(text) <= LETTERS * most
