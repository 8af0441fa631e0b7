"""Text to token ids and back: a thin wrapper of `tokenizers`, and training of byte-level BPE."""

import functools
import hashlib
import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, overload

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from elastic_lm.config.checks import is_whole, require, require_ids
from elastic_lm.data.chat_template import ChatTemplate, chat_template_of
from elastic_lm.data.gguf_tokenizer import unpacked
from elastic_lm.data.tokenizer_files import (
    CONFIG_FILE,
    TOKENIZER_FILE,
    build,
    carried_files,
    content_of,
    find_tokenizer,
    special_token_texts,
    special_tokens_of,
)
from elastic_lm.files.atomic import read_json, write_bytes_whole, write_text_whole
from elastic_lm.files.checksums import check_files
from elastic_lm.files.gguf import is_gguf
from elastic_lm.files.hub import local_model
from elastic_lm.files.text_files import check_whole

SAMPLED_TOKENS = 256  # of a vocabulary, that its fingerprint reads
SAMPLE_TEXT = (
    "The 3 quick brown foxes don't jump over 1,024 lazy dogs.\n\tdef größe(x): return {x: '日本語 🙂'}\n"
)
END_OF_TEXT = "<|endoftext|>"
# Files of a folder that say what its tokenizer does; checked where the folder has checksums.
CHECKED = ("*token*", "config.json", "generation_config.json", "chat_template*", "vocab*", "merges.txt")
NO_TEMPLATE = "the tokenizer has none, so that it is no chat model's; put a chat_template.jinja beside it"
OURS = "elastic"  # key of tokenizer_config.json under which ids stand that no file of the folder tells


