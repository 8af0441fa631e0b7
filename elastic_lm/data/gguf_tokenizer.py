"""The tokenizer of a GGUF file as files of a Hugging Face folder: tokenizer.json, its config, the templates.

Two kinds are read: byte-level BPE ("gpt2") and SentencePiece ("llama"). A file says how text is cut before
BPE by a name (`tokenizer.ggml.pre`) whose meaning is part of llama.cpp; one that is not known here is
refused, because a guess would give other ids.
"""

import contextlib
import json
import re
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from elastic_lm.config.checks import require
from elastic_lm.data.tokenizer_files import CONFIG_FILE, TEMPLATES, TOKENIZER_FILE
from elastic_lm.files.gguf import GGUF, open_gguf

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # types of tokens
FILLED_UP = re.compile(r"\[PAD\d+\]")  # rows of the embedding that no token has
SPACE = "▁"

CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
PUNCTUATION = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3 = rf"{CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{PUNCTUATION}"
QWEN2 = rf"{CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{PUNCTUATION}"
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*|\p{{N}}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# How text is cut, by the names that llama.cpp gives it: a pattern, or one of the three words.
GPT2, DIGITS, DEFAULT = "gpt2", "gpt2, with every digit by itself", "default"
WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
DEFAULT_CUTS = (r"[\p{P}$+<=>^~|]+", WORDS, r"\p{N}+", r"[0-9][0-9][0-9]")  # one after the other
CUTS: Mapping[str, str] = (
    {DEFAULT: DEFAULT}
    | dict.fromkeys(("gpt-2", "phi-2", "olmo", "jais"), GPT2)
    | dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone"), DIGITS)
    | dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3", "smaug-bpe", "dbrx"), LLAMA3)
    | dict.fromkeys(("qwen2", "deepseek-r1-qwen", "megrez"), QWEN2)
    | {"tekken": TEKKEN}
)
COMPOSED = ("qwen2", "deepseek-r1-qwen", "megrez")  # characters are composed first, by NFC
WHOLE_WORDS = (
    "llama-bpe",
    "llama3",
    "llama-v3",
    "falcon3",
    "tekken",
)  # a word in the vocabulary is one token
BEGINS = ("llama-bpe", "llama3", "llama-v3", "falcon3", "tekken")  # with bos, unless the file says otherwise
ROLES = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding", "sep": "seperator", "mask": "mask"}

Part = dict[str, Any]


def tokenizer_files(file: GGUF) -> dict[str, bytes]:
    """The files that `transformers` would keep beside a model.

    Args:
      file: with the metadata of a tokenizer.

    Returns:
      Contents by name: tokenizer.json, tokenizer_config.json, and the chat templates that the file has.

    Raises:
      ValueError: it has no tokenizer, or one of a kind that is not read; names the key.
    """
    model = file.value("tokenizer.ggml.model")
    tokens = file.value("tokenizer.ggml.tokens")
    if model not in ("gpt2", "llama") or not tokens:
        raise ValueError(
            f"{file.path}: tokenizer.ggml.model={model!r}: is not read; supported: gpt2, llama; "
            "use the Hugging Face folder of the model"
        )
    tokens = [*tokens]
    types = file.value("tokenizer.ggml.token_type") or [NORMAL] * len(tokens)
    fix = f"must be one for each of the {len(tokens)} tokens; download or copy the file again"
    require(len(types) == len(tokens), f"{file.path}: token types", len(types), fix)
    while types[len(tokens) - 1] == UNUSED and FILLED_UP.fullmatch(tokens[-1]):
        tokens.pop()

    described = _byte_level(file, tokens) if model == "gpt2" else _sentencepiece(file, tokens, types)
    ids = {role: file.value(f"tokenizer.ggml.{key}_token_id") for role, key in ROLES.items()}
    roles = {role: i for role, i in ids.items() if type(i) is int and i < len(tokens)}
    bos = roles.get("bos") if file.value("tokenizer.ggml.add_bos_token", _begins(file, model)) else None
    described |= {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": _added_tokens(tokens, types),
        "post_processor": _post_processor(None if bos is None else tokens[bos], bos),
    }
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": bos is not None,
        "clean_up_tokenization_spaces": False,
        "model_max_length": file.value(f"{file.architecture}.context_length"),
        **{f"{role}_token": tokens[i] for role, i in roles.items()},
    }
    return {
        TOKENIZER_FILE: json.dumps(described, ensure_ascii=False).encode(),
        CONFIG_FILE: json.dumps(config, indent=2, ensure_ascii=False).encode(),
        **_templates(file),
    }


@contextlib.contextmanager
def unpacked(path: Path) -> Iterator[Path]:
    """A folder, as long as the block lasts, with the files of a GGUF file's tokenizer.

    Raises:
      ValueError: see `tokenizer_files`; or the file cannot be read.
    """
    file = open_gguf(path)
    with tempfile.TemporaryDirectory(prefix="elastic_lm_gguf_") as name:
        folder = Path(name)
        for name, content in tokenizer_files(file).items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(content)
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ending_ids(file)}))
        yield folder


def ending_ids(file: GGUF) -> list[int]:
    """Ids that end a text, or a turn of a chat."""
    keys = ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id")
    return [*dict.fromkeys(i for key in keys if (i := file.value(key)) is not None)]


def _begins(file: GGUF, model: str) -> bool:
    """Whether a text begins with bos where the file does not say."""
    return model == "llama" or file.value("tokenizer.ggml.pre") in BEGINS


