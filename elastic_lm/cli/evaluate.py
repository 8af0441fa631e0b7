"""`elastic-lm evaluate`: quality of every depth, of sub-networks, and of an exit policy."""

import argparse
import dataclasses
import json
import time
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from elastic_lm.cli import evaluate_tasks
from elastic_lm.cli.belonging import add_force, check_belongs, parts_of
from elastic_lm.cli.evaluate_tasks import TaskOptions, add_tasks
from elastic_lm.cli.held_out import (
    SEQ_LEN,
    ContinuedOptions,
    add_continued,
    generated_line,
    generated_text,
    held_out_batches,
    with_prompts,
)
from elastic_lm.cli.many_processes import ProcessOptions, add_processes
from elastic_lm.cli.model_folder import load_with_tokenizer
from elastic_lm.cli.ordered_text import READ_TOKENS, ordered_batches
from elastic_lm.cli.parser import place, require_flag
from elastic_lm.cli.width_flags import SubnetText, WidthOptions, add_width, check_same_part, chosen_subnet
from elastic_lm.config.exit_policy import DEFAULT_METRIC
from elastic_lm.config.subnet import Budget, Subnet

if TYPE_CHECKING:
    from elastic_lm.config.model import ModelConfig
    from elastic_lm.data.batch import Batch
    from elastic_lm.data.tokenizer import Tokenizer
    from elastic_lm.depth.policies import ConfidenceExit
    from elastic_lm.models.decoder import Decoder, Params

HELP = f"""\
Perplexity of the full model, of every exit and of sub-networks; with thresholds, agreement and mean depth.

elastic-lm evaluate --model runs/exits/model --data test.txt
elastic-lm evaluate --model hf-dir --data wiki.txt --context 1024 --stride 512 --tokens 1000000
elastic-lm evaluate --model runs/exits/model --thresholds thresholds.json --json result.json
elastic-lm evaluate --model runs/elastic/model --budget parameters=70% --budget parameters=50%
elastic-lm evaluate --model runs/exits/model --tasks arc_easy,hellaswag --limit 500 --json tasks.json

A text file is read in order, --context tokens at once (default: as many as the model takes, {READ_TOKENS} at
most), and every --stride tokens anew (default: --context), as published perplexities are computed. A smaller
stride gives more context to every token. The lines of a .jsonl are texts of their own, which are mixed and
packed into rows, and so is the Python library.

With thresholds, a few prompts of the text are continued too (--continuations): text that a model writes
itself may agree less with the full model than given text.

With --tasks, the lm-evaluation-harness asks its questions instead, and every exit answers in the same pass.
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(ProcessOptions, TaskOptions, ContinuedOptions):
    """What is measured, and where the numbers go."""

    seq_len: int | None = None  # tokens that are seen at once; None = by the text and the model
    stride: int | None = None  # text files: tokens from one window to the next; None = seq_len
    subnet: tuple[SubnetText, ...] = ()  # parts of the model that are measured instead of all of it
    budget: tuple[Budget, ...] = ()  # what such parts may cost
    latency_table: str | None = None  # with a budget of milliseconds
    budget_context: int | None = None  # with a budget of FLOPs or bytes
    thresholds: str | None = None  # file of an exit policy that is measured too
    force: bool = False  # thresholds of other weights are taken without a word
    json: str | None = None  # file for the numbers; - = stdout only

    def __post_init__(self) -> None:
        super().__post_init__()
        self.widths()
        if self.stride is None:
            return
        if not self.in_order:
            raise ValueError(
                f"--stride {self.stride}: is for text that is read in order; give --data FILE.txt"
            )
        right = 1 <= self.stride <= (self.seq_len or self.stride)
        require_flag(right, "--stride", self.stride, f"must be from 1 to --context {self.seq_len or 'N'}")

    @property
    def in_order(self) -> bool:
        """Whether the text is read in order, from its first token to its last."""
        return self.source == "text"

    def widths(self) -> list[WidthOptions]:
        """One for every part of the model that is measured; none = the whole model."""
        named = [WidthOptions(subnet=subnet) for subnet in self.subnet]
        for budget in self.budget:
            table = self.latency_table if budget.kind == "latency_ms" else None
            context = self.budget_context if budget.kind in ("flops", "memory_bytes") else None
            named.append(WidthOptions(budget=budget, latency_table=table, budget_context=context))

        # What no budget reads is refused, as where one part alone is named.
        if not any(width.latency_table for width in named):
            WidthOptions(latency_table=self.latency_table)
        if all(width.budget_context is None for width in named):
            WidthOptions(budget_context=self.budget_context)
        return named


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `Options`."""
    context = f"tokens seen at once (default: see above; rows of {SEQ_LEN} where text is packed)"
    add_continued(parser, "test text", "--context", seq_len=context)
    stride = "text files: tokens from the beginning of one window to the next (default: --context)"
    parser.add_argument("--stride", type=int, metavar="S", help=stride)
    parser.add_argument("--thresholds", metavar="FILE", help="also measure this exit policy")
    add_width(parser, several=True)
    add_force(parser, "thresholds")
    parser.add_argument("--json", metavar="FILE", help="write the numbers here too; - = stdout only")
    add_tasks(parser, place)
    add_processes(parser)


