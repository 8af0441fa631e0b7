"""`elastic-lm cascade` again: after interrupts and failures, for other goals, with other models or flags."""

import dataclasses
import http.server
import json
import os
import pathlib
import re
import shutil
import threading
from collections.abc import Iterator

import jax
import pytest

from elastic_lm.cascade.answerer import Answer
from elastic_lm.cascade.cascade import Cascade
from elastic_lm.cascade.classifier import Classifier
from elastic_lm.cascade.function import Function
from elastic_lm.cascade.guarantee import CascadeGuarantee
from elastic_lm.cascade.rule import CascadeRule
from elastic_lm.cascade.text_answerer import TextAnswerer
from elastic_lm.checkpoints import native as checkpoint
from elastic_lm.cli import main as cli
from elastic_lm.cli.cascade import run as run_command
from elastic_lm.cli.cascade.answering import answer_failed, answer_missing
from elastic_lm.cli.cascade.checks import check_members, check_record
from elastic_lm.cli.cascade.identity import check_models
from elastic_lm.config.encoder import EncoderConfig
from elastic_lm.config.encoder_decoder import EncoderDecoderConfig
from elastic_lm.cost.sequences import text_to_text_flops
from elastic_lm.data.tokenizer import train_bpe
from elastic_lm.files.fingerprints import SAMPLE, SAMPLES, checkpoint_fingerprint
from elastic_lm.files.journal import Journal, read_records
from elastic_lm.models import registry as kinds
from elastic_lm.models.registry import init_params

CONFIG = EncoderConfig(vocab_size=260, d_model=16, n_layers=1, n_heads=2, d_mlp=32, max_len=32, n_labels=2)
SWIFT = Function(lambda record: Answer(record["x"], {"energy": float(record["x"] % 3)}))


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[object, str]:
    capsys.readouterr()
    code = cli.main([str(a) for a in ("cascade", *arguments)])
    return code, capsys.readouterr().err


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The same classifier with its classes in two orders, one without names, a regression, and records."""
    folder, tokenizer = tmp_path_factory.mktemp("models"), train_bpe(["some text"], 260)
    params = jax.tree.map(lambda x: 8 * x, init_params(CONFIG, jax.random.key(0)))
    turned = {**params, "head": jax.tree.map(lambda x: x[::-1], params["head"])}
    names = ("no", "yes")
    models = {
        "ordered": (dataclasses.replace(CONFIG, labels=names), params),
        "turned": (dataclasses.replace(CONFIG, labels=names[::-1]), turned),
        "unnamed": (CONFIG, params),
        "regression": (dataclasses.replace(CONFIG, problem="regression"), params),
    }
    for name, (config, own) in models.items():
        checkpoint.save_model(folder / name, config, own, tokenizer)
    records = [{"text": "abcdefgh"[i % 8 :] + "tex"[i % 3 :], "label": names[i % 2]} for i in range(20)]
    (folder / "d.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


@pytest.fixture
def pair(folder: pathlib.Path) -> tuple[object, ...]:
    return "--swift", folder / "ordered", "--super", folder / "turned", "--data", folder / "d.jsonl"


@pytest.fixture
def service() -> Iterator[str]:
    """A Super that can be down."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(404 if down else 200)
            self.end_headers()
            self.wfile.write(b'{"output": "yes", "cost": 5}')

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    down.append(True)
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
    down.clear()


down: list[bool] = []


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_rows_whose_write_is_interrupted_are_there_once(tmp_path: pathlib.Path, monkeypatch, error) -> None:
    records, synchronise, calls = [{"x": x} for x in range(100)], os.fsync, []

    def fsync(file: int) -> None:
        calls.append(file)
        synchronise(file)
        if len(calls) == 3:
            raise error

    cascade = Cascade(SWIFT, Function(lambda record: -record["x"]), 1.0, batch_size=8)
    journal = Journal(tmp_path / "o.jsonl", {})
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        with pytest.raises(error):
            answer_missing(cascade, records, journal, 100)
    journal.close()
    journal = Journal(tmp_path / "o.jsonl", {})
    assert journal.records == 24
    answer_missing(cascade, records, journal, 100)
    assert [line["index"] for line in journal.lines()] == list(range(100))