def _byte_level(file: GGUF, tokens: Sequence[str]) -> Part:
    """BPE on bytes, after the text was cut into words."""
    pre = file.value("tokenizer.ggml.pre")
    if pre in (None, ""):
        fix = "the model may have learned another; a newer file, or the Hugging Face folder, says which"
        what = "does not say how its tokenizer cuts text (tokenizer.ggml.pre); taken is llama.cpp's default"
        warnings.warn(f"{file.path}: {what}: {fix}", stacklevel=4)
        pre = DEFAULT
    cut = CUTS.get(pre) if isinstance(pre, str) else None
    if cut is None:
        raise ValueError(
            f"{file.path}: tokenizer.ggml.pre={pre!r}: it is not known how this tokenizer cuts text; known: "
            f"{', '.join(CUTS)}. Use the Hugging Face folder of the model"
        )
    by_words = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    splits = [
        {"type": "Split", "pattern": {"Regex": one}, "behavior": "Isolated", "invert": False}
        for one in (DEFAULT_CUTS if cut == DEFAULT else (cut,))
    ]
    parts = {
        GPT2: [by_words],
        DIGITS: [{"type": "Digits", "individual_digits": True}, by_words],
    }.get(cut, [*splits, by_words | {"use_regex": False}])
    return {
        "normalizer": {"type": "NFC"} if pre in COMPOSED else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": parts} if len(parts) > 1 else parts[0],
        "decoder": by_words,
        "model": {
            **_bpe(tokens, [merge.split(" ") for merge in file.value("tokenizer.ggml.merges", [])]),
            "ignore_merges": pre in WHOLE_WORDS,
        },
    }


def _sentencepiece(file: GGUF, tokens: list[str], types: Sequence[int]) -> Part:
    """BPE on characters, whose merges follow from the scores of the tokens; a rare character is its bytes."""
    gemma = file.architecture.startswith("gemma")
    if gemma:  # runs of spaces are written as such there
        tokens[:] = [SPACE * len(token) if token and not token.strip(" ") else token for token in tokens]
    scores = file.value("tokenizer.ggml.scores")
    # Gemma's scores do not follow the order in which its merges were learned, and that of its tokens does.
    ranks = scores if scores and not gemma else [-i for i in range(len(tokens))]
    prefix = bool(file.value("tokenizer.ggml.add_space_prefix", True)) and not gemma
    steps: list[Part] = [
        {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    metaspace = {
        "type": "Metaspace",
        "replacement": SPACE,
        "prepend_scheme": "first" if prefix else "never",
        "split": False,
    }
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
    unknown = next((tokens[i] for i, kind in enumerate(types[: len(tokens)]) if kind == UNKNOWN), None)
    return {
        "normalizer": spaces if gemma else None,
        "pre_tokenizer": None if gemma else metaspace,
        "decoder": {"type": "Sequence", "decoders": steps + ([strip] if prefix else [])},
        "model": {
            **_bpe(tokens, _merges(tokens, ranks)),
            "unk_token": unknown,
            "fuse_unk": True,
            "byte_fallback": True,
        },
    }


def _bpe(tokens: Sequence[str], merges: Sequence[Sequence[str]]) -> Part:
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "vocab": {token: i for i, token in enumerate(tokens)},
        "merges": merges,
    }


def _merges(tokens: Sequence[str], ranks: Sequence[float]) -> list[tuple[str, str]]:
    """All pairs of tokens that make another one, the best first."""
    ids = {token: i for i, token in enumerate(tokens)}
    found = []
    for token, rank in zip(tokens, ranks, strict=False):
        pairs = ((token[:cut], token[cut:]) for cut in range(1, len(token)))
        known = [(left, right) for left, right in pairs if left in ids and right in ids]
        known.sort(key=lambda pair: (ids[pair[0]], ids[pair[1]]))
        found += [(rank, len(left), len(right), left, right) for left, right in known]
    found.sort(key=lambda entry: entry[:3], reverse=True)
    return [(left, right) for *_, left, right in found]


def _added_tokens(tokens: Sequence[str], types: Sequence[int]) -> list[Part]:
    """Tokens that are found in a text before it is cut."""
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    special = {CONTROL: True, UNKNOWN: True, USER_DEFINED: False}
    return [
        {"id": i, "content": token, **flags, "special": special[kind]}
        for i, (token, kind) in enumerate(zip(tokens, types, strict=False))
        if kind in special
    ]


def _post_processor(bos: str | None, bos_id: int | None) -> Part:
    """The template that puts bos first, if any."""
    first: list[Part] = [] if bos is None else [{"SpecialToken": {"id": bos, "type_id": 0}}]
    single = [*first, {"Sequence": {"id": "A", "type_id": 0}}]
    known = {} if bos is None else {bos: {"id": bos, "ids": [bos_id], "tokens": [bos]}}
    return {
        "type": "TemplateProcessing",
        "single": single,
        "pair": [*single, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": known,
    }


def _templates(file: GGUF) -> dict[str, bytes]:
    """The chat template, and further ones by their names."""
    files = {}
    for key in file.keys("tokenizer.chat_template"):
        name, text = key.removeprefix("tokenizer.chat_template").removeprefix("."), file.value(key)
        if isinstance(text, str) and re.fullmatch(r"[\w-]*", name):
            place = f"{TEMPLATES}/{name}.jinja" if name else "chat_template.jinja"
            files[place] = text.encode()
    return files
