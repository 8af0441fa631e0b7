"""Text to token ids and back: a thin wrapper of `tokenizers`, and training of byte-level BPE."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from elastic_lm.config.checks import require
from elastic_lm.files.atomic import local_folder, read_json

END_OF_TEXT = "<|endoftext|>"


class Tokenizer:
    """A `tokenizer.json` with the ids that begin and end a text.

    Attributes:
      bos_id: id put before every text, or None.
      eos_ids: ids that end a text; possibly empty.
      pad_id: id that fills rows up, or None.

    Example:
      ```python
      import elastic_lm as el

      tokenizer = el.Tokenizer.load(el.embedded_model())
      ids = tokenizer.encode("import os", bos=True)
      assert tokenizer.decode(ids) == "import os"
      ```
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        bos_id: int | None = None,
        eos_ids: Sequence[int] = (),
        pad_id: int | None = None,
    ) -> None:
        self.backend = backend
        self.bos_id = bos_id
        self.eos_ids = tuple(eos_ids)
        self.pad_id = pad_id
        self._truncating: dict[int, tokenizers.Tokenizer] = {}  # copies that cut, by length

    @classmethod
    def load(cls, path: str | Path) -> "Tokenizer":
        """Reads a folder that holds tokenizer.json (a Hugging Face or elastic checkpoint), or that file.

        The beginning id is what the tokenizer's own template prepends; ending ids come from
        generation_config.json, config.json or tokenizer_config.json beside it, in this order. The padding
        id is that of tokenizer_config.json, config.json or tokenizer.json.

        Raises:
          FileNotFoundError: there is no tokenizer.json.
          ValueError: the file is not a tokenizer, or one beside it is damaged; names the file.
        """
        file = local_folder(path)
        file = file / "tokenizer.json" if file.is_dir() else file
        if not file.is_file():
            raise FileNotFoundError(f"no tokenizer at {file}: expected a tokenizer.json or a folder with one")
        try:
            backend = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:
            raise ValueError(f"{file} is not a tokenizer.json: {error}") from error
        pad_id = _pad_id(backend, file.parent)
        backend.no_truncation()
        backend.no_padding()
        return cls(backend, _bos_id(backend, file.parent), _eos_ids(backend, file.parent), pad_id)

    @property
    def vocab_size(self) -> int:
        """Number of ids, added tokens included."""
        return self.backend.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str, bos: bool = False) -> list[int]:
        """Ids of `text`.

        Args:
          text: any string.
          bos: put `bos_id` first, where the tokenizer has one.

        Raises:
          ValueError: it is no string, or one that holds half of a character.
        """
        try:
            ids = self.backend.encode(text, add_special_tokens=False).ids
        except TypeError as error:  # no string, or one with a lone surrogate, which JSON can spell
            fix = (
                "holds half of a character; give complete Unicode text"
                if isinstance(text, str)
                else "must be text"
            )
            raise ValueError(f"text={text!r}: {fix}") from error
        return [self.bos_id, *ids] if bos and self.bos_id is not None else ids

    def encode_pair(
        self, first: str, second: str | None = None, max_len: int | None = None
    ) -> tuple[list[int], list[int]]:
        """Ids of one or two texts as the tokenizer's own template joins them, for an encoder.

        Args:
          first: any string.
          second: any string; None = there is one text.
          max_len: ids in all, special tokens included; the longer text loses its end first. None = all.

        Returns:
          (ids, token types), of the same length.

        Raises:
          ValueError: max_len leaves no room for text.
        """
        backend = self.backend
        if max_len is not None:
            special = backend.num_special_tokens_to_add(second is not None)
            require(max_len > special, "max_len", max_len, f"must be above the {special} special tokens")
            backend = self._cut_to(max_len)
        encoding = backend.encode(first, second)
        return encoding.ids, encoding.type_ids

    def _cut_to(self, max_len: int) -> tokenizers.Tokenizer:
        """A copy that truncates: truncation is a setting of the whole tokenizer, which threads share."""
        if max_len not in self._truncating:
            copy = tokenizers.Tokenizer.from_str(self.backend.to_str())
            copy.enable_truncation(max_len, strategy="longest_first")
            self._truncating[max_len] = copy
        return self._truncating[max_len]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`, without special tokens."""
        return self.backend.decode([int(i) for i in ids], skip_special_tokens=True)

    def save(self, folder: str | Path) -> None:
        """Writes tokenizer.json and a tokenizer_config.json that `transformers` understands."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        config: dict[str, Any] = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "add_bos_token": self.bos_id is not None,
            "clean_up_tokenization_spaces": False,
        }
        if self.bos_id is not None:
            config["bos_token"] = self.backend.id_to_token(self.bos_id)
        if self.eos_ids:
            config["eos_token"] = self.backend.id_to_token(self.eos_ids[0])
        if self.pad_id is not None:
            config["pad_token"] = self.backend.id_to_token(self.pad_id)
        (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
        unfinished = folder / "tokenizer.json.unfinished"  # a process may die while it writes
        self.backend.save(str(unfinished))
        unfinished.replace(folder / "tokenizer.json")


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Learns byte-level BPE, which can write any text and needs no unknown token.

    Args:
      texts: documents to learn from; the result depends on their content alone, not on threads.
      vocab_size: ids in total: 256 bytes, one end-of-text token (id 0), the rest merges.

    Raises:
      ValueError: vocab_size is below 257.

    Example:
      ```python
      from elastic_lm.data import train_bpe

      tokenizer = train_bpe(["a good film", "a bad film"], 262)
      assert tokenizer.decode(tokenizer.encode("a film")) == "a film"
      ```
    """
    if vocab_size < 257:
        raise ValueError(f"vocab_size={vocab_size}: byte-level BPE needs at least 257")
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return Tokenizer(backend, None, (0,))


def _json(file: Path) -> dict[str, Any]:
    return read_json(file) if file.is_file() else {}


def _bos_id(backend: tokenizers.Tokenizer, folder: Path) -> int | None:
    """The id that the tokenizer's template puts first, or the one its config asks for."""
    template = backend.encode("a", add_special_tokens=True)
    if template.ids and template.special_tokens_mask[0]:
        return template.ids[0]
    file = folder / "tokenizer_config.json"
    return _token_id(backend, file, "bos_token") if _json(file).get("add_bos_token") else None


def _eos_ids(backend: tokenizers.Tokenizer, folder: Path) -> tuple[int, ...]:
    for name in ("generation_config.json", "config.json"):
        ids = _json(folder / name).get("eos_token_id")
        if ids is not None:
            ids = tuple(ids) if isinstance(ids, list) else (ids,)
            right = all(type(i) is int for i in ids)
            require(right, f"{folder / name}: eos_token_id", ids, "must be a token id, or a list of them")
            return ids
    token = _token_id(backend, folder / "tokenizer_config.json", "eos_token")
    token = backend.token_to_id(END_OF_TEXT) if token is None else token
    return () if token is None else (token,)


def _pad_id(backend: tokenizers.Tokenizer, folder: Path) -> int | None:
    named = _token_id(backend, folder / "tokenizer_config.json", "pad_token")
    if named is not None:
        return named
    stated = _json(folder / "config.json").get("pad_token_id")
    if stated is None:
        return backend.padding["pad_id"] if backend.padding else None
    require(type(stated) is int, f"{folder / 'config.json'}: pad_token_id", stated, "must be a token id")
    return stated if 0 <= stated < backend.get_vocab_size() else None  # old configs write -1 for none


def _token_id(backend: tokenizers.Tokenizer, file: Path, key: str) -> int | None:
    """Id of the special token under `key`, written as a string or as an AddedToken."""
    value = _json(file).get(key)
    if value is None:
        return None
    token = value.get("content") if isinstance(value, dict) else value
    if not isinstance(token, str):
        raise ValueError(
            f'{file}: {key}={value!r}: must be a string, or a mapping like {{"content": "</s>"}}'
        )
    return backend.token_to_id(token)
