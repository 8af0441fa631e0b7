"""`elastic-lm drafter`: the layers that draft best for their model, a knapsack on measured costs."""

import argparse
import dataclasses

from elastic_lm.cli.model_folder import load_with_tokenizer
from elastic_lm.cli.parser import ModelOptions, add_data, add_model, require_flag
from elastic_lm.config.decoding import WINDOW

HELP = """\
Finds which layers of a model draft best for the whole of it, for `generate --lossless --drafter`.

elastic-lm drafter --model my-model --data text.txt --out drafter.json
elastic-lm generate --model my-model --lossless --drafter drafter.json --prompt "Once upon a time"

Nothing is trained and the model is not changed. It continues the beginnings of some texts, a dynamic program
over the attention and MLP blocks of its layers finds the best drafter of each cost, passes are timed on this
device, and the drafter with the most tokens per second by the forecast is written. The last line says what it
is forecast to give, or that no drafter pays; what is generated is the whole model's own in any case.
"""
PROMPT_TOKENS = 32  # of a text that is continued


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(ModelOptions):
    """What is looked for, on which text."""

    data: tuple[str, ...] = ()  # text files, folders or JSON lines; () = the Python standard library
    prompts: int = 8  # texts that are continued
    new_tokens: int = 48  # of each
    window: int = WINDOW  # of `generate`
    batch_size: int = 1  # rows that are decoded together
    out: str = "drafter.json"  # file that is written
    json: str | None = None  # file for all drafters and times

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in (("prompts", 1), ("new_tokens", 2), ("batch_size", 1), ("window", 2)):
            value = getattr(self, name)
            require_flag(value >= least, f"--{name.replace('_', '-')}", value, f"must be at least {least}")


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `Options`."""
    add_model(parser)
    add_data(parser, "text like what will be written")
    add = parser.add_argument
    add("--prompts", type=int, metavar="N", help=f"texts that are continued (default: {Options.prompts})")
    tokens = f"tokens of each, on which drafts are compared (default: {Options.new_tokens})"
    add("--new-tokens", type=int, metavar="N", help=tokens)
    add("--window", type=int, metavar="W", help=f"of `generate` (default: {Options.window})")
    rows = f"prompts that will be decoded together (default: {Options.batch_size})"
    add("--batch-size", type=int, metavar="B", help=rows)
    add("--out", metavar="FILE", help=f"file to write (default: {Options.out})")
    add("--json", metavar="FILE", help="write every drafter and all times here")


def run(options: Options) -> None:
    """Searches, prints what was found, and writes the best drafter."""
    import datetime
    import json
    import sys

    from rich.console import Console

    from elastic_lm.bench.drafter_plan import plan_drafter, show_plan, to_json
    from elastic_lm.cli.belonging import parts_of
    from elastic_lm.data.text_parts import LEAST_TOKENS, text_parts
    from elastic_lm.files.atomic import prepare_output, write_text_whole
    from elastic_lm.report.machine import recorded_versions
    from elastic_lm.width.drafter_files import save_drafter

    for file in (options.out, options.json):
        prepare_output(file)
    model, params, tokenizer, folder = load_with_tokenizer(options.model, options.dtype)
    longest = model.config.max_len - options.window
    prompt_tokens = min(PROMPT_TOKENS, longest // 3)
    new_tokens = min(options.new_tokens, longest - prompt_tokens)
    require_flag(
        prompt_tokens >= 1, "--window", options.window, f"max_len={model.config.max_len} is too short"
    )
    parts = text_parts(
        options.data,
        tokenizer,
        seq_len=prompt_tokens,
        fit_tokens=LEAST_TOKENS,  # nothing is fitted; only the beginnings are read
        test_tokens=LEAST_TOKENS,
        prompts=options.prompts,
        prompt_tokens=prompt_tokens,
    )
    plan = plan_drafter(
        model.config,
        params,
        parts.prompts,
        new_tokens,
        window=options.window,
        batch_size=options.batch_size,
        say=lambda what: print(what, file=sys.stderr, flush=True),
    )
    show_plan(plan, Console(highlight=False))

    best = plan.best
    findings = {
        "acceptance": best.candidate.acceptance,
        "share": best.candidate.share,
        "drafts": best.drafts,
        "forecast": best.speedup,
        "provenance": {
            "model": {"folder": folder, "weights": parts_of(params, tokenizer)["weights"]},
            "data": list(options.data),
            "tokens": plan.tokens,
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "versions": recorded_versions(),
        },
    }
    save_drafter(best.candidate.drafter, options.out, findings)
    print(f"wrote {options.out}", file=sys.stderr)
    if options.json:
        write_text_whole(options.json, json.dumps(to_json(plan), indent=2) + "\n")
        print(f"written to {options.json}", file=sys.stderr)
