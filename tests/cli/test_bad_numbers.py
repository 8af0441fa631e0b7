"""Damaged weights, foreign tokenizers, absurd sizes and deep JSON: one line each, and nothing is written."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from elastic_lm import hf, testing
from elastic_lm.checkpoints import native
from elastic_lm.cli import main as cli
from elastic_lm.data.tokenizer import Tokenizer, train_bpe
from elastic_lm.depth.policies import ConfidenceExit
from elastic_lm.files import checksums

DEEP = "[" * 200_000
TEXT = "def f(x):\n    return x + 1\n" * 60
WORDS = "".join(f"word{i} and{i * i} " for i in range(400))  # enough for as many ids as are asked for
TENSOR = "model.layers.1.mlp.up_proj.weight"
BAD = {"nan": np.nan, "infinity": np.inf}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder `hf`, an elastic checkpoint `ck`, and text."""
    base = tmp_path_factory.mktemp("limits")
    config = testing.tiny_config(exits=(1,), n_layers=2, vocab_size=300)
    tokenizer = train_bpe([WORDS], 300)
    params = testing.random_params(config)
    hf.export(config, params, base / "hf", tokenizer)
    native.save_model(base / "ck", config, params, tokenizer)
    (base / "d.txt").write_text(TEXT)
    return base


@pytest.fixture
def model(folder: Path, tmp_path: Path) -> Path:
    """A copy of the Hugging Face folder to damage, by somebody who left no checksums."""
    return unchecked(shutil.copytree(folder / "hf", tmp_path / "hf"))


