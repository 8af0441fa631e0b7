"""`elastic-lm push`: a model goes to the Hugging Face Hub, with a model card."""

import argparse
import dataclasses
import tempfile
from pathlib import Path
from typing import Any

from elastic_lm.cli.parser import CommandOptions, local_place

HELP = """\
A model -> the Hugging Face Hub, with a model card.

elastic-lm push --model runs/exits/model --to my-org/my-model --private
elastic-lm push --model hf-dir --to my-org/my-model --thresholds thresholds.json --dry-run

A checkpoint of this package is uploaded as a Hugging Face folder, which `transformers` loads too, unless it
is elastic in width or has layers of different sizes. The card says what the run beside the model and its
thresholds tell. Every file of the folder that is not hidden goes along, a README.md in place of the card, and
of paths in them only the last name. Tokens come from HF_TOKEN or `hf auth login`.
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(CommandOptions):
    """What is pushed."""

    model: str  # elastic checkpoint or Hugging Face folder
    to: str  # ORG/NAME on the Hub
    private: bool | None = None  # of a new model; None = as the organisation has set it
    revision: str | None = None  # branch; None = the main one
    thresholds: str | None = None  # file of `calibrate`; None = thresholds.json in or beside the model
    base_model: str | None = None  # that it was made from; None = that of the run
    license: str | None = None  # identifier; None = that of the base model, if it states one
    dry_run: bool = False  # the card is printed and nothing is sent


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `Options`."""
    add = parser.add_argument
    add(
        "--model",
        required=True,
        metavar="DIR",
        type=local_place,
        help="elastic checkpoint or Hugging Face folder",
    )
    add("--to", required=True, metavar="ORG/NAME", help="name on the Hub; made where it does not exist")
    add("--private", action="store_true", help="a new model is private")
    add("--revision", metavar="BRANCH", help="branch, made where it does not exist (default: main)")
    add(
        "--thresholds",
        metavar="FILE",
        type=local_place,
        help="of `calibrate` (default: thresholds.json in DIR or beside it)",
    )
    add("--base-model", metavar="NAME", help="that it was made from (default: as its run says)")
    add("--license", metavar="ID", help="such as apache-2.0 (default: that of a base model on the Hub)")
    add("--dry-run", action="store_true", help="print the model card and send nothing")


def run(options: Options) -> None:
    """Pushes the model, as a Hugging Face folder where it can be one."""
    from elastic_lm.files.local import local_path

    folder = local_path(options.model)
    with tempfile.TemporaryDirectory(prefix="elastic_lm_push_") as temporary:
        exported = _exported(folder, Path(temporary) / "model")
        given = options.given(("private", "revision", "thresholds", "base_model", "license"))
        _push(options, folder, exported, given)


def _push(options: Options, folder: Path, exported: Path, given: dict[str, Any]) -> None:
    from elastic_lm.checkpoints.loading import load
    from elastic_lm.files.fingerprints import weights_fingerprint
    from elastic_lm.hf.pushing import push_from

    where = push_from(
        exported,
        folder,
        options.to,
        dry_run=options.dry_run,
        weights=lambda: weights_fingerprint(load(folder)[1]),
        **given,
    )
    print(where if options.dry_run else f"{folder} -> {where}")


def _exported(folder: Path, target: Path) -> Path:
    """A Hugging Face folder of a checkpoint; the checkpoint itself where it cannot be one."""
    from elastic_lm.checkpoints.native import CONFIG_FILE, MENU_FILE, load_config

    if not (folder / CONFIG_FILE).is_file() or (folder / MENU_FILE).is_file():
        return folder

    from elastic_lm import hf
    from elastic_lm.checkpoints.loading import load
    from elastic_lm.cli.model_folder import load_tokenizer

    try:
        hf.config_to_hf(load_config(folder))
    except ValueError:
        return folder
    model, params = load(folder)
    tokenizer = load_tokenizer(str(folder), model.config.vocab_size)
    hf.export(model.config, params, target, tokenizer, source=folder)
    return target