class Tokenizer:
    """A `tokenizer.json` with the ids that begin and end a text.

    Attributes:
      bos_id: id put before every text, or None.
      eos_ids: ids that end a text; possibly empty.
      pad_id: id that fills rows up, or None.
      limit: rows of the model's vocabulary, above which no id is given; None = no model is known.

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
        files: Mapping[str, bytes] | None = None,
    ) -> None:
        """Wraps a tokenizer.

        Args:
          backend: of the `tokenizers` library.
          bos_id: see the attributes.
          eos_ids: see the attributes.
          pad_id: see the attributes.
          files: contents of the folder that it comes from, which `save` writes again (`carried_files`).
        """
        self.backend = backend
        self.bos_id = bos_id
        self.eos_ids = tuple(eos_ids)
        self.pad_id = pad_id
        self._files = dict(files or {})
        self.limit: int | None = None
        self._byte_of = _byte_tokens(backend)
        self._truncating: dict[int, tokenizers.Tokenizer] = {}  # copies that cut, by length

    @classmethod
    def load(cls, path: str | Path, *, revision: str | None = None) -> "Tokenizer":
        """Reads a folder that holds tokenizer.json (a Hugging Face or elastic checkpoint), or that file.

        Special tokens that only tokenizer_config.json, added_tokens.json or special_tokens_map.json beside it
        name are added, as `transformers` does. The beginning id is what the tokenizer's own template
        prepends; ending ids come from generation_config.json, config.json or tokenizer_config.json beside it,
        in this order. The padding id is that of tokenizer_config.json, config.json or tokenizer.json.

        Args:
          path: the folder or file, a .gguf file, or a model's name on the Hub, see `el.load`.
          revision: branch, tag or commit on the Hub; None = the main branch.

        Raises:
          FileNotFoundError: there is no tokenizer.json; says how to make one of another format.
          ValueError: the file is not a tokenizer, or one beside it is damaged; names the file.
        """
        place = local_model(path, revision=revision, weights=False)
        if is_gguf(place):
            with unpacked(place) as folder:
                return cls.load(folder)
        file = find_tokenizer(place)
        check_files(file.parent, CHECKED)
        folder, files = file.parent, carried_files(file)
        backend = build(folder, files)
        pad_id = _pad_id(backend, folder)
        backend.no_truncation()
        backend.no_padding()
        return cls(backend, _bos_id(backend, folder), _eos_ids(backend, folder), pad_id, files)

    @property
    def special_tokens(self) -> tuple[str, ...]:
        """The texts of tokens that `decode` leaves out."""
        added = self.backend.get_added_tokens_decoder().values()
        return tuple(token.content for token in added if token.special)

    def named_token(self, key: str) -> int | None:
        """Id of the special token that the tokenizer's files name so, such as "bos_token"; None = none."""
        text = special_tokens_of(self._files).get(key)
        return self.backend.token_to_id(text) if text else None

    @property
    def vocab_size(self) -> int:
        """Number of ids, added tokens included."""
        return self.backend.get_vocab_size(with_added_tokens=True)

    def check_vocabulary(self, size: int) -> None:
        """Refuses a tokenizer of another model, and from now on ids that the model has no row for.

        Tokens that were added to a tokenizer, often for padding, may lie above the model's rows as long as no
        text holds them.

        Args:
          size: rows of the model's vocabulary.

        Raises:
          ValueError: the tokenizer has more ids than the model has rows, added tokens aside, or a token that
            begins or ends every text has no row.
        """
        own = self.backend.get_vocab_size(with_added_tokens=False)
        require(
            own <= size,
            "vocabulary of the model",
            size,
            f"the tokenizer has {own} ids, so that it belongs to another model: name the model's own",
        )
        self.limit = size
        self.check_ids([i for i in (self.bos_id, *self.eos_ids[:1]) if i is not None])

    def check_ids(self, ids: Sequence[int]) -> None:
        """Refuses ids that the model has no row for; without one, none are refused.

        Raises:
          ValueError: names the token.
        """
        if self.limit is None or not ids or (min(ids) >= 0 and max(ids) < self.limit):
            return
        token = min(ids) if min(ids) < 0 else max(ids)
        text = self.backend.id_to_token(token) if 0 <= token < self.vocab_size else None
        raise ValueError(
            f"token {text!r} has id {token}, and the model's vocabulary only the {self.limit} rows from 0: "
            f"leave it out of the text, or use the tokenizer that belongs to the model"
        )

    @property
    def fingerprint(self) -> str:
        """16 hexadecimal digits that tell one tokenizer from another, by tokens and by the ids of a text.

        It does not depend on how the files spell the tokenizer, nor on the ids that end a text.
        """
        size = self.vocab_size
        step = max(1, size // SAMPLED_TOKENS)
        tokens = [self.backend.id_to_token(i) for i in range(0, size, step)]
        ids = self.backend.encode(SAMPLE_TEXT, add_special_tokens=False).ids
        known = json.dumps([size, tokens, ids])
        return hashlib.sha256(known.encode()).hexdigest()[:16]

    def encode(self, text: str, bos: bool = False) -> list[int]:
        """Ids of `text`.

        Args:
          text: any string.
          bos: put `bos_id` first, where the tokenizer has one.

        Raises:
          ValueError: it is no text, one that holds half of a character, or one with a token above the model's
            vocabulary; see `check_vocabulary`.
        """
        try:
            ids = self.backend.encode(text, add_special_tokens=False).ids
        except TypeError as error:
            raise _refused(text) from error
        ids = [self.bos_id, *ids] if bos and self.bos_id is not None else ids
        self.check_ids(ids)
        return ids

    @functools.cached_property
    def chat_template(self) -> ChatTemplate | None:
        """How a conversation is written for the model; None where the tokenizer does not say."""
        return chat_template_of(self._files)

    @overload
    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = ...,
        documents: Sequence[Mapping[str, Any]] | None = ...,
        *,
        tokenize: Literal[True] = ...,
        **how: Any,
    ) -> list[int]: ...

    @overload
    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = ...,
        documents: Sequence[Mapping[str, Any]] | None = ...,
        *,
        tokenize: Literal[False],
        **how: Any,
    ) -> str: ...

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        *,
        tokenize: bool = True,
        **how: Any,
    ) -> list[int] | str:
        """A conversation as the model reads it, as `transformers` writes it.

        Args:
          messages: mappings with a "role" and mostly "content"; at least one.
          tools: JSON schemas of functions that the model may call.
          documents: that the model may quote.
          tokenize: False = the text and not its ids.
          **how: `add_generation_prompt`, `continue_final_message`, `chat_template` and further variables of
            the template; see `data.ChatTemplate.render`.

        Raises:
          ValueError: the tokenizer has no template, or the template refuses the messages; says why.

        Example:
          ```python
          import elastic_lm as el

          tokenizer = el.Tokenizer.load(el.embedded_model())
          messages = [{"role": "user", "content": "Hello"}]
          template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\\n{% endfor %}"
          ids = tokenizer.apply_chat_template(messages, chat_template=template)
          assert tokenizer.decode(ids) == "user: Hello\\n"
          ```
        """
        template = self.chat_template
        if template is None:
            given = how.get("chat_template")
            require(isinstance(given, str), "chat_template", given, NO_TEMPLATE)
            template = ChatTemplate({}, special_token_texts(self._described()))
        text = template.render(messages, tools, documents, **how)
        return self.encode(text) if tokenize else text

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
          ValueError: max_len leaves no room for text, or a text is refused as by `encode`.
        """
        backend = self.backend
        if max_len is not None:
            special = backend.num_special_tokens_to_add(second is not None)
            require(max_len > special, "max_len", max_len, f"must be above the {special} special tokens")
            backend = self._cut_to(max_len)
        try:
            encoding = backend.encode(first, second)
        except TypeError as error:
            raise _refused(first, second or "") from error
        self.check_ids(encoding.ids)
        return encoding.ids, encoding.type_ids

    def _cut_to(self, max_len: int) -> tokenizers.Tokenizer:
        """A copy that truncates: truncation is a setting of the whole tokenizer, which threads share."""
        if max_len not in self._truncating:
            copy = tokenizers.Tokenizer.from_str(self.backend.to_str())
            copy.enable_truncation(max_len, strategy="longest_first")
            self._truncating[max_len] = copy
        return self._truncating[max_len]

    def decode(self, ids: Iterable[int], special: bool = False) -> str:
        """Text of `ids`; bytes that are no character become one U+FFFD, and leave their neighbours alone.

        Args:
          ids: token ids.
          special: special tokens are written out, not left out.
        """
        ids = [int(i) for i in ids]
        if self._byte_of and any(i in self._byte_of for i in ids):
            tokens = self._with_whole_bytes(ids, special)
            if tokens is not None:
                return self.backend.decoder.decode(tokens)
        return self.backend.decode(ids, skip_special_tokens=not special)

    def _with_whole_bytes(self, ids: list[int], special: bool) -> list[str] | None:
        """The tokens of ids, with the text of bytes in place of them; None where no byte is left over.

        `tokenizers` takes all bytes in a row for broken as soon as one of them is.
        """
        runs = (group for are_bytes, group in itertools.groupby(ids, self._byte_of.__contains__) if are_bytes)
        if all(_is_text(bytes(self._byte_of[i] for i in run)) for run in runs):
            return None
        hidden = set() if special else set(self.special_tokens)
        named = ((i, self.backend.id_to_token(i)) for i in ids)
        kept = [
            (self._byte_of.get(i), token) for i, token in named if token is not None and token not in hidden
        ]

        tokens: list[str] = []
        for are_bytes, group in itertools.groupby(kept, lambda one: one[0] is not None):
            if not are_bytes:
                tokens += [token for _, token in group]
                continue
            run = bytes(byte for byte, _ in group if byte is not None)
            tokens.append(run.decode(errors="replace"))
        return tokens

    def save(self, folder: str | Path) -> None:
        """Writes tokenizer.json and what `transformers` wants beside it.

        A tokenizer that was loaded is written as it was found: with all keys of tokenizer_config.json, the
        chat template, and the files that name added tokens.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        files = self._files if self._is_as_found(folder) else {}
        config = json.loads(files.get(CONFIG_FILE, b"{}")) if files else self._described()
        for name, content in files.items():
            if name not in (TOKENIZER_FILE, CONFIG_FILE):
                write_bytes_whole(folder / name, content)
        _write(folder / CONFIG_FILE, config)
        own = files.get(TOKENIZER_FILE) or self.backend.to_str(pretty=True).encode()
        write_bytes_whole(folder / TOKENIZER_FILE, own)

        # What was found in a config.json that is not beside the new files is written down.
        again = _eos_ids(self.backend, folder), _pad_id(self.backend, folder)
        if again != (self.eos_ids, self.pad_id):
            _write(folder / CONFIG_FILE, config | {OURS: {"eos_ids": self.eos_ids, "pad_id": self.pad_id}})

    def _is_as_found(self, folder: Path) -> bool:
        """Whether the files that this tokenizer was loaded from still describe it."""
        if not self._files:
            return False
        found = build(folder, self._files)
        found.no_truncation()
        found.no_padding()
        return found.to_str() == self.backend.to_str()

    def _described(self) -> dict[str, Any]:
        """A tokenizer_config.json for a tokenizer that was found in no folder."""
        config: dict[str, Any] = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "add_bos_token": self.bos_id is not None,
            "clean_up_tokenization_spaces": False,
        }
        ids = {
            "bos_token": self.bos_id,
            "eos_token": next(iter(self.eos_ids), None),
            "pad_token": self.pad_id,
        }
        return config | {key: self.backend.id_to_token(i) for key, i in ids.items() if i is not None}


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


