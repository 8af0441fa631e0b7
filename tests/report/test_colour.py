"""Coloured text loses nothing and joins tokens that share a character."""

import io
import itertools
import re
from collections.abc import Sequence

import numpy as np
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


# Vision without one kind of cones, on linear RGB (Machado, Oliveira and Fernandes 2009, severity 1).
BLINDNESS = {
    "none": np.eye(3),
    "protanopia": [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ],
    "deuteranopia": [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ],
    "tritanopia": [
        [1.255528, -0.076749, -0.178779],
        [-0.078411, 0.930809, 0.147602],
        [0.004733, 0.691367, 0.303900],
    ],
}
WHITE, DARK = (255, 255, 255), (30, 30, 30)


def linear(colour: render.Rgb) -> np.ndarray:
    values = np.asarray(colour) / 255
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def lab(colour: render.Rgb, blindness: str = "none") -> np.ndarray:
    """CIELAB of an sRGB colour as somebody sees it."""
    seen = np.clip(np.asarray(BLINDNESS[blindness]) @ linear(colour), 0, 1)
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    xyz = to_xyz @ seen / (to_xyz @ np.ones(3))
    f = np.where(xyz > (6 / 29) ** 3, np.cbrt(xyz), xyz / (3 * (6 / 29) ** 2) + 4 / 29)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


def distance(first: render.Rgb, second: render.Rgb, blindness: str) -> float:
    """CIE76."""
    return float(np.linalg.norm(lab(first, blindness) - lab(second, blindness)))


@pytest.mark.parametrize("blindness", BLINDNESS)
@pytest.mark.parametrize("exits", [(9,), (3, 6), (3, 6, 9), (2, 4, 6, 8), (1, 2, 3, 4, 5, 6)])
@pytest.mark.parametrize("page", [WHITE, DARK], ids=["white", "dark"])
def test_everybody_tells_depths_apart(blindness: str, exits: tuple[int, ...], page: render.Rgb) -> None:
    # Tokens of full depth stand on the page itself, and come after the last exit.
    colours = [*(render.depth_colour(depth, exits) for depth in exits), page]
    least = {4: 15, 6: 8}.get(len(exits), 20)
    for first, second in itertools.pairwise(colours):
        assert distance(first, second, blindness) > least, (first, second)
    assert all(distance(colour, page, blindness) > 20 for colour in colours[:-1])


def test_old_colours_would_fail() -> None:
    """Green, yellow and red of earlier releases, on a tint of 35 %, at an exit of 9 of 12 layers."""
    tint = [tuple(round(255 - 0.35 * (255 - v)) for v in c) for c in ((217, 165, 33), (215, 48, 39))]
    half = tuple((a + b) // 2 for a, b in zip(*tint, strict=True))
    assert distance(half, tint[1], "deuteranopia") < 20


@pytest.mark.parametrize("count", range(1, 30))
def test_text_is_legible_on_every_colour(count: int) -> None:
    exits = tuple(range(1, count + 1))
    for depth in exits:
        colour = render.depth_colour(depth, exits)
        light = sorted(0.05 + render.luminance(c) for c in (colour, render.text_colour(colour)))
        assert light[1] / light[0] >= 4.5


def test_colours_go_by_the_exits_that_exist() -> None:
    first, last = render.depth_colour(3, (3, 6)), render.depth_colour(6, (3, 6))
    assert render.depth_colour(9, (9, 11)) == first
    assert render.depth_colour(11, (9, 11)) == last
    assert render.depth_colour(9, (9,)) == first
    assert render.depth_colour(5, (3, 6)) == last  # between two exits
    assert np.allclose(lab(first), render.FIRST, atol=1.0)
    assert np.allclose(lab(last), render.LAST, atol=1.0)
    among = render.to_html([("a", 6)], 12, exits=(3, 6))
    assert among == render.to_html([("a", 6)], 12, exits=(3, 6, 12)) != render.to_html([("a", 6)], 12)
    assert [text for text, _ in render.legend((3, 6), 12)][::2] == [" 3 layers ", " 6 layers ", " 12 layers "]


def test_full_depth_is_plain() -> None:
    assert render.to_ansi([("a", 2), ("b", 4)], 4).endswith("\x1b[0mb")
    page = render.to_html([("a", 2), ("b", 4)], 4)
    assert '<span title="4 of 4 layers">b</span>' in page
    assert re.search(r'<span style="background: #[0-9a-f]{6}; color: #ffffff" title="2 of 4 layers">a', page)


def test_ansi_in_the_colours_that_a_terminal_has() -> None:
    red, green, blue = render.depth_colour(2, (2,))
    shown = f"\x1b[38;2;255;255;255;48;2;{red};{green};{blue}ma\tb\r\n\x1b[0m"
    assert render.to_ansi([("a\tb\r\n", 2)], 4) == shown
    assert "48;5;" in render.to_ansi([("a", 0)], 4, "256")
    assert re.match(r"\x1b\[(3|9)\d;(4|10)\dma", render.to_ansi([("a", 0)], 4, "standard"))
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
