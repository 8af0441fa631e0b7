"""A tokenizer for tests."""

from collections.abc import Sequence


class Letters:
    """A token per character, of 63; token 0 begins a text."""

    def encode(self, text: str, *, bos: bool = False) -> list[int]:
        return [0] * bos + [ord(c) % 63 + 1 for c in text]

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(chr(63 + (i - 1) % 63) for i in ids if i)
