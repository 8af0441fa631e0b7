"""`generate --chat` and `chat`: the template's ids, answers line by line, hints and refusals."""

import io
import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest

from elastic_lm.checkpoints.native import save_model
from elastic_lm.cli import main as cli
from elastic_lm.data.tokenizer import Tokenizer, train_bpe
from elastic_lm.decode.chat import Chat
from elastic_lm.decode.sampler import Sampler
from elastic_lm.models.registry import init_params
from elastic_lm.testing import tiny_config

TEMPLATE = """\
{%- for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
NEW = 6


def make(folder: Path, template: str | None) -> str:
    config = tiny_config(exits=(1,), n_layers=2, vocab_size=320, max_len=256)
    save_model(folder, config, init_params(config, jax.random.key(1)), None)
    tokenizer = train_bpe(["user assistant system What is it? Hello there, and so on" * 3], 300)
    tokenizer.backend.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    tokenizer.save(folder)
    (folder / "checksums.json").unlink(missing_ok=True)
    if template:
        (folder / "chat_template.jinja").write_text(template)
    return str(folder)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make(tmp_path_factory.mktemp("chat") / "model", TEMPLATE)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make(tmp_path_factory.mktemp("plain") / "model", None)


def run(*arguments: object) -> int:
    return cli.main([str(argument) for argument in arguments])


def chat_of(model: str, **how) -> Chat:
    from elastic_lm.checkpoints.loading import load_decoder

    decoder, params = load_decoder(model)
    return Chat(Sampler(decoder, params, Tokenizer.load(model)), max_new_tokens=NEW, **how)


def test_generate_asks_by_the_template(
    model: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    out = tmp_path / "out.jsonl"
    ask = ("generate", "--model", model, "--prompt", "Hello", "--max-new-tokens", NEW, "--chat", "--raw")
    assert run(*ask, "--system", "Be.", "--json", out) == 0
    answer = chat_of(model, system="Be.").send("Hello")
    assert capsys.readouterr().out == answer.text + "\n"
    record = json.loads(out.read_text())
    assert (record["prompt"], record["text"], record["tokens"]) == ("Hello", answer.text, answer.tokens)
    assert "logprobs" not in record
    assert run(*ask, "--system", "Be.", "--stream") == 0
    assert capsys.readouterr().out == answer.text + "\n"


def test_several_samples_with_log_probabilities(model: str, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    ask = ("generate", "--model", model, "--prompt", "Hello", "--prompt", "What", "--max-new-tokens", NEW)
    assert run(*ask, "--n", 2, "--temperature", 1, "--top-logprobs", 2, "--json", out) == 0
    records = [json.loads(line) for line in out.read_text().splitlines()]
    assert [record["prompt"] for record in records] == ["Hello", "Hello", "What", "What"]
    for record in records:
        assert len(record["logprobs"]) == len(record["top_logprobs"]) == len(record["tokens"])
        assert all(len(ranked) == 2 and ranked[0][1] <= 0 for ranked in record["top_logprobs"])
    assert records[0]["tokens"] != records[1]["tokens"]


def test_a_chat_model_that_says_nothing_gets_a_hint(
    model: str, plain: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("elastic_lm.decode.results.Detokenizer.text", lambda *_: "")
    for extra in ((), ("--stream",)):
        assert run("generate", "--model", model, "--prompt", "Hello", "--max-new-tokens", 1, *extra) == 0
        said = [line for line in capsys.readouterr().err.splitlines() if "add --chat" in line]
        assert len(said) == 1
    for other in (("--model", plain), ("--model", model, "--chat")):
        assert run("generate", *other, "--prompt", "Hello", "--max-new-tokens", 1) == 0
        assert "add --chat" not in capsys.readouterr().err


def talk(monkeypatch: pytest.MonkeyPatch, text: str, *arguments: object) -> int:
    monkeypatch.setattr("sys.stdin", io.StringIO(text))
    return run("chat", *arguments, "--max-new-tokens", NEW, "--raw")


def test_lines_are_answered_in_one_conversation(
    model: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = "Hello\n\nWhat is it?\n/reset\nHello\n/system Be.\nHello\n/nothing\n/quit\nnever read\n"
    assert talk(monkeypatch, lines, "--model", model) == 0
    chat, other = chat_of(model), chat_of(model, system="Be.")
    first, second, third = (
        c.send(s).text for c, s in ((chat, "Hello"), (chat, "What is it?"), (other, "Hello"))
    )
    printed = capsys.readouterr()
    assert printed.out == "".join(f"{text}\n" for text in (first, second, first, third))
    assert "/nothing is no command. /reset begins anew" in printed.err
    assert first != second


def test_answers_are_in_the_colours_of_depth(
    model: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert talk(monkeypatch, "Hello", "--model", model, "--threshold", 0, "--color", "always") == 0
    printed = capsys.readouterr().out
    assert "\x1b[38;2;" in printed
    ask = ("generate", "--model", model, "--prompt", "Hello", "--max-new-tokens", NEW, "--chat", "--raw")
    assert run(*ask, "--threshold", 0, "--color", "always", "--stream") == 0
    assert capsys.readouterr().out == printed


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (("--temperature", "-1"), "temperature=-1.0"),
        (("--lossless",), "--lossless: nothing drafts"),
        (("--max-new-tokens", "0"), "max_new_tokens=0"),
    ],
)
def test_refusals_come_before_anything_is_said(
    model: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, arguments, why: str
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("Hello\n"))
    assert run("chat", "--model", model, *arguments) == 2
    assert why in capsys.readouterr().err


def test_what_is_no_chat_model_is_refused(
    plain: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert talk(monkeypatch, "Hello", "--model", plain) == 2
    assert run("generate", "--model", plain, "--chat", "--prompt", "Hello") == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    for line in lines:
        assert f"{plain}: has no chat template" in line


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (("--system", "Be."), "--system Be.: goes with --chat"),
        (("--n", "0"), "--n 0: must be at least 1"),
        (("--n", "2"), "--n 2: greedy samples are all the same"),
        (("--n", "2", "--temperature", "1", "--stream"), "--n 2: goes without --stream"),
        (("--logprobs",), "--logprobs: stand in the JSON lines"),
        (("--top-logprobs", "3"), "--top-logprobs 3: stand in the JSON lines"),
        (("--top-logprobs", "-1"), "--top-logprobs -1: must be at least 0"),
    ],
)
def test_flags_of_generate_that_do_not_go_together(
    capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], why: str
) -> None:
    assert run("generate", "--prompt", "Hello", *arguments) == 2
    assert why in capsys.readouterr().err


# The command on a terminal, with answers that take as long as they are given time.
TYPED = """
import signal, sys, time

