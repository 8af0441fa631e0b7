"""Files that are one JSON array of objects, read like JSON lines: one object at a time, by its place."""

import json
from pathlib import Path

from elastic_lm.files.text_files import Bytes

Place = tuple[int, int, int]  # number of the record from 1, first byte, one past its last byte
SPACE = " \t\r\n"


def is_array(data: Bytes, start: int) -> bool:
    """Whether a text begins as an array of JSON objects does.

    Args:
      data: UTF-8.
      start: where the text begins.
    """
    begin = data[start : start + 4096].lstrip()
    return begin[:1] == b"[" and begin[1:].lstrip()[:1] in (b"{", b"]", b"")


def array_places(file: Path, data: Bytes, start: int) -> list[Place]:
    """Where each object of an array stands.

    Args:
      file: names it in messages.
      data: UTF-8, of which all is held in memory while it is looked at.
      start: where the text begins.

    Raises:
      ValueError: it is no complete array of objects; names the record.
    """
    text = bytes(data[start:]).decode()
    decoder = json.JSONDecoder()
    places: list[Place] = []
    at = _past_space(text, text.index("[") + 1)
    byte, counted = start, 0  # bytes before character `counted`
    while text[at : at + 1] != "]":
        number = len(places) + 1
        try:
            value, stop = decoder.raw_decode(text, at)
        except ValueError as error:
            raise ValueError(f"{file} record {number} is not JSON ({error})") from error
        if not isinstance(value, dict):
            raise ValueError(f"{file} record {number}: {type(value).__name__} is not a JSON object")
        first = byte + _bytes(text[counted:at])
        byte, counted = first + _bytes(text[at:stop]), stop
        places.append((number, first, byte))
        at = _past_space(text, stop)
        if text[at : at + 1] not in (",", "]"):
            raise ValueError(f"{file}: the array is not complete after record {number}; it ends in ]")
        if text[at : at + 1] == ",":
            at = _past_space(text, at + 1)
    if text[at + 1 :].strip():
        raise ValueError(f"{file}: text follows the array; write one array, or one object per line")
    return places


def _past_space(text: str, at: int) -> int:
    while text[at : at + 1] and text[at] in SPACE:
        at += 1
    return at


def _bytes(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode())