def _refused(*texts: object) -> ValueError:
    """Why `tokenizers` takes one of these for no text."""
    for text in texts:
        if not isinstance(text, str):
            return ValueError(f"text={text!r}: must be text")
        try:
            check_whole("text", text)
        except ValueError as error:
            return error
    return ValueError("text: cannot be read by the tokenizer")


def _is_text(run: bytes) -> bool:
    try:
        run.decode()
    except UnicodeDecodeError:
        return False
    return True


def _byte_tokens(backend: tokenizers.Tokenizer) -> dict[int, int]:
    """Ids of tokens that are one byte each -> that byte; {} where no such tokens are decoded to bytes."""
    if backend.decoder is None or "ByteFallback" not in str(backend.decoder):
        return {}
    names = {f"<0x{byte:02X}>": byte for byte in range(256)}
    ids = {backend.token_to_id(name): byte for name, byte in names.items()}
    return {i: byte for i, byte in ids.items() if i is not None}


def _write(path: Path, config: dict[str, Any]) -> None:
    write_text_whole(path, json.dumps(config, indent=2, ensure_ascii=False) + "\n")


def _json(file: Path) -> dict[str, Any]:
    return read_json(file) if file.is_file() else {}


def _ours(folder: Path) -> dict[str, Any]:
    """Ids that `Tokenizer.save` has written down."""
    file = folder / CONFIG_FILE
    found = _json(file).get(OURS)
    if found is None:
        return {}
    fix = 'must be a mapping like {"eos_ids": [0], "pad_id": null}'
    require(isinstance(found, dict), f"{file}: {OURS}", found, fix)
    ids, pad_id = found.get("eos_ids", []), found.get("pad_id")
    require(isinstance(ids, list), f"{file}: {OURS}.eos_ids", ids, "must be a list of token ids")
    require_ids(f"{file}: {OURS}.eos_ids", ids)
    require(pad_id is None or is_whole(pad_id), f"{file}: {OURS}.pad_id", pad_id, "must be a token id")
    return found


