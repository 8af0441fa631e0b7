"""Conversations to learn from: token ids by the chat template, and which of them the assistant says.

Where the template has `generation` tags, they say what the assistant says. Elsewhere, the text of a turn is
what the template adds when the turn follows its generation prompt: with c_1 .. c_n the messages and R the
template, turn i of the assistant is what R(c_1 .. c_i) has after R(c_1 .. c_{i-1}, generation prompt), which
holds as long as R only appends. Templates that rewrite earlier turns, such as those that leave out older
thoughts, show a model another text at every turn, so that every turn becomes a row of its own.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from elastic_lm.data.chat_template import CharSpan, ChatTemplate
from elastic_lm.data.records import Records
from elastic_lm.data.tokenizer import NO_TEMPLATE, Tokenizer
from elastic_lm.files.text_files import check_whole

ASSISTANT = "assistant"
# Roles and keys as ShareGPT's files write them.
OTHER_ROLES = {"human": "user", "gpt": ASSISTANT, "chatgpt": ASSISTANT, "bing": ASSISTANT, "bard": ASSISTANT}
ALPACA = ("instruction", "input", "output")
# A conversation that shows whether a template rewrites earlier turns.
PROBE = tuple(
    {"role": role, "content": content}
    for content in ("first", "second", "third")
    for role in ("user", ASSISTANT)
)


class Conversation(NamedTuple):
    """Messages to learn from.

    Attributes:
      messages: mappings with "role" and what the template reads.
      tools: JSON schemas of functions, or None.
      name: where it comes from, for messages.
      last: only the last message is learned.
      request: Alpaca's three texts, which have headings where there is no chat template; None = of a chat.
    """

    messages: Sequence[Mapping[str, Any]]
    tools: Sequence[Mapping[str, Any]] | None
    name: str
    last: bool = False
    request: tuple[str, str, str] | None = None


class Conversations:
    """A random-access sequence of conversations over files of records."""

    def __init__(self, files: Sequence[str | Path], field: str) -> None:
        """Finds the records.

        Args:
          files: as `records.Records` reads them.
          field: key of the messages: a list of mappings with "role" and "content", or with "from" and
            "value". A record may have "tools".

        Raises:
          ValueError: see `records.Records`; that a record has no such messages is said when it is read.
        """
        self._records, self._field = Records(files), field

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: Any) -> Conversation:
        where, record = self._records[index]
        value = record.get(self._field)
        if not isinstance(value, list) or not value or not all(isinstance(one, dict) for one in value):
            found = f"{type(value).__name__}" if self._field in record else f"no {self._field!r}"
            raise ValueError(
                f"{where}: {self._field!r} must be a list of messages like "
                f'{{"role": "user", "content": "Hello"}}; found {found} among {", ".join(record)}'
            )
        messages = [_message(where, message) for message in value]
        if not any(message["role"] == ASSISTANT for message in messages):
            raise ValueError(f"{where}: no message has the role {ASSISTANT!r}, so that nothing is learned")
        return Conversation(messages, record.get("tools") or None, where)

    def file_of(self, index: Any) -> Path:
        """The file of a conversation."""
        return self._records.file_of(index)


class Alpaca:
    """The same over records of Alpaca's fields: an instruction, mostly an input, and an output."""

    def __init__(self, files: Sequence[str | Path]) -> None:
        """Finds the records; see `Conversations`."""
        self._records = Records(files)

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: Any) -> Conversation:
        where, record = self._records[index]
        missing = [name for name in ("instruction", "output") if not isinstance(record.get(name), str)]
        if missing:
            raise ValueError(f"{where} has no text under {missing[0]!r}; found: {', '.join(record)}")
        instruction, further, output = (record.get(name) or "" for name in ALPACA)
        if not isinstance(further, str):
            raise ValueError(f"{where}: input={further!r} must be text, or missing")
        for text in (instruction, further, output):
            check_whole(where, text)
        asked = f"{instruction}\n\n{further}" if further else instruction
        messages = [{"role": "user", "content": asked}, {"role": ASSISTANT, "content": output}]
        return Conversation(messages, None, where, request=(instruction, further, output))

    def file_of(self, index: Any) -> Path:
        """The file of a record."""
        return self._records.file_of(index)


class PerTurn:
    """A conversation for every turn of the assistant, up to this turn, of which it alone is learned."""

    def __init__(self, source: "Conversations | Alpaca") -> None:
        """Reads all conversations to count their turns."""
        self._source = source
        self._turns: list[tuple[int, int]] = []
        for i in range(len(source)):
            roles = [message["role"] for message in source[i].messages]
            self._turns += [(i, turn) for turn, role in enumerate(roles) if role == ASSISTANT]

    def __len__(self) -> int:
        return len(self._turns)

    def __getitem__(self, index: Any) -> Conversation:
        i, turn = self._turns[index]
        whole = self._source[i]
        return Conversation(whole.messages[: turn + 1], whole.tools, whole.name, last=True)

    def file_of(self, index: Any) -> Path:
        """The file of a turn's conversation."""
        return self._source.file_of(self._turns[index][0])


