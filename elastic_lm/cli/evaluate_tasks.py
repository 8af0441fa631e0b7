"""`elastic-lm evaluate --tasks`: tasks of the lm-evaluation-harness at every depth, and of sub-networks."""

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from elastic_lm.cli.parser import CommandOptions, require_flag
from elastic_lm.cli.width_flags import chosen_subnet

if TYPE_CHECKING:
    from elastic_lm.cli.evaluate import Options
    from elastic_lm.config.subnet import Subnet

ROWS = 8  # texts that are read at once
ONLY_TASKS = ("tasks_data", "limit", "num_fewshot", "exit", "chat", "plot")
ONLY_TEXT = ("data", "seq_len", "stride", "mesh")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskOptions(CommandOptions):
    """Which tasks are measured, and how much of them."""

    tasks: tuple[str, ...] = ()  # names of tasks or groups; () = text is measured
    tasks_data: str | None = None  # folder with their data; None = from the Hub
    limit: int | None = None  # questions of each; None = all
    num_fewshot: int | None = None  # examples before each question; None = as the task says
    exit: int | None = None  # the layer whose exit alone answers; None = every depth
    rows: int = ROWS  # texts that are read at once
    chat: bool = False  # prompts are written with the chat template
    plot: str | None = None  # file for a picture of accuracy against compute

    def __post_init__(self) -> None:
        # Of the other classes that a command's options are made of.
        after = getattr(super(), "__post_init__", None)
        if after is not None:
            after()
        for field, least in (("limit", 1), ("num_fewshot", 0), ("rows", 1)):
            value, flag = getattr(self, field), f"--{field.replace('_', '-')}"
            require_flag(value is None or value >= least, flag, value, f"must be at least {least}")

        given = ONLY_TEXT if self.tasks else ONLY_TASKS
        fix = "is about text; leave it out" if self.tasks else "is about tasks; add --tasks NAME,NAME"
        for field in given:
            value = getattr(self, field)
            flag = f"--{field.replace('_', '-')}"
            flag = "--context" if field == "seq_len" else flag
            require_flag(value in (None, (), False), flag, value, fix)
        if self.exit is not None and getattr(self, "thresholds", None):
            raise ValueError(f"--exit {self.exit}: goes without --thresholds; give one of them")


def names(text: str) -> list[str]:
    """Names with commas between them, as a flag's type."""
    found = [name.strip() for name in text.split(",") if name.strip()]
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r} names no task; give one like arc_easy,lambada")
    return found


def add_tasks(parser: argparse.ArgumentParser, place: Callable[[str], str]) -> None:
    """Adds the flags of `TaskOptions`.

    Args:
      parser: of the command.
      place: type of folders and files.
    """
    group = parser.add_argument_group(
        "tasks", 'In place of text: tasks of the lm-evaluation-harness (pip install "elastic-lm[harness]").'
    )
    add = group.add_argument
    add("--tasks", type=names, metavar="NAME,NAME", help="such as arc_easy,hellaswag,lambada,mmlu")
    text = "folder with the tasks' data as JSON lines, such as arc_easy_test.jsonl.gz (default: from the Hub)"
    add("--tasks-data", metavar="DIR", type=place, help=text)
    add("--limit", type=int, metavar="N", help="questions of each task, the first ones (default: all)")
    add("--num-fewshot", type=int, metavar="N", help="examples before each question (default: as the task)")
    add("--exit", type=int, metavar="LAYER", help="the exit that answers (default: every depth, in one pass)")
    add("--rows", type=int, metavar="N", help=f"texts that are read at once (default: {ROWS})")
    add("--chat", action="store_true", help="prompts are written with the model's chat template")
    add("--plot", metavar="FILE", type=place, help="picture of accuracy against compute")


def run(options: "Options") -> None:
    """Measures the tasks, one after the other; what is done is in the file at once."""
    import jax

    from elastic_lm.cli.evaluate import checked_policy
    from elastic_lm.cli.model_folder import load_with_tokenizer
    from elastic_lm.depth.policies import ConfidenceExit
    from elastic_lm.files.atomic import prepare_output
    from elastic_lm.harness import tasks as harness_tasks
    from elastic_lm.harness.library import harness
    from elastic_lm.report.machine import versions

    harness()  # that it is missing is said before anything is read
    count = jax.process_count()
    require_flag(count == 1, "--tasks", ",".join(options.tasks), f"runs as one process, not as {count}")
    policy = ConfidenceExit.load(options.thresholds) if options.thresholds else None
    prepare_output(options.json)
    prepare_output(options.plot)
    tasks = {name: harness_tasks.load_tasks([name], options.tasks_data) for name in options.tasks}
    model, params, tokenizer, folder = load_with_tokenizer(options.model, options.dtype)
    if policy is not None:
        policy = checked_policy(options, policy, model.config, params, tokenizer, folder)

    subnets: list[Subnet | None] = [
        chosen_subnet(width, folder, model.config, params, tokenizer, force=options.force)
        for width in options.widths()
    ]
    result: dict[str, Any] = {
        "model": folder,
        "tasks_data": options.tasks_data,
        "limit": options.limit,
        "num_fewshot": options.num_fewshot,
        "chat": options.chat,
        "versions": {**versions(), "lm_eval": harness("").__version__},
        "parts": [],
    }
    for subnet in subnets or [None]:
        measured = _measure(options, (model, params, tokenizer), subnet, policy, tasks, result, folder)
        if len(subnets) > 1:
            print(f"part {measured} of {len(subnets)} is done", file=sys.stderr)

    if options.plot:
        _draw(options.plot, result)
    print(json.dumps(result, indent=2) if options.json == "-" else tasks_table(result))


