"""`elastic-lm preview`: a preview of the vocabulary head, chosen and calibrated on text."""

import argparse
import dataclasses
import sys

from elastic_lm.cli.held_out import HeldOutOptions, add_held_out, held_out_batches
from elastic_lm.cli.model_folder import load_with_tokenizer
from elastic_lm.cli.parser import require_share, share
from elastic_lm.config.decoding import PREVIEW_AGREEMENT

HELP = """\
Fits a preview to text: a cheap part of the vocabulary head that decides most tokens.

elastic-lm preview --model my-model --data text.txt --out preview.safetensors
elastic-lm preview --model my-model --data text.txt --agreement 0.99
elastic-lm generate --model my-model --preview preview.safetensors --prompt "Once upon a time"

Pays where the vocabulary head is a large part of the model. The text is read once: three quarters choose, and
one quarter calibrates and measures. Where the preview is not sure, the whole head is read: in a batch, as
soon as this holds for one row, so that previews pay at batch 1 above all.
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(HeldOutOptions):
    """What the preview has to keep, and where it goes."""

    agreement: float = PREVIEW_AGREEMENT  # share of tokens equal to the whole head's
    out: str = "preview.safetensors"  # file that is written

    def __post_init__(self) -> None:
        super().__post_init__()
        require_share("--agreement", self.agreement)


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `Options`."""
    add_held_out(parser, "text like what will be written")
    add = parser.add_argument
    agreement = f"share of tokens equal to the whole head's (default: {Options.agreement})"
    add("--agreement", type=share, metavar="A", help=agreement)
    add("--out", metavar="FILE", help=f"file to write (default: {Options.out})")


def run(options: Options) -> None:
    """Fits, calibrates, prints and writes a preview."""
    from elastic_lm.depth.preview_files import save_preview
    from elastic_lm.depth.previewing import fit_preview
    from elastic_lm.files.atomic import prepare_output

    prepare_output(options.out)
    model, params, tokenizer, _ = load_with_tokenizer(options.model, options.dtype)
    batches, text = held_out_batches(options, tokenizer, "calibration")
    preview, report = fit_preview(model.config, params, batches, agreement=options.agreement)
    save_preview(preview, report, options.out)
    print(
        f"{report.agreement:.2%} of {report.tokens} other tokens of {text} keep the whole head's choice\n"
        f"a token at batch 1 reads {report.bytes:.0%} of the head's bytes on average: rank {report.rank}, "
        f"{report.blocks} blocks of {preview.block} exact rows, the whole head for {report.whole:.1%}\n"
        f"mean total variation from its distribution {report.variation:.4f}\n"
        f"wrote {options.out}"
    )
    if report.agreement < options.agreement:
        print(
            f"below the {options.agreement:.2%} that --agreement asks for: {report.tokens} tokens calibrated "
            "the margin; raise --tokens",
            file=sys.stderr,
        )
