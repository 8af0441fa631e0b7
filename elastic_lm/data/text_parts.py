"""A text as tokens in three parts: rows to fit on, rows to measure on, and beginnings to continue.

The parts are consecutive (seven, two and one tenth of the text), so that what is measured on does not come
from between pieces that were fitted on. Text is cut anywhere: a file that is one long line has three parts as
well.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np

from elastic_lm.data.batch import Arrays, Batch
from elastic_lm.data.splitting import MOST, read_pieces
from elastic_lm.data.stdlib import stdlib_files

LEAST_TOKENS = 4096  # of the whole text
SHARES = (0.7, 0.9)  # of the text, where the second and the third part begin
LEAST_ROWS = 32  # to fit on; they are shorter where the text is short
ROWS = 4  # of a batch


class Encoder(Protocol):
    """What is needed of a tokenizer."""

    def encode(self, text: str, bos: bool = False) -> list[int]:
        """Token ids of a text."""
        ...


@dataclasses.dataclass(frozen=True)
class TextParts:
    """Token ids.

    Attributes:
      fitting: [R, T + 1] int32.
      testing: [R', T + 1] int32.
      prompts: token ids of each beginning.
    """

    fitting: np.ndarray
    testing: np.ndarray
    prompts: list[list[int]]


def text_parts(
    paths: Sequence[str],
    tokenizer: Encoder,
    *,
    seq_len: int,
    fit_tokens: int,
    test_tokens: int,
    prompts: int,
    prompt_tokens: int,
    seed: int = 0,
) -> TextParts:
    """Reads and cuts a text.

    Args:
      paths: text files, folders, or JSON lines with a `text` field; () = the Python standard library.
      tokenizer: of the model.
      seq_len: most tokens per row, T.
      fit_tokens: most tokens to fit on.
      test_tokens: most tokens to measure on.
      prompts: beginnings, each of another piece of text as far as there are so many.
      prompt_tokens: tokens of each.
      seed: of the shuffle within a part.

    Returns:
      The parts.

    Raises:
      FileNotFoundError: a path does not exist.
      ValueError: there is too little text.
    """
    texts = read_pieces(paths or [str(path) for path in stdlib_files("test") if path.stat().st_size])
    pieces = [text[i : i + MOST] for text in texts for i in range(0, len(text), MOST)]
    if len(pieces) < 4 * ROWS:
        size = max(len("".join(pieces)) // (4 * ROWS), 1)
        pieces = [text[i : i + size] for text in texts for i in range(0, len(text), size)]

    cuts = [round(share * len(pieces)) for share in SHARES]
    rng = np.random.default_rng(seed)
    parts = [rng.permutation(part).tolist() for part in np.split(np.asarray(pieces, object), cuts)]
    fitting, testing = _tokens(parts[0], tokenizer, fit_tokens), _tokens(parts[1], tokenizer, test_tokens)
    beginnings = _beginnings(parts[2], tokenizer, prompts, prompt_tokens)

    length = min(seq_len, len(fitting) // LEAST_ROWS - 1)
    found = len(_tokens(pieces, tokenizer, LEAST_TOKENS))
    if found < LEAST_TOKENS or length < 1 or len(testing) < ROWS * (length + 1) or not beginnings:
        raise ValueError(
            f"--data {' '.join(paths)}: {found} tokens of text are too few, {LEAST_TOKENS} are needed: seven "
            "tenths to fit on, two tenths to measure on and one tenth to continue; give more text"
        )
    rows = (np.asarray(_cut(part, length + 1), np.int32) for part in (fitting, testing))
    return TextParts(*rows, prompts=beginnings)


def _tokens(pieces: Sequence[str], tokenizer: Encoder, most: int) -> list[int]:
    """About the first `most` token ids of some pieces."""
    ids: list[int] = []
    for piece in pieces:
        ids += tokenizer.encode(piece)
        if len(ids) >= most:
            break
    return ids[:most]


def _beginnings(pieces: Sequence[str], tokenizer: Encoder, count: int, length: int) -> list[list[int]]:
    """At most `count` prompts, one of each piece; of fewer pieces, as many as each has."""
    found: list[list[int]] = []
    for piece in pieces:
        ids = tokenizer.encode(piece, bos=True)
        most = 1 if len(pieces) >= count else len(ids) // length
        found += _cut(ids[: most * length], length)
        if len(found) >= count:
            break

    # Where every piece is shorter than a prompt, prompts run over the ends of pieces.
    return (found or _cut(_tokens(pieces, tokenizer, count * length), length))[:count]


def _cut(ids: Sequence[int], length: int) -> list[list[int]]:
    """Consecutive pieces of one length; what is left over is dropped."""
    return [list(ids[i : i + length]) for i in range(0, len(ids) - length + 1, length)]


def batches(rows: np.ndarray) -> Iterator[Batch]:
    """Batches of `ROWS` rows, every row a document; what is left over is dropped.

    Args:
      rows: [R, T + 1] int32.
    """
    for i in range(0, len(rows) - ROWS + 1, ROWS):
        yield whole_rows(rows[i : i + ROWS])


def whole_rows(rows: np.ndarray, first: int = 0) -> Batch:
    """A batch in which every row is a document.

    Args:
      rows: [B, T + 1] int32.
      first: the target of the token at this column is the first that counts.
    """
    column = np.broadcast_to(np.arange(rows.shape[1] - 1, dtype=np.int32), rows[:, 1:].shape)
    fields: Arrays = {
        "tokens": rows[:, :-1],
        "targets": rows[:, 1:],
        "weights": (column >= first).astype(np.float32),
        "positions": column,
        "segments": np.ones_like(column),
    }
    return Batch(**fields)
