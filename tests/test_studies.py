"""Studies of experiments/all_dials run from end to end on a tiny model, stop, and go on."""

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
    names = {"arc_easy_val": question, "superglue_boolq_val_orig": boolq}
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
def test_cascades_cost_what_was_run(run: Study) -> None:
    first = run("cascades", "--tasks", "arc_easy_val")["cells"]
    with pytest.raises(FileExistsError, match="--resume"):
        run("cascades")

    content = run("cascades", "--tasks", "arc_easy_val", "superglue_boolq_val_orig", "--resume")
    assert {name: content["cells"][name] for name in first} == first  # nothing is answered twice
    rows = [row for name, cell in content["cells"].items() if "half" not in name for row in cell["value"]]
    assert len(rows) == 2 * 8
    for row in rows:
        (swift,) = row["swift"].values()
        # The exit and the rest read the vocabulary head twice; the Super alone reads it once.
        assert row["super"]["rest"] < row["super"]["cost"] < row["super"]["rest"] + swift["cost"]
    assert {one["score"] for one in content["summary"]} >= {"energy", "max_prob", "random"}


@pytest.mark.long
def test_every_token_has_one_kind(run: Study) -> None:
    *each, total = run("kinds")["cells"]["0.9"]["value"]
    assert sum(one["tokens"] for one in each) == total["tokens"]