def unchecked(model: Path) -> Path:
    (model / checksums.FILE).unlink()
    return model


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one line of a refusal."""
    status = cli.main([str(a) for a in arguments])
    lines = [line for line in capsys.readouterr().err.splitlines() if line]
    assert status == 2, lines
    assert "Traceback" not in "".join(lines)
    assert lines[-1].startswith("elastic-lm")
    return lines[-1]


def edit(path: Path, **values: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def commands(model: Path, folder: Path, out: Path) -> dict[str, list[object]]:
    held_out = ["--data", folder / "d.txt", "--seq-len", 32, "--tokens", 64]
    return {
        "generate": ["--model", model, "--prompt", "def f", "--max-new-tokens", 2],
        "evaluate": ["--model", model, *held_out],
        "calibrate": ["--model", model, *held_out, "--out", out / "t.json"],
        "preview": ["--model", model, *held_out, "--out", out / "p.safetensors"],
        "convert": ["--from", model, "--to", out / "converted"],
    }


@pytest.mark.parametrize("command", ["generate", "evaluate", "calibrate", "preview", "convert"])
@pytest.mark.parametrize("kind", BAD)
def test_damaged_weights(folder: Path, model: Path, tmp_path: Path, capsys, command: str, kind: str) -> None:
    weights = load_file(model / "model.safetensors")
    weights[TENSOR][0, 0] = BAD[kind]
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    line = refused(capsys, command, *commands(model, folder, tmp_path)[command])
    assert TENSOR in line
    assert kind in line.lower()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hf"]


@pytest.mark.parametrize("command", ["generate", "evaluate", "calibrate", "preview", "convert"])
def test_the_tokenizer_of_another_model(
    folder: Path, model: Path, tmp_path: Path, capsys, command: str
) -> None:
    train_bpe([WORDS], 600).save(model)
    line = refused(capsys, command, *commands(model, folder, tmp_path)[command])
    assert "300: the tokenizer has 600 ids" in line
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hf"]


def test_added_tokens_above_the_vocabulary_are_refused_only_where_they_occur(
    folder: Path, model: Path, tmp_path: Path, capsys
) -> None:
    tokenizer = Tokenizer.load(model)
    tokenizer.backend.add_special_tokens(["[PAD]"])
    tokenizer.backend.save(str(model / "tokenizer.json"))
    assert cli.main(["convert", "--from", str(model), "--to", str(tmp_path / "converted")]) == 0
    assert "1 added tokens have no row in the model's vocabulary of 300" in capsys.readouterr().err

    loaded = Tokenizer.load(model)
    assert loaded.encode("a[PAD]")[-1] == 300  # no model is known yet
    loaded.check_vocabulary(300)
    assert loaded.encode("def f")
    with pytest.raises(ValueError, match=r"token '\[PAD\]' has id 300, .* 300 rows"):
        loaded.encode("a[PAD]")
    (tmp_path / "d.txt").write_text(TEXT + "[PAD]")
    held_out = ["--data", tmp_path / "d.txt", "--seq-len", 32, "--tokens", 4000]
    assert "'[PAD]' has id 300" in refused(capsys, "evaluate", "--model", model, *held_out)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("num_hidden_layers", 10**6, "num_hidden_layers=1000000: must be at least 1, and at most 4,096"),
        ("num_hidden_layers", 10**12, "num_hidden_layers=1000000000000: must be below 2**31"),
        ("num_hidden_layers", 4000, "number of layers=4000: the weights are"),
        ("vocab_size", 2 * 10**9, "asks for (2000000000, 32)"),
        ("hidden_size", 2**40, "hidden_size=1099511627776: must be below 2**31"),
        ("eos_token_id", 10**12, "eos_token_id=(1000000000000,): must be a token id"),
        ("bos_token_id", 2**31, "bos_token_id=2147483648"),
        ("max_position_embeddings", 10**15, "max_position_embeddings=1000000000000000: must be below 2**31"),
    ],
)
def test_absurd_numbers_in_config_json(model: Path, capsys, key: str, value: int, words: str) -> None:
    for file in ("config.json", "generation_config.json"):
        if (model / file).is_file():
            edit(model / file, **{key: value})
    line = refused(capsys, "generate", "--model", model, "--prompt", "x")
    assert words in line
    assert "config.json" in line


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("n_layers", 10**6, "at most 4,096"),
        ("n_layers", 4000, "model.n_layers=4000: params holds"),
        ("vocab_size", 2 * 10**9, "embed/table=(300, 32): elastic_config.json asks for (2000000000, 32)"),
        ("eos_ids", [10**12], "eos_ids"),
        ("kind", ["decoder"], "kind=['decoder']: must be one of"),
    ],
)
def test_absurd_values_in_elastic_config_json(
    folder: Path, tmp_path: Path, capsys, key, value, words
) -> None:
    model = unchecked(shutil.copytree(folder / "ck", tmp_path / "ck"))
    edit(model / "elastic_config.json", **{key: value})
    assert words in refused(capsys, "generate", "--model", model, "--prompt", "x")


def test_deep_json(folder: Path, model: Path, tmp_path: Path, capsys) -> None:
    deep = tmp_path / "deep.json"
    deep.write_text(DEEP)
    (tmp_path / "deep.jsonl").write_text(DEEP)
    ck, pair = folder / "ck", ["--swift", folder / "ck", "--super", folder / "ck"]
    out = ["--out", tmp_path / "out.jsonl"]
    (tmp_path / "good.jsonl").write_text('{"text": "a"}\n')
    for arguments in (
        ["generate", "--model", ck, "--thresholds", deep, "--prompt", "x"],
        ["generate", "--model", ck, "--prompts-file", tmp_path / "deep.jsonl"],
        ["evaluate", "--model", ck, "--data", tmp_path / "deep.jsonl"],
        ["cascade", "run", *pair, "--rule", deep, "--data", tmp_path / "good.jsonl", *out],
        ["cascade", "run", *pair, "--threshold", 1, "--data", tmp_path / "deep.jsonl", *out],
    ):
        assert "deep.json" in refused(capsys, *arguments)
    shutil.copy(deep, model / "config.json")
    assert "nested more than 100 deep" in refused(capsys, "generate", "--model", model, "--prompt", "x")


@pytest.mark.parametrize("provenance", [None, "text", [1], {"model": "n_layers"}])
def test_provenance_of_another_type(folder: Path, tmp_path: Path, capsys, provenance: object) -> None:
    ConfidenceExit("max_prob", (0.5,), (1,)).save(tmp_path / "t.json")
    edit(tmp_path / "t.json", provenance=provenance)
    arguments = ["--model", folder / "ck", "--thresholds", tmp_path / "t.json", "--prompt", "x"]
    line = refused(capsys, "generate", *arguments)
    assert "t.json" in line
    assert "provenance" in line


def test_a_new_model_that_no_machine_holds(tmp_path: Path, capsys) -> None:
    config = tmp_path / "c.py"
    config.write_text(
        "from ml_collections import ConfigDict\n"
        "def get_config(arg=''):\n"
        "    shape = dict(d_model=64, n_layers=2, n_heads=4, d_mlp=64, vocab_size=512)\n"
        f"    data = dict(source='text', paths=({str(tmp_path / 'd.txt')!r},), seq_len=32, batch_size=2)\n"
        "    return ConfigDict(dict(model=shape, data=data, train=dict(steps=2, warmup=1)))\n"
    )
    (tmp_path / "d.txt").write_text(TEXT)
    for override, words in (
        ("model.vocab_size=2000000000", "model='256,000,"),
        ("model.n_layers=1000000", "n_layers=1000000: must be at least 1, and at most 4,096"),
        (
            "data.batch_size=2000000000",
            "data.batch_size=2000000000: rows of data.seq_len=32 tokens would take",
        ),
        ("data.seq_len=10000000000", "data.seq_len=10000000000: must be at least 1, and below 2**31"),
    ):
        line = refused(
            capsys, "train", "--config", config, f"--config.{override}", "--workdir", tmp_path / "w"
        )
        assert words in line
    assert not (tmp_path / "w").exists()


@pytest.mark.long
def test_a_cascade_whose_every_record_failed_exits_1(folder: Path, tmp_path: Path, capsys) -> None:
    (tmp_path / "in.jsonl").write_text('{"text": [1]}\n{"other": "a"}\n')
    pair = ["--swift", folder / "ck", "--super", folder / "ck"]
    arguments = ["cascade", "run", *pair, "--threshold", 1, "--data", tmp_path / "in.jsonl"]
    arguments = [str(a) for a in [*arguments, "--text-field", "text", "--out", tmp_path / "out.jsonl"]]
    for _ in range(2):  # the second run finds all lines there
        assert cli.main(arguments) == 1
        assert "every one of 2 records failed" in capsys.readouterr().err