@pytest.mark.parametrize("score", ["energy", "random"])
def test_failed_rows_are_answered_again(tmp_path: pathlib.Path, capsys, score: str) -> None:
    records, lost = [{"x": x} for x in range(50)], {3, 9, 12, 14}

    def super_(record: dict) -> int:
        if record["x"] in lost:
            raise ConnectionError("down")
        return -record["x"]

    cascade = Cascade(SWIFT, Function(super_), 0.9, score=score, batch_size=8)
    whole = Journal(tmp_path / "whole.jsonl", {})
    broken = Journal(tmp_path / "broken.jsonl", {})
    answer_missing(cascade, records, broken, 50)
    failed = [line["index"] for line in broken.lines() if "error" in line]
    assert 0 < len(failed) <= 4
    lost.intersection_update({failed[0]})
    answer_failed(cascade, records, broken)
    assert f"{len(failed)} records had failed, 1 of them" in capsys.readouterr().err
    lost.clear()
    answer_failed(cascade, records, broken)
    answer_failed(cascade, records, broken)  # nothing is left to do
    answer_missing(cascade, records, whole, 50)
    assert list(broken.lines()) == list(whole.lines())


def test_outputs_are_names_whatever_the_order(pair: tuple, tmp_path: pathlib.Path, capsys) -> None:
    rule, out = tmp_path / "rule.json", tmp_path / "o.jsonl"
    assert run(capsys, "fit", *pair, "--target-cost", 1e12, "--out", rule)[0] == 0
    fitted = CascadeRule.load(rule)
    accuracies = {point.accuracy for point in fitted.curve}
    assert len(accuracies) == 1  # both models answer alike
    middle = fitted.curve[len(fitted.curve) // 2].threshold
    assert run(capsys, "run", *pair, "--threshold", middle, "--out", out)[0] == 0
    lines = list(read_records(out))
    assert {line["model"] for line in lines} == {"swift", "super"}
    labels = [record["label"] for record in read_records(pair[-1])]
    right = [line["output"] == label for line, label in zip(lines, labels, strict=True)]
    assert sum(right) / 20 == pytest.approx(*accuracies)


def test_another_goal_asks_no_model(pair: tuple, tmp_path: pathlib.Path, capsys, monkeypatch) -> None:
    fit = ("fit", *pair, "--out", tmp_path / "rule.json")
    code, error = run(capsys, *fit, "--target-accuracy", 1)
    assert code == 2
    (kept,) = tmp_path.glob("rule.answers-*.jsonl")
    assert f"the answers are kept in {kept}: another goal asks no model" in error
    assert run(capsys, *fit, "--super-accuracy", "--max-len", 5)[0] == 0
    assert len(list(tmp_path.glob("rule.answers-*.jsonl"))) == 2
    monkeypatch.setattr(Classifier, "answer", lambda *_, **__: pytest.fail("a model was asked"))
    code, error = run(capsys, *fit, "--super-accuracy")
    assert code == 0
    assert "20 of 20 records are there already" in error


def test_a_run_is_known_by_all_that_changes_answers(
    pair: tuple, folder: pathlib.Path, tmp_path: pathlib.Path, capsys
) -> None:
    data = tmp_path / "d.jsonl"
    shutil.copy(folder / "d.jsonl", data)
    shutil.copytree(folder / "ordered", tmp_path / "swift")
    models = ("--swift", tmp_path / "swift", "--super", folder / "turned", "--data", data)
    given = ("run", *models, "--threshold", 0, "--out", tmp_path / "o.jsonl")
    assert run(capsys, *given)[0] == 0
    assert run(capsys, *given, "--batch-size", 3)[0] == 0
    assert "begun with max_len=None, now max_len=8" in run(capsys, *given, "--max-len", 8)[1]
    data.write_text(data.read_text().replace("tex", "ext"))
    assert "was begun with data_sha256=" in run(capsys, *given)[1]
    shutil.copy(folder / "d.jsonl", data)
    shutil.rmtree(tmp_path / "swift")
    shutil.copytree(folder / "turned", tmp_path / "swift")
    assert "was begun with swift_checkpoint=" in run(capsys, *given)[1]


def test_a_rule_is_about_its_checkpoints(
    pair: tuple, folder: pathlib.Path, tmp_path: pathlib.Path, capsys
) -> None:
    rule = tmp_path / "rule.json"
    assert run(capsys, "fit", *pair, "--super-accuracy", "--out", rule)[0] == 0
    contents = CascadeRule.load(rule).provenance["contents"]
    assert [len(contents[name][part]) for name in contents for part in contents[name]] == [16] * 4
    shutil.copytree(folder / "ordered", tmp_path / "copy")
    given = ("run", "--super", folder / "turned", "--data", folder / "d.jsonl", "--rule", rule)
    code, error = run(capsys, *given, "--swift", tmp_path / "copy", "--out", tmp_path / "a")
    assert (code, "fit it again" in error) == (0, False)
    code, error = run(capsys, *given, "--swift", folder / "turned", "--out", tmp_path / "b")
    assert code == 0
    assert f"swift {folder / 'turned'} is not the checkpoint that the rule was fitted on" in error


def test_models_are_told_apart_by_what_they_hold(capsys: pytest.CaptureFixture[str]) -> None:
    """A model that was saved again is the same one; a guarantee is about the models it was tested on."""
    parser, _ = cli.build_parsers()
    given = ("cascade", "run", "--swift", "a", "--super", "b", "--data", "d", "--rule", "r", "--out", "o")
    options = run_command.Options.from_flags(parser.parse_args(given))
    parts = {"swift": {"weights": "1", "tokenizer": "t"}, "super": {"weights": "2", "tokenizer": "t"}}
    provenance = {
        "models": {"swift": "old/a", "super": "old/b"},
        "fingerprints": {"swift": "f", "super": "g"},
        "contents": parts,
    }
    rule = CascadeRule(1.0, provenance=provenance)
    files = {"swift": "saved again", "super": "saved again"}
    check_models(rule, options, files, parts)
    assert capsys.readouterr().err == ""

    other = {**parts, "super": {"weights": "3", "tokenizer": "u"}}
    check_models(rule, options, files, other)
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert "super b is not the checkpoint" in line
    assert "(old/b), as their weights and tokenizer differ" in line

    tested = CascadeGuarantee(0.1, 0.05, True, "kept", 9, 1, 1, 0.0, 0.0, 0.0)
    with pytest.raises(ValueError, match=r"super b is not the checkpoint .* --force; the rule's guarantee"):
        check_models(dataclasses.replace(rule, guarantee=tested), options, files, other)


@pytest.mark.parametrize("models", [{"swift": {"a": 1}}, {"small": "x"}, "two models", None])
def test_other_descriptions_of_models(models: object, capsys) -> None:
    parser, _ = cli.build_parsers()
    given = ("cascade", "run", "--swift", "a", "--super", "b", "--data", "d", "--rule", "r", "--out", "o")
    options = run_command.Options.from_flags(parser.parse_args(given))
    rule = CascadeRule(1.0, provenance={"models": models})
    check_models(rule, options, {"swift": "1", "super": "2"}, {})
    assert capsys.readouterr().err == ""


def test_a_service_that_was_down(folder: pathlib.Path, service: str, tmp_path: pathlib.Path, capsys) -> None:
    models = ("--swift", folder / "ordered", "--super", service, "--data", folder / "d.jsonl")
    rule, out = tmp_path / "rule.json", tmp_path / "o.jsonl"
    fit = ("fit", *models, "--super-accuracy", "--out", rule)
    answer = ("run", *models, "--threshold", 1e9, "--out", out)
    assert "every record failed, the first with" in run(capsys, *fit)[1]
    assert run(capsys, *answer)[0] == 1
    assert {line["fallback"] for line in read_records(out)} <= {"no", "yes"}
    down.clear()
    assert "every record failed" in run(capsys, *fit)[1]
    assert run(capsys, *fit, "--retry-failed")[0] == 0
    assert "20 records had failed, 0 of them" in run(capsys, *answer, "--retry-failed")[1]
    lines = list(read_records(out))
    assert [line["index"] for line in lines] == list(range(20))
    assert all(line["output"] == "yes" and "error" not in line for line in lines)


@pytest.mark.parametrize(
    ("swift", "super_", "flags", "message"),
    [
        ("ordered", "turned", ("--labels", "a,b"), "--labels='a,b': is read by encoder-decoders, and these"),
        ("ordered", "turned", ("--template", "{text}"), "--template='{text}': is read by encoder-decoders"),
        ("ordered", "turned", ("--normalise", "bytes"), "--normalise='bytes': is read by decoders that ch"),
        ("ordered", "turned", ("--timeout", "3"), "--timeout=3.0: is read by services"),
        ("ordered", "turned", ("--super-cost", "3"), "--super-cost=3.0: is of a service"),
        ("http://h/", "http://h/", ("--pair-field", "label"), "--pair-field='label': is read by encoders"),
        (
            "http://h/",
            "turned",
            ("--temperature", "2"),
            "--temperature=2.0: the Swift is one of the services",
        ),
        ("ordered", "http://h/", ("--service-model", "b"), "--service-model='b': is read by services of --s"),
        ("ordered", "http://h/", ("--style", "openai"), "--super-cost 0: the service does not say"),
        ("ordered", "turned", ("--super-cost", "-1"), "--super-cost=-1.0: must be at least 0"),
        ("ordered", "turned", ("--text-field", "no"), "--text-field='no': is no field of the first record"),
        ("ordered", "turned", ("--pair-field", "no"), "--pair-field='no': is no field"),
        ("ordered", "turned", ("--choices-field", "no"), "--choices-field='no': is no field"),
        ("ordered", "turned", ("--max-len", "99"), "max_len=99: must be at least 1 and at most the model's"),
        ("ordered", "turned", ("--tolerance", "1"), "record 1: label='no': --tolerance 1 compares numbers"),
        ("ordered", "unnamed", (), "--swift: its classes are no, yes, and those of --super are 0, 1"),
        ("unnamed", "unnamed", (), "record 1: label='no': is no class of the models, which know 0, 1"),
        ("regression", "ordered", (), "is a regression, and has no max_prob"),
        ("nowhere", "ordered", (), "no such folder. A model of the Hub is named ORG/NAME"),
    ],
)
def test_what_does_not_fit_is_refused_before_a_row_is_answered(
    folder: pathlib.Path, tmp_path: pathlib.Path, capsys, swift: str, super_: str, flags: tuple, message: str
) -> None:
    models = [name if name.startswith("http") else folder / name for name in (swift, super_)]
    given = ("--swift", models[0], "--super", models[1], "--data", folder / "d.jsonl")
    code, error = run(capsys, "fit", *given, *flags, "--super-accuracy", "--out", tmp_path / "rule.json")
    assert code == 2
    assert message in error
    assert error.strip().count("\n") == 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("flag", "value", "message"),
    [
        ("--template", "{text", "--template {text: expected '}'"),
        ("--template", "{text.x}", "cannot be filled from a record"),
        ("--template", "{txt}", "its {txt} is no field of the first record of d, which has text"),
        ("--labels", "a,a", "--labels='a,a': must be different texts"),
        ("--labels", "a,", "--labels='a,': must be different texts"),
        (
            "--pair-field",
            "text",
            "--pair-field='text': is read by encoders, and these are encoder-decoders; leave it",
        ),
    ],
)
def test_flags_of_encoder_decoders(flag: str, value: str, message: str) -> None:
    parser, _ = cli.build_parsers()
    given = ("--swift", "a", "--super", "b", "--data", "d", "--threshold", "0", "--out", "o", flag, value)
    model = TextAnswerer.__new__(TextAnswerer)
    options = run_command.Options.from_flags(parser.parse_args(["cascade", "run", *given]))
    check = check_members if flag == "--pair-field" else check_record
    with pytest.raises(ValueError, match=re.escape(message)):
        check(options, {"text": "a"}, *([(model, model), ("energy",)] if check is check_members else ()))