def run(options: Options) -> None:
    """Measures every depth on the test text, or on tasks."""
    if options.tasks:
        evaluate_tasks.run(options)
        return

    from elastic_lm.depth.policies import ConfidenceExit
    from elastic_lm.files.atomic import prepare_output, write_text_whole
    from elastic_lm.processes import all_or_none, is_first

    policy = ConfidenceExit.load(options.thresholds) if options.thresholds else None
    with all_or_none():
        if is_first():
            prepare_output(options.json)
    model, params, tokenizer, folder = load_with_tokenizer(options.model, options.dtype, options.mesh)
    if policy:
        policy = checked_policy(options, policy, model.config, params, tokenizer, folder)

    widths = options.widths()
    parts = [chosen_subnet(w, folder, model.config, params, tokenizer, force=options.force) for w in widths]
    batches, text = _batches(options, model.config, tokenizer)
    if len(parts) > 1:
        batches = list(batches)
    measured = [
        _measure(options, model, params, tokenizer, policy, subnet, iter(batches))
        for subnet in parts or [None]
    ]
    result: dict[str, Any] = {"model": folder, "data": text}
    result |= {"subnets": measured} if parts else measured[0]

    with all_or_none():
        if is_first() and options.json and options.json != "-":
            write_text_whole(options.json, json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2) if options.json == "-" else quality_table(result))


def checked_policy(
    options: Options,
    policy: "ConfidenceExit",
    config: "ModelConfig",
    params: "Params",
    tokenizer: "Tokenizer",
    folder: str,
) -> "ConfidenceExit":
    """The policy for this model, after what there is to say about where it was calibrated."""
    policy.check(config)
    check_belongs(
        options.thresholds or "",
        policy.calibrated_on,
        fitted="calibrated",
        model=folder,
        parts=parts_of(params, tokenizer),
        fix=f"calibrate again: elastic-lm calibrate --model {folder} --out {options.thresholds}",
        force=options.force,
    )
    return policy.for_any_weights()


def _measure(
    options: Options,
    model: "Decoder",
    params: "Params",
    tokenizer: "Tokenizer",
    policy: "ConfidenceExit | None",
    subnet: Subnet | None,
    batches: "Iterable[Batch]",
) -> dict[str, Any]:
    """What is told of the whole model, or of one part of it."""
    from elastic_lm.cost.counted import model_cost
    from elastic_lm.depth import quality
    from elastic_lm.depth.observations import observe
    from elastic_lm.depth.subnet_policies import exits_below_the_end
    from elastic_lm.width.slicing import slice_params

    config, held = model.config, params
    if subnet is not None:
        config, held = slice_params(config, params, subnet)
        config = exits_below_the_end(config)

    prompts: list[list[int]] = []
    if policy:
        prompts, batches = with_prompts(batches, options, config.max_len, tokenizer.bos_id)
    pace = Pace()
    # Without a policy the confidences are not read, and any metric does.
    metric = policy.metric if policy else DEFAULT_METRIC
    seen = observe(config, held, pace.timed(batches), metric=metric)
    depths = quality.by_depth(seen, quality.count_bytes(seen, tokenizer))
    result: dict[str, Any] = {}
    if subnet is not None:
        cost = model_cost(config.with_exits(()))
        result |= {"subnet": dataclasses.asdict(subnet), "parameters": cost.parameters}
    result |= {
        "tokens": seen.tokens,
        "tokens_per_s": pace.rate(),
        "depths": [dataclasses.asdict(d) for d in depths],
    }
    if policy:
        result["policy"] = _measure_policy(options, model, params, policy, subnet, seen, prompts)
    return result


