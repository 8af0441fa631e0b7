"""Chat templates: the same text and ids as transformers, named templates, sandbox, and refusals that help."""

import datetime
import json
import os
from pathlib import Path

import pytest
import tokenizers

from elastic_lm.cli.conversation import prompt_ids
from elastic_lm.data.chat_template import ChatTemplate
from elastic_lm.data.tokenizer import Tokenizer, train_bpe

MODEL = os.environ.get("ELASTIC_LM_REAL_MODEL", "")
CHATML = """\
{%- for message in messages %}
    {%- if loop.first and message['role'] != 'system' %}
        {{- '<|im_start|>system\\nYou help.<|im_end|>\\n' }}
    {%- endif %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
# White space that only trim_blocks and lstrip_blocks remove, loop controls, and a namespace.
BLOCKS = """\
{% set ns = namespace(seen=0) %}
{{ bos_token }}
{% for message in messages %}
    {% if message.role == 'note' %}
        {% continue %}
    {% endif %}
    {% set ns.seen = ns.seen + 1 %}
[{{ ns.seen }}] {{ message.role | upper }}: {{ message.content | trim }}{{ eos_token }}
{% endfor %}
{% if add_generation_prompt %}
ASSISTANT:{% endif %}
"""
TOOLS = """\
{%- if tools %}{{ '<tools>\\n' }}{% for tool in tools %}{{ tool | tojson }}
{{ tool | tojson(indent=2, sort_keys=true) }}{% endfor %}</tools>{% endif %}
{%- for document in documents or [] %}<doc>{{ document.title }}: {{ document.text }}</doc>{% endfor %}
{%- for message in messages %}{{ message.role }}:
{%- if message.tool_calls is defined %}
{%- for call in message.tool_calls %}{{ call.function | tojson }}{% endfor %}
{%- else %}{{ message.content }}{% endif %}
{%- if message.reasoning_content is defined %}({{ message.reasoning_content }}){% endif %}|{% endfor %}
{{- strftime_now('%Y') if enable_date is defined and enable_date else '' }}
"""
# Marks what the assistant says, and leaves older thoughts out, as reasoning models do.
MARKED = """\
{%- for message in messages %}
    {%- if message['role'] == 'assistant' %}
        {{- '<|im_start|>assistant\\n' }}
        {%- generation %}
            {{- message['content'].split('</think>')[-1] if not loop.last else message['content'] }}
            {{- '<|im_end|>' }}
        {%- endgeneration %}
        {{- '\\n' }}
    {%- else %}
        {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}
"""
TEMPLATES = {"chatml": CHATML, "blocks": BLOCKS, "tools": TOOLS, "marked": MARKED}
TALK = [
    {"role": "system", "content": "Be kind.\n"},
    {"role": "user", "content": "  What is <b>2+2</b>? größe 日本 🙂"},
    {"role": "note", "content": "not shown"},
    {"role": "assistant", "content": "<think>easy</think>4 "},
    {"role": "user", "content": "And 3+3?"},
    {"role": "assistant", "content": "<think>as well</think>6", "tool_calls": None},
]
WEATHER = {
    "type": "function",
    "function": {"name": "weather", "description": "Wie's heiß?", "parameters": {"city": {"type": "string"}}},
}


END = {"content": "<|im_end|>", "lstrip": False, "normalized": False, "rstrip": False, "special": True}


def save_tokenizer(folder: Path, template: object) -> Path:
    texts = ["user assistant system What is the capital of France? Be kind. " * 3]
    tokenizer = train_bpe(texts, 300)
    tokenizer.backend.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    tokenizer.save(folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config |= {"bos_token": "<|im_start|>", "eos_token": {"__type": "AddedToken", **END}}
    config |= {"unk_token": "<|endoftext|>", "chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "checksums.json").unlink(missing_ok=True)
    return folder


@pytest.fixture(scope="module")
def theirs():
    return pytest.importorskip("transformers").PreTrainedTokenizerFast


@pytest.mark.parametrize("name", TEMPLATES)
def test_text_and_ids_are_those_of_transformers(tmp_path: Path, theirs, name: str) -> None:
    folder = save_tokenizer(tmp_path, TEMPLATES[name])
    ours, other = Tokenizer.load(folder), theirs.from_pretrained(folder)
    for count in range(1, len(TALK) + 1):
        for generation in (False, True):
            how = {"add_generation_prompt": generation, "enable_date": True}
            text = ours.apply_chat_template(TALK[:count], tokenize=False, **how)
            assert text == other.apply_chat_template(TALK[:count], tokenize=False, **how)
            ids = ours.apply_chat_template(TALK[:count], **how)
            assert ids == other.apply_chat_template(TALK[:count], **how)["input_ids"]


@pytest.fixture
def gpt2(tmp_path: Path, theirs) -> Path:
    """GPT-2's tokenizer with the two tokens of ChatML."""
    files = Path(os.environ.get("ELASTIC_LM_SHARED", "/nowhere")) / "data" / "tokenizers"
    if not (files / "gpt2_vocab.json").is_file():
        pytest.skip("set ELASTIC_LM_SHARED to a folder with data/tokenizers/gpt2_vocab.json")
    bpe = tokenizers.models.BPE.from_file(str(files / "gpt2_vocab.json"), str(files / "gpt2_merges.txt"))
    backend = tokenizers.Tokenizer(bpe)
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    special = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "unk_token": "<|endoftext|>"}
    made = theirs(tokenizer_object=backend, **special)
    made.chat_template = CHATML
    made.save_pretrained(tmp_path / "gpt2")
    return tmp_path / "gpt2"


