"""A real model that nobody trained to be elastic, and layers of it that draft for it.

COMMAND   python experiments/sub_network_drafter/drafter.py --model SMOLLM2 --data lambada_test.jsonl.gz \\
              --out runs/sub_network_drafter
HARDWARE  two CPU cores
DURATION  about 15 minutes, most of which is compilation and the search
EXPECTED  README.md beside this file

The knapsack over attention and MLP blocks finds the best drafter of several costs on text that the model
itself wrote (`bench.drafter_plan`), with a forecast for each. Then the model continues other prompts: every
side has to give the tokens of full depth, and the sides take turns, several rounds. Beside the best drafter
stands one that leaves out every third layer, as one would without a search, and the same best drafter whose
drafts are drawn from a preview of the vocabulary head. The exit is fitted in closed form.
"""

import argparse
import functools
import json
import statistics
from pathlib import Path
from typing import Any

import jax

import elastic_lm as el
from elastic_lm.bench.drafter_plan import plan_drafter, to_json
from elastic_lm.bench.timing import interleave
from elastic_lm.checkpoints.loading import load_decoder
from elastic_lm.config.exit_policy import DEFAULT_METRIC
from elastic_lm.data.text_parts import batches, text_parts
from elastic_lm.decode.results import Sample
from elastic_lm.decode.sampler import Sampler
from elastic_lm.depth.fitting import fit_exits
from elastic_lm.depth.observations import observe
from elastic_lm.depth.threshold_search import choose_thresholds
from elastic_lm.report.machine import hardware, versions

PROMPT = 32  # tokens
TARGET = 0.9  # agreement that the exit's threshold keeps
SAMPLED = {"temperature": 0.8, "top_p": 0.95}


def main() -> None:
    """Searches, checks, times, and writes results.json."""
    args = parse()
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    decoder, params = load_decoder(args.model)
    config, tokenizer = decoder.config, el.Tokenizer.load(args.model)
    parts = text_parts(
        args.data, tokenizer, seq_len=128, fit_tokens=args.tokens, test_tokens=args.tokens // 2,
        prompts=args.searched + args.prompts, prompt_tokens=PROMPT, seed=args.seed,
    )  # fmt: skip
    searched, prompts = parts.prompts[: args.searched], parts.prompts[args.searched :]

    plan = plan_drafter(config, params, searched, args.new_tokens, window=args.window)
    print(plan.verdict, flush=True)
    result: dict[str, Any] = {"args": vars(args), "hardware": hardware(), "versions": versions()}
    result["plan"] = to_json(plan)
    write(out, result)

    best = plan.best.candidate
    third = el.Subnet.uniform(config, layers=[i for i in range(config.n_layers) if i % 3 != 1])
    preview, _ = el.depth.fit_preview(config, params, [*batches(parts.fitting)], agreement=0.99, ranks=(64,))
    exit_model, exit_params, policy = with_exit(args, config, params, parts)
    options: dict[str, dict[str, Any]] = {
        "full depth": {},
        "lookup": {"lossless": True, "lookup": True},
        f"exit {policy.layers[0]}": {"lossless": True, "exit": policy},
        "drafter": {"lossless": True, "drafter": best.drafter},
        "drafter, preview": {"lossless": True, "drafter": best.drafter, "preview": preview},
        "every third layer left out": {"lossless": True, "drafter": third},
    }
    samplers = {}
    for name, how in options.items():
        model, weights = (exit_model, exit_params) if "exit" in how else (decoder, params)
        # Copies pay in long pieces, drafts that are computed one by one in short ones.
        window = 16 if how.get("lookup") else args.window
        samplers[name] = Sampler(model, weights, window=window, **how)

    result["checked"] = check(args, samplers, prompts)
    write(out, result)
    result["timed"] = timed(args, samplers, prompts[: args.timed])
    write(out, result)
    print(table(result))


def write(out: Path, result: dict[str, Any]) -> None:
    """Keeps what there is so far."""
    (out / "results.json").write_text(json.dumps(result, indent=1, default=str) + "\n")


