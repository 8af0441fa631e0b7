"""A training run of seconds on text made here."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from elastic_lm.config.data import DataConfig
from elastic_lm.config.model import ModelConfig
from elastic_lm.train.config import RunConfig, TrainConfig

LINE = "def f{0}(x):\n    return x * {0} + {1}\n\n"


@pytest.fixture(autouse=True, scope="session")
def compiled_programs_are_kept(programs_on_disk: None) -> None:
    """Runs with one shape of model and batch compile once per session."""


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    """About 30 KB of code-like text."""
    file = tmp_path / "text.txt"
    file.write_text("".join(LINE.format(i, i * i) for i in range(800)))
    return file


@pytest.fixture
def run_config(text_file: Path) -> RunConfig:
    """Two layers, six steps, a checkpoint every two."""
    return RunConfig(
        model=ModelConfig(
            vocab_size=300, d_model=32, n_layers=2, n_heads=4, n_kv_heads=2, d_mlp=64, max_len=64, tied=True
        ),
        data=DataConfig(
            source="text",
            paths=(str(text_file),),
            eval_paths=(str(text_file),),
            seq_len=32,
            batch_size=8,
            span=200,
        ),
        train=TrainConfig(
            steps=6, lr=1e-2, warmup=2, log_every=1, eval_every=3, eval_batches=2, save_every=2
        ),
    )


def changed(config: RunConfig, **train: Any) -> RunConfig:
    """`config` with other fields of `train`."""
    return dataclasses.replace(config, train=dataclasses.replace(config.train, **train))