QUESTIONS = ("What is the capital of France?", "  2+2  is 12?\n\ngröße 日本 🙂 <|im_end|>", "don't")


def check_chat_ids(folder: Path) -> None:
    """Compares what `--chat` reads with the ids of `transformers`."""
    transformers = pytest.importorskip("transformers")
    ours, other = Tokenizer.load(folder), transformers.AutoTokenizer.from_pretrained(folder)
    for text in QUESTIONS:
        for system in (None, "Be kind."):
            talk = [] if system is None else [{"role": "system", "content": system}]
            talk.append({"role": "user", "content": text})
            due = other.apply_chat_template(talk, add_generation_prompt=True)["input_ids"]
            found = prompt_ids(ours, str(folder), text, system)
            assert found == due
            assert len(found) > 10


def test_the_ids_of_chat_are_those_of_transformers(gpt2: Path) -> None:
    check_chat_ids(gpt2)


@pytest.mark.skipif(not MODEL, reason="set ELASTIC_LM_REAL_MODEL to the folder of a chat model")
def test_the_ids_of_chat_with_a_real_model_are_those_of_transformers() -> None:
    check_chat_ids(Path(MODEL))


def test_tools_documents_and_calls_are_those_of_transformers(tmp_path: Path, theirs) -> None:
    folder = save_tokenizer(tmp_path, TOOLS)
    ours, other = Tokenizer.load(folder), theirs.from_pretrained(folder)
    call = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Köln"}}}
    talk = [
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": None, "tool_calls": [call], "reasoning": "look it up"},
        {"role": "tool", "content": "20"},
    ]
    how = {"tools": [WEATHER], "documents": [{"title": "a", "text": "b"}], "tokenize": False}
    text = ours.apply_chat_template(talk, **how)
    assert text == other.apply_chat_template(talk, **how)
    assert "Wie's heiß?" in text
    assert "(look it up)" in text


@pytest.mark.parametrize("content", ["4 and", "4 and  ", [{"type": "text", "text": "4 and"}]])
def test_a_continued_message_is_that_of_transformers(tmp_path: Path, theirs, content: object) -> None:
    for i, template in enumerate((CHATML, BLOCKS)):
        if not isinstance(content, str):
            template = template.replace("message.content", "message.content[0].text")
        folder = save_tokenizer(tmp_path / str(i), template)
        ours, other = Tokenizer.load(folder), theirs.from_pretrained(folder)
        talk = [{"role": "user", "content": content}, {"role": "assistant", "content": content}]
        how = {"continue_final_message": True, "tokenize": False}
        text = ours.apply_chat_template(talk, **how)
        assert text == other.apply_chat_template(talk, **how)
        assert text.endswith("4 and" if i else "4 and  " if content == "4 and  " else "4 and")


def test_named_templates_are_chosen_as_in_transformers(tmp_path: Path, theirs) -> None:
    named = [{"name": "default", "template": CHATML}, {"name": "tool_use", "template": TOOLS}]
    folder = save_tokenizer(tmp_path / "config", named)
    (tmp_path / "config" / "other").mkdir()
    files = save_tokenizer(tmp_path / "files", "not this one")
    (files / "chat_template.jinja").write_text(CHATML)
    (files / "additional_chat_templates").mkdir()
    (files / "additional_chat_templates" / "tool_use.jinja").write_text(TOOLS)
    for place in (folder, files):
        ours, other = Tokenizer.load(place), theirs.from_pretrained(place)
        for how in ({}, {"tools": [WEATHER]}, {"chat_template": "tool_use"}, {"chat_template": BLOCKS}):
            text = ours.apply_chat_template(TALK, tokenize=False, **how)
            assert text == other.apply_chat_template(TALK, tokenize=False, **how), how


def test_what_a_saved_tokenizer_renders_is_the_same(tmp_path: Path) -> None:
    ours = Tokenizer.load(save_tokenizer(tmp_path / "a", BLOCKS))
    ours.save(tmp_path / "b")
    again = Tokenizer.load(tmp_path / "b")
    assert again.apply_chat_template(TALK) == ours.apply_chat_template(TALK)


