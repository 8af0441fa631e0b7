"""Decoder-only models in the study: reviews are continued with their sentiment, of two choices.

The Super is a base model tuned on the reviews. The Swift is either the base's lowest layers, tuned in the
same way, or an exit that was tuned along with its Super, which goes on from the exit's states.
"""

import functools
import json
from pathlib import Path
from typing import Any

from encoders import HELD_BACK, split
from study import Columns, answered, settled

import elastic_lm as el
from elastic_lm.checkpoints.loading import load_decoder
from elastic_lm.train.run import MODEL_FOLDER

STEPS, NESTED_STEPS = 500, 150  # of 8192 tokens
LAYERS = 2
NAME = "sentiment"
HOW: dict[str, Any] = {"separator": "", "batch_size": 128}


def measured(data: Path, out: Path, base: str, seed: int) -> dict[str, Columns]:
    """Trains what is missing and answers all rows.

    Args:
      data: from prepare.py.
      out: folder of the study.
      base: folder of a decoder-only model.
      seed: of the split and the order.

    Returns:
      {"separate", "nested": columns}.
    """
    folder = out / NAME / f"seed_{seed}"
    split(data / f"{NAME}_train.jsonl", folder, seed)
    make = functools.partial(trained, folder, seed)

    def separate() -> dict[str, el.cascade.MultipleChoice]:
        whole = make("super", init_from=base, lr=1e-3)
        small = make("swift", init_from=base, init_layers=LAYERS, lr=2e-3)
        return {"swift": choice(small), "super": choice(whole)}

    def inside() -> dict[str, el.cascade.MultipleChoice]:
        both = make(
            "both",
            exits=(el.ExitConfig(LAYERS, "norm", tied=True),),
            method=el.depth.JointTrainingConfig(),
            init_from=base,
            lr=1e-3,
            steps=NESTED_STEPS,
        )
        return nested(both, LAYERS)

    pairs = {"separate": separate, "nested": inside}
    return {
        how: settled(folder / f"{how}.json", functools.partial(columns, data, folder, models, seed))
        for how, models in pairs.items()
    }


def trained(
    folder: Path,
    seed: int,
    name: str,
    *,
    exits: tuple[el.ExitConfig, ...] = (),
    method: el.train.MethodConfig | None = None,
    **fields: Any,
) -> str:
    """Folder of a finished model; `fields` are options of training."""
    model = folder / name / MODEL_FOLDER
    if not model.is_dir():
        paths = {"paths": (str(folder / "train.jsonl"),), "eval_paths": (str(folder / "fit.jsonl"),)}
        shape: dict[str, Any] = {"seq_len": 256, "batch_size": 32, "packing": "first_fit", "seed": seed}
        steps = fields.setdefault("steps", STEPS)
        fields |= {"warmup": steps // 10, "eval_every": 0, "save_every": 250, "keep": 1}
        run = el.RunConfig(
            exits=exits,
            data=el.DataConfig(source="instruction", **paths, **shape),
            method=method or el.train.PretrainingConfig(),
            train=el.TrainConfig(seed=seed, **fields),
        )
        el.train.fit(run, folder / name)
    return str(model)


def choice(folder: str) -> el.cascade.MultipleChoice:
    """A model that chooses the sentiment."""
    model, params = load_decoder(folder)
    return el.cascade.MultipleChoice(model, params, el.Tokenizer.load(folder), **HOW)


def nested(folder: str, layer: int) -> dict[str, el.cascade.MultipleChoice]:
    """An exit and the model that it is part of."""
    model, params = load_decoder(folder)
    swift, super_ = el.cascade.shared_multiple_choice(
        model, params, el.Tokenizer.load(folder), exit=layer, **HOW
    )
    return {"swift": swift, "super": super_}


def columns(data: Path, folder: Path, make: Any, seed: int) -> Columns:
    """Scores, right or wrong, and costs of the rows that choose thresholds and of the test rows."""
    files = {"fit": folder / "fit.jsonl", "test": data / f"{NAME}_dev.jsonl"}
    rows = {
        name: [json.loads(line) for line in file.read_text().splitlines()][:HELD_BACK]
        for name, file in files.items()
    }
    return answered(make(), rows, lambda row, output: float(output == row["gold"]), seed)
