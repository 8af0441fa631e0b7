"""`elastic-lm export`: an elastic checkpoint becomes a Hugging Face folder."""

import argparse
import dataclasses
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING

from elastic_lm.cli.belonging import parts_of
from elastic_lm.cli.model_folder import load_tokenizer, parameter_count, writing_target
from elastic_lm.cli.parser import add_dtype, require_dtype
from elastic_lm.cli.width_flags import WidthOptions, add_width, chosen_subnet

if TYPE_CHECKING:
    from elastic_lm.config.model import ModelConfig
    from elastic_lm.config.subnet import Subnet
    from elastic_lm.depth.policies import ConfidenceExit

HELP = """\
Elastic checkpoint -> Hugging Face folder that `transformers` and vLLM load.

elastic-lm export --from runs/exits/model --to hf-dir
elastic-lm export --from runs/x/model --to hf-dir --dtype bfloat16 --without-exits
elastic-lm export --from runs/elastic/model --to small --budget parameters=70%
elastic-lm export --from runs/elastic/model --to small --subnet mlp=50% heads=50%
elastic-lm export --from runs/exits/model --to small --subnet mlp=50% --thresholds thresholds.json

The chat template, all special tokens, and every key of the configs that the checkpoint was made from are
written again. Exits go into a file of their own that `transformers` ignores; this package reads them back.
A sub-network becomes an ordinary smaller model. `transformers` knows one size for all layers of a model, so
that all layers of the sub-network must be alike, as those are that --budget finds without routers. With
--thresholds, what `calibrate` found with the same --budget or --subnet comes along as thresholds.json.
"""


THRESHOLDS = "thresholds.json"  # file of the folder, where `push` looks for it, too


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(WidthOptions):
    """What is exported."""

    source: str  # elastic checkpoint
    target: str  # new Hugging Face folder
    dtype: str | None = None  # of the stored weights; None = as in the checkpoint
    without_exits: bool = False  # only the full-depth model is written
    thresholds: str | None = None  # file of the exits' thresholds, which is written into the folder, too
    overwrite: bool = False  # an earlier export at `target` is replaced

    def __post_init__(self) -> None:
        super().__post_init__()
        require_dtype(self.dtype)
        if self.without_exits and self.thresholds:
            raise ValueError(f"--thresholds {self.thresholds}: are of the exits; leave --without-exits out")


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `Options`."""
    add = parser.add_argument
    where = "checkpoint or other folder, .gguf file, or ORG/NAME[@REVISION] on the Hub"
    add("--from", dest="source", required=True, metavar="DIR", help=where)
    add("--to", dest="target", required=True, metavar="HF_DIR", help="new folder")
    add_dtype(parser, "of the stored weights (default: as in the checkpoint)")
    add("--without-exits", action="store_true", help="write the full-depth model only")
    text = "from `calibrate`, for what is exported; written as thresholds.json beside its weights"
    add("--thresholds", metavar="FILE", help=text)
    add("--overwrite", action="store_true", help="replace an earlier export at --to")
    add_width(parser)


def run(options: Options) -> None:
    """Exports the checkpoint; the target is checked before anything is read."""
    from elastic_lm import hf
    from elastic_lm.checkpoints.loading import load
    from elastic_lm.config.encoder import EncoderConfig
    from elastic_lm.config.model import ModelConfig
    from elastic_lm.depth.policies import ConfidenceExit
    from elastic_lm.hf.exporting import check_target
    from elastic_lm.models.exits import without_exits
    from elastic_lm.models.task_heads import attach_task_exits
    from elastic_lm.width.slicing import slice_params

    with writing_target(options.target):
        check_target(options.target, options.overwrite)
        policy = ConfidenceExit.load(options.thresholds) if options.thresholds else None
        model, params = load(options.source, dtype=options.dtype)
        config = model.config
        tokenizer = load_tokenizer(options.source, config.vocab_size)
        whole, subnet, parts = config, None, parts_of(params, tokenizer) if policy else {}
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

        if policy is not None:
            policy = policy_of_part(options, policy, whole, subnet, parts, parts_of(params, None)["weights"])
        hf.export(
            config, params, options.target, tokenizer, source=options.source, overwrite=options.overwrite
        )
        if policy is not None:
            policy.save(f"{options.target.rstrip('/')}/{THRESHOLDS}")

    count = len(getattr(config, "exits", ()))
    exits = f" and {count} exits" if count else ""
    size = f"{parameter_count(params)} parameters{exits}"
    print(f"{options.source} -> {options.target}: {config.family}, {size}")


def policy_of_part(
    options: Options,
    policy: "ConfidenceExit",
    whole: object,
    subnet: "Subnet | None",
    parts: Mapping[str, str],
    weights: str,
) -> "ConfidenceExit":
    """The thresholds for the folder that is written.

    Args:
      options: of the command.
      policy: from the file that they name.
      whole: config of the whole model.
      subnet: the part that is written; None = all of it.
      parts: fingerprints of the whole model.
      weights: fingerprint of what is written.

    Raises:
      ValueError: the thresholds are of another model, or of another part of it.
    """
    from elastic_lm.config.model import ModelConfig
    from elastic_lm.config.subnet import Subnet
    from elastic_lm.depth.subnet_policies import of_slice
    from elastic_lm.files.fingerprints import differing_parts

    file = options.thresholds or ""
    if not isinstance(whole, ModelConfig):
        raise ValueError(f"--thresholds {file}: are of a decoder's exits; leave them out")
    policy.check(whole)
    if other := differing_parts(policy.calibrated_on, parts):
        theirs = policy.calibrated_on.get("path") or "another model"
        raise ValueError(
            f"{file}: was calibrated on {theirs}, whose {other} differ from those of {options.source}; "
            f"calibrate again: elastic-lm calibrate --model {options.source}"
        )
    try:
        return of_slice(policy, whole, subnet or Subnet.full(whole), weights=weights, path=options.target)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


def warn_of_heads(config: "ModelConfig") -> None:
    """Says where transformers may refuse the sizes of a sub-network, although the folder says all of them."""
    if config.d_model % config.n_heads:
        sizes = f"d_model={config.d_model} is no multiple of its {config.n_heads} heads"
        fix = "transformers refuses that in some families, such as llama; choose another share of heads"
        print(f"warning: {sizes}: {fix}", file=sys.stderr)
