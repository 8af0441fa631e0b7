"""Text coloured by the depth at which each token left the model: terminal escapes and HTML.

One scale serves both: green left early, yellow half-way, red needed the full depth.
"""

import html
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Literal, TextIO, cast

from rich.color import Color
from rich.console import COLOR_SYSTEMS, Console
from rich.style import Style

RAMP = ((26, 152, 80), (217, 165, 33), (215, 48, 39))  # shallow, middle, full depth

Span = tuple[str, int]  # text, and the depth it was decided at
Colours = Literal["standard", "256", "truecolor"]  # what a terminal shows: 16 colours, 256, or 24 bits


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
    red, green, blue = (round(x + (y - x) * share) for x, y in zip(RAMP[low], RAMP[low + 1], strict=True))
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

    A token may hold part of a character, so each piece is what its token adds to the decoded prefix. An
    unfinished character is shown with the token that completes it.

    Args:
      decode: token ids -> text.
      tokens: ids in order.
      depths: layers used by each token, as many as tokens.
      prompt: ids before them; some tokenizers write a space between the two or none, as the prompt ends.
      text: what the tokens say in the end, possibly cut before a stop string; None = all of it.

    Returns:
      [(text, depth)], neighbours differing in depth; the texts join to the decoded whole.

    Example:
      ```python
      from elastic_lm.evaluate import spans

      letters = "abcd"
      spans(lambda ids: "".join(letters[i] for i in ids), tokens=[0, 1, 2], depths=[2, 2, 4])
      # [("ab", 2), ("c", 4)]
      ```
    """
    before = decode(prompt) if prompt else ""

    def prefix(end: int) -> str:
        shown = decode([*prompt, *tokens[:end]])
        # A prompt that ends within a character may read otherwise once the next token is there.
        shown = shown[len(before) :] if shown.startswith(before) else decode(tokens[:end])
        return shown if text is None else shown[: len(text)]

    pieces = zip(_pieces(prefix, len(tokens)), depths, strict=True)
    runs = itertools.groupby(pieces, key=lambda piece: piece[1])
    joined = [("".join(text for text, _ in run), depth) for depth, run in runs]
    return [(text, depth) for text, depth in joined if text]


def _pieces(prefix: Callable[[int], str], count: int) -> Iterator[str]:
    """What each of `count` tokens adds to the text of those before it."""
    shown = ""
    for end in range(1, count + 1):
        text = prefix(end)
        if text.endswith("\ufffd") and end < count:  # an unfinished character
            yield ""
        else:
            yield text[len(shown) :]
            shown = text


def to_ansi(parts: Iterable[Span], n_layers: int, colours: Colours | None = "truecolor") -> str:
    """Terminal text, each span in the colour of its depth.

    Args:
      parts: from `spans` or `legend`.
      n_layers: layers of the full model.
      colours: what the terminal shows, from `terminal_colours`; the nearest of its colours are taken. None =
        plain text.

    Returns:
      Text with escapes for colours.

    Example:
      ```python
      from elastic_lm.evaluate import to_ansi

      print(to_ansi([("easy ", 3), ("hard", 12)], n_layers=12))
      ```
    """
    system = COLOR_SYSTEMS[colours] if colours else None
    styles = [(text, Style(color=Color.from_rgb(*depth_colour(depth, n_layers)))) for text, depth in parts]

    # Printing by a rich console would change the text: it expands tabs and removes carriage returns.
    return "".join(style.render(text, color_system=system) for text, style in styles)


def to_html(parts: Iterable[Span], n_layers: int) -> str:
    """A <pre> element, each span on the colour of its depth, with the depth as tooltip.

    Args:
      parts: from `spans` or `legend`; the text is escaped.
      n_layers: layers of the full model.

    Returns:
      HTML.

    Example:
      ```python
      from elastic_lm.evaluate import to_html

      to_html([("easy ", 3), ("hard", 12)], n_layers=12)  # in a notebook: IPython.display.HTML(...)
      ```
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

    Example:
      ```python
      from elastic_lm.evaluate import legend, to_ansi

      print(to_ansi(legend([3, 6], n_layers=12), n_layers=12))
      ```
    """
    marks = [(f"■ {depth} layers", depth) for depth in sorted({*depths, n_layers})]
    gaps = [("   ", n_layers)] * len(marks)
    return list(itertools.chain.from_iterable(zip(marks, gaps, strict=True)))[:-1]


def terminal_colours(stream: TextIO, choice: str = "auto") -> Colours | None:
    """Which colours to print with.

    Args:
      stream: where the text goes.
      choice: "always", "never", or "auto": where it is a terminal that shows them and NO_COLOR is not set.

    Returns:
      The colours that TERM and COLORTERM say a terminal shows, 24 bits where there is none; None = no colour.
    """
    is_terminal = stream.isatty()  # a notebook is not a terminal: print as to a file
    console = Console(file=stream, force_terminal=is_terminal, force_jupyter=False, legacy_windows=False)
    shown = cast(Colours | None, console.color_system)
    if choice == "always":
        return shown or "truecolor"
    return None if choice == "never" or console.no_color else shown