def test_encoder_decoders_read_as_many_tokens_as_is_said(tmp_path: pathlib.Path, capsys) -> None:
    tokenizer = train_bpe(["some text"], 260)
    shape = {"vocab_size": 260, "d_model": 16, "n_layers": 1, "n_heads": 2, "d_mlp": 32}
    config = EncoderDecoderConfig(**shape, eos_ids=tokenizer.eos_ids)
    checkpoint.save_model(tmp_path / "t5", config, kinds.init_params(config, jax.random.key(0)), tokenizer)
    (tmp_path / "d.jsonl").write_text('{"text": "abcdefgh"}\n{"text": "abcdefxy"}\n')
    given = ("run", "--swift", tmp_path / "t5", "--super", tmp_path / "t5", "--data", tmp_path / "d.jsonl")
    given += ("--labels", "a,b", "--threshold", -1e9)
    costs = {}
    for longest in (7, 9, 5000):  # of 8 tokens and an end token; more than a model reads unless asked to
        out = tmp_path / f"{longest}.jsonl"
        assert run(capsys, *given, "--max-len", longest, "--out", out)[0] == 0
        first, second = read_records(out)
        assert (first["score"] == second["score"]) == (longest == 7)
        costs[longest] = first["cost"]
    assert costs == {n: text_to_text_flops(config, min(n, 9), 1) for n in costs}
    code, error = run(capsys, *given, "--max-len", 1, "--out", tmp_path / "none.jsonl")
    assert (code, error.count("\n")) == (2, 1)
    assert "max_len=1: must be above the 1 end tokens" in error


def test_fingerprints_see_contents_alone(tmp_path: pathlib.Path) -> None:
    weights = tmp_path / "a" / "model.safetensors"
    weights.parent.mkdir()
    weights.write_bytes(bytes(2 * SAMPLES * SAMPLE))
    (tmp_path / "a" / "config.json").write_text("{}")
    first = checkpoint_fingerprint(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b", copy_function=shutil.copyfile)
    (tmp_path / "b" / "out.jsonl").write_text("of no concern")
    assert checkpoint_fingerprint(tmp_path / "b") == first
    with weights.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"x")
    assert checkpoint_fingerprint(tmp_path / "a") != first
    (tmp_path / "b" / "config.json").write_text("[]")
    assert checkpoint_fingerprint(tmp_path / "b") != first
