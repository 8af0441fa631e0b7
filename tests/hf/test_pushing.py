"""Models on the Hub: loaded by name, and pushed with a card, against a Hub on loopback."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest

import elastic_lm as el
from elastic_lm.checkpoints.native import save_model
from elastic_lm.cli.main import main
from elastic_lm.depth.policies import CalibrationPoint
from elastic_lm.files.checksums import check_files, write_checksums
from elastic_lm.files.fingerprints import weights_fingerprint
from elastic_lm.hf.model_card import MARK
from elastic_lm.testing import random_params, tiny_config
from tests import hub_server

CONFIG = dataclasses.replace(tiny_config(exits=(2,)), vocab_size=300)
RUN = {
    "train": {"init_from": "acme/base", "lr": 0.001, "optimizer": "adamw"},
    "method": {"name": "ee_tuning", "weights": [1.0], "warmup_steps": 0, "table": "/home/me/secret/t.json"},
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
    (folder / "run" / "inputs.json").write_text(json.dumps({"from_hub": True}))
    points = [CalibrationPoint(0.95, (0.5,), 0.9612, 3.25, (0.375, 0.625))]
    data = {"description": "/home/me/secret/held_out.txt", "scoring_tokens": 512}
    shape = {field: getattr(CONFIG, field) for field in ("n_layers", "d_model", "vocab_size")}
    model = {"path": "/home/me/secret/run/model", "weights": weights_fingerprint(params), **shape}
    origin = {"model": model, "data": data, "date": "2026-11-30T12:00:00", "guarantee": "none: an average"}
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
    assert not any(b"secret" in content for content in files.values())
    assert json.loads(files["thresholds.json"])["provenance"]["model"]["path"] == "model"
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
    assert "| method | ee_tuning (weights=[1.0], table=t.json) |" in card
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


def changed(file: Path, target: Path, **model) -> Path:
    """Thresholds that were fitted on another model."""
    content = json.loads(file.read_text())
    content["provenance"]["model"] |= model
    target.write_text(json.dumps(content))
    return target


@pytest.mark.parametrize(
    ("model", "why"), [({"weights": "0" * 16}, "fitted on other weights"), ({"d_model": 8}, "with d_model=8")]
)
def test_thresholds_of_another_model_are_not_pushed(model, why, models, tmp_path):
    shutil.copytree(models / "hf", tmp_path / "hf")
    other = changed(models / "run" / "thresholds.json", tmp_path / "thresholds.json", **model)
    with pytest.warns(UserWarning, match=f"is left out, as its thresholds are another model's: .*{why}"):
        card = el.hf.push(tmp_path / "hf", "acme/new", dry_run=True)
    assert "What the exits give was not measured" in card
    with pytest.raises(ValueError, match=f"are thresholds of another model: .*{why}.*; calibrate this model"):
        el.hf.push(tmp_path / "hf", "acme/new", thresholds=other, dry_run=True)


def test_another_run_beside_and_local_bases_are_not_named(models, tmp_path, capsys):
    shutil.copytree(models / "hf", tmp_path / "hf")
    (tmp_path / "run.json").write_text(json.dumps(RUN))
    assert "ee_tuning" not in el.hf.push(tmp_path / "hf", "acme/new", dry_run=True)

    # What was a folder of the machine that trained is no name on the Hub, though it looks like one.
    card = el.hf.push(tmp_path / "hf", "acme/new", run=tmp_path, dry_run=True)
    assert "| base model | base |" in card
    assert "base_model" not in card

    # A README.md of the user is the card, also where a checkpoint is exported.
    shutil.copytree(models / "run" / "model", tmp_path / "model")
    (tmp_path / "model" / "README.md").write_text("# MY OWN CARD")
    assert main(["push", "--model", str(tmp_path / "model"), "--to", "acme/new", "--dry-run"]) == 0
    assert capsys.readouterr().out.strip() == "# MY OWN CARD"


def test_only_files_of_an_earlier_push_are_deleted(hub, models, tmp_path):
    theirs = {
        "adapters/x/adapter_model.safetensors": b"a",
        "onnx/model.safetensors": b"b",
        "notes.json": b"{}",
    }
    stale = {"model-00001-of-00002.safetensors": b"c", "params/d/1": b"d"}
    hub.add("acme/ours", theirs | stale | {"README.md": MARK.encode()})
    hub.add("acme/others", theirs | stale | {"README.md": b"# Mine"})
    folder = tmp_path / "hf"
    shutil.copytree(models / "hf", folder)
    config = json.loads((folder / "config.json").read_text()) | {"_name_or_path": "/home/me/secret/base"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "checksums.json").unlink(missing_ok=True)
    write_checksums(folder)

    env = hub_server.environment(hub, tmp_path)
    calls = [json.dumps((str(folder), name, {})) for name in ("acme/ours", "acme/others")]
    done = hub_server.python(PUSHES, env, *calls)
    assert done.stdout.count(hub.url) == 2, done.stdout + done.stderr
    ours, others = (hub.repos[name]["main"] for name in ("acme/ours", "acme/others"))
    assert theirs.items() <= ours.items()
    assert not stale.keys() & ours.keys()
    assert "of an earlier push leave model-00001-of-00002.safetensors, params/d/1" in done.stderr
    assert (theirs | stale).items() <= others.items()

    # Without the folder of the machine, and with checksums of what was sent.
    assert json.loads(ours["config.json"])["_name_or_path"] == "base"
    assert not any(b"secret" in content for content in ours.values())
    for name, content in ours.items():
        (tmp_path / "came" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "came" / name).write_bytes(content)
    check_files(tmp_path / "came")


def test_a_license_is_asked_of_the_base_model(hub, models, tmp_path):
    env = hub_server.environment(hub, tmp_path)
    call = (str(models / "run" / "model"), "acme/licensed", {})
    done = hub_server.python(PUSHES, env, json.dumps(call))
    assert done.stdout.startswith(hub.url), done.stdout + done.stderr
    files = hub.repos["acme/licensed"]["main"]
    assert 'license: "mit"' in files["README.md"].decode()
    assert "elastic_config.json" in files