def _batches(
    options: Options, config: "ModelConfig", tokenizer: "Tokenizer"
) -> "tuple[Iterable[Batch], str]":
    """The test text, in order or packed, and its description."""
    if options.in_order:
        context = options.seq_len or min(config.max_len, READ_TOKENS)
        longest = f"must be at most {config.max_len}, which is all that the model takes at once"
        require_flag(context <= config.max_len, "--context", context, longest)
        near = f"must be from 1 to --context, which is {context}"
        require_flag((options.stride or context) <= context, "--stride", options.stride, near)
        return ordered_batches(options.data, tokenizer, options.tokens, context, options.stride)
    packed = dataclasses.replace(options, seq_len=options.seq_len or SEQ_LEN)
    return held_out_batches(packed, tokenizer, "test")


def _measure_policy(
    options: Options,
    model: "Decoder",
    params: "Params",
    policy: "ConfidenceExit",
    subnet: Subnet | None,
    seen: Any,
    prompts: list[list[int]],
) -> dict[str, Any]:
    """What an exit policy does on the text that was seen, and on text of its own."""
    from elastic_lm.depth.policies import on_subnet
    from elastic_lm.depth.threshold_search import exit_outcome

    check_same_part(
        options.thresholds or "",
        policy.calibrated_on,
        subnet,
        model.config,
        promise=False,
        force=options.force,
    )
    here: Any = policy if subnet is None else on_subnet(policy, model.config, subnet)
    layers = (*seen.layers, seen.n_layers)
    seen = seen.gated(here.gates) if any(here.gates) else seen
    found = exit_outcome(seen.confidence, seen.agrees, layers, here.thresholds)
    own = generated_text(model, params, policy, prompts, options, subnet) if here.thresholds else None
    return {
        "thresholds": here.thresholds,
        "metric": policy.metric,
        **dataclasses.asdict(found),
        "generated": dataclasses.asdict(own) if own else None,
        "degenerate": own.degenerate(policy.target) if own and policy.target else "",
    }


class Pace:
    """How many tokens are read per second, without the first batch, which waits for compilation."""

    def __init__(self) -> None:
        self._tokens, self._began, self._all = 0, 0.0, 0.0

    def timed(self, batches: "Iterable[Batch]") -> "Iterator[Batch]":
        """The same batches; the time begins when the second is asked for."""
        self._all = time.perf_counter()
        for i, batch in enumerate(batches):
            if i == 1:
                self._began = time.perf_counter()
            if i:
                self._tokens += int((batch.segments > 0).sum())
            yield batch
        self._all = time.perf_counter()

    def rate(self) -> float | None:
        """Tokens per second; None = there was one batch only."""
        return self._tokens / (self._all - self._began) if self._tokens else None


def number_or_dash(value: float | None, form: str = ".4f") -> str:
    """A number for the table; a dash where there is none, such as nats per byte of a text without bytes."""
    return f"{'-':>11}" if value is None else f"{value:>11{form}}"


def quality_table(result: dict[str, Any]) -> str:
    """Loss, perplexity, accuracy and agreement per depth; the policy's lines where there is one."""
    if "subnets" not in result:
        return "\n".join([f"{result['data']}: {result['tokens']} tokens", *_lines(result)])
    lines = [result["data"]]
    for part in result["subnets"]:
        layers = len(part["subnet"]["layers"])
        lines += ["", f"sub-network of {layers} layers, {part['parameters']:,} parameters", *_lines(part)]
    return "\n".join(lines)


def _lines(part: dict[str, Any]) -> list[str]:
    """The table of one model."""
    from elastic_lm.decode.generated import GeneratedText

    lines = ["layers       loss   perplexity   nats/byte   accuracy   agreement"]
    lines += [
        f"{d['layers']:<6d} {d['nats_per_token']:>10.4f} {d['perplexity']:>12.4f} "
        f"{number_or_dash(d['nats_per_byte'])} {d['accuracy']:>10.4f} {d['agreement']:>11.4f}"
        for d in part["depths"]
    ]
    if part["tokens_per_s"]:
        lines.append(f"read at {part['tokens_per_s']:.0f} tokens/s, all depths together")
    if "policy" in part:
        policy = part["policy"]
        shares = ", ".join(f"{share:.3f}" for share in policy["shares"])
        depth = f"mean {policy['mean_layers']:.2f} layers, shares {shares}"
        lines.append(f"with exits: agreement {policy['agreement']:.4f}, {depth}")
        if policy["generated"]:
            lines.append(generated_line(GeneratedText(**policy["generated"])))
        if policy["degenerate"]:
            lines.append(f"not to be used: {policy['degenerate']}")
    return lines
