"""Coloured text loses nothing and joins tokens that share a character."""

import io
import itertools
import re
from collections.abc import Sequence

import pytest

from elastic_lm.report import colour as render

BYTES = "naïve café".encode()


def decode(ids: Sequence[int]) -> str:
    return bytes(ids).decode("utf-8", errors="replace")


def test_spans_join_to_the_decoded_text() -> None:
    depths = [(2, 4)[i % 3 == 0] for i in range(len(BYTES))]
    parts = render.spans(decode, list(BYTES), depths)
    assert "".join(text for text, _ in parts) == "naïve café"
    assert all(a[1] != b[1] for a, b in itertools.pairwise(parts))


def test_spans_follow_a_prompt_and_end_where_the_text_does() -> None:
    words = ["once", "upon", "a", "time"]

    def joined(ids: Sequence[int]) -> str:
        return " ".join(words[i] for i in ids)

    assert render.spans(joined, [2, 3], [1, 2]) == [("a", 1), (" time", 2)]
    assert render.spans(joined, [2, 3], [1, 2], prompt=[0, 1]) == [(" a", 1), (" time", 2)]
    assert render.spans(joined, [2, 3], [1, 2], prompt=[0, 1], text=" a ti") == [(" a", 1), (" ti", 2)]
    assert render.spans(joined, [2, 3], [1, 2], prompt=[0, 1], text=" a") == [(" a", 1)]


def test_spans_keep_a_cut_character_at_the_end() -> None:
    assert render.spans(decode, list(BYTES[:3]), [1, 1, 1]) == [("na\ufffd", 1)]


def test_ansi_and_html_hold_the_text() -> None:
    parts = [("if a < b:", 2), ("\n  pass", 4)]
    plain = re.sub(r"\x1b\[[0-9;]*m", "", render.to_ansi(parts, 4))
    assert plain == "if a < b:\n  pass"
    page = render.to_html(parts, 4)
    assert "a &lt; b" in page
    assert "2 of 4 layers" in page


def test_colours_run_from_shallow_to_full_depth() -> None:
    assert render.depth_colour(0, 12) == render.RAMP[0]
    assert render.depth_colour(6, 12) == render.RAMP[1]
    assert render.depth_colour(12, 12) == render.RAMP[2]
    assert [text for text, _ in render.legend((3, 6), 12)][::2] == ["■ 3 layers", "■ 6 layers", "■ 12 layers"]


def test_ansi_in_the_colours_that_a_terminal_has() -> None:
    assert render.to_ansi([("a\tb\r\n", 0)], 4) == "\x1b[38;2;26;152;80ma\tb\r\n\x1b[0m"
    assert render.to_ansi([("a", 0)], 4, "256").startswith("\x1b[38;5;")
    assert re.match(r"\x1b\[3\dma", render.to_ansi([("a", 0)], 4, "standard"))
    assert render.to_ansi([("a", 0), ("b", 4)], 4, None) == "ab"


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"TERM": "xterm-256color", "COLORTERM": "truecolor"}, "truecolor"),
        ({"TERM": "xterm-256color"}, "256"),
        ({"TERM": "xterm"}, "standard"),
        ({"TERM": "dumb"}, None),
        ({"TERM": "xterm-256color", "NO_COLOR": "1"}, None),
    ],
)
def test_colours_of_a_terminal(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], expected: str | None
) -> None:
    for name in ("TERM", "COLORTERM", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert render.terminal_colours(Terminal()) == expected
    assert render.terminal_colours(Terminal(), "never") is None
    assert render.terminal_colours(Terminal(), "always")
    # Where there is no terminal nothing is known of it.
    assert render.terminal_colours(io.StringIO()) is None
    assert render.terminal_colours(io.StringIO(), "always") == "truecolor"
