"""`elastic-lm plan`, and what it says to too little text."""

import json
import pathlib

import jax
import pytest

from elastic_lm import testing
from elastic_lm.checkpoints import native as checkpoint
from elastic_lm.cli import main as cli
from elastic_lm.data.stdlib import stdlib_files
from elastic_lm.data.tokenizer import train_bpe
from elastic_lm.models.registry import init_params


@pytest.fixture(scope="module")
def text() -> str:
    """One long line."""
    return " ".join(path.read_text() for path in stdlib_files("test")[:6]).replace("\n", " ")[:60_000]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, text: str) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("model")
    config = testing.tiny_config(n_layers=3, vocab_size=300)
    tokenizer = train_bpe([text], 300)
    checkpoint.save_model(folder, config, init_params(config, jax.random.key(0)), tokenizer)
    return folder


@pytest.mark.long
def test_one_long_line_is_planned_for(
    model: pathlib.Path, text: str, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text.txt").write_text(text)
    out = tmp_path / "plan.json"
    flags = ["--model", str(model), "--data", str(tmp_path / "text.txt"), "--json", str(out)]
    assert cli.main(["plan", *flags, "--batch-size", "2", "--targets", "0.5,0.9", "--window", "4"]) == 0
    printed = capsys.readouterr()
    plan = json.loads(out.read_text())
    assert (plan["batch_size"], plan["dtype"]) == (2, "float32")
    assert plan["verdict"] in printed.out
    names = {c["name"] for c in plan["configurations"]}
    assert {"preview", "exits", "exits + preview", "lossless lookup", "lossless exits"} <= names
    assert all(c["speedup"] > 0 for c in plan["configurations"])
    assert "fitting previews" in printed.err


def test_too_little_text(
    model: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "text.txt"
    file.write_text("too short\n" * 20)
    assert cli.main(["plan", "--model", str(model), "--data", str(file)]) == 2
    error = capsys.readouterr().err
    assert f"--data {file}: " in error
    assert "4096 are needed" in error
