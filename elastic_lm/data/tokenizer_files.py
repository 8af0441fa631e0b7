"""The files of a tokenizer: tokenizer.json, what beside it names further tokens, and the chat template.

`transformers` adds tokens that only the files beside tokenizer.json name, and lets tokenizer_config.json
change how spaces are read. Both is done here in the same way, so that a text has the same ids.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, pre_tokenizers

from elastic_lm.config.checks import is_whole, require
from elastic_lm.config.parse import parse_json
from elastic_lm.files.atomic import read_json

TOKENIZER_FILE = "tokenizer.json"
CONFIG_FILE = "tokenizer_config.json"
SPECIAL_FILE = "special_tokens_map.json"
ADDED_FILE = "added_tokens.json"
ADDED_DECODER = "added_tokens_decoder"  # key of the config under which added tokens stand by their ids
TEMPLATES = "additional_chat_templates"  # a folder of .jinja files
BESIDE = (CONFIG_FILE, SPECIAL_FILE, ADDED_FILE, "chat_template.jinja", "chat_template.json")

# Special tokens by their keys, in the order in which `transformers` adds them.
ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
EXTRA = ("additional_special_tokens", "extra_special_tokens")
FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")

# Classes of `transformers` that take tokenizer.json as it is.
GENERIC = ("", "PreTrainedTokenizer", "TokenizersBackend")
LLAMA = ("LlamaTokenizer", "CodeLlamaTokenizer")

SURROGATE = re.compile("[\ud800-\udfff]")  # half a character, that UTF-8 does not have

# Other formats of tokenizers, by the names of their files.
OTHERS = (
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "vocab.json",
    "vocab.txt",
    "tekken.json",
)


def find_tokenizer(path: str | Path) -> Path:
    """The tokenizer.json of a folder, or the file itself.

    Raises:
      FileNotFoundError: there is none; says how to make one of another format.
    """
    file = Path(path)
    file = file / TOKENIZER_FILE if file.is_dir() else file
    if file.is_file():
        return file
    found = [name for name in OTHERS if (file.parent / name).is_file()]
    if not found:
        raise FileNotFoundError(f"no tokenizer at {file}: expected a tokenizer.json or a folder with one")
    raise FileNotFoundError(
        f"no tokenizer at {file}, and {found[0]} there is in a format that is not read: convert it with "
        f"transformers, AutoTokenizer.from_pretrained({str(file.parent)!r}).save_pretrained("
        f"{str(file.parent)!r}), which writes a tokenizer.json"
    )


def carried_files(file: Path) -> dict[str, bytes]:
    """What a tokenizer is made of, to be written again where it is saved.

    Args:
      file: its tokenizer.json; the other files lie in the same folder.

    Returns:
      Contents by their names in a folder, without what `Tokenizer.save` writes down itself.
    """
    files = {TOKENIZER_FILE: file.read_bytes()}
    files |= {name: (file.parent / name).read_bytes() for name in BESIDE if (file.parent / name).is_file()}
    templates = sorted((file.parent / TEMPLATES).glob("*.jinja"))
    files |= {f"{TEMPLATES}/{template.name}": template.read_bytes() for template in templates}
    if CONFIG_FILE in files:
        config = read_json(file.parent / CONFIG_FILE)
        if SURROGATE.search(json.dumps(config, ensure_ascii=False)):
            fix = "which is half a character and cannot be written again; remove it"
            raise ValueError(f"{file.parent / CONFIG_FILE}: holds a lone surrogate such as \\ud800, {fix}")
        if config.pop("elastic", None) is not None:
            files[CONFIG_FILE] = json.dumps(config, indent=2, ensure_ascii=False).encode()
    return files


def build(folder: Path, files: Mapping[str, bytes]) -> tokenizers.Tokenizer:
    """The tokenizer that files describe.

    Args:
      folder: names it in messages.
      files: from `carried_files`.

    Raises:
      ValueError: a file is damaged, or names a token by an id that it does not get; names the file.
    """
    try:
        backend = tokenizers.Tokenizer.from_str(files[TOKENIZER_FILE].decode())
    except Exception as error:
        raise ValueError(f"{folder / TOKENIZER_FILE} is not a tokenizer.json: {error}") from error
    config = _object(folder, files, CONFIG_FILE)
    _fit_spaces(backend, config)
    _add_tokens(backend, folder, files, config)
    return backend


def _object(folder: Path, files: Mapping[str, bytes], name: str) -> dict[str, Any]:
    """The JSON object of a file; {} where there is none."""
    if name not in files:
        return {}
    try:
        value = parse_json(files[name].decode())
    except ValueError as error:
        raise ValueError(f"{folder / name}: not valid JSON ({error}); download or copy it again") from error
    if not isinstance(value, dict):
        raise ValueError(f"{folder / name}: must hold a JSON object, not a {type(value).__name__}")
    return value


def _fit_spaces(backend: tokenizers.Tokenizer, config: Mapping[str, Any]) -> None:
    """Lets `add_prefix_space` and `legacy` decide about the space before a text, as the class does."""
    name = str(config.get("tokenizer_class") or "").removesuffix("Fast")
    prefix, legacy = config.get("add_prefix_space"), config.get("legacy")
    if name in GENERIC or (prefix is None and name not in LLAMA):
        return
    described = json.loads(backend.to_str())
    byte_level = _of_type(described["pre_tokenizer"], "ByteLevel")
    if name in LLAMA:
        # Llama 3's tokenizer is stored under Llama's class, and is taken as it is.
        if described["model"]["type"] == "BPE" and not byte_level:
            _as_llama(backend, prefix is not False, bool(legacy))
    elif isinstance(prefix, bool) and any(one["add_prefix_space"] != prefix for one in byte_level):
        for one in byte_level:
            one["add_prefix_space"] = prefix
        backend.pre_tokenizer = tokenizers.Tokenizer.from_str(json.dumps(described)).pre_tokenizer


def _as_llama(backend: tokenizers.Tokenizer, prefix: bool, legacy: bool) -> None:
    """Spaces as Llama's tokenizers read and write them.

    Args:
      backend: is changed.
      prefix: a space is put before a text.
      legacy: and before every piece of text that follows a special token.
    """
    scheme = ("always" if legacy else "first") if prefix else "never"
    backend.normalizer = None
    backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme=scheme, split=False)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence(steps + ([decoders.Strip(" ", 1, 0)] if prefix else []))


def _of_type(part: Any, name: str) -> list[dict[str, Any]]:
    """The parts of a pre-tokenizer that are of a type."""
    if not isinstance(part, dict):
        return []
    if part.get("type") == name:
        return [part]
    return [one for inner in part.get("pretokenizers", ()) for one in _of_type(inner, name)]


def _add_tokens(
    backend: tokenizers.Tokenizer, folder: Path, files: Mapping[str, bytes], config: Mapping[str, Any]
) -> None:
    """Adds the tokens that only the files beside tokenizer.json name, in the order of `transformers`."""
    by_id: dict[int, AddedToken] = {}
    named = dict(config)
    own = backend.get_added_tokens_decoder().values()
    texts = {token.content for token in own}
    if isinstance(config.get("added_tokens_decoder"), dict):
        source = CONFIG_FILE
        for key, value in config["added_tokens_decoder"].items():
            by_id[_id(folder / source, key)] = _token(folder / source, "added_tokens_decoder", value)
    else:
        source = ADDED_FILE
        named |= _object(folder, files, SPECIAL_FILE)
        special = {token.content for token in _named_tokens(folder, named, {})}
        for content, key in _object(folder, files, ADDED_FILE).items():
            if content in texts:
                continue  # tokenizer.json says more of it
            is_special = content in special
            token = AddedToken(content, normalized=not is_special, special=is_special)
            by_id[_id(folder / source, key)] = token

    known = {repr(token) for token in own}
    roles = {content for _, content in _roles(named)}
    new = [token for _, token in sorted(by_id.items()) if repr(token) not in known]
    listed = texts | {token.content for token in new}
    for token in _named_tokens(folder, named, {token.content: token for token in by_id.values()}):
        if token.content not in listed:
            listed.add(token.content)
            new.append(token)
    for token in new:
        token.special = token.special or token.content in roles
    if new:
        backend.add_tokens(new)
    for i, token in by_id.items():
        got = backend.token_to_id(token.content)
        if got != i and token.content not in texts:
            raise ValueError(
                f"{folder / source}: the token {token.content!r} has the id {i} there, and {got} when it is "
                f"added to {TOKENIZER_FILE}; copy both files again from one place"
            )


def _named_tokens(
    folder: Path, config: Mapping[str, Any], described: Mapping[str, AddedToken]
) -> list[AddedToken]:
    """Special tokens by the keys of a config, then further ones.

    Args:
      folder: names the config in messages.
      config: tokenizer_config.json, with what special_tokens_map.json adds.
      described: tokens whose flags are known, by their texts.
    """
    values = [(key, config[key]) for key, content in _roles(config) if content != ""]
    for key in EXTRA:
        more = config.get(key) or []
        require(
            isinstance(more, list | dict), f"{folder / CONFIG_FILE}: {key}", more, "must be a list of tokens"
        )
        values += [(key, value) for value in (more.values() if isinstance(more, dict) else more)]
    tokens = [_token(folder / CONFIG_FILE, key, value) for key, value in values]
    return [described.get(token.content, token) for token in tokens]


def _roles(config: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """(key, text) of the special tokens that have a key each; old files write "" for none."""
    further = [
        key
        for key, value in config.items()
        if key.endswith("_token") and key not in ROLES and isinstance(value, str)
    ]
    keys = [*(key for key in ROLES if config.get(key) is not None), *further]
    return [(key, content_of(config[key])) for key in keys]


def special_token_texts(config: Mapping[str, Any]) -> dict[str, str]:
    """Texts of special tokens by their keys, such as `bos_token`, as chat templates may write them."""
    return {key: text for key, text in _roles(config) if isinstance(text, str)}


def special_tokens_of(files: Mapping[str, bytes]) -> dict[str, str]:
    """Texts of special tokens by their keys, as the files of a tokenizer name them (`carried_files`)."""
    config = parse_json(files.get(CONFIG_FILE, b"{}").decode())
    if not isinstance(config.get(ADDED_DECODER), dict) and SPECIAL_FILE in files:
        config = {**config, **parse_json(files[SPECIAL_FILE].decode())}
    return special_token_texts(config)


def content_of(token: Any) -> Any:
    """The text of a token that is written as a text or as a mapping with flags, whatever its type."""
    return token.get("content") if isinstance(token, dict) else token


def _token(file: Path, key: str, value: Any) -> AddedToken:
    """A special token, written as a text or as a mapping with flags."""
    fields: Mapping[str, Any] = value if isinstance(value, dict) else {}
    content = content_of(value)
    if not isinstance(content, str) or not content:
        raise ValueError(
            f'{file}: {key}={value!r}: must be a string, or a mapping like {{"content": "</s>"}}'
        )
    flags = {flag: bool(on) for flag, on in fields.items() if flag in FLAGS}
    return AddedToken(content, **({"special": True} | flags if key != "added_tokens_decoder" else flags))


def _id(file: Path, value: Any) -> int:
    """A token id, which JSON writes as text where it is a key."""
    digits = isinstance(value, str) and value.isascii() and value.isdigit() and len(value) < 11
    i: Any = int(value) if digits else value
    if not is_whole(i):
        raise ValueError(f"{file}: the id {value!r} of an added token must be a whole number below 2**31")
    return i
