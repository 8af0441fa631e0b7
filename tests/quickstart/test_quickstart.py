"""The main job on the tiny setting, and how the user's own text is divided."""

import json
import pathlib

import pytest

from elastic_lm.cli import main as cli
from elastic_lm.data.splitting import split_text
from elastic_lm.data.tokenizer import train_bpe
from elastic_lm.quickstart import report, train
from elastic_lm.quickstart.options import Options
from elastic_lm.quickstart.report import Report, Target
from elastic_lm.quickstart.run import _next_command, run
from elastic_lm.quickstart.train import check_exits, exit_layers
from elastic_lm.testing import tiny_config


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
    assert {"config", "hardware", "versions"} <= set(numbers)
    assert (out / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert "4 layers" in (out / "text.html").read_text()
    printed = capsys.readouterr().out
    assert "speed-up" in printed
    assert "\x1b[38;2;" in printed
    shown = ["--model", f"{out}/model", "--thresholds", f"{out}/thresholds.json", "--prompt", "def"]
    assert cli.main(["generate", *shown, "--max-new-tokens", "4"]) == 0


@pytest.mark.parametrize(
    ("speedups", "dial", "command"),
    [
        ((), "exits", "--model own "),
        ((0.9, 0.8), "exits", "--model own "),
        ((1.2, 0.9), "exits", "--model out/model --thresholds out/thresholds.json "),
        ((1.3, 1.1), "preview", "--model own --preview out/preview_99.safetensors "),
    ],
)
def test_what_comes_next_is_what_is_recommended(speedups: tuple[float, ...], dial: str, command: str) -> None:
    rows = [
        Target(
            target_agreement=target,
            agreement=target,
            mean_layers=3.0,
            tokens_per_s=1.0,
            speedup=speedup,
            generated_agreement=1.0,
            thresholds=(0.5,),
            dial=dial,
        )
        for target, speedup in zip((0.9, 0.99), speedups, strict=False)
    ]
    result = Report(1.0, 4, 1.0, rows, {}, {}, None)
    options = Options(out="out", hf_dir="own", data=("text.txt",))
    assert _next_command(options, result).startswith(f"elastic-lm generate {command}--prompt")


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
        report.save_texts(train_bpe(["some text"], 260), [], {}, [4], 4, page)
    assert {file.read_text() for file in (numbers, page)} == {"of the run before"}


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
    whole = pathlib.Path.write_bytes

    def die(path: pathlib.Path, content: bytes) -> None:
        whole(path, content[:100])
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(pathlib.Path, "write_bytes", die)
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
