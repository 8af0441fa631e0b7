"""Chat templates: messages to text as `transformers` renders them, and where the assistant speaks in it.

A template is a program in Jinja that comes with a tokenizer. It runs in a sandbox, and sees plain JSON values
alone.
"""

import dataclasses
import datetime
import functools
import json
import re
from collections.abc import Mapping, Sequence, Sized
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.runtime
import jinja2.sandbox
import jinja2.utils

from elastic_lm.config.checks import require
from elastic_lm.config.parse import parse_json
from elastic_lm.data.tokenizer_files import (
    CONFIG_FILE,
    TEMPLATES,
    special_tokens_of,
)

DEFAULT, TOOL_USE = "default", "tool_use"  # names of templates, where a tokenizer has several
TEMPLATE_FILE = "chat_template.jinja"
REASONING = ("reasoning_content", "thinking", "reasoning")  # keys under which a message holds its reasoning
TAG = "\ufdd2end of the final message "  # goes where a message that is continued ends
# Around what the assistant says. These code points are no characters, and no text has them.
OPEN, CLOSE = "\ufdd0", "\ufdd1"
MARKS = re.compile(f"[{OPEN}{CLOSE}]")
LONGEST = 1 << 24  # characters, items or bits that `*` and `**` of a template may make
# What a template may raise, whose code is not ours.
FAILURES = (
    *(TypeError, LookupError, AttributeError, ValueError, ArithmeticError),
    *(RecursionError, MemoryError, SyntaxError),
)
GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")

Message = Mapping[str, Any]
CharSpan = tuple[int, int]  # first character, one past the last


@dataclasses.dataclass(frozen=True)
class ChatTemplate:
    """The chat templates of a tokenizer.

    Attributes:
      texts: templates by name; a single one is called "default".
      special_tokens: texts of special tokens by their keys, such as `bos_token`, which templates may write.

    Example:
      ```python
      from elastic_lm.data import ChatTemplate

      text = "{% for message in messages %}<{{ message.role }}>{{ message.content }}\\n{% endfor %}"
      template = ChatTemplate({"default": text})
      assert template.render([{"role": "user", "content": "Hello"}]) == "<user>Hello\\n"
      ```
    """

    texts: Mapping[str, str]
    special_tokens: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def text(self, template: str | None = None, tools: object = None) -> str:
        """The template that is used.

        Args:
          template: a name, or a template itself; None = the default, or with tools the one for them.
          tools: that the model may call, or None.

        Raises:
          ValueError: none of the templates is the default one.
        """
        if template is not None:
            return self.texts.get(template, template)
        if tools is not None and TOOL_USE in self.texts:
            return self.texts[TOOL_USE]
        if DEFAULT not in self.texts:
            names = ", ".join(sorted(self.texts))
            raise ValueError(f"chat_template=None: there are several and no default; name one of {names}")
        return self.texts[DEFAULT]

    def render(
        self,
        messages: Sequence[Message],
        tools: Sequence[Message] | None = None,
        documents: Sequence[Message] | None = None,
        *,
        chat_template: str | None = None,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        **variables: Any,
    ) -> str:
        """The text of a conversation.

        Args:
          messages: mappings with a "role" and what the template reads, mostly "content"; at least one.
          tools: JSON schemas of functions that the model may call.
          documents: that the model may quote.
          chat_template: name of one of the templates, or another template; None = the default.
          add_generation_prompt: the text ends where the assistant begins to speak.
          continue_final_message: the text ends within the last message, which the model continues.
          **variables: further variables of the template.

        Raises:
          ValueError: the messages are none, or the template fails on them or refuses them; says why.
        """
        source = self.text(chat_template, tools)
        both = add_generation_prompt and continue_final_message
        fix = "goes without add_generation_prompt; give one of them"
        require(not both, "continue_final_message", True, fix)
        chat = plain_messages(messages)
        if continue_final_message:
            _tag_end(chat)
        found = self._run(source, False, chat, tools, documents, add_generation_prompt, variables)
        return _until_tag(found) if continue_final_message else found

    def render_with_spans(
        self, messages: Sequence[Message], tools: Sequence[Message] | None = None, **variables: Any
    ) -> tuple[str, list[CharSpan]]:
        """The text of a conversation, and where its `generation` tags say that the assistant speaks.

        Args:
          messages: as in `render`.
          tools: as in `render`.
          **variables: further variables of the template.

        Returns:
          (text, spans of characters); no spans where the template has no such tags.

        Raises:
          ValueError: as in `render`.
        """
        source = self.text(None, tools)
        marked = self._run(source, True, plain_messages(messages), tools, None, False, variables)
        spans, starts = [], []
        for marks, found in enumerate(MARKS.finditer(marked)):
            place = found.start() - marks
            if found.group() == OPEN:
                starts.append(place)
            elif starts:
                spans.append((starts.pop(), place))
        return MARKS.sub("", marked), sorted(spans)

    def marks_assistant(self, tools: object = None) -> bool:
        """Whether the template says by `generation` tags where the assistant speaks."""
        return bool(GENERATION.search(self.text(None, tools)))

    def _run(
        self,
        source: str,
        marking: bool,
        chat: list[dict[str, Any]],
        tools: Sequence[Message] | None,
        documents: Sequence[Message] | None,
        add_generation_prompt: bool,
        variables: Mapping[str, Any],
    ) -> str:
        if tools is not None:
            right = not isinstance(tools, str | Mapping) and all(isinstance(tool, Mapping) for tool in tools)
            require(right, "tools", tools, "must be JSON schemas of functions, in a list")
        values: dict[str, Any] = {**self.special_tokens, **_plain("a variable", dict(variables))}
        values["messages"] = chat
        values["tools"] = None if tools is None else _plain("tools", list(tools))
        values["documents"] = None if documents is None else _plain("documents", list(documents))
        values["add_generation_prompt"] = add_generation_prompt
        try:
            return _compiled(source, marking).render(values)
        except jinja2.TemplateSyntaxError as error:
            raise ValueError(f"the chat template is not valid Jinja: line {error.lineno}: {error}") from error
        except jinja2.TemplateError as error:
            raise ValueError(f"the chat template refuses these messages: {error}") from error
        except FAILURES as error:
            raise ValueError(
                f"the chat template fails on these messages ({type(error).__name__}: {error}); it may expect "
                "other roles or contents"
            ) from error


