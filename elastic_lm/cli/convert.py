"""`elastic-lm convert`: a Hugging Face folder, a GGUF file or a step of a run becomes a checkpoint."""

import argparse
import dataclasses
import re
from pathlib import Path
from typing import Any

from elastic_lm.cli.model_folder import load_tokenizer, parameter_count, writing_target
from elastic_lm.cli.parser import CommandOptions, add_dtype, require_dtype, require_flag
from elastic_lm.files.remote import is_remote

STEP = re.compile(r"/checkpoints/\d+/*$")
HELP = """\
Hugging Face folder or name, or GGUF file -> elastic checkpoint, tensor by tensor.

elastic-lm convert --from hf-dir --to ckpt
elastic-lm convert --from org/name@revision --to ckpt --dtype bfloat16
elastic-lm convert --from model.gguf --to ckpt
elastic-lm convert --from runs/exits/checkpoints/500 --to ckpt --backbone

A checkpoint of a training run becomes the model that the run would have left at that step. The run's data and
the model that it began with must be where they were.
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(CommandOptions):
    """What is converted."""

    source: str  # Hugging Face folder, name on the Hub, .gguf file, or checkpoint of a training run
    target: str  # folder of the new checkpoint
    dtype: str | None = None  # of parameters and activations; None = float32 on CPU, elsewhere as stored
    backbone: bool = False  # of a training run: leave the exits out
    overwrite: bool = False  # an earlier checkpoint at `target` is replaced

    def __post_init__(self) -> None:
        require_dtype(self.dtype)


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `Options`."""
    add = parser.add_argument
    add(
        "--from",
        dest="source",
        required=True,
        metavar="HF_DIR",
        help="folder, .gguf file, ORG/NAME, or WORKDIR/checkpoints/STEP of a training run",
    )
    add("--to", dest="target", required=True, metavar="DIR", help="new checkpoint folder")
    add_dtype(parser, "default: float32 on CPU, elsewhere as stored")
    add("--backbone", action="store_true", help="of a training run: leave the exits out")
    add("--overwrite", action="store_true", help="replace an earlier checkpoint at --to")


def run(options: Options) -> None:
    """Converts the folder; the target is checked before anything is read."""
    from elastic_lm import hf
    from elastic_lm.checkpoints import native

    if is_remote(options.source) and STEP.search(options.source):
        fix = "copy its workdir to this machine (gcloud storage cp -r WORKDIR .), and name the step there"
        raise ValueError(f"--from {options.source}: a checkpoint of a training run is read here: {fix}")
    step = native.is_step(Path(options.source))
    if options.backbone and not step:
        fix = "name WORKDIR/checkpoints/STEP"
        raise ValueError(f"--backbone is for checkpoints of a training run, and --from is none: {fix}")
    if step:
        convert_step(options)
        return

    with writing_target(options.target):
        native.check_target(options.target, options.overwrite)
        config, params = hf.load(options.source, dtype=options.dtype)
        tokenizer = load_tokenizer(options.source, config.vocab_size)
        native.save_model(
            options.target, config, params, tokenizer, source=options.source, overwrite=options.overwrite
        )

    report(options, config, params)


def convert_step(options: Options) -> None:
    """Makes a model of a checkpoint of a training run."""
    from elastic_lm.train import save_step_model

    require_flag(options.dtype is None, "--dtype", options.dtype, "is not for a run: it keeps its own")
    with writing_target(options.target):
        config, params = save_step_model(
            options.source, options.target, backbone=options.backbone, overwrite=options.overwrite
        )
    report(options, config, params)


def report(options: Options, config: Any, params: Any) -> None:
    """Says what was converted."""
    size = f"{config.n_layers} layers, {parameter_count(params)} parameters"
    print(f"{options.source} -> {options.target}: {config.family}, {size}")
