"""`elastic-lm export`: an elastic checkpoint becomes a Hugging Face folder."""

import argparse
import dataclasses
import sys
from typing import TYPE_CHECKING

from elastic_lm.cli.model_folder import load_tokenizer, parameter_count, writing_target
from elastic_lm.cli.parser import add_dtype, require_dtype
from elastic_lm.cli.width_flags import WidthOptions, add_width, chosen_subnet

if TYPE_CHECKING:
    from elastic_lm.config.model import ModelConfig

HELP = """\
Elastic checkpoint -> Hugging Face folder that `transformers` and vLLM load.

elastic-lm export --from runs/exits/model --to hf-dir
elastic-lm export --from runs/x/model --to hf-dir --dtype bfloat16 --without-exits
elastic-lm export --from runs/elastic/model --to small --budget parameters=70%
elastic-lm export --from runs/elastic/model --to small --subnet mlp=50% heads=50%

The chat template, all special tokens, and every key of the configs that the checkpoint was made from are
written again. Exits go into a file of their own that `transformers` ignores; this package reads them back.
A sub-network becomes an ordinary smaller model. `transformers` knows one size for all layers of a model, so
that all layers of the sub-network must be alike, as those are that --budget finds without routers.
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(WidthOptions):
    """What is exported."""

    source: str  # elastic checkpoint
    target: str  # new Hugging Face folder
    dtype: str | None = None  # of the stored weights; None = as in the checkpoint
    without_exits: bool = False  # only the full-depth model is written
    overwrite: bool = False  # an earlier export at `target` is replaced

    def __post_init__(self) -> None:
        super().__post_init__()
        require_dtype(self.dtype)


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `Options`."""
    add = parser.add_argument
    where = "checkpoint or other folder, .gguf file, or ORG/NAME[@REVISION] on the Hub"
    add("--from", dest="source", required=True, metavar="DIR", help=where)
    add("--to", dest="target", required=True, metavar="HF_DIR", help="new folder")
    add_dtype(parser, "of the stored weights (default: as in the checkpoint)")
    add("--without-exits", action="store_true", help="write the full-depth model only")
    add("--overwrite", action="store_true", help="replace an earlier export at --to")
    add_width(parser)


def run(options: Options) -> None:
    """Exports the checkpoint; the target is checked before anything is read."""
    from elastic_lm import hf
    from elastic_lm.checkpoints.loading import load
    from elastic_lm.config.encoder import EncoderConfig
    from elastic_lm.config.model import ModelConfig
    from elastic_lm.hf.exporting import check_target
    from elastic_lm.models.exits import without_exits
    from elastic_lm.models.task_heads import attach_task_exits
    from elastic_lm.width.slicing import slice_params

    with writing_target(options.target):
        check_target(options.target, options.overwrite)
        model, params = load(options.source, dtype=options.dtype)
        config = model.config
        tokenizer = load_tokenizer(options.source, config.vocab_size)
        if options.subnet or options.budget:
            if not isinstance(config, ModelConfig):
                raise ValueError(f"{options.source}: holds no decoder, and only those have sub-networks")
            subnet = chosen_subnet(options, options.source, config, params, tokenizer)
            if subnet is not None:
                config, params = slice_params(config, params, subnet)
                warn_of_heads(config)
        if options.without_exits and isinstance(config, ModelConfig):
            config, params = without_exits(config, params)
        elif options.without_exits and isinstance(config, EncoderConfig) and config.exits:
            config, params = attach_task_exits(config, params, ())

        hf.export(
            config, params, options.target, tokenizer, source=options.source, overwrite=options.overwrite
        )

    count = len(getattr(config, "exits", ()))
    exits = f" and {count} exits" if count else ""
    size = f"{parameter_count(params)} parameters{exits}"
    print(f"{options.source} -> {options.target}: {config.family}, {size}")


def warn_of_heads(config: "ModelConfig") -> None:
    """Says where transformers may refuse the sizes of a sub-network, although the folder says all of them."""
    if config.d_model % config.n_heads:
        sizes = f"d_model={config.d_model} is no multiple of its {config.n_heads} heads"
        fix = "transformers refuses that in some families, such as llama; choose another share of heads"
        print(f"warning: {sizes}: {fix}", file=sys.stderr)