def parse() -> argparse.Namespace:
    """The arguments."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", nargs="+", required=True)
    parser.add_argument("--out", default="runs/sub_network_drafter")
    parser.add_argument("--searched", type=int, default=6, help="prompts on which layers are chosen")
    parser.add_argument("--prompts", type=int, default=16, help="others, of which no token may differ")
    parser.add_argument("--timed", type=int, default=6, help="of these, prompts that are timed")
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=4096, help="to fit the exit and the preview on")
    parser.add_argument("--window", type=int, default=4, help="of drafters and exits; lookup has 16")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def with_exit(args: argparse.Namespace, config: Any, params: Any, parts: Any) -> tuple[Any, Any, Any]:
    """The model with an exit after two thirds of its layers, fitted in closed form, and its policy."""
    layer = round(2 * config.n_layers / 3)
    exits = [el.ExitConfig(layer, "linear", tied=True, init="fit")]
    config, params = el.attach_exits(config, params, exits, jax.random.key(args.seed))
    params = fit_exits(config, params, batches(parts.fitting))
    seen = observe(config, params, batches(parts.testing))
    found = choose_thresholds(seen.confidence, seen.agrees, (layer, config.n_layers), [TARGET])
    policy = el.ConfidenceExit(DEFAULT_METRIC, tuple(found[TARGET]), (layer,))
    return el.Decoder(config), params, policy


def check(args: argparse.Namespace, samplers: dict[str, Sampler], prompts: list[list[int]]) -> Any:
    """How many tokens differ from full depth, greedy and sampled, one row and four; has to be none."""
    found: dict[str, Any] = {name: {} for name in samplers}
    for case, settings, rows in (("greedy", {}, 1), ("greedy, batch 4", {}, 4), ("sampled", SAMPLED, 1)):
        few = prompts if case != "sampled" else prompts[:4]
        expected: list[list[int]] = []
        for name, sampler in samplers.items():
            if case != "greedy" and name not in ("full depth", "drafter"):
                continue
            samples: list[Sample] = []
            for i in range(0, len(few), rows):
                samples += sampler.sample(few[i : i + rows], args.new_tokens, ignore_eos=True, **settings)
            tokens = [sample.tokens for sample in samples]
            expected = expected or tokens
            differing = sum(
                a != b for one, other in zip(tokens, expected, strict=True)
                for a, b in zip(one, other, strict=True)
            )  # fmt: skip
            stats = {id(sample.stats): sample.stats for sample in samples}.values()
            drafted = sum(s.drafted for s in stats)
            found[name][case] = {
                "tokens": sum(map(len, tokens)),
                "differing": differing,
                "drafted": drafted,
                "accepted": sum(s.accepted for s in stats),
            }
            print(case, name, found[name][case], flush=True)
    return found


def timed(args: argparse.Namespace, samplers: dict[str, Sampler], prompts: list[list[int]]) -> Any:
    """Ratios to full depth of the same round, one row at a time."""

    def run(sampler: Sampler) -> None:
        for prompt in prompts:
            sampler.sample(prompt, args.new_tokens, ignore_eos=True)

    sides = {name: functools.partial(run, sampler) for name, sampler in samplers.items()}
    seconds = interleave(sides, args.rounds)
    full = seconds["full depth"]
    found: dict[str, Any] = {}
    for name, values in seconds.items():
        ratios = [a / b for a, b in zip(full, values, strict=True)]
        stats = [samplers[name].sample(p, args.new_tokens, ignore_eos=True).stats for p in prompts]
        drafted, accepted = sum(s.drafted for s in stats), sum(s.accepted for s in stats)
        found[name] = {
            "speedup": statistics.median(ratios), "least": min(ratios), "most": max(ratios),
            "seconds": values, "drafted": drafted, "accepted": accepted,
        }  # fmt: skip
    return found


def table(result: dict[str, Any]) -> str:
    """Forecast against measured, in Markdown."""
    lines = ["| side | speed-up (least - most) | drafts accepted |", "|---|---|---|"]
    for name, row in result["timed"].items():
        share = f"{row['accepted']} of {row['drafted']}" if row["drafted"] else ""
        lines.append(f"| {name} | {row['speedup']:.2f} ({row['least']:.2f} - {row['most']:.2f}) | {share} |")
    best = max(result["plan"]["drafters"], key=lambda one: one["forecast"])
    lines.append(
        f"\nforecast of the best drafter: {best['forecast']:.2f}, acceptance {best['acceptance']:.0%}"
    )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
