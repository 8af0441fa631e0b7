"""Kinds of tokens, by the pieces of byte-level BPE, SentencePiece and WordPiece."""

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from elastic_lm.data.piece_kinds import KINDS, piece_bytes, token_kinds
from elastic_lm.data.tokenizer import Tokenizer, train_bpe

TEXT = ["def größe(x1):\n    return x1 + 1024 # 日本\n", "class A:\n\tdef g(self): return self\n"] * 9


def test_pieces_of_byte_level_bpe_are_the_bytes_that_they_decode_to() -> None:
    tokenizer = train_bpe(TEXT, 330)
    for text in TEXT[:2]:
        ids = tokenizer.encode(text)
        pieces = [tokenizer.backend.id_to_token(i) for i in ids]
        assert b"".join(piece_bytes(piece, "ByteLevel()") for piece in pieces) == text.encode()

    kinds = token_kinds(tokenizer)
    assert len(kinds) == tokenizer.vocab_size
    assert set(kinds) <= set(KINDS)
    assert kinds[0] == "special"
    assert [kinds[i] for i in tokenizer.encode(" return x")] == ["word start"] * 2
    assert {kinds[i] for i in tokenizer.encode("10")} == {"digits"}
    assert {kinds[i] for i in tokenizer.encode("\n    ")} == {"whitespace"}
    assert {kinds[i] for i in tokenizer.encode("🙂")} == {"part of character"}


@pytest.mark.parametrize(
    ("spelling", "pieces"),
    [
        (decoders.Metaspace(), {"▁the": "word start", "ing": "word continuation", "▁": "whitespace"}),
        (decoders.ByteFallback(), {"<0x0A>": "whitespace", "<0xE3>": "part of character", "▁12": "digits"}),
        (decoders.WordPiece(), {"the": "word start", "##ing": "word continuation", ".": "punctuation"}),
    ],
)
def test_pieces_of_other_tokenizers(spelling: object, pieces: dict[str, str]) -> None:
    vocabulary = {"<unk>": 0, **{piece: i for i, piece in enumerate(pieces, 1)}}
    backend = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.decoder = spelling
    backend.add_special_tokens(["<unk>"])
    assert token_kinds(Tokenizer(backend)) == ("special", *pieces.values())
