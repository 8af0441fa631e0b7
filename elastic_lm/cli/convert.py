"""One function per `elastic-lm` command: parsed flags -> config -> one call into the library."""

import argparse
import contextlib
import dataclasses
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from elastic_lm.config.model import ModelConfig
    from elastic_lm.cost.latency_table import LatencyTable
    from elastic_lm.depth.guarantee import Guarantee
    from elastic_lm.depth.policies import ConfidenceExit
    from elastic_lm.models.decoder import Params


def quickstart(args: argparse.Namespace) -> None:
    """Runs the main job end to end."""
    from elastic_lm.quickstart.options import from_flags
    from elastic_lm.quickstart.run import run

    run(from_flags(args), colour=args.color)


def convert(args: argparse.Namespace) -> None:
    """Hugging Face folder to elastic checkpoint."""
    from elastic_lm import hf
    from elastic_lm.checkpoints import native as checkpoint

    checkpoint.check_target(args.target, args.overwrite)
    config, params = hf.load(args.source, dtype=args.dtype)
    tokenizer = _tokenizer(args.source)
    checkpoint.save_model(args.target, config, params, tokenizer, overwrite=args.overwrite)
    size = f"{config.n_layers} layers, {_count(params)} parameters"
    print(f"{args.source} -> {args.target}: {config.family}, {size}")


def export(args: argparse.Namespace) -> None:
    """Elastic checkpoint to Hugging Face folder."""
    from elastic_lm import hf
    from elastic_lm.checkpoints.loading import load
    from elastic_lm.config.encoder import EncoderConfig
    from elastic_lm.config.model import ModelConfig
    from elastic_lm.models.exits import without_exits
    from elastic_lm.models.task_heads import attach_task_exits

    model, params = load(args.source, dtype=args.dtype)
    config = model.config
    if args.without_exits and isinstance(config, ModelConfig):
        config, params = without_exits(config, params)
    elif args.without_exits and isinstance(config, EncoderConfig) and config.exits:
        config, params = attach_task_exits(config, params, ())
    hf.export(config, params, args.target, _tokenizer(args.source), overwrite=args.overwrite)
    count = len(getattr(config, "exits", ()))
    exits = f" and {count} exits" if count else ""
    print(f"{args.source} -> {args.target}: {config.family}, {_count(params)} parameters{exits}")


def train(args: argparse.Namespace) -> None:
    """Trains what a config file describes."""
    from elastic_lm.checkpoints.native import QUICKSTART_MARK
    from elastic_lm.train.config import RunConfig
    from elastic_lm.train.load_config import load_config
    from elastic_lm.train.run import fit
    from elastic_lm.train.tasks.run import fit_task

    if (Path(args.workdir) / QUICKSTART_MARK).exists():
        raise ValueError(
            f"--workdir {args.workdir}: the next `elastic-lm quickstart` replaces it; choose another"
        )
    config = load_config(args.config, args.overrides)
    model, _, metrics = (
        fit(config, args.workdir) if isinstance(config, RunConfig) else fit_task(config, args.workdir)
    )
    numbers = ", ".join(f"{name} {value:.4g}" for name, value in metrics.items())
    count = len(getattr(model, "exits", ()))
    exits = f", {count} exits" if count else ""
    print(f"{args.workdir}/model: {model.n_layers} layers{exits}; held out: {numbers or 'no text'}")


