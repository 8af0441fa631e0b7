"""`elastic-lm cascade`: rules fitted and files answered, killed runs, Supers that fail, and bad input."""

import json
import pathlib
import signal
import subprocess
import sys
import time

import cascade_process
import jax
import numpy as np
import pytest

from elastic_lm import testing
from elastic_lm.cascade.answerer import Answer
from elastic_lm.cascade.cascade import Cascade
from elastic_lm.cascade.endpoint import Endpoint
from elastic_lm.cascade.function import Function
from elastic_lm.cascade.rule import CascadeRule
from elastic_lm.cascade.scores import Scoring
from elastic_lm.checkpoints import native as checkpoint
from elastic_lm.cli import main as cli
from elastic_lm.cli.cascade import run as run_command
from elastic_lm.cli.cascade.answering import answer_missing
from elastic_lm.cli.cascade.lines import result_line
from elastic_lm.cli.cascade.models import make_members
from elastic_lm.config.encoder import EncoderConfig
from elastic_lm.config.encoder_decoder import EncoderDecoderConfig
from elastic_lm.data.tokenizer import train_bpe
from elastic_lm.files.journal import Journal, read_records
from elastic_lm.models.registry import init_params
from elastic_lm.models.task_heads import exit_encoder

RECORDS = 10_000
LETTERS = list("abcdefgh ")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    path = tmp_path_factory.mktemp("records") / "in.jsonl"
    path.write_text("".join(f'{{"n": {n}}}\n' for n in range(RECORDS)))
    return path


def expected(n: int) -> dict:
    answer = cascade_process.swift({"n": n})
    score = answer.scores["energy"]
    kept = score >= 50.0
    output = answer.output if kept else cascade_process.super_({"n": n}).output
    cost = 1.0 if kept else 11.0
    return {"index": n, "output": output, "model": "swift" if kept else "super", "score": score, "cost": cost}


