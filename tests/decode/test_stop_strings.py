"""Where text ends: stop strings in it, and stop strings that are special tokens, which no text shows."""

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elastic_lm.decode.results import Detokenizer

VOCABULARY = ["<end>", "<sep>", "a", "b", "ab", "é", "b<"]
HALF = len(VOCABULARY)  # the first byte of a character whose second byte never comes alone


class Pieces:
    """A tokenizer whose tokens are pieces of text, some of them special, and one of half a character."""

    special_tokens = ("<end>", "<sep>")

    def encode(self, text: str, *, bos: bool = False) -> list[int]:
        raise NotImplementedError

    def decode(self, ids: Sequence[int], special: bool = False) -> str:
        pieces = ["\ufffd" if i == HALF else VOCABULARY[i] for i in ids]
        return "".join(piece for piece in pieces if special or piece not in self.special_tokens)


def ids(text: str) -> list[int]:
    return [VOCABULARY.index(piece) for piece in text.split()]


@pytest.mark.parametrize(
    ("emitted", "stops", "count", "text"),
    [
        ("a b <sep> a", ("<sep>",), 3, "ab"),
        ("a b <sep> a", ("b<sep>",), 3, "a"),
        ("a b <sep> a b", ("<sep>ab",), 5, "ab"),
        ("a ab <sep> b", ("b<sep>",), 3, "aa"),
        ("a b <sep> ab b", ("<sep>a",), 4, "ab"),  # the stop ends within a token
        ("a <sep> b <end>", ("ab",), 3, ""),  # looked for in the text, which omits special tokens
        ("a é <sep> b", ("b", "<sep>"), 3, "aé"),
        ("a b é", ("<sep>", "x"), None, "abé"),
        ("b< <sep>", ("<sep>",), 2, "b<"),
    ],
)
def test_stop_strings_with_special_tokens(
    emitted: str, stops: tuple[str, ...], count: int | None, text: str
) -> None:
    detokenizer = Detokenizer(Pieces(), (), stops)
    tokens = ids(emitted)
    assert detokenizer.stops_after([2, 1], tokens) == count
    assert detokenizer.text([2, 1], tokens[:count]) == text


STOPS = ["<sep>", "b<sep>", "<sep>a", "<end><sep>", "ab", "bb", "é", "<sep>é<sep>", "aba"]


@settings(deadline=None, derandomize=True, max_examples=150)
@given(
    st.lists(st.integers(0, HALF), max_size=9),
    st.lists(st.sampled_from(STOPS), max_size=2),
    st.integers(0, 3),
)
def test_what_was_streamed_is_the_text(tokens: list[int], stops: list[str], prompt: int) -> None:
    """As the sampler streams: after every token, cut at the first stop, the settled part of the text."""
    detokenizer, before = Detokenizer(Pieces(), (), tuple(stops)), [prompt]
    count = detokenizer.stops_after(before, tokens)
    if count is not None:
        assert detokenizer.stops_after(before, tokens[: count - 1]) is None
    tokens = tokens[:count]
    final, shown = detokenizer.text(before, tokens), ""
    for n in range(1, len(tokens)):
        safe = detokenizer.settled(before, tokens[:n], detokenizer.text(before, tokens[:n]))
        assert final.startswith(safe), (n, safe, final)
        shown = max(shown, safe, key=len)
    assert final.startswith(shown)
    assert not any(stop in final for stop in stops if "<" not in stop)