def calibrate(args: argparse.Namespace) -> None:
    """Fits the exits' thresholds."""
    from elastic_lm.cli.held_out import held_out_batches, load_with_tokenizer
    from elastic_lm.depth.calibration import calibrate
    from elastic_lm.depth.guarantee import RiskControl
    from elastic_lm.files.atomic import prepare_output

    if args.epsilon is None and args.delta is not None:
        raise ValueError(f"--delta {args.delta}: is part of a guarantee; give --epsilon too")
    if args.epsilon is not None and args.strategy != "joint":
        raise ValueError(f"--strategy {args.strategy}: with --epsilon thresholds are joint; leave it out")
    if args.window < 1:
        raise ValueError(f"--window {args.window}: must be at least 1")
    risk = None if args.epsilon is None else RiskControl(args.target, args.epsilon, args.delta)
    prepare_output(args.out)
    model, params, tokenizer, folder = load_with_tokenizer(args.model)
    batches, text = held_out_batches(args, tokenizer, "calibration", independent=risk is not None)
    config, params, untuned = _with_exits(model.config, params, args)
    goal: dict[str, Any] = {name: getattr(args, name) for name in ("target", "metric", "strategy")}
    policy = calibrate(config, params, batches, risk=risk, **goal, model=folder, data=text)
    if not untuned:
        policy.save(args.out)
    print("target   agreement   mean layers   thresholds")
    for point in policy.curve:
        mark = "*" if point.target == args.target else " "
        thresholds = ", ".join("never" if t > 1 else f"{t:.3f}" for t in point.thresholds)
        row = f"{point.target:<7g} {point.agreement:>10.4f} {point.mean_layers:>13.2f}   {thresholds}"
        shown = point.note and not (policy.guarantee and mark == "*")
        print(f"{row} {mark}\n{' ' * 8}{point.note}" if shown else f"{row} {mark}")
    if policy.guarantee:
        print(_guarantee_text(policy.guarantee))
    if args.forecast:
        print(_forecast_table(config, policy, args.window))
    print(
        "nothing written: the model has no exits yet" if untuned else f"written to {args.out}",
        file=sys.stderr,
    )