def _bos_id(backend: tokenizers.Tokenizer, folder: Path) -> int | None:
    """The id that the tokenizer's template puts first, or the one its config asks for.

    A template stands above `add_bos_token: false`, as in `transformers`.
    """
    template = backend.encode("a", add_special_tokens=True)
    if template.ids and template.special_tokens_mask[0]:
        return template.ids[0]
    file = folder / CONFIG_FILE
    return _token_id(backend, file, "bos_token") if _json(file).get("add_bos_token") else None


def _eos_ids(backend: tokenizers.Tokenizer, folder: Path) -> tuple[int, ...]:
    for name in ("generation_config.json", "config.json"):
        ids = _json(folder / name).get("eos_token_id")
        if ids is not None:
            ids = tuple(ids) if isinstance(ids, list) else (ids,)
            right = all(is_whole(i, -1) for i in ids)
            require(right, f"{folder / name}: eos_token_id", ids, "must be a token id, or a list of them")
            stated = tuple(i for i in ids if i >= 0)  # old configs write -1 for none
            if stated or not ids:
                return stated
    if "eos_ids" in _ours(folder):
        return tuple(_ours(folder)["eos_ids"])
    token = _token_id(backend, folder / CONFIG_FILE, "eos_token")
    token = backend.token_to_id(END_OF_TEXT) if token is None else token
    return () if token is None else (token,)


def _pad_id(backend: tokenizers.Tokenizer, folder: Path) -> int | None:
    named = _token_id(backend, folder / CONFIG_FILE, "pad_token")
    if named is not None:
        return named
    if "pad_id" in _ours(folder):
        return _ours(folder)["pad_id"]
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
    token = content_of(value)
    if token == "":
        return None  # so do old files write that there is none
    if not isinstance(token, str):
        raise ValueError(
            f'{file}: {key}={value!r}: must be a string, or a mapping like {{"content": "</s>"}}'
        )
    return backend.token_to_id(token)