def with_headings(instruction: str, further: str, output: str) -> tuple[str, list[CharSpan]]:
    """Alpaca's text of an instruction with an input, and its answer; (text, span of the answer)."""
    text = f"### Instruction:\n{instruction}\n\n"
    text += f"### Input:\n{further}\n\n" if further else ""
    text += "### Response:\n"
    return text + output, [(len(text), len(text + output))]


def for_tokenizer(
    source: "Conversations | Alpaca", tokenizer: Tokenizer
) -> "Conversations | Alpaca | PerTurn":
    """The conversations as rows that a tokenizer's template can show.

    Raises:
      ValueError: the tokenizer has no template, and the conversations need one.
    """
    template = tokenizer.chat_template
    if template is None:
        if isinstance(source, Alpaca):
            return source
        raise ValueError(f"data.tokenizer: {NO_TEMPLATE}, or name the folder of a tokenizer that has one")
    return PerTurn(source) if rewrites(template) else source


def rewrites(template: ChatTemplate) -> bool:
    """Whether a template without `generation` tags shows earlier turns otherwise than it first did."""
    if template.marks_assistant():
        return False
    try:
        whole = template.render(PROBE)
        parts = [template.render(PROBE[:i]) for i in range(2, len(PROBE), 2)]
        prompts = [template.render(PROBE[:i], add_generation_prompt=True) for i in range(1, len(PROBE), 2)]
    except ValueError:
        return True  # what it accepts is seen row by row
    return not all(whole.startswith(part) for part in (*parts, *prompts))


def encode_conversation(tokenizer: Tokenizer, conversation: Conversation) -> tuple[list[int], list[bool]]:
    """Token ids of a conversation, and which of them the assistant says.

    What it says includes the token that ends its turn, and nothing after that.

    Args:
      tokenizer: with a chat template; without one, the conversation is one of `Alpaca`.
      conversation: from `for_tokenizer`.

    Returns:
      (ids, learned), of the same length.

    Raises:
      ValueError: the template refuses the messages, or does not show what the assistant says; names the
        record.
    """
    template = tokenizer.chat_template
    if template is None:
        assert conversation.request is not None
        text, spans = with_headings(*conversation.request)
    else:
        try:
            text, spans = _spans(template, conversation)
        except ValueError as error:
            raise ValueError(f"{conversation.name}: {error}") from error
    found = tokenizer.backend.encode(text, add_special_tokens=False)
    ids = list(found.ids)
    learned = np.zeros(len(ids), bool)
    starts, stops = np.asarray(found.offsets, np.int64).reshape(-1, 2).T
    for first, last in spans:
        learned |= (starts < last) & (stops > first)
    if template is None and tokenizer.eos_ids:
        ids, learned = [*ids, tokenizer.eos_ids[0]], np.append(learned, True)
        if tokenizer.bos_id is not None:
            ids, learned = [tokenizer.bos_id, *ids], np.append(False, learned)
    tokenizer.check_ids(ids)
    return ids, learned.tolist()


def _spans(template: ChatTemplate, conversation: Conversation) -> tuple[str, list[CharSpan]]:
    """Text of a conversation, and where the assistant speaks in it."""
    messages, tools = conversation.messages, conversation.tools
    if template.marks_assistant(tools):
        text, spans = template.render_with_spans(messages, tools)
        if not spans:
            raise ValueError("the chat template marks nothing that the assistant says in these messages")
        return text, spans

    text = template.render(messages, tools)
    turns = [i for i, message in enumerate(messages) if message["role"] == ASSISTANT]
    spans = []
    for i in turns[-1:] if conversation.last else turns:
        before = template.render(messages[:i], tools, add_generation_prompt=True) if i else ""
        through = text if i + 1 == len(messages) else template.render(messages[: i + 1], tools)
        if not (text.startswith(through) and through.startswith(before)):
            raise ValueError(
                f"the chat template rewrites message {i + 1} when others follow, so that it cannot be told "
                "what the assistant says; give conversations of one answer each"
            )
        spans.append((len(before), len(_until_end(template, through))))
    return text, spans


def _until_end(template: ChatTemplate, text: str) -> str:
    """A text up to the token that ends its last turn, where white space follows one."""
    bare = text.rstrip()
    ends = [end for key, end in template.special_tokens.items() if key == "eos_token" and end]
    return bare if any(bare.endswith(end) for end in ends) else text


def _message(where: str, message: Mapping[str, Any]) -> dict[str, Any]:
    """A message with "role" and "content"."""
    if "role" not in message and isinstance(message.get("from"), str):
        role = str(message["from"])
        message = {"role": OTHER_ROLES.get(role, role), "content": message.get("value")}
    if not isinstance(message.get("role"), str):
        raise ValueError(f'{where}: a message has no "role"; found: {", ".join(message)}')
    content = message.get("content")
    if isinstance(content, str):
        check_whole(where, content)
    return dict(message)
