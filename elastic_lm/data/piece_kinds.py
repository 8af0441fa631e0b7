"""Kinds of tokens, from the tokenizer's pieces alone: what errors are told apart by.

special            begins, ends or marks a text; `Tokenizer.decode` leaves it out
whitespace         nothing but white space: indentation, ends of lines
word start         has a letter, and white space before it
word continuation  has a letter, and no white space before it: the rest of a word, or the first of a line
digits             has a digit and no letter
punctuation        anything else: punctuation, operators, symbols
part of character  bytes that are no whole character
"""

from typing import Protocol

import tokenizers

SPECIAL = "special"
WHITESPACE = "whitespace"
WORD_START = "word start"
CONTINUATION = "word continuation"
DIGITS = "digits"
PUNCTUATION = "punctuation"
PART = "part of character"
KINDS = (SPECIAL, WHITESPACE, WORD_START, CONTINUATION, DIGITS, PUNCTUATION, PART)

SPACE_MARK = "\u2581"  # stands for a space in SentencePiece's pieces
WORD_PIECE_MARK = "##"  # begins WordPiece's pieces that continue a word


class HasPieces(Protocol):
    """A tokenizer, as far as kinds of tokens need one; `data.Tokenizer` is one."""

    backend: tokenizers.Tokenizer

    @property
    def special_tokens(self) -> tuple[str, ...]:
        """The texts of special tokens."""
        ...

    @property
    def vocab_size(self) -> int:
        """Number of ids."""
        ...


def token_kinds(tokenizer: HasPieces) -> tuple[str, ...]:
    """The kind of every token of a vocabulary.

    Args:
      tokenizer: of the model.

    Returns:
      One of `KINDS` for every id from 0.

    Example:
      ```python
      import elastic_lm as el

      tokenizer = el.Tokenizer.load(el.embedded_model())
      kinds = el.data.token_kinds(tokenizer)
      assert [kinds[i] for i in tokenizer.encode("import 1")][-1] == "digits"
      ```
    """
    special, decoder = set(tokenizer.special_tokens), str(tokenizer.backend.decoder)
    pieces = map(tokenizer.backend.id_to_token, range(tokenizer.vocab_size))
    return tuple(
        SPECIAL if piece is None or piece in special else kind_of(piece_bytes(piece, decoder))
        for piece in pieces
    )


def piece_bytes(piece: str, decoder: str) -> bytes:
    """UTF-8 bytes of a piece, with the white space before it.

    Args:
      piece: as the vocabulary spells it.
      decoder: of the tokenizer, as text; its name says how pieces are spelled.
    """
    if "ByteLevel" in decoder and all(letter in BYTE_OF for letter in piece):
        return bytes(BYTE_OF[letter] for letter in piece)
    if "WordPiece" in decoder:
        return (
            piece.removeprefix(WORD_PIECE_MARK) if piece.startswith(WORD_PIECE_MARK) else f" {piece}"
        ).encode()
    if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
        return bytes.fromhex(piece[3:5])
    return piece.replace(SPACE_MARK, " ").encode()


def kind_of(piece: bytes) -> str:
    """The kind of a piece that is not special, by its bytes."""
    try:
        text = piece.decode()
    except UnicodeDecodeError:
        return PART

    if any(letter.isalpha() for letter in text):
        return WORD_START if text[0].isspace() else CONTINUATION
    if any(letter.isnumeric() for letter in text):
        return DIGITS
    return WHITESPACE if not text.strip() else PUNCTUATION


def _byte_letters() -> dict[str, int]:
    """The letters by which byte-level BPE spells bytes: printable ones as they are, others from U+0100."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


BYTE_OF = _byte_letters()