# A shell lets what it runs in the background ignore Ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)
from elastic_lm.cli import chat, generate, main
from elastic_lm.decode import chat as talking

class Stats:
    tokens, tokens_per_s, gb_per_s, mean_layers, exit_counts = 1, 1.0, None, 1.0, {}

class Sample:
    text, stats = "well", Stats

class Tokenizer:
    chat_template = "there"

class Sampler:
    runs = None
    from elastic_lm.testing import tiny_config
    config = tiny_config()

class Chat:
    def __init__(self, *a, **k): pass
    def prompt(self, text): return [1]
    def stream_samples(self, text):
        yield Sample
        while text == "long":
            time.sleep(0.05)
            yield Sample

talking.Chat = Chat
generate.make_sampler = lambda options: (Sampler, Tokenizer)
sys.argv = ["elastic-lm", "chat", "--color", "never"]
raise SystemExit(main.main())
"""


@pytest.mark.skipif(sys.platform == "win32", reason="terminals of POSIX")
def test_ctrl_c_ends_an_answer_and_then_the_command() -> None:
    ours, theirs = pty.openpty()
    process = subprocess.Popen([sys.executable, "-c", TYPED], stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    seen = ""

    def wait_for(text: str, count: int) -> None:
        nonlocal seen
        end = time.monotonic() + 90
        while seen.count(text) < count:
            assert time.monotonic() < end, seen
            if select.select([ours], [], [], 1.0)[0]:
                seen += os.read(ours, 4096).decode()

    wait_for("> ", 1)
    os.write(ours, b"long\n")
    wait_for("well", 1)
    process.send_signal(signal.SIGINT)
    wait_for("> ", 2)  # the answer has ended, the conversation has not
    os.write(ours, b"short\n")
    wait_for("> ", 3)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=30) == 130
    os.close(ours)


@pytest.mark.skipif(sys.platform == "win32", reason="terminals of POSIX")
def test_answers_alone_go_to_stdout_where_that_is_a_file() -> None:
    ours, theirs = pty.openpty()
    command = [sys.executable, "-c", TYPED]
    process = subprocess.Popen(
        command, stdin=theirs, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    os.close(theirs)
    os.write(ours, b"short\n/quit\n")
    answers, others = process.communicate(timeout=90)
    os.close(ours)
    assert "> " not in answers
    assert "well" in answers
    assert others.count("> ") == 2