def test_a_run_that_is_killed_loses_and_doubles_nothing(data: pathlib.Path, tmp_path: pathlib.Path) -> None:
    out = tmp_path / "out.jsonl"
    command = [sys.executable, cascade_process.__file__, str(data), str(out)]
    killed = subprocess.Popen([*command, "0.01"], stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while (not out.exists() or out.stat().st_size < 20_000) and time.monotonic() < deadline:
        time.sleep(0.005)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert out.stat().st_size >= 20_000
    with out.open("ab") as file:
        file.write(b'{"index": 99')  # half a line more
    again = subprocess.run([*command, "0"], capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    there = int(again.stderr.split()[0])
    assert 100 < there < RECORDS
    assert f"{RECORDS - there} records in" in again.stdout
    assert list(read_records(out)) == [expected(n) for n in range(RECORDS)]


def test_a_super_that_is_down_is_reported_and_the_rest_is_finished(
    data: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    nobody = Endpoint("http://127.0.0.1:9/", retries=0, workers=4)
    swift = Function(lambda record: Answer(record["n"], {"energy": float(record["n"] % 100 != 7)}))
    journal = Journal(tmp_path / "out.jsonl", {})
    cascade = Cascade(swift, nobody, 0.5, batch_size=64)
    statistics = answer_missing(cascade, read_records(data), journal, RECORDS)
    journal.close()
    assert (statistics.records, statistics.to_super, statistics.failed) == (RECORDS, 100, 100)
    for n, line in enumerate(read_records(tmp_path / "out.jsonl")):
        if n % 100 == 7:
            assert line["error"].startswith("http://127.0.0.1:9/: no answer after 1 tries")
            assert (line["output"], line["fallback"]) == (None, n)
        else:
            assert (line["output"], line["model"]) == (n, "swift")


def test_services_by_flags(monkeypatch: pytest.MonkeyPatch) -> None:
    given = ("--super", "https://host/v1", "--swift", "http://host/", "--style", "openai", "--data", "d")
    parser, _ = cli.build_parsers()
    args = parser.parse_args(
        ["cascade", "run", *given, "--service-model", "big", "--threshold", "1", "--out", "o"]
    )
    monkeypatch.setenv("ELASTIC_LM_API_KEY", "secret\n")
    swift, super_ = make_members(run_command.Options.from_flags(args), {}, Scoring(), ("energy",))
    assert isinstance(swift, Endpoint)
    assert isinstance(super_, Endpoint)
    assert super_.url == "https://host/v1"
    sent = super_._body({"text": "Is it?"})
    assert sent == {"temperature": 0, "max_tokens": 32, "model": "big", "prompt": "Is it?"}
    assert super_._headers == {"Authorization": "Bearer secret"}


def test_scores_that_are_nan_are_null() -> None:
    swift = Function(lambda record: Answer(0, {"energy": float("nan")}))
    (result,) = Cascade(swift, Function(lambda record: 1), 0.0).answer([{}])
    assert (
        json.dumps(result_line(result))
        == '{"index": 0, "output": 1, "model": "super", "score": null, "cost": 0.0}'
    )


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A decoder whose exit is sure of other things than its last layer."""
    folder = tmp_path_factory.mktemp("model")
    config = testing.tiny_config(exits=(1,), n_layers=2, vocab_size=260)
    checkpoint.save_model(folder, config, testing.random_params(config), train_bpe(["some text"], 260))
    return folder


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    rng = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("questions") / "val.jsonl"
    records = [
        {"text": "".join(rng.choice(LETTERS, 9)), "choices": ["ab", "cd"], "label": int(rng.integers(2))}
        for _ in range(40)
    ]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def run(*arguments: object) -> object:
    try:
        return cli.main([str(a) for a in arguments])
    except SystemExit as stop:
        return stop.code


def test_fit_then_run_and_run_again(
    model: pathlib.Path, questions: pathlib.Path, tmp_path: pathlib.Path, capsys
) -> None:
    rule, out = tmp_path / "rule.json", tmp_path / "out.jsonl"
    models = ("--swift-exit", 1, "--super", model, "--data", questions)
    plot = tmp_path / "curve.png"
    assert run("cascade", "fit", *models, "--super-accuracy", "--out", rule, "--plot", plot) == 0
    printed = capsys.readouterr()
    assert "40 records: Swift alone" in printed.out
    assert plot.read_bytes()[:4] == b"\x89PNG"
    fitted = CascadeRule.load(rule)
    assert fitted.provenance["models"] == {"swift": f"{model} exit 1", "super": str(model)}
    assert fitted.measured is not None
    assert run("cascade", "run", *models, "--rule", rule, "--out", out) == 0
    assert "records in" in capsys.readouterr().out
    lines = list(read_records(out))
    assert [line["index"] for line in lines] == list(range(40))
    share = np.mean([line["model"] == "super" for line in lines])
    assert share == pytest.approx(fitted.measured.share_super)
    labels = [record["label"] for record in read_records(questions)]
    right = [line["output"] == label for line, label in zip(lines, labels, strict=True)]
    assert np.mean(right) == pytest.approx(fitted.measured.accuracy)
    assert np.mean([line["cost"] for line in lines]) == pytest.approx(fitted.measured.cost)
    before = out.read_bytes()
    assert run("cascade", "run", *models, "--rule", rule, "--out", out) == 0
    assert "40 of 40 records are there already" in capsys.readouterr().err
    assert out.read_bytes() == before
    assert run("cascade", "run", *models, "--threshold", 9, "--out", out) == 2
    assert "was begun with threshold=" in capsys.readouterr().err


def test_route_is_cascade_with_a_warning(
    model: pathlib.Path, questions: pathlib.Path, tmp_path: pathlib.Path, capsys
) -> None:
    printed, files = {}, {}
    for name in ("cascade", "route"):
        rule, out = tmp_path / f"{name}.json", tmp_path / f"{name}.jsonl"
        models = ("--swift-exit", 1, "--super", model, "--data", questions)
        assert run(name, "fit", *models, "--super-accuracy", "--out", rule) == 0
        assert run(name, "run", *models, "--rule", rule, "--out", out) == 0
        printed[name] = capsys.readouterr()
        files[name] = out.read_bytes(), CascadeRule.load(rule).curve
    assert files["route"] == files["cascade"]
    warning = "elastic-lm route is now elastic-lm cascade; the old name goes in 0.3"
    assert printed["route"].err.splitlines().count(warning) == 2  # one line for each command
    assert warning not in printed["cascade"].err
    assert run("route", "fit", "--help") == 0
    assert "usage: elastic-lm cascade fit" in capsys.readouterr().out


def test_what_the_prompt_decides_is_decided_before_text_is_generated(
    model: pathlib.Path, tmp_path: pathlib.Path, capsys
) -> None:
    rule, out, data = (tmp_path / name for name in ("rule.json", "out.jsonl", "prompts.jsonl"))
    rng = np.random.default_rng(1)
    prompts = [{"text": "".join(rng.choice(LETTERS, 9)), "label": "?"} for _ in range(12)]
    data.write_text("".join(json.dumps(record) + "\n" for record in prompts))
    models = ("--swift-exit", 1, "--super", model, "--data", data, "--max-new-tokens", 3)
    goal = ("--target-cost", 1e12, "--out", rule)
    assert run("cascade", "fit", *models, *goal, "--score", "prompt_energy") == 0
    fitted = CascadeRule.load(rule)
    middle = fitted.curve[len(fitted.curve) // 2]
    given = ("--score", "prompt_energy", "--threshold", repr(middle.threshold), "--out", out)
    assert run("cascade", "run", *models, *given) == 0
    lines = list(read_records(out))
    assert {line["model"] for line in lines} == {"swift", "super"}
    assert np.mean([line["cost"] for line in lines]) == pytest.approx(middle.cost)


@pytest.fixture(scope="module")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, pathlib.Path]:
    """An encoder with an exit, that exit as a model of its own, and an encoder-decoder."""
    tokenizer = train_bpe(["some text"], 260)
    config = EncoderConfig(
        vocab_size=260, d_model=16, n_layers=2, n_heads=2, d_mlp=32, max_len=32, n_labels=2, exits=(1,)
    )
    whole = jax.tree.map(lambda x: 8 * x, init_params(config, jax.random.key(0)))
    writer = EncoderDecoderConfig(vocab_size=260, d_model=8, n_layers=1, n_heads=1, d_mlp=8)
    models = {
        "whole": (config, whole),
        "exit": exit_encoder(config, whole, 1),
        "writer": (writer, init_params(writer, jax.random.key(0))),
    }
    folder = tmp_path_factory.mktemp("encoders")
    for name, (own, params) in models.items():
        checkpoint.save_model(folder / name, own, params, tokenizer)
    return {name: folder / name for name in models}


def test_an_exit_of_an_encoder_is_a_swift(
    encoders: dict[str, pathlib.Path], questions: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    pair = ("--super", encoders["whole"], "--data", questions)
    rule = tmp_path / "rule.json"
    assert run("cascade", "fit", "--swift-exit", 1, *pair, "--target-cost", 1e9, "--out", rule) == 0
    fitted = CascadeRule.load(rule)
    middle, lines = fitted.curve[len(fitted.curve) // 2], []
    for swift in (("--swift", encoders["exit"]), ("--swift-exit", 1)):
        out = tmp_path / f"{len(lines)}.jsonl"
        assert run("cascade", "run", *swift, *pair, "--threshold", middle.threshold, "--out", out) == 0
        lines.append(list(read_records(out)))
    apart, inside = lines
    saved = [a.pop("cost") - b.pop("cost") for a, b in zip(apart, inside, strict=True)]
    assert [saving > 0 for saving in saved] == [line["model"] == "super" for line in inside]
    assert {line["model"] for line in inside} == {"swift", "super"}
    for a, b in zip(apart, inside, strict=True):
        assert a == {**b, "score": pytest.approx(b["score"])}


RULES = """
from elastic_lm.cascade import Answer


def answer(record):
    return Answer(len(record["text"]) % 2, {"energy": float(len(record["text"]))}, cost=1.0)
"""


def test_a_python_file_is_an_answerer(tmp_path: pathlib.Path, capsys) -> None:
    swift, super_, data, out = (
        tmp_path / name for name in ("rules.py", "labels.py", "in.jsonl", "out.jsonl")
    )
    swift.write_text(RULES)
    super_.write_text("answer = lambda record: record['label']")
    data.write_text("".join(json.dumps({"text": "x" * n, "label": 7}) + "\n" for n in range(4)))
    given = ("--swift", f"Function:{swift}", "--super", f"Function:{super_}", "--data", data, "--out", out)
    assert run("cascade", "run", *given, "--threshold", 2) == 0
    lines = list(read_records(out))
    assert [line["output"] for line in lines] == [7, 7, 0, 1]
    assert [line["model"] for line in lines] == ["super", "super", "swift", "swift"]

    # Another file is another model, whose answers do not go on with those of the first.
    swift.write_text(RULES + "# changed")
    assert run("cascade", "run", *given, "--threshold", 2) == 2
    assert "was begun with swift_checkpoint=" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("swift", "options", "message"),
    [
        ("Function:none.py", (), "none.py: No such file or directory"),
        ("Function:empty.py", (), "empty.py has no function answer: define answer(record)"),
        ("Answer:empty.py", (), "model='Answer:empty.py': is no answerer that a command can make"),
        ("Function:rules.py", ("--max-new-tokens", 3), "--max-new-tokens=3: is read by"),
        (
            "Function:rules.py",
            ("--temperature", 2),
            "answerers by name, which answer with energies of their own",
        ),
    ],
)
def test_answerers_by_name_that_do_not_work(tmp_path, capsys, monkeypatch, swift, options, message) -> None:
    monkeypatch.chdir(tmp_path)
    pathlib.Path("empty.py").touch()
    pathlib.Path("rules.py").write_text(RULES)
    pathlib.Path("in.jsonl").write_text('{"text": "x"}\n')
    given = ("--swift", swift, "--super", "Function:rules.py", "--data", "in.jsonl", "--out", "out.jsonl")
    assert run("cascade", "run", *given, "--threshold", 2, *options) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.strip().count("\n") == 0


@pytest.mark.parametrize(
    ("super_", "message"),
    [
        ("exit", "exit=1: the model has exits after layers none; name one of them, or train it"),
        ("writer", "holds an encoder_decoder, which has no exits; name a model of its own as --swift"),
    ],
)
def test_exits_that_are_not_there(encoders, questions, tmp_path, capsys, super_, message) -> None:
    given = ("--swift-exit", 1, "--super", encoders[super_], "--data", questions)
    assert run("cascade", "run", *given, "--threshold", 0, "--out", tmp_path / "o") == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("fit", "--risk", "0.1"), "--swift: name the small model"),
        (("fit", "--swift", "a", "--swift-exit", "1", "--risk", "0.1"), "leave --swift out"),
        (("fit", "--swift-exit", "9", "--risk", "0.1"), "exit=9"),
        (("fit", "--swift-exit", "1"), "one of the arguments --target-accuracy"),
        (("fit", "--swift-exit", "1", "--super-accuracy", "--epsilon", "0.1"), "give --risk too"),
        (("fit", "--swift-exit", "1", "--risk", "0.1", "--label-field", "x"), "record 1: no 'x'"),
        (("fit", "--swift-exit", "1", "--target-accuracy", "1"), "no threshold reaches it"),
        (("fit", "--swift-exit", "1", "--risk", "0.1", "--score", "surprise"), "score='surprise'"),
        (("fit", "--swift-exit", "1", "--risk", "0.1", "--temperature", "0"), "temperature=0.0"),
        (("run", "--swift-exit", "1"), "give one of them"),
        (("run", "--swift-exit", "1", "--rule", "r.json", "--score", "energy"), "settled by --rule"),
        (("run", "--swift-exit", "1", "--rule", "r.json"), "no such cascade rule"),
        (("run", "--swift-exit", "1", "--treshold", "1"), "did you mean --threshold?"),
    ],
)
def test_bad_input_is_one_line(
    model: pathlib.Path, questions: pathlib.Path, tmp_path, capsys, monkeypatch, arguments, message
) -> None:
    monkeypatch.chdir(tmp_path)
    given = ("--super", model, "--data", questions, "--out", tmp_path / "o")
    assert run("cascade", *arguments, *given) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.strip().count("\n") == 0