def test_what_the_assistant_says_is_marked_as_in_transformers(tmp_path: Path, theirs) -> None:
    folder = save_tokenizer(tmp_path, MARKED)
    other = theirs.from_pretrained(folder)
    template = Tokenizer.load(folder).chat_template
    assert template.marks_assistant()
    text, spans = template.render_with_spans(TALK)
    assert text == other.apply_chat_template(TALK, tokenize=False)
    assert [text[a:b] for a, b in spans] == ["4 <|im_end|>", "<think>as well</think>6<|im_end|>"]


def test_dates_are_of_now() -> None:
    text = ChatTemplate({"default": "{{ strftime_now('%d %B %Y') }}"}).render([{"role": "user"}])
    assert abs(datetime.datetime.strptime(text, "%d %B %Y") - datetime.datetime.now()).days <= 1


HARMFUL = {
    "attributes": "{{ messages.__class__.__mro__ }}",
    "globals": "{{ raise_exception.__globals__.values() }}",
    "changes": "{{ messages.append(1) }}",
    "namespace": "{% set ns = namespace() %}{% set ns.__class__ = 1 %}",
}


@pytest.mark.parametrize("name", HARMFUL)
def test_templates_run_in_a_sandbox(name: str) -> None:
    with pytest.raises(ValueError, match="the chat template"):
        print(ChatTemplate({"default": HARMFUL[name]}).render([{"role": "user", "content": "a"}]))


def test_products_and_powers_of_usual_size_are_those_of_jinja() -> None:
    text = "{{ 'ab' * 3 }} {{ 2 ** 10 }} {{ 2 ** -1 }} {{ 1.5 * 2 }} {{ 3 * 'c' }} {{ [1] * 2 }}"
    shown = ChatTemplate({"default": text}).render([{"role": "user", "content": "a"}])
    assert shown == "ababab 1024 0.5 3.0 ccc [1, 1]"


def test_templates_leave_the_callers_messages_alone() -> None:
    talk = [{"role": "assistant", "content": "a", "tool_calls": None}]
    ChatTemplate({"default": CHATML}).render(talk, continue_final_message=True)
    assert talk == [{"role": "assistant", "content": "a", "tool_calls": None}]


REFUSED = [
    ("{{ raise_exception('roles alternate') }}", TALK, {}, "refuses these messages: roles alternate"),
    ("{% if %}", TALK, {}, "not valid Jinja: line 1"),
    ("{{ 1 + messages }}", TALK, {}, r"fails on these messages \(TypeError"),
    ("{{ 1 // 0 }}", TALK, {}, r"fails on these messages \(ZeroDivisionError"),
    ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", TALK, {}, r"fails .* \(RecursionError"),
    ("{{ 'a' * 10**12 }}", TALK, {}, r"fails .* \(OverflowError: \* makes a value that is too long"),
    ("{{ 10 ** (10 ** 10) }}", TALK, {}, r"fails .* \(OverflowError: \*\* makes a value that is too long"),
    ("{{ (messages * 10**9) | length }}", TALK, {}, r"fails .* \(OverflowError"),
    ("{{ messages[0].a.b }}", TALK, {}, "refuses these messages: .*has no attribute 'a'"),
    (CHATML, [], {}, "there are none"),
    (CHATML, "Hello", {}, "must be a list like"),
    (CHATML, [{"role": "user", "content": Path("a")}], {}, "holds a PosixPath"),
    (CHATML, TALK, {"tools": "weather"}, "must be JSON schemas"),
    (CHATML, TALK, {"add_generation_prompt": True, "continue_final_message": True}, "give one of them"),
    ("{{ messages[0].content }}", TALK, {"continue_final_message": True}, "leaves out or changes the end"),
]


@pytest.mark.parametrize(("template", "messages", "how", "why"), REFUSED)
def test_refusals_say_what_is_wrong(template: str, messages, how, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        ChatTemplate({"default": template}).render(messages, **how)


def test_a_tokenizer_without_a_template_says_so(tmp_path: Path) -> None:
    ours = Tokenizer.load(save_tokenizer(tmp_path / "none", None))
    with pytest.raises(ValueError, match=r"the tokenizer has none, .*put a chat_template.jinja beside it"):
        ours.apply_chat_template(TALK)
    text = ours.apply_chat_template(TALK, chat_template=CHATML, tokenize=False)
    assert text.startswith("<|im_start|>system")
    with pytest.raises(ValueError, match="must be a template, or a list"):
        _ = Tokenizer.load(save_tokenizer(tmp_path / "bad", {"default": CHATML})).chat_template
    named = Tokenizer.load(save_tokenizer(tmp_path / "named", [{"name": "b", "template": CHATML}]))
    with pytest.raises(ValueError, match="name one of b"):
        named.apply_chat_template(TALK)
