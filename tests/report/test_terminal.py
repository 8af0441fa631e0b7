"""What a terminal is shown of text that others wrote."""

from hypothesis import given, settings
from hypothesis import strategies as st

from elastic_lm.report.terminal import shown


def test_control_characters_are_written_out() -> None:
    assert shown("\x1b]0;title\x07\x1b[2J") == "\\x1b]0;title\\x07\\x1b[2J"
    assert shown("a\x9bb\x7fc\rd\u202ee") == "a\\x9bb\\x7fc\\x0dd\\u202ee"
    assert shown("\tcafé\n漢字 🙂\u2028") == "\tcafé\n漢字 🙂\u2028"


TEXTS = st.text(st.sampled_from([*map(chr, range(0x20)), *"aé🙂\x7f\x9f\u202e\\x"]), max_size=9)


@settings(deadline=None, derandomize=True, max_examples=50)
@given(TEXTS, TEXTS)
def test_pieces_are_shown_as_the_whole(one: str, other: str) -> None:
    assert shown(one) + shown(other) == shown(one + other)
    assert not any(ord(c) < 32 and c not in "\t\n" for c in shown(one))