def _measure(
    options: "Options",
    loaded: tuple[Any, Any, Any],
    subnet: "Subnet | None",
    policy: Any,
    tasks: dict[str, Any],
    result: dict[str, Any],
    folder: str,
) -> int:
    """Adds what is measured of one part of the model to the result; gives the number of parts there are."""
    from elastic_lm.files.atomic import write_text_whole
    from elastic_lm.harness.curve import depth_curve, task_point
    from elastic_lm.harness.model import harness_model

    model = harness_model(
        *loaded,
        exit=options.exit,
        thresholds=policy,
        subnet=subnet,
        batch_size=options.rows,
        remember=options.exit is None,
        name=folder,
    )
    part: dict[str, Any] = {"parameters": model.parameters, "depths": []}
    if subnet is not None:
        part = {"subnet": dataclasses.asdict(subnet), **part}
    result["parts"].append(part)

    whole, how = loaded[0].config, {"limit": options.limit, "num_fewshot": options.num_fewshot}
    how["chat"] = options.chat
    for name, own in tasks.items():
        if options.exit is None:
            points = depth_curve(model, own, whole, thresholds=policy, **how)
        else:
            kind = "full" if options.exit == whole.n_layers else "exit"
            points = [task_point(kind, model, own, whole, **how)]
        _add(part["depths"], points)
        if options.json and options.json != "-":
            write_text_whole(options.json, json.dumps(result, indent=2) + "\n")
        print(f"{name} is done", file=sys.stderr)
    return len(result["parts"])


def _add(depths: list[dict[str, Any]], points: list[Any]) -> None:
    """Adds what was measured of one task, or of a group of them, to the depths."""
    if not depths:
        depths += [{"kind": point.kind, "layers": {}, "flops_share": {}, "tasks": {}} for point in points]
    for depth, point in zip(depths, points, strict=True):
        depth["layers"] |= dict.fromkeys(point.results, point.layers)
        depth["flops_share"] |= dict.fromkeys(point.results, point.flops_share)
        depth["tasks"] |= {task: dict(numbers) for task, numbers in point.results.items()}


def _draw(path: str, result: dict[str, Any]) -> None:
    """The picture, without the tasks that a group is made of."""
    from elastic_lm.harness.curve import draw_curve

    parts = {}
    for part in result["parts"]:
        name = "whole model" if "subnet" not in part else f"{part['parameters'] / 1e6:,.1f} M parameters"
        parts[name] = [{**d, "tasks": _outer(d["tasks"])} for d in part["depths"]]
    draw_curve(parts, path, measured_on=f"{result['model']}, first {result['limit'] or 'all'} questions")


def _outer(tasks: dict[str, Any]) -> dict[str, Any]:
    """Without the tasks of groups, whose names have the group's in front."""
    return {name: numbers for name, numbers in tasks.items() if "::" not in name}


def tasks_table(result: dict[str, Any]) -> str:
    """Every task and metric by depth."""
    lines = []
    for part in result["parts"]:
        if "subnet" in part:
            kept = len(part["subnet"]["layers"])
            lines += [f"sub-network of {kept} layers, {part['parameters']:,} parameters"]
        lines.append("task                 metric          layers   FLOPs     value    error")
        names = list(dict.fromkeys(task for d in part["depths"] for task in _outer(d["tasks"])))
        for task in names:
            for depth in part["depths"]:
                lines += _task_lines(task, depth)
        lines.append("")
    return "\n".join(lines[:-1])


def _task_lines(task: str, depth: dict[str, Any]) -> list[str]:
    """The metrics of one task at one depth."""
    numbers, layers, share = (depth[key][task] for key in ("tasks", "layers", "flops_share"))
    shown = "-" if share is None else f"{100 * share:.0f} %"
    name = "" if layers is None else f"{layers:.0f}" if layers == int(layers) else f"{layers:.2f}"
    lines = []
    for metric, value in numbers.items():
        if metric == "rows" or metric.endswith("_stderr"):
            continue
        error = numbers.get(f"{metric}_stderr")
        spread = "-" if error is None else f"{error:.4f}"
        lines.append(f"{task:<20s} {metric:<14s} {name:>7s} {shown:>7s} {value:>9.4f} {spread:>8s}")
    return lines
