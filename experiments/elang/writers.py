"""Translation in the study: two new encoder-decoder models, the smaller one distilled from the larger.

The quality of a translation is its sentence's chrF (Popovic 2015, by sacrebleu), in [0, 1].
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import sacrebleu
from study import Columns, answered, settled

import elastic_lm as el
from elastic_lm.train.run import MODEL_FOLDER

RECIPE = Path(__file__).parents[2] / "configs" / "translation.py"
STEPS = 500
MOST = 48  # tokens of a translation
FILES = {"fit": "multi30k_val", "test": "multi30k_test_2016_flickr"}


def measured(data: Path, out: Path, seed: int) -> dict[str, Columns]:
    """Trains what is missing and translates with both models; {"separate": columns}."""
    folder = out / "translation" / f"seed_{seed}"

    def separate() -> Columns:
        super_ = trained(data, folder, seed, "super")
        taught = {"teacher_from": super_, "distil": 0.5}
        swift = trained(data, folder, seed, "swift", tokenizer=super_, **taught)
        return columns(data, swift, super_, seed)

    return {"separate": settled(folder / "separate.json", separate)}


def trained(data: Path, folder: Path, seed: int, size: str, *, tokenizer: str = "", **taught: Any) -> str:
    """Folder of a finished model; `taught` are options of distillation."""
    model = folder / size / MODEL_FOLDER
    if not model.is_dir():
        run = el.train.load_config(f"{RECIPE}:{data},{size}")
        assert isinstance(run, el.TaskRun)
        own: dict[str, Any] = {
            "task": {"seed": seed, "tokenizer": tokenizer},
            "method": taught,
            "train": {"steps": STEPS, "seed": seed, "eval_every": 0, "keep": 1},
        }
        sections = {name: dataclasses.replace(getattr(run, name), **new) for name, new in own.items()}
        el.train.fit(dataclasses.replace(run, **sections), folder / size)
    return str(model)


def columns(data: Path, swift: str, super_: str, seed: int) -> Columns:
    """Scores, chrF and costs of the rows that choose thresholds and of the test rows."""
    answerers = {"swift": answerer(swift), "super": answerer(super_)}
    rows = {
        split: [json.loads(line) for line in (data / f"{name}.jsonl").read_text().splitlines()]
        for split, name in FILES.items()
    }
    return answered(answerers, rows, lambda row, text: chrf(text, row["de"]), seed)


def answerer(folder: str) -> el.cascade.TextAnswerer:
    """A model that translates the English of rows."""
    model, params = el.load(folder)
    assert isinstance(model, el.EncoderDecoder)
    texts = el.TextToText(model, params, el.Tokenizer.load(folder))
    return el.cascade.TextAnswerer(texts, MOST, template="{en}", batch_size=128)


def chrf(text: str, reference: str) -> float:
    """chrF of a translation, in [0, 1]."""
    return sacrebleu.sentence_chrf(text, [reference]).score / 100
