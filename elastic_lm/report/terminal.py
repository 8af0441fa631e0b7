"""Text that others wrote, such as prompts and what a model generates, made safe to print on a terminal."""

# C0 and C1 control characters but tabs and newlines, and those that change the direction of text: they can
# retitle a window, erase what was printed, or make text read otherwise than it is.
CONTROLS = {*range(0x20), *range(0x7F, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A)} - {0x09, 0x0A}
ESCAPES = {code: f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" for code in CONTROLS}


def shown(text: str) -> str:
    """The text with control characters written out, like \\x1b, so that a terminal does not carry them out.

    Tabs and newlines stay. Characters that are one in the text are one in what is shown, wherever it is cut.
    """
    return text.translate(ESCAPES)
