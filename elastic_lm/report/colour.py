"""Text coloured by the depth at which each token left the model: terminal escapes and HTML.

One scale serves both: green left early, yellow half-way, red needed the full depth.
"""

import html
import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TextIO

RAMP = ((26, 152, 80), (217, 165, 33), (215, 48, 39))  # shallow, middle, full depth
RESET = "\x1b[0m"

Span = tuple[str, int]  # text, and the depth it was decided at


def depth_colour(depth: int, n_layers: int) -> tuple[int, int, int]:
    """Colour of a token, on the scale from green over yellow to red.

    Args:
      depth: layers it used.
      n_layers: layers of the full model, where the scale is red.

    Returns:
      (red, green, blue), 0 .. 255 each.
    """
    place = min(max(depth / n_layers, 0.0), 1.0) * (len(RAMP) - 1)
    low = min(int(place), len(RAMP) - 2)
    share = place - low
    return _mix(RAMP[low], RAMP[low + 1], share)


def _mix(a: tuple[int, int, int], b: tuple[int, int, int], share: float) -> tuple[int, int, int]:
    red, green, blue = (round(x + (y - x) * share) for x, y in zip(a, b, strict=True))
    return red, green, blue


def spans(
    decode: Callable[[Sequence[int]], str],
    tokens: Sequence[int],
    depths: Sequence[int],
    *,
    prompt: Sequence[int] = (),
    text: str | None = None,
) -> list[Span]:
    """Splits decoded text into runs of one depth.

    A token may hold part of a character, so each piece is what its token adds to the decoded prefix;
    an unfinished character is shown with the token that completes it.

    Args:
      decode: token ids -> text.
      tokens: ids in order.
      depths: layers used by each token, as many as tokens.
      prompt: ids before them, which may decide about a space between.
      text: what the tokens say in the end, possibly cut before a stop string; None = all of it.

    Returns:
      [(text, depth)], neighbours differing in depth; the texts join to the decoded whole.
    """
    before = decode(prompt) if prompt else ""

    def prefix(end: int) -> str:
        shown = decode([*prompt, *tokens[:end]])
        shown = shown[len(before) :] if shown.startswith(before) else decode(tokens[:end])
        return shown if text is None else shown[: len(text)]

    pieces = zip(_pieces(prefix, len(tokens)), depths, strict=True)
    runs = itertools.groupby(pieces, key=lambda piece: piece[1])
    joined = [("".join(text for text, _ in run), depth) for depth, run in runs]
    return [(text, depth) for text, depth in joined if text]


def _pieces(prefix: Callable[[int], str], count: int) -> Iterator[str]:
    shown = ""
    for end in range(1, count + 1):
        text = prefix(end)
        if text.endswith("\ufffd") and end < count:
            yield ""
        else:
            yield text[len(shown) :]
            shown = text


def to_ansi(parts: Iterable[Span], n_layers: int) -> str:
    """Terminal text, each span in the colour of its depth.

    Args:
      parts: from `spans` or `legend`.
      n_layers: layers of the full model.

    Returns:
      Text with 24-bit colour escapes.
    """
    return "".join("\x1b[38;2;{};{};{}m".format(*depth_colour(d, n_layers)) + t + RESET for t, d in parts)


def to_html(parts: Iterable[Span], n_layers: int) -> str:
    """A <pre> element, each span on the colour of its depth, with the depth as tooltip.

    Args:
      parts: from `spans` or `legend`; the text is escaped.
      n_layers: layers of the full model.

    Returns:
      HTML.
    """
    body = "".join(_html_span(text, depth, n_layers) for text, depth in parts)
    return f'<pre style="white-space: pre-wrap; line-height: 1.5">{body}</pre>'


def _html_span(text: str, depth: int, n_layers: int) -> str:
    colour = "rgba({}, {}, {}, 0.35)".format(*depth_colour(depth, n_layers))
    title = f"{depth} of {n_layers} layers"
    return f'<span style="background: {colour}" title="{title}">{html.escape(text)}</span>'


def legend(depths: Sequence[int], n_layers: int) -> list[Span]:
    """Spans that explain the colours.

    Args:
      depths: layers of every exit, in any order.
      n_layers: layers of the full model; explained too.

    Returns:
      One span per depth, shallow first, with gaps between.
    """
    marks = [(f"■ {depth} layers", depth) for depth in sorted({*depths, n_layers})]
    gaps = [("   ", n_layers)] * len(marks)
    return list(itertools.chain.from_iterable(zip(marks, gaps, strict=True)))[:-1]


def wants_colour(stream: TextIO, choice: str = "auto") -> bool:
    """Whether to colour what is printed.

    Args:
      stream: where it goes.
      choice: "always", "never", or "auto": a terminal, and NO_COLOR is not set.

    Returns:
      True = colour.
    """
    if choice != "auto":
        return choice == "always"
    return stream.isatty() and "NO_COLOR" not in os.environ
