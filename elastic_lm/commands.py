"""One function per `elastic-lm` command: parsed flags -> config -> one call into the library."""

import argparse
import sys


def quickstart(args: argparse.Namespace) -> None:
    """Runs the main job end to end."""
    from elastic_lm.quickstart.options import from_flags
    from elastic_lm.quickstart.run import run

    run(from_flags(args), colour=args.color)


def convert(args: argparse.Namespace) -> None:
    """Hugging Face folder to elastic checkpoint."""
    from elastic_lm import checkpoint, hf

    config, params = hf.load(args.source, dtype=args.dtype)
    checkpoint.save_model(args.target, config, params, _tokenizer(args.source))
    size = f"{config.n_layers} layers, {_count(params)} parameters"
    print(f"{args.source} -> {args.target}: {config.family}, {size}")


def export(args: argparse.Namespace) -> None:
    """Elastic checkpoint to Hugging Face folder."""
    from elastic_lm import hf
    from elastic_lm.loading import load

    model, params = load(args.source)
    hf.export(model.config, params, args.target, _tokenizer(args.source), overwrite=args.overwrite)
    exits = f" and {len(model.config.exits)} exits" if model.config.exits else ""
    print(f"{args.source} -> {args.target}: {model.config.family}, {_count(params)} parameters{exits}")


def generate(args: argparse.Namespace) -> None:
    """Continues prompts."""
    from elastic_lm import generation

    generation.run(args)


def bench(args: argparse.Namespace) -> None:
    """Runs a benchmark."""
    from elastic_lm.bench import report

    result = report.run(args.name, report.Options(args.tiny, args.rounds, args.seed))
    print(report.table(result))
    if args.json:
        report.save(result, args.json)
        print(f"written to {args.json}", file=sys.stderr)


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
