"""Translation in the study: two new encoder-decoder models, the smaller one distilled from the larger.

The quality of a translation is its sentence's chrF (Popovic 2015, by sacrebleu), in [0, 1].
"""

import json
import runpy
from pathlib import Path
from typing import Any

import sacrebleu
from study import Columns, answered, settled

from elastic_lm.cascade.text_answerer import TextAnswerer
from elastic_lm.checkpoints.loading import load
from elastic_lm.config.parse import from_dict
from elastic_lm.data.tokenizer import Tokenizer
from elastic_lm.decode.seq2seq import TextToText
from elastic_lm.train.config import TaskRun
from elastic_lm.train.run import MODEL_FOLDER
from elastic_lm.train.tasks.run import fit_task

RECIPE = Path(__file__).parents[2] / "configs" / "translation.py"
STEPS = 500
MOST = 48  # tokens of a translation
FILES = {"fit": "multi30k_val", "test": "multi30k_test_2016_flickr"}


def measured(data: Path, out: Path, seed: int) -> dict[str, Columns]:
    """Trains what is missing and translates with both models; {"separate": columns}."""
    folder = out / "translation" / f"seed_{seed}"

    def separate() -> Columns:
        super_ = trained(data, folder, seed, "super")
        swift = trained(data, folder, seed, "swift", super_, teacher_from=super_, distil=0.5)
        return columns(data, swift, super_, seed)

    return {"separate": settled(folder / "separate.json", separate)}


def trained(data: Path, folder: Path, seed: int, size: str, tokenizer: str = "", **train: Any) -> str:
    """Folder of a finished model."""
    model = folder / size / MODEL_FOLDER
    if not model.is_dir():
        config = runpy.run_path(str(RECIPE))["get_config"](f"{data},{size}").to_dict()
        config["task"] |= {"seed": seed, "tokenizer": tokenizer}
        config["train"] |= {"steps": STEPS, "seed": seed, "eval_every": 0, "keep": 1, **train}
        fit_task(from_dict(TaskRun, config), folder / size)
    return str(model)


def columns(data: Path, swift: str, super_: str, seed: int) -> Columns:
    """Scores, chrF and costs of the rows that choose thresholds and of the test rows."""
    answerers = {"swift": answerer(swift), "super": answerer(super_)}
    rows = {
        split: [json.loads(line) for line in (data / f"{name}.jsonl").read_text().splitlines()]
        for split, name in FILES.items()
    }
    return answered(answerers, rows, lambda row, text: chrf(text, row["de"]), seed)


def answerer(folder: str) -> TextAnswerer:
    """A model that translates the English of rows."""
    model, params = load(folder)
    return TextAnswerer(
        TextToText(model, params, Tokenizer.load(folder)), MOST, template="{en}", batch_size=128
    )


def chrf(text: str, reference: str) -> float:
    """chrF of a translation, in [0, 1]."""
    return sacrebleu.sentence_chrf(text, [reference]).score / 100