def chat_template_of(files: Mapping[str, bytes]) -> ChatTemplate | None:
    """The chat templates among the files of a tokenizer; None where there are none.

    Args:
      files: contents by name, from `tokenizer_files.carried_files`.

    Raises:
      ValueError: the templates of tokenizer_config.json are written in no known way.
    """
    config = parse_json(files.get(CONFIG_FILE, b"{}").decode())
    texts = _of_config(config.get("chat_template"))
    own = {DEFAULT: files[TEMPLATE_FILE].decode()} if TEMPLATE_FILE in files else {}
    for name, content in files.items():
        if name.startswith(f"{TEMPLATES}/"):
            own[name.removeprefix(f"{TEMPLATES}/").removesuffix(".jinja")] = content.decode()
    texts = own or texts
    if not texts:
        return None
    return ChatTemplate(texts, special_tokens_of(files))


def _of_config(value: Any) -> dict[str, str]:
    """The templates under `chat_template`: one text, or a list of named ones."""
    if not value:
        return {}
    if isinstance(value, str):
        return {DEFAULT: value}
    named = [(one.get("name"), one.get("template")) for one in value if isinstance(one, dict)]
    right = isinstance(value, list) and len(named) == len(value)
    right = right and all(isinstance(part, str) for pair in named for part in pair)
    fix = 'must be a template, or a list like [{"name": "default", "template": "..."}]'
    require(right, f"{CONFIG_FILE}: chat_template", value, fix)
    return {str(name): str(text) for name, text in named}


