"""What to type after a quickstart: the recommended setting, on a line of the user's own text."""

import shlex
from collections.abc import Sequence
from pathlib import Path

from elastic_lm.quickstart import folders
from elastic_lm.quickstart.options import Options
from elastic_lm.quickstart.report import Target

WORDS = 12  # of the prompt
ANY = "The"  # where the text has no line that can be typed
QUOTES = set("'\"")  # a shell needs more of them around


def command(options: Options, row: Target | None, prompt: str) -> str:
    """The command that generates with a setting.

    Args:
      options: of the run.
      row: the setting; None = full depth.
      prompt: text.
    """
    out = options.out
    source = options.hf_dir or f"{out}/{folders.MODEL}"
    dial = row.dial if row else "full depth"
    if row is not None and dial == "exits":
        how = ["--model", f"{out}/{folders.MODEL}", "--thresholds", f"{out}/thresholds.json"]
    elif row is not None and dial == "preview":
        how = ["--model", source, "--preview", str(preview_file(out, row.target_agreement))]
    else:
        how = ["--model", source, *(("--lossless", "--lookup") if dial == "lookup" else ())]
    dtype = ["--dtype", options.dtype] if options.dtype else []
    return shlex.join(["elastic-lm", "generate", *how, *dtype, "--prompt", prompt])


def preview_file(out: str, target: float) -> Path:
    """Where the preview for a target agreement is saved."""
    return Path(out) / f"{folders.PREVIEW}{100 * target:g}.safetensors"


def short_prompt(texts: Sequence[str]) -> str:
    """A prompt that can be typed: the first words of a line, if possible of one without quotation marks.

    Args:
      texts: of the user's own.
    """
    # A dash in front would read as a flag, and half characters and control characters cannot be typed.
    lines = [line.replace("\ufffd", "").strip().lstrip("- ") for text in texts for line in text.split("\n")]
    lines = ["".join(c for c in line if c.isprintable() or c.isspace()) for line in lines]
    short = [" ".join(line.split()[:WORDS]) for line in lines if line]
    plain = [line for line in short if not set(line) & QUOTES]
    return max(plain or short, key=lambda line: len(line.split()), default=ANY)
