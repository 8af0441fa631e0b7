"""The main job on the tiny setting, and how the user's own text is divided."""

import argparse
import json
import pathlib
import re
import shlex

import pytest

from elastic_lm.bench import plan as planning
from elastic_lm.cli import main as cli
from elastic_lm.data.splitting import split_text
from elastic_lm.data.tokenizer import train_bpe
from elastic_lm.hf import exporting as hf
from elastic_lm.quickstart import measure, next_step, report, train
from elastic_lm.quickstart import run as quickstart_run
from elastic_lm.quickstart.options import Options
from elastic_lm.quickstart.report import Report, Target
from elastic_lm.quickstart.run import run
from elastic_lm.quickstart.train import check_exits, exit_layers
from elastic_lm.report import progress
from elastic_lm.testing import random_params, tiny_config


@pytest.mark.long
def test_tiny_quickstart_writes_everything(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert cli.main(["quickstart", "--tiny", "--from-scratch", "--out", str(out), "--color", "always"]) == 0
    numbers = json.loads((out / "report.json").read_text())
    assert numbers["full_depth_layers"] == 4
    assert numbers["seconds_total"] > 0
    assert [row["target_agreement"] for row in numbers["targets"]] == [0.9, 0.99]
    for row in numbers["targets"]:
        assert {"agreement", "mean_layers", "tokens_per_s", "speedup"} <= set(row)
        assert 0 <= row["agreement"] <= 1
        assert 1 <= row["mean_layers"] <= 4
        assert row["predicted"] > 0
        assert 0 <= row["generated_agreement"] <= 1
    assert {"config", "hardware", "versions"} <= set(numbers)
    assert set(numbers["recommended_by_target"]) == {"0.9", "0.99"}
    assert numbers["recommended"]["speedup"] >= 1
    assert (out / "curve.png").read_bytes().startswith(b"\x89PNG")
    page = (out / "text.html").read_text()
    assert "4 layers" in page
    shares = re.findall(r"(\d+) of (\d+) tokens left early \((\d+)%\)", page)
    assert shares
    assert all(int(percent) == round(100 * int(early) / int(all_)) for early, all_, percent in shares)
    assert " times as fast as full depth" in page
    printed = capsys.readouterr().out
    assert "speed-up" in printed
    assert "\x1b[38;2;" in printed
    shown = ["--model", f"{out}/model", "--thresholds", f"{out}/thresholds.json", "--prompt", "def"]
    assert cli.main(["generate", *shown, "--max-new-tokens", "4"]) == 0


def row(
    dial: str, target: float, speedup: float, agreement: float | None = None, degenerate: str = ""
) -> Target:
    return Target(
        target_agreement=target,
        agreement=target if agreement is None else agreement,
        mean_layers=3.0,
        tokens_per_s=1.0,
        speedup=speedup,
        generated_agreement=1.0,
        thresholds=(0.5,),
        dial=dial,
        degenerate=degenerate,
    )


def result(*rows: Target) -> Report:
    return Report(1.0, 4, 1.0, list(rows), {}, {}, None)


EXITS = "--model out/model --thresholds out/thresholds.json"
PREVIEW = "--model own --preview out/preview_99.safetensors"


@pytest.mark.parametrize(
    ("rows", "how"),
    [
        ((), "--model own"),
        ((row("exits", 0.9, 0.9), row("exits", 0.99, 0.8)), "--model own"),
        ((row("exits", 0.9, 1.2), row("exits", 0.99, 0.9)), EXITS),
        ((row("preview", 0.9, 1.3), row("preview", 0.99, 1.1)), PREVIEW),
        ((row("lookup", 1.0, 1.2), row("preview", 0.99, 1.1)), "--model own --lossless --lookup"),
        ((row("lookup", 1.0, 1.05), row("preview", 0.99, 1.1)), PREVIEW),
    ],
)
def test_what_comes_next_is_what_is_recommended(rows: tuple[Target, ...], how: str) -> None:
    options = Options(out="out", hf_dir="own", data=("text.txt",))
    words = next_step.command(options, result(*rows).recommended, "It's a prompt")
    assert words == f"elastic-lm generate {how} --prompt " + shlex.quote("It's a prompt")


def test_what_was_measured_in_a_dtype_runs_in_it() -> None:
    words = next_step.command(Options(hf_dir="own", dtype="bfloat16"), None, "a")
    assert words == "elastic-lm generate --model own --dtype bfloat16 --prompt a"
    with pytest.raises(ValueError, match="dtype='int8': must be one of float32"):
        Options(dtype="int8")


def test_every_target_gets_the_fastest_setting_that_keeps_it() -> None:
    found = result(
        row("lookup", 1.0, 1.1),
        row("exits", 0.9, 1.6),
        row("exits", 0.95, 1.5, agreement=0.944),  # more disagreements than a tenth above what is allowed
        row("exits", 0.98, 1.4, degenerate="its text loops"),
        row("preview", 0.99, 1.2, agreement=0.9891),
        row("preview", 0.995, 1.01),
    )
    speeds = [getattr(found.fastest(t), "speedup", 1.0) for t in (0.9, 0.95, 0.98, 0.99, 0.995, 1.0)]
    assert speeds == [1.6, 1.2, 1.2, 1.2, 1.1, 1.1]
    assert result(row("preview", 0.995, 1.01)).fastest(0.9) is None  # within what timing varies
    assert [r.name for r in found.targets if r.refused] == ["exits at 95 %", "exits at 98 %"]


def test_the_report_says_what_bytes_predict_and_what_was_refused(tmp_path: pathlib.Path) -> None:
    found = result(row("exits", 0.9, 1.6, degenerate="its text loops"), row("lookup", 1.0, 1.1))
    report.save(found, Options(targets=(0.9, 0.99)), tmp_path / "report.json", "elastic-lm generate")
    numbers = json.loads((tmp_path / "report.json").read_text())
    assert numbers["refused"] == {"exits at 90 %": "its text loops"}
    assert numbers["recommended"]["command"] == "elastic-lm generate"
    assert {name: found["dial"] for name, found in numbers["recommended_by_target"].items()} == {
        "0.9": "lookup",
        "0.99": "lookup",
    }
    assert [r["predicted"] for r in numbers["targets"]] == [1.0, 1.0]


@pytest.mark.parametrize(
    ("texts", "prompt"),
    [
        (["\n = Title = \nThe tower was built in 1901 .\n"], "The tower was built in 1901 ."),
        (["\n \n", "- one\n"], "one"),
        (["a " * 40], " ".join("a" * 12)),
        (["It's a long line of text\n", "a line without\n"], "a line without"),
        (["It's"], "It's"),
    ],
)
def test_the_prompt_is_a_line_of_the_text(texts: list[str], prompt: str) -> None:
    assert next_step.short_prompt(texts) == prompt
    words = shlex.split(next_step.command(Options(hf_dir="own", data=("x",)), None, prompt))
    assert main_parser(words[1:]).prompt == [prompt]


def main_parser(words: list[str]) -> argparse.Namespace:
    return cli.build_parsers()[0].parse_args(words)


@pytest.mark.long
def test_a_model_of_ones_own_with_every_dial_ends_in_time_and_shows_progress(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = tmp_path / "book.txt"
    text.write_text("".join(f"line {i % 90} of the text, and again line {i % 90}\n" for i in range(8000)))
    tokenizer = train_bpe([text.read_text()], 300)
    config = tiny_config(n_layers=3, vocab_size=300, max_len=256, tied=True)
    hf.export(config, random_params(config), tmp_path / "own", tokenizer)
    monkeypatch.setattr(progress, "EVERY", 0.05)
    # As if everything paid: on a model of this size nothing does.
    forced = property(lambda row: "preview" if row.target > 0.95 else "exits")
    monkeypatch.setattr(planning.Forecasts, "best", forced)
    monkeypatch.setattr(planning.Plan, "paying_exits", property(lambda plan: (plan.targets[0].exit_layer,)))
    monkeypatch.setattr(quickstart_run, "lookup_pays", lambda plan: plan is not None)
    out = tmp_path / "out"
    given = ["--hf-dir", str(tmp_path / "own"), "--data", str(text), "--out", str(out), "--minutes", "2"]
    assert cli.main(["quickstart", "--tiny", *given]) == 0

    numbers = json.loads((out / "report.json").read_text())
    assert [r["dial"] for r in numbers["targets"]] == ["lookup", "exits", "preview"]
    assert [r["target_agreement"] for r in numbers["targets"]] == [1.0, 0.9, 0.99]
    assert numbers["targets"][0]["generated_agreement"] == 1.0
    for target, found in numbers["recommended_by_target"].items():
        faster = [r["speedup"] for r in numbers["targets"] if r["target_agreement"] >= float(target)]
        assert 1 <= found["speedup"] <= max(1.0, *faster)
    assert "timing in turns" in capsys.readouterr().out
    words = shlex.split(numbers["recommended"]["command"])
    assert words[words.index("--prompt") + 1] in text.read_text()
    assert cli.main([*words[1:], "--max-new-tokens", "4"]) == 0


def test_a_crash_leaves_the_old_report(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    numbers, page = tmp_path / "report.json", tmp_path / "text.html"
    for file in (numbers, page):
        file.write_text("of the run before")

    def killed(self: pathlib.Path, target: pathlib.Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(pathlib.Path, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        report.save(Report(1.0, 4, 1.0, [], {}, {}), Options(), numbers)
    with pytest.raises(KeyboardInterrupt):
        report.save_texts(train_bpe(["some text"], 260), [], {}, result(), [4], page)
    assert {file.read_text() for file in (numbers, page)} == {"of the run before"}


def test_spread_is_half_of_the_middle_half_of_the_rounds() -> None:
    full = measure.Generation([], [2.0, 2.0, 2.0, 2.0, 2.0])
    other = measure.Generation([], [1.0, 2.0, 0.5, 1.0, 4.0])  # 2, 1, 4, 2 and 0.5 times as fast
    assert other.speedup(full) == 2.0
    assert other.spread(full) == pytest.approx(0.5)
    assert measure.Generation([], [1.0, 2.0]).spread(measure.Generation([], [2.0, 2.0])) == 0.0


def test_text_is_cut_into_disjoint_parts(tmp_path: pathlib.Path) -> None:
    lines = [f"line {i} of the text\n" for i in range(4000)]
    (tmp_path / "book.txt").write_text("".join(lines))
    files = split_text([str(tmp_path / "book.txt")], tmp_path / "parts")
    parts = {name: file.read_text().splitlines(keepends=True) for name, file in files.items()}
    assert sorted(line for part in parts.values() for line in part) == sorted(lines)
    assert 0.85 < len(parts["train"]) / len(lines) < 0.95
    assert min(len(parts["calibration"]), len(parts["test"])) > 100
    (tmp_path / "short.txt").write_text("too little\n")
    with pytest.raises(ValueError, match=r"short\.txt: 1 pieces of text are too few"):
        split_text([str(tmp_path / "short.txt")], tmp_path / "parts")


def test_half_written_text_is_not_used(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "book.txt").write_text("".join(f"line {i} of the text\n" for i in range(4000)))

    def die(path: pathlib.Path, target: pathlib.Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(pathlib.Path, "replace", die)
        with pytest.raises(KeyboardInterrupt):
            split_text([str(tmp_path / "book.txt")], tmp_path / "parts")
    files = split_text([str(tmp_path / "book.txt")], tmp_path / "parts")
    assert files["train"].stat().st_size > 10_000


def test_what_the_model_cannot_do_is_refused_before_anything_is_trained(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train, "fit", lambda *_: pytest.fail("trained"))
    with pytest.raises(ValueError, match="exits lie between 1 and 3"):
        run(Options(out=str(tmp_path), from_scratch=True, exits=(99,)).shrunk())
    (tmp_path / "book.txt").write_text("".join(f"line {i} of the text\n" for i in range(4000)))
    few = Options(out=str(tmp_path), data=(str(tmp_path / "book.txt"),), prompts=1000)
    with pytest.raises(ValueError, match="pieces of 48 tokens, 1000 are needed"):
        run(few)


def test_exit_layers() -> None:
    assert exit_layers(Options(), 12) == (9,)
    assert [exit_layers(Options(), n) for n in (2, 3, 5)] == [(1,), (2,), (3,)]
    assert exit_layers(Options(exits=(2, 5)), 6) == (2, 5)
    with pytest.raises(ValueError, match="exits lie between 1 and 11"):
        exit_layers(Options(exits=(12,)), 12)


def test_exits_that_are_there_already() -> None:
    model = tiny_config(exits=(3,))
    check_exits(Options(exits=(2,)), model)
    with pytest.raises(ValueError, match="exits lie between 1 and 3"):
        check_exits(Options(exits=(4,)), model)
    with pytest.raises(ValueError, match=r"x has exits after layers \(3,\)") as caught:
        check_exits(Options(hf_dir="x"), model)
    for fix in (
        "export --from x --to DIR --without-exits",
        "calibrate --model x",
        "other layers with --exits",
    ):
        assert fix in str(caught.value)


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"metric": "foo"}, "metric='foo': must be one of"),
        ({"kind": "foo"}, "exit.kind='foo': must be one of"),
        ({"exits": (0,)}, "layers are counted from 1"),
        ({"exits": (3, 3)}, "name every layer once"),
        ({"from_scratch": True, "hf_dir": "x"}, "give one of them"),
    ],
)
def test_choices_are_checked_at_once(choices: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Options(**choices)


def test_rows_and_texts_fit_the_model() -> None:
    fitted = Options().fitted(64)
    assert (fitted.seq_len, fitted.prompt_tokens, fitted.new_tokens) == (64, 21, 43)
    assert Options().fitted(1024) == Options()
    with pytest.raises(ValueError, match="max_len=8 is too short"):
        Options().fitted(8)