def _with_exits(
    config: "ModelConfig", params: "Params", args: argparse.Namespace
) -> "tuple[ModelConfig, Params, bool]":
    """The model with its exits; for a forecast of one without, the model with exits that nothing tuned.

    Raises:
      ValueError: it has none, and not only a forecast is wanted.
    """
    import jax

    from elastic_lm.config.model import ExitConfig
    from elastic_lm.models.exits import attach_exits

    if config.exits:
        return config, params, False
    if not args.forecast:
        raise ValueError(
            f"{args.model or 'the embedded model'} has no exits: tune some (`elastic-lm train --config "
            "configs/ee_tuning.py --config.train.init_from=MODEL`), or forecast their gain with --forecast"
        )
    layers = sorted({max(1, config.n_layers * i // 4) for i in (1, 2, 3)} - {config.n_layers})
    print(f"exits after layers {layers} that nothing tuned: what tuned ones gain is more", file=sys.stderr)
    exits = [ExitConfig(layer, "norm", tied=True) for layer in layers]
    return *attach_exits(config, params, exits, jax.random.key(0)), True


def _guarantee_text(guarantee: "Guarantee") -> str:
    """What is guaranteed, or how much text is missing, and the figures behind it."""
    g = guarantee
    lines = ["", f"guaranteed: {g.statement}" if g.achieved else g.statement]
    if not g.achieved and g.more_sequences:
        lines.append("  rows are sequences: raise --tokens, lower --seq-len, or lower --target")
    if g.tested:
        thresholds = "these thresholds" if g.achieved else "the most cautious thresholds"
        lines += [
            f"  tested on {g.sequences} sequences: {g.accepted} of {g.tested} candidates passed; p-value of "
            f"{thresholds} {g.p_value:.3g}",
            f"  agreement {g.agreement:.4f}, alone at least {g.agreement_bound:.4f} with probability "
            f"{1 - g.epsilon:g}",
            f"  sequences below {g.target:g}: share {g.below:.4f}, alone at most {g.below_bound:.4f} with "
            f"probability {1 - g.epsilon:g}",
            f"  by one token of each sequence: agreement alone at least {g.token_bound:.4f} with probability "
            f"{1 - g.epsilon:g}",
            f"  worst tenth of the sequences: mean agreement {g.worst_decile:.4f}",
        ]
    return "\n".join(lines)


def _forecast_table(config: "ModelConfig", policy: "ConfidenceExit", window: int) -> str:
    """Predicted speed-up of every point of the curve, and what looking at an exit costs."""
    import jax

    from elastic_lm.depth import forecasting as forecast
    from elastic_lm.depth.threshold_search import Outcome

    further = forecast.CPU_FURTHER_POSITION if jax.default_backend() == "cpu" else 0.0
    lines = ["", f"forecast at batch size 1, window {window}, a further deep position costs {further:g}:"]
    lines.append("target   speed-up   layers    heads   verdict")
    found = None
    for point in policy.curve:
        outcome = Outcome(point.agreement, point.mean_layers, point.shares)
        gated = policy.metric == "learned" or any(policy.gates)
        found = forecast.of_outcome(
            config,
            point.thresholds,
            outcome,
            looked=point.looked,
            gated=gated,
            window=window,
            further=further,
        )
        row = f"{point.target:<7g} {found.speedup:>9.2f} {found.segments:>8.3f} {found.heads:>8.3f}"
        lines.append(f"{row}   {found.verdict}")
    lines.append("layers and heads: share of the full model's cost of a token")
    if found:
        layers = [e.layer for e in config.exits if e.layer < config.n_layers]
        checks = zip(layers, found.check, found.gated_check, strict=True)
        lines += [f"exit {n}: its head costs {head:.3f}, a gate {gate:.4f}" for n, head, gate in checks]
    return "\n".join(lines)


def evaluate(args: argparse.Namespace) -> None:
    """Quality of every depth, and of an exit policy."""
    from elastic_lm.cli.held_out import held_out_batches, load_with_tokenizer
    from elastic_lm.depth import quality
    from elastic_lm.depth.observations import observe
    from elastic_lm.depth.policies import ConfidenceExit
    from elastic_lm.depth.threshold_search import outcome
    from elastic_lm.files.atomic import prepare_output

    policy = ConfidenceExit.load(args.thresholds) if args.thresholds else None
    prepare_output(args.json)
    model, params, tokenizer, folder = load_with_tokenizer(args.model)
    if policy:
        policy.check(model.config)
    batches, text = held_out_batches(args, tokenizer, "test")
    metric = policy.metric if policy else "max_prob"
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
        found = outcome(seen.confidence, seen.agrees, layers, policy.thresholds)
        result["policy"] = {"thresholds": policy.thresholds, "metric": metric, **dataclasses.asdict(found)}
    if args.json and args.json != "-":
        Path(args.json).write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2) if args.json == "-" else _quality_table(result))


def _quality_table(result: dict[str, Any]) -> str:
    """Perplexity, accuracy and agreement per depth; the policy's line where there is one."""
    lines = ["layers   perplexity   nats/byte   accuracy   agreement"]
    lines += [
        f"{d['layers']:<6d} {d['perplexity']:>12.4f} {d['nats_per_byte']:>11.4f} "
        f"{d['accuracy']:>10.4f} {d['agreement']:>11.4f}"
        for d in result["depths"]
    ]
    if "policy" in result:
        policy = result["policy"]
        shares = ", ".join(f"{share:.3f}" for share in policy["shares"])
        depth = f"mean {policy['mean_layers']:.2f} layers, shares {shares}"
        lines.append(f"with exits: agreement {policy['agreement']:.4f}, {depth}")
    return "\n".join(lines)


def generate(args: argparse.Namespace) -> None:
    """Continues prompts."""
    from elastic_lm.cli import generate as generation

    generation.run(args)


def route(args: argparse.Namespace) -> None:
    """Fits the rule of a cascade, or answers rows by one."""
    from elastic_lm.cli.cascade import run as commands

    commands.run(args)


def bench(args: argparse.Namespace) -> None:
    """Runs a benchmark."""
    from elastic_lm.bench import report
    from elastic_lm.files.atomic import partial_path, prepare_output

    prepare_output(args.json)
    partial = partial_path(args.json) if args.json else None

    def keep(result: dict) -> None:
        row = result["rows"][-1]
        print(f"{row['name']} {row['ratio']:.3f}", file=sys.stderr, flush=True)
        if partial:  # what is measured stays, also where a later row fails
            with contextlib.suppress(OSError):
                report.save(result, partial)

    result = report.run(args.name, report.Options(args.tiny, args.rounds, args.seed, args.model), keep)
    print(report.table(result))
    if args.json:
        report.save(result, args.json)  # over what was kept
        print(f"written to {args.json}", file=sys.stderr)


def latency(args: argparse.Namespace) -> None:
    """Builds a latency table, or checks one."""
    from elastic_lm.bench import latency_verify as verify
    from elastic_lm.bench import report
    from elastic_lm.cost.latency_table import LatencyTable
    from elastic_lm.files.atomic import prepare_output
    from elastic_lm.report import machine
    from elastic_lm.report.writers import ProgressWriter

    _check_latency(args)
    out = args.out or ("latency.json" if args.action == "build" else None)
    for path in (out, args.json):
        prepare_output(path)
    table = LatencyTable.load(args.table) if args.table else None
    config, params = _timed_model(args)
    if table is None:
        table = _built_table(args, config, params)
    else:
        table.check(config, source=args.table)
    if out:
        table.save(out)
        print(f"written to {out}", file=sys.stderr)
    if args.action == "build":
        print(table.text())
        return
    how = {"rounds": args.rounds, "seed": args.seed, "progress": ProgressWriter}
    count = 20 if args.subnets is None else args.subnets
    rows, checked = verify.verify(table, config, params=params, count=count, **how)
    result = {
        "rows": [dataclasses.asdict(row) for row in rows],
        "hardware": machine.hardware(),
        "versions": machine.versions(),
        "options": {name: getattr(args, name) for name in ("model", "table", "tiny", "rounds", "seed")},
        "workload": dataclasses.asdict(table.workload),
        "residuals": dict(table.residuals),
        "subnets": [dataclasses.asdict(c) for c in checked],
    }
    print(verify.text(checked))
    print(report.table(result))
    if args.json:
        report.save(result, args.json)
        print(f"written to {args.json}", file=sys.stderr)


def _check_latency(args: argparse.Namespace) -> None:
    """Refuses flags of `latency` that do not go together.

    Raises:
      ValueError: names the flag and the fix.
    """
    given = [name for name in ("table", "subnets", "json") if getattr(args, name) is not None]
    if args.action == "build" and given:
        raise ValueError(f"--{given[0]} {getattr(args, given[0])}: goes with `latency verify`; leave it out")
    built = ("out", "batch", "context", "mlp", "heads", "groups")
    given = [name for name in built if getattr(args, name) is not None]
    if args.table and given:
        value = getattr(args, given[0])
        raise ValueError(f"--{given[0]} {value}: is settled by --table {args.table}; leave one of them out")
    for name in ("subnets", "rounds"):
        if (number := getattr(args, name)) is not None and number < 1:
            raise ValueError(f"--{name} {number}: must be at least 1")
    if args.tiny and args.model:
        raise ValueError(f"--tiny: stands for a model of its own; leave it or --model {args.model} out")


def _timed_model(args: argparse.Namespace) -> "tuple[ModelConfig, Params | None]":
    """The model that --model names, or one without parameters, which are then random."""
    from elastic_lm.bench.model import random_model
    from elastic_lm.checkpoints.loading import load_decoder

    if not args.model:
        return random_model(args.tiny), None
    model, params = load_decoder(args.model)
    return model.config, params


def _built_table(args: argparse.Namespace, config: "ModelConfig", params: "Params | None") -> "LatencyTable":
    """The table of the workload and menu that the flags describe."""
    from elastic_lm.bench.latency_build import build, default_menu
    from elastic_lm.checkpoints.native import load_menu
    from elastic_lm.cost.counted import Workload
    from elastic_lm.report.writers import ProgressWriter

    menu = default_menu(config)
    if args.model:
        with contextlib.suppress(FileNotFoundError):
            menu = load_menu(args.model)
    shares = {name: getattr(args, name) for name in ("mlp", "heads", "groups")}
    menu = dataclasses.replace(menu, **{k: v for k, v in shares.items() if v is not None})
    given = {name: getattr(args, name) for name in ("batch", "context")}
    load = Workload(**{"context": 128, **{k: v for k, v in given.items() if v is not None}})
    how = {"rounds": args.rounds, "seed": args.seed, "progress": ProgressWriter}
    return build(config, menu, load, params=params, **how)


def _tokenizer(folder: str):
    """The tokenizer of a model folder, or None where it has no tokenizer.json."""
    from elastic_lm.data.tokenizer import Tokenizer

    try:
        return Tokenizer.load(folder)
    except FileNotFoundError:
        print(f"{folder} has no tokenizer.json: only the model is written", file=sys.stderr)
        return None


def _count(params) -> str:
    import jax

    return f"{sum(leaf.size for leaf in jax.tree.leaves(params)):,}"