def plain_messages(messages: Any) -> list[dict[str, Any]]:
    """Messages as plain JSON values, as templates see them.

    Raises:
      ValueError: they are no list of mappings, there are none, or a value is nothing that JSON has.
    """
    right = isinstance(messages, Sequence) and not isinstance(messages, str | bytes)
    right = right and all(isinstance(message, Mapping) for message in messages)
    fix = 'must be a list like [{"role": "user", "content": "Hello"}]'
    require(right, "messages", messages, fix)
    require(len(messages) > 0, "messages", messages, "there are none; give at least one")
    chat, checked = [], list[Message](messages)
    for message in checked:
        # Keys without a value are as good as missing, but templates print "None" for them.
        own: dict[str, Any] = {key: value for key, value in message.items() if value is not None}
        own = _plain("a message", own)
        thought = next((own[key] for key in REASONING if key in own), None)
        if thought is not None:
            own = {"thinking": thought, **own, "reasoning_content": thought}
        chat.append(own)
    return chat


def _plain(what: str, value: Any) -> Any:
    """A deep copy in which everything is a plain JSON value, which has no methods that do harm."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(what, item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(what, item) for item in value]
    for kind in (str, int, float):
        if isinstance(value, kind):
            return kind(value)
    raise ValueError(f"{what} holds a {type(value).__name__}: must be text, numbers, lists or mappings alone")


def _tag_end(chat: list[dict[str, Any]]) -> None:
    """Marks where the content of the last message ends."""
    content = chat[-1].get("content")
    if isinstance(content, str):
        chat[-1]["content"] = content + TAG
        return
    blocks = [block for block in content or () if isinstance(block, dict)]
    texts = [block for block in blocks if isinstance(block.get("text"), str)]
    require(bool(texts), "continue_final_message", True, "the last message has no text; give it one")
    texts[-1]["text"] += TAG


def _until_tag(text: str) -> str:
    """The text up to where the last message ends."""
    place = text.rfind(TAG.strip())
    fix = "the template leaves out or changes the end of the last message; use add_generation_prompt"
    require(place >= 0, "continue_final_message", True, fix)
    whole = text[place : place + len(TAG)] == TAG
    # A template that trims contents trimmed the tag, and would have trimmed what stands before it.
    return text[:place] if whole else text[:place].rstrip()


class _Generation(jinja2.ext.Extension):
    """`{% generation %} ... {% endgeneration %}`: what the assistant says."""

    tags = {"generation"}  # noqa: RUF012 - as jinja2 declares it

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_said"), [], [], body).set_lineno(line)

    def _said(self, caller: jinja2.runtime.Macro) -> str:
        return str(caller())


class _Marked(_Generation):
    """The same, with marks around what the assistant says."""

    def _said(self, caller: jinja2.runtime.Macro) -> str:
        return f"{OPEN}{caller()}{CLOSE}"


class _Namespace(jinja2.utils.Namespace):
    """`namespace` of templates, without attributes that Python reserves."""

    def __setitem__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            raise jinja2.TemplateError(f"the attribute {name!r} of a namespace begins with an underscore")
        super().__setitem__(name, value)


class _Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """The sandbox of jinja2, in which products and powers may not fill the memory."""

    intercepted_binops = frozenset({"*", "**"})

    def call_binop(self, context: jinja2.runtime.Context, operator: str, left: Any, right: Any) -> Any:
        """A product or a power, unless it is too long."""
        if _length(operator, left, right) > LONGEST:
            raise OverflowError(f"{operator} makes a value that is too long")
        return super().call_binop(context, operator, left, right)


def _length(operator: str, left: Any, right: Any) -> int:
    """About how many characters, items or bits a product or a power of whole numbers has."""
    if isinstance(left, int) and isinstance(right, int):
        return left.bit_length() * abs(right) if operator == "**" else 0
    pairs = ((left, right), (right, left))
    return max((len(a) * b for a, b in pairs if isinstance(a, Sized) and isinstance(b, int)), default=0)


@functools.lru_cache(maxsize=32)
def _compiled(source: str, marking: bool) -> jinja2.Template:
    """A template, ready to run; `marking` puts marks around what `generation` tags enclose."""
    environment = _Sandbox(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_Marked if marking else _Generation, jinja2.ext.loopcontrols],
    )
    environment.filters["tojson"] = _to_json
    environment.globals |= {
        "raise_exception": _raise_exception,
        "strftime_now": _strftime_now,
        "namespace": _Namespace,
    }
    return environment.from_string(source)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as a model reads it; jinja2's own filter escapes it for HTML."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(layout: str) -> str:
    return datetime.datetime.now().strftime(layout)
