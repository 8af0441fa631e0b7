"""The studies of experiments/all_dials run from end to end on a tiny model, stop, and go on."""

import gzip
import json
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import elastic_lm as el
from elastic_lm.checkpoints.native import save_model
from elastic_lm.data import train_bpe

FOLDER = Path(__file__).parents[1] / "experiments" / "all_dials"
Study = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, instructions, and evaluation sets of a few rows."""
    folder = tmp_path_factory.mktemp("studies")
    tokenizer = train_bpe(["Question: is the sky blue? Answer: yes, 42 times. The end."], 280)
    config = el.testing.tiny_config(vocab_size=280, max_len=256)
    save_model(folder / "model", config, el.testing.random_params(config), tokenizer)

    for split in ("train", "held_out"):
        rows = [
            {"prompt": f"Question {i}: why? ", "response": f"Because {i} of 7 skies are."} for i in range(24)
        ]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"instructions_{split}.jsonl").write_text(lines)
    question = {"query": "The sky is", "choices": ["blue", "a cheese"], "gold": 0}
    boolq = {"passage": "The sky.", "question": "is it blue", "label": True}
    trivia = {"question": "Who?", "answers": ["A man"]}
    names = dict.fromkeys(("arc_easy_val", "piqa_val", "hellaswag_val_1k"), question)
    names |= {"superglue_boolq_val_orig": boolq, "triviaqa_dpr_dev": trivia, "triviaqa_dpr_test": trivia}
    for name, row in names.items():
        data = (json.dumps(row) + "\n").encode() * 12
        (folder / f"{name}.jsonl.gz").write_bytes(gzip.compress(data))
    return folder


@pytest.fixture
def run(places: Path, monkeypatch: pytest.MonkeyPatch) -> Study:
    """Runs a study; gives what its results file holds."""

    def study(name: str, *flags: str) -> dict[str, Any]:
        monkeypatch.syspath_prepend(str(FOLDER))
        given = [f"--{where}={places}" for where in ("data", "eval")]
        given += [f"--model={places / 'model'}", f"--out={places / 'out'}", "--tiny"]
        monkeypatch.setattr(sys, "argv", [name, *given, *flags])
        runpy.run_path(str(FOLDER / f"{name}.py"), run_name="__main__")
        return json.loads((places / "out" / f"{name}.json").read_text())

    return study


@pytest.mark.long
def test_methods_stop_and_go_on(run: Study, places: Path) -> None:
    flags = ("--seeds=0", f"--trivia={places}", "--arms", "soft", "elastic")
    first = run("methods", *flags, "--parts", "forward", "train")["cells"]
    with pytest.raises(FileExistsError, match="--resume"):
        run("methods", *flags)

    whole = run("methods", *flags, "--resume")["cells"]
    assert {name: whole[name] for name in first} == first  # nothing is measured twice
    depths = whole["forward/exits copied"]["value"]["depths"]
    assert depths[-1]["agreement"] == 1.0  # full depth is the reference
    assert whole["train/soft/0"]["value"]["training"]["tokens"] > 0
    assert whole["time"]["value"]["full depth"]["relative"] == 1.0
    assert (places / "out" / "methods.png").is_file()


@pytest.mark.long
def test_cascades_cost_what_was_run(run: Study) -> None:
    content = run("cascades")
    rows = [row for name, cell in content["cells"].items() if "half" not in name for row in cell["value"]]
    assert len(rows) == 4 * 8
    for row in rows:
        (swift,) = row["swift"].values()
        # The exit and the rest read the vocabulary head twice; the Super alone reads it once.
        assert row["super"]["rest"] < row["super"]["cost"] < row["super"]["rest"] + swift["cost"]
    assert {one["score"] for one in content["summary"]} >= {"energy", "max_prob", "random"}


@pytest.mark.long
def test_kinds_and_batches(run: Study) -> None:
    kinds = run("kinds")["cells"]["0.9"]["value"]
    *each, total = kinds
    assert sum(one["tokens"] for one in each) == total["tokens"]
    assert run("batches")["cells"]["2"]["value"]["full depth"]["speed"] == 1.0
