"""Text coloured by the depth at which each token left the model: terminal escapes and HTML.

Tokens of full depth are plain text. Those that left early stand on a colour: dark blue after the first of
the model's exits, yellow after its last one, and between them the straight line in CIELAB, along which equal
steps look equally large. Lightness and the blue-yellow contrast change together, so that readers who do not
tell red from green, or blue from yellow, tell neighbouring exits apart. All colours lie between black and
white in lightness, and differ from a page of either.
"""

import html
import itertools
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Literal, TextIO, cast

from rich.color import Color
from rich.console import COLOR_SYSTEMS, Console
from rich.style import Style

FIRST, LAST = (34.0, 6.0, -42.0), (80.0, 4.0, 62.0)  # CIELAB of the first exit and of the last one
WHITE_POINT = (0.95047, 1.0, 1.08883)  # XYZ of D65

Span = tuple[str, int]  # text, and the depth it was decided at
Rgb = tuple[int, int, int]  # 0 .. 255 each
Colours = Literal["standard", "256", "truecolor"]  # what a terminal shows: 16 colours, 256, or 24 bits


def depth_colour(depth: int, exits: Sequence[int]) -> Rgb:
    """Colour that a token stands on, by the rank of its exit among those that exist.

    Args:
      depth: layers it used.
      exits: layers of the exits below full depth, in increasing order; a depth between two counts as the
        deeper one.

    Returns:
      (red, green, blue), 0 .. 255 each.
    """
    rank = sum(layer < depth for layer in exits)
    share = min(rank / max(len(exits) - 1, 1), 1.0)
    return _rgb(*(first + (last - first) * share for first, last in zip(FIRST, LAST, strict=True)))


def text_colour(background: Rgb) -> Rgb:
    """Black or white, whichever has the greater contrast on a background; it is above 4.5 to 1."""
    # The contrasts are (L + 0.05) / 0.05 with black and 1.05 / (L + 0.05) with white (WCAG 2).
    return (0, 0, 0) if luminance(background) > (1.05 * 0.05) ** 0.5 - 0.05 else (255, 255, 255)


def luminance(colour: Rgb) -> float:
    """Relative luminance of an sRGB colour, from 0 for black to 1 for white."""
    red, green, blue = (_linear(value / 255) for value in colour)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def _linear(value: float) -> float:
    return value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4


def _rgb(lightness: float, a: float, b: float) -> Rgb:
    """The sRGB colour of a CIELAB one."""
    y = (lightness + 16) / 116
    x, y, z = (
        white * (f**3 if f > 6 / 29 else 3 * (6 / 29) ** 2 * (f - 4 / 29))
        for white, f in zip(WHITE_POINT, (y + a / 500, y, y - b / 200), strict=True)
    )
    linear = (
        3.2404542 * x - 1.5371385 * y - 0.4985314 * z,
        -0.9692660 * x + 1.8760108 * y + 0.0415560 * z,
        0.0556434 * x - 0.2040259 * y + 1.0572252 * z,
    )
    each = (12.92 * v if v <= 0.0031308 else 1.055 * v ** (1 / 2.4) - 0.055 for v in linear)
    red, green, blue = (round(255 * min(max(v, 0.0), 1.0)) for v in each)
    return red, green, blue


def _exits(parts: Sequence[Span], n_layers: int, exits: Collection[int]) -> list[int]:
    """Layers of the exits below full depth: those that are named, and those that occur."""
    return sorted(layer for layer in {*exits, *(depth for _, depth in parts)} if layer < n_layers)


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


def to_ansi(
    parts: Iterable[Span],
    n_layers: int,
    colours: Colours | None = "truecolor",
    *,
    exits: Collection[int] = (),
) -> str:
    """Terminal text, each span that left early on the colour of its depth.

    Args:
      parts: from `spans` or `legend`.
      n_layers: layers of the full model, whose spans are plain.
      colours: what the terminal shows, from `terminal_colours`; the nearest of its colours are taken. None =
        plain text.
      exits: layers of the model's exits, among which colours are shared out; those that occur in `parts`
        count too.

    Returns:
      Text with escapes for colours.

    Example:
      ```python
      from elastic_lm.evaluate import to_ansi

      print(to_ansi([("easy ", 3), ("hard", 12)], n_layers=12, exits=(3, 6)))
      ```
    """
    parts = list(parts)
    exits = _exits(parts, n_layers, exits)
    system = COLOR_SYSTEMS[colours] if colours else None

    def style(depth: int) -> Style:
        if depth >= n_layers:
            return Style()
        colour = depth_colour(depth, exits)
        return Style(color=Color.from_rgb(*text_colour(colour)), bgcolor=Color.from_rgb(*colour))

    # Printing by a rich console would change the text: it expands tabs and removes carriage returns.
    return "".join(style(depth).render(text, color_system=system) for text, depth in parts)


def to_html(parts: Iterable[Span], n_layers: int, *, exits: Collection[int] = ()) -> str:
    """A <pre> element, each span that left early on the colour of its depth, with the depth as tooltip.

    Args:
      parts: from `spans` or `legend`; the text is escaped.
      n_layers: layers of the full model, whose spans are plain.
      exits: layers of the model's exits, among which colours are shared out; those that occur in `parts`
        count too.

    Returns:
      HTML.

    Example:
      ```python
      from elastic_lm.evaluate import to_html

      to_html([("easy ", 3), ("hard", 12)], n_layers=12)  # in a notebook: IPython.display.HTML(...)
      ```
    """
    parts = list(parts)
    exits = _exits(parts, n_layers, exits)
    body = "".join(_html_span(text, depth, n_layers, exits) for text, depth in parts)
    return f'<pre style="white-space: pre-wrap; line-height: 1.5">{body}</pre>'


def _html_span(text: str, depth: int, n_layers: int, exits: Sequence[int]) -> str:
    look = ""
    if depth < n_layers:
        colour = depth_colour(depth, exits)
        look = f' style="background: {_hex(colour)}; color: {_hex(text_colour(colour))}"'
    return f'<span{look} title="{depth} of {n_layers} layers">{html.escape(text)}</span>'


def _hex(colour: Rgb) -> str:
    return "#{:02x}{:02x}{:02x}".format(*colour)


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
    marks = [(f" {depth} layers ", depth) for depth in sorted({*depths, n_layers})]
    gaps = [("  ", n_layers)] * len(marks)
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
