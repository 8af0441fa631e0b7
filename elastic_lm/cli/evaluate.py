"""`elastic-lm evaluate`: quality of every depth, and of an exit policy."""

import argparse
import dataclasses
import json
from typing import Any

from elastic_lm.cli.belonging import add_force, check_belongs, parts_of
from elastic_lm.cli.held_out import (
    ContinuedOptions,
    add_continued,
    generated_line,
    generated_text,
    held_out_batches,
    with_prompts,
)
from elastic_lm.cli.model_folder import load_with_tokenizer
from elastic_lm.config.exit_policy import DEFAULT_METRIC

HELP = """\
Perplexity of the full model and of every exit; with thresholds, agreement and mean depth.

elastic-lm evaluate --model runs/exits/model --data test.txt
elastic-lm evaluate --model runs/exits/model --thresholds thresholds.json --json result.json

With thresholds, a few prompts of the text are continued too (--continuations): text that a model writes
itself may agree less with the full model than given text.
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(ContinuedOptions):
    """What is measured, and where the numbers go."""

    thresholds: str | None = None  # file of an exit policy that is measured too
    force: bool = False  # thresholds of other weights are taken without a word
    json: str | None = None  # file for the numbers; - = stdout only


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `Options`."""
    add_continued(parser, "test text")
    parser.add_argument("--thresholds", metavar="FILE", help="also measure this exit policy")
    add_force(parser, "thresholds")
    parser.add_argument("--json", metavar="FILE", help="write the numbers here too; - = stdout only")


def run(options: Options) -> None:
    """Measures every depth on the test text."""
    from elastic_lm.depth import quality
    from elastic_lm.depth.observations import observe
    from elastic_lm.depth.policies import ConfidenceExit
    from elastic_lm.depth.threshold_search import exit_outcome
    from elastic_lm.files.atomic import prepare_output, write_text_whole

    policy = ConfidenceExit.load(options.thresholds) if options.thresholds else None
    prepare_output(options.json)
    model, params, tokenizer, folder = load_with_tokenizer(options.model, options.dtype)
    if policy:
        policy.check(model.config)
        check_belongs(
            options.thresholds or "",
            policy.calibrated_on,
            fitted="calibrated",
            model=folder,
            parts=parts_of(params, tokenizer),
            fix=f"calibrate again: elastic-lm calibrate --model {folder} --out {options.thresholds}",
            force=options.force,
        )
        policy = policy.for_any_weights()

    batches, text = held_out_batches(options, tokenizer, "test")
    prompts: list[list[int]] = []
    if policy:
        prompts, batches = with_prompts(batches, options, model.config.max_len, tokenizer.bos_id)
    # Without a policy the confidences are not read, and any metric does.
    metric = policy.metric if policy else DEFAULT_METRIC
    seen = observe(model.config, params, batches, metric=metric)
    depths = quality.by_depth(seen, quality.count_bytes(seen, tokenizer))
    result = {
        "model": folder,
        "data": text,
        "tokens": seen.tokens,
        "depths": [dataclasses.asdict(d) for d in depths],
    }

    if policy:
        layers = (*seen.layers, seen.n_layers)
        seen = seen.gated(policy.gates) if policy.gates else seen
        found = exit_outcome(seen.confidence, seen.agrees, layers, policy.thresholds)
        own = generated_text(model, params, policy, prompts, options)
        result["policy"] = {
            "thresholds": policy.thresholds,
            "metric": metric,
            **dataclasses.asdict(found),
            "generated": dataclasses.asdict(own) if own else None,
            "degenerate": own.degenerate(policy.target) if own and policy.target else "",
        }

    if options.json and options.json != "-":
        write_text_whole(options.json, json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2) if options.json == "-" else quality_table(result))


def number_or_dash(value: float | None) -> str:
    """Nats per byte for the table; a dash where the text has no bytes, such as that of an end token alone."""
    return f"{'-':>11}" if value is None else f"{value:>11.4f}"


def quality_table(result: dict[str, Any]) -> str:
    """Perplexity, accuracy and agreement per depth; the policy's lines where there is one."""
    from elastic_lm.decode.generated import GeneratedText

    lines = ["layers   perplexity   nats/byte   accuracy   agreement"]
    lines += [
        f"{d['layers']:<6d} {d['perplexity']:>12.4f} {number_or_dash(d['nats_per_byte'])} "
        f"{d['accuracy']:>10.4f} {d['agreement']:>11.4f}"
        for d in result["depths"]
    ]
    if "policy" in result:
        policy = result["policy"]
        shares = ", ".join(f"{share:.3f}" for share in policy["shares"])
        depth = f"mean {policy['mean_layers']:.2f} layers, shares {shares}"
        lines.append(f"with exits: agreement {policy['agreement']:.4f}, {depth}")
        if policy["generated"]:
            lines.append(generated_line(GeneratedText(**policy["generated"])))
        if policy["degenerate"]:
            lines.append(f"not to be used: {policy['degenerate']}")
    return "\n".join(lines)
