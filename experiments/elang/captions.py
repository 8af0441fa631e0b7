"""Decoder-only models that translate: English captions are continued with German ones.

The Super is new, and so is its Swift, a smaller model; or Swift is an exit of a Super that was trained along
with it, whose states of the prompt the Super goes on from. The quality of a translation is its chrF.
"""

import functools
import json
from pathlib import Path
from typing import Any

from study import Columns, answered, settled
from writers import FILES, MOST, chrf

from elastic_lm.config import DataConfig, ExitConfig, ModelConfig, RunConfig
from elastic_lm.data.tokenizer import Tokenizer
from elastic_lm.decode.generator import Generator
from elastic_lm.decode.nested import nested_generator
from elastic_lm.decode.sampler import Sampler
from elastic_lm.loading import load_decoder
from elastic_lm.train.run import MODEL_FOLDER, fit
from elastic_lm.train_config import TrainConfig

STEPS, EXIT = 2000, 2
SIZES = {
    "super": {"d_model": 256, "n_layers": 6, "n_heads": 4, "n_kv_heads": 4, "d_mlp": 704},
    "swift": {"d_model": 128, "n_layers": 2, "n_heads": 4, "n_kv_heads": 4, "d_mlp": 352},
}
SPLITS = {"paths": "train", "eval_paths": "val"}
HOW: dict[str, Any] = {"batch_size": 128, "prompt_field": "prompt"}


def measured(data: Path, out: Path, seed: int) -> dict[str, Columns]:
    """Trains what is missing and translates with all models; {"separate", "nested": columns}."""
    folder = out / "captions" / f"seed_{seed}"
    whole = trained(data, folder, seed, "super")
    small = trained(data, folder, seed, "swift", tokenizer=whole)
    exits = (ExitConfig(EXIT, "norm", tied=True),)
    both = trained(data, folder, seed, "both", "super", exits, whole)
    pairs = {
        "separate": lambda: {"swift": generator(small), "super": generator(whole, scored=False)},
        "nested": lambda: nested(both),
    }
    return {
        how: settled(folder / f"{how}.json", functools.partial(columns, data, make, seed))
        for how, make in pairs.items()
    }


def trained(
    data: Path,
    folder: Path,
    seed: int,
    name: str,
    size: str = "",
    exits: tuple[ExitConfig, ...] = (),
    tokenizer: str = "",
) -> str:
    """Folder of a finished model."""
    model = folder / name / MODEL_FOLDER
    if not model.is_dir():
        files = {key: (str(data / f"captions_{split}.jsonl"),) for key, split in SPLITS.items()}
        shape = {"seq_len": 256, "batch_size": 32, "packing": "first_fit", "seed": seed}
        rate = {"optimizer": "muon", "lr": 5e-3, "schedule": "wsd", "decay_share": 0.4, "min_lr": 0.02}
        train = TrainConfig(
            method="joint" if exits else "pretraining",
            steps=STEPS,
            warmup=STEPS // 40,
            eval_every=0,
            save_every=500,
            keep=1,
            seed=seed,
            **rate,
        )
        config = ModelConfig(vocab_size=4096, max_len=256, tied=True, **SIZES[size or name])
        text = DataConfig("instruction", **files, **shape, tokenizer=tokenizer)
        fit(RunConfig(config, exits, text, train), folder / name)
    return str(model)


def generator(folder: str, **how: Any) -> Generator:
    """A model that continues captions."""
    model, params = load_decoder(folder)
    sampler = Sampler(model, params, Tokenizer.load(folder), window=1)
    return Generator(sampler, MOST, **HOW, **how)


def nested(folder: str) -> dict[str, Generator]:
    """An exit and the model that it is part of."""
    model, params = load_decoder(folder)
    swift, super_ = nested_generator(model, params, Tokenizer.load(folder), MOST, exit=EXIT, **HOW)
    return {"swift": swift, "super": super_}


def columns(data: Path, make: Any, seed: int) -> Columns:
    """Scores, chrF and costs of the rows that choose thresholds and of the test rows."""
    names = {split: name.replace("multi30k", "captions") for split, name in FILES.items()}
    rows = {
        split: [json.loads(line) for line in (data / f"{name}.jsonl").read_text().splitlines()]
        for split, name in names.items()
    }
    return answered(make(), rows, lambda row, text: chrf(text.strip(), row["de"]), seed)
