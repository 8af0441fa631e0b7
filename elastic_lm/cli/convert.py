"""`elastic-lm convert`: a Hugging Face folder, or a GGUF file, becomes an elastic checkpoint."""

import argparse
import dataclasses

from elastic_lm.cli.model_folder import load_tokenizer, parameter_count, writing_target
from elastic_lm.cli.parser import CommandOptions, add_dtype, require_dtype

HELP = """\
Hugging Face folder or name, or GGUF file -> elastic checkpoint, tensor by tensor.

elastic-lm convert --from hf-dir --to ckpt
elastic-lm convert --from org/name@revision --to ckpt --dtype bfloat16
elastic-lm convert --from model.gguf --to ckpt
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(CommandOptions):
    """What is converted."""

    source: str  # Hugging Face folder, name on the Hub, or .gguf file
    target: str  # folder of the new checkpoint
    dtype: str | None = None  # of parameters and activations; None = float32 on CPU, elsewhere as stored
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
        help="folder, .gguf file, or ORG/NAME",
    )
    add("--to", dest="target", required=True, metavar="DIR", help="new checkpoint folder")
    add_dtype(parser, "default: float32 on CPU, elsewhere as stored")
    add("--overwrite", action="store_true", help="replace an earlier checkpoint at --to")


def run(options: Options) -> None:
    """Converts the folder; the target is checked before anything is read."""
    from elastic_lm import hf
    from elastic_lm.checkpoints import native

    with writing_target(options.target):
        native.check_target(options.target, options.overwrite)
        config, params = hf.load(options.source, dtype=options.dtype)
        tokenizer = load_tokenizer(options.source, config.vocab_size)
        native.save_model(
            options.target, config, params, tokenizer, source=options.source, overwrite=options.overwrite
        )

    size = f"{config.n_layers} layers, {parameter_count(params)} parameters"
    print(f"{options.source} -> {options.target}: {config.family}, {size}")
