"""Models on the Hub: loaded by name, and pushed with a card, against a Hub on loopback."""

import dataclasses
import json
from pathlib import Path

import pytest

import elastic_lm as el
from elastic_lm.checkpoints.native import save_model
from elastic_lm.cli.main import main
from elastic_lm.depth.policies import CalibrationPoint
from elastic_lm.hf.model_card import MARK
from elastic_lm.testing import random_params, tiny_config
from tests import hub_server

CONFIG = dataclasses.replace(tiny_config(exits=(2,)), vocab_size=300)
RUN = {
    "train": {"init_from": "acme/base", "lr": 0.001, "optimizer": "adamw"},
    "method": {"name": "ee_tuning", "weights": [1.0], "warmup_steps": 0},
    "data": {"source": "text", "paths": ["/home/me/secret/train.txt"], "seq_len": 64, "batch_size": 2},
}
LOADS = """
import sys
import elastic_lm as el
model, params = el.load(sys.argv[1])
tokenizer = el.Tokenizer.load(sys.argv[1])
here, own = el.load(sys.argv[2])
assert model.config == here.config
el.testing.assert_same_tree(params, own)
assert tokenizer.encode("a film") == el.Tokenizer.load(sys.argv[2]).encode("a film")
"""
PUSHES = """
import json, sys
import elastic_lm as el
for line in sys.argv[1:]:
    folder, name, how = json.loads(line)
    try:
        print(el.hf.push(folder, name, **how))
    except Exception as error:
        print(f"{type(error).__name__}: {error}")
"""


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """A folder with a run, its checkpoint with thresholds, and the Hugging Face folder of it."""
    folder = tmp_path_factory.mktemp("models")
    tokenizer = el.data.train_bpe(["a good film", "a bad film"], 270)
    params = random_params(CONFIG)
    (folder / "run").mkdir()
    save_model(folder / "run" / "model", CONFIG, params, tokenizer)
    (folder / "run" / "run.json").write_text(json.dumps(RUN))
    points = [CalibrationPoint(0.95, (0.5,), 0.9612, 3.25, (0.375, 0.625))]
    data = {"description": "/home/me/secret/held_out.txt", "scoring_tokens": 512}
    origin = {"data": data, "date": "2026-11-30T12:00:00", "guarantee": "none: an average"}
    policy = el.ConfidenceExit("margin", (0.5,), (2,), 0.95, tuple(points), provenance=origin)
    policy.save(folder / "run" / "thresholds.json")
    el.hf.export(CONFIG, params, folder / "hf", tokenizer)
    el.hf.export(CONFIG, params, folder / "shards", tokenizer, max_shard_bytes=20_000)
    return folder


@pytest.fixture(scope="module")
def hub(models):
    with hub_server.running() as hub:
        hub.add("acme/exported", hub_server.files_of(models / "hf"))
        hub.add("acme/native", hub_server.files_of(models / "run" / "model"))
        hub.add("acme/base", {"README.md": b"---\nlicense: mit\n---\n"})
        hub.add("acme/carded", {"README.md": b"# My own card\n"})
        yield hub


@pytest.mark.parametrize("kind", ["exported", "native"])
def test_models_load_by_name(kind, hub, models, tmp_path):
    folder = models / "hf" if kind == "exported" else models / "run" / "model"
    env = hub_server.environment(hub, tmp_path)
    done = hub_server.python(LOADS, env, f"acme/{kind}", str(folder))
    assert done.returncode == 0, done.stderr


def test_pushed_models_have_a_card_and_come_back(hub, models, tmp_path):
    env = hub_server.environment(hub, tmp_path, HF_TOKEN="hf_mine")
    shards, whole = str(models / "shards"), str(models / "hf")
    run = {"run": str(models / "run"), "private": True}
    calls = [
        (shards, "acme/new", run),
        (whole, "acme/new", run | {"license": "apache-2.0"}),
        (whole, "acme/new", {"revision": "draft", "token": "hf_other"}),
        (whole, "acme/carded", {}),
        (whole, "acme/gated", {}),
        (whole, "acme/away", {}),
        (whole, "new", {}),
        (str(models), "acme/new", {}),
    ]
    hub.tokens.clear()
    done = hub_server.python(PUSHES, env, *(json.dumps(call) for call in calls))
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == len(calls), done.stdout
    assert [line.startswith(f"{hub.url}/acme/") for line in lines] == [True] * 4 + [False] * 4
    assert hub.tokens == {"hf_mine", "hf_other"}
    assert hub.private["acme/new"]

    # The second push replaced the shards of the first, and a card of our own.
    files = hub.repos["acme/new"]["main"]
    due = hub_server.files_of(models / "hf")
    assert {name: files[name] for name in due} == due
    assert files.keys() - due.keys() == {".gitattributes", "README.md", "thresholds.json"}
    assert "draft" in hub.repos["acme/new"]
    card = files["README.md"].decode()
    assert 'license: "apache-2.0"' in card
    assert MARK in card

    # What others wrote stays, with a warning.
    assert hub.repos["acme/carded"]["main"]["README.md"] == b"# My own card\n"
    assert "its README.md on the Hub was not written by elastic_lm" in done.stderr

    assert lines[4].startswith("PermissionError: acme/gated: http")
    assert "of a user who may write there" in lines[4]
    assert lines[5].startswith("OSError: acme/away: ")
    assert "fails with 503; try again later" in lines[5]
    assert lines[6] == "ValueError: name='new': must be ORG/NAME, as the Hub names models"
    assert lines[7].startswith(f"FileNotFoundError: {models}: holds no model to push")


def test_the_card_says_what_is_known_and_no_path_of_the_machine(models, capsys):
    command = ["push", "--model", str(models / "run" / "model"), "--to", "acme/new", "--dry-run"]
    assert main(command) == 0
    card = capsys.readouterr().out
    assert 'tags: ["elastic-lm", "early-exit"]\nbase_model: "acme/base"\nlibrary_name: "transformers"' in card
    assert "leave it after 2 of its 4 layers" in card
    assert "| base model | [acme/base](https://huggingface.co/acme/base) |" in card
    assert "| method | ee_tuning (weights=[1.0]) |" in card
    assert "| data | text: train.txt |" in card
    assert "Measured on 512 held-out tokens (held_out.txt), 2026-11-30:" in card
    assert "| target | equal to full depth | mean layers | leave after 2 | leave after 4 |" in card
    assert "| 0.95 | 0.9612 | 3.25 | 37.5% | 62.5% |" in card
    assert 'el.load("acme/new")' in card
    assert 'AutoModelForCausalLM.from_pretrained("acme/new")' in card
    assert "--thresholds thresholds.json" in card
    assert "secret" not in card

    # Without a run and thresholds it says so.
    bare = el.hf.push(models / "hf", "acme/new", dry_run=True)
    assert "What the exits give was not measured" in bare
    assert "base_model" not in bare


def test_a_license_is_asked_of_the_base_model(hub, models, tmp_path):
    env = hub_server.environment(hub, tmp_path)
    call = (str(models / "run" / "model"), "acme/licensed", {})
    done = hub_server.python(PUSHES, env, json.dumps(call))
    assert done.stdout.startswith(hub.url), done.stdout + done.stderr
    files = hub.repos["acme/licensed"]["main"]
    assert 'license: "mit"' in files["README.md"].decode()
    assert "elastic_config.json" in files
