"""What counts as text, where its lines end, and how much a packed file may unpack to."""

import gzip
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elastic_lm.files import text_files
from elastic_lm.files.text_files import check_whole, open_bytes, parse_object, read_lines, text_start

# What some programs take for line ends, and this package does not.
INSIDE = ["\u2028", "\u2029", "\u0085", "\x0b", "\x0c", "\x1c", "\x1d", "\x1e", "\r"]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("text".encode("utf-16"), "but UTF-16: convert it first"),
        ("text".encode("utf-16-le"), r"line 1 holds the byte 0x00\); it is a binary file, or UTF-16"),
        ("a\nb\ncafé".encode("latin-1"), r"line 3 holds the byte 0xe9\); convert it first"),
        (b"a\nb\0", "line 2 holds the byte 0x00"),
        ("ok\n\u20ac".encode()[:-1], "line 2 holds the byte 0xe2"),  # a character is cut off at the end
        (b"\xed\xa0\x80", "line 1 holds the byte 0xed"),  # half of a character, as some programs write it
        (gzip.compress(b"text", mtime=0), r"packed by gzip: end its name in \.gz"),
        (b"PK\x03\x04\x00", "a zip file: unpack it first"),
    ],
)
def test_what_is_no_text_is_refused_and_its_line_named(data: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=f"f.txt: is not UTF-8 text.*{message}"):
        text_start("f.txt", data)


def test_text_begins_after_a_byte_order_mark() -> None:
    assert text_start("f", "\ufeffa".encode()) == 3
    assert text_start("f", "a\ufeff".encode()) == 0
    assert text_start("f", b"BZh and PAR1 begin some words") == 0


def test_characters_over_the_ends_of_pieces_are_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_files, "CHUNK", 3)
    assert text_start("f", "aé漢🙂\n".encode() * 5) == 0
    bad = "aé漢🙂\n".encode() * 5 + b"\xff"
    with pytest.raises(ValueError, match="line 6 holds the byte 0xff"):
        text_start("f", bad)


@settings(deadline=None, derandomize=True, max_examples=60)
@given(
    st.lists(st.text(st.sampled_from([*INSIDE, "a", " ", "é", "🙂"]), max_size=6), min_size=1, max_size=5),
    st.booleans(),
    st.booleans(),
    st.booleans(),
)
def test_lines_end_at_newlines_alone(
    tmp_path_factory: pytest.TempPathFactory, lines: list[str], windows: bool, mark: bool, packed: bool
) -> None:
    lines = [line.rstrip("\r") for line in lines]
    data = ("\ufeff" * mark + ("\r\n" if windows else "\n").join(lines)).encode()
    file = tmp_path_factory.mktemp("lines") / ("f.GZ" if packed else "f.txt")
    file.write_bytes(gzip.compress(data) if packed else data)
    assert read_lines(file) == lines


def test_packed_files_unpack_within_a_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_files, "UNPACKED", 10_000)
    small, bomb, text = (tmp_path / f"{name}.txt.gz" for name in ("small", "bomb", "text"))
    small.write_bytes(gzip.compress(b"a" * 10_000))
    bomb.write_bytes(gzip.compress(b"a" * 1_000_000))
    text.write_bytes(gzip.compress("".join(map(str, range(20_000))).encode()))
    assert [len(open_bytes(file).read()) for file in (small, text)] == [10_000, 88_890]
    with pytest.raises(
        ValueError, match=r"bomb\.txt\.gz: unpacks to more than .* bytes, more than 100 times"
    ):
        open_bytes(bomb).read()
    with open_bytes(bomb, whole=False) as stream:  # which is never held in memory
        assert sum(len(piece) for piece in iter(lambda: stream.read(4096), b"")) == 1_000_000


@pytest.mark.parametrize("at", [2, 40, -6, -2])
def test_damaged_files_are_named(tmp_path: Path, at: int) -> None:
    """A wrong header, wrong data (which zlib reports), and wrong sums at the end."""
    data = bytearray(gzip.compress("".join(map(str, range(300))).encode()))
    data[at] ^= 0xFF
    (tmp_path / "f.gz").write_bytes(data)
    with pytest.raises(ValueError, match=r"f\.gz is not a complete gzip file"):
        read_lines(tmp_path / "f.gz")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"[" * 200_000, "nested more than 100 deep"),
        (b"\xff", "is not UTF-8 text"),
        ('{"a": 1}'.encode("utf-16"), "is not UTF-8 text"),
        (b"[1]", "list is not a JSON object"),
        ("{", "is not JSON"),
    ],
)
def test_lines_that_are_no_objects_are_named(line: bytes | str, message: str) -> None:
    with pytest.raises(ValueError, match=f"f line 3.*{message}"):
        parse_object("f line 3", line)


@settings(deadline=None, derandomize=True, max_examples=60)
@given(st.text(st.sampled_from("a é🙂\ud83d\ude42\udfff"), max_size=8))
def test_texts_are_whole_or_refused(text: str) -> None:
    half = any("\ud800" <= c <= "\udfff" for c in text)
    read = json.loads(json.dumps(text))  # two halves in the right order become one character
    if not half:
        assert check_whole("f line 1", read) == text
        return
    with pytest.raises(ValueError, match="f line 1 holds half of a character near"):
        check_whole("f line 1", text)
