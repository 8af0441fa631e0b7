"""EE-Tuning on real weights, the whole chain: tune exits, calibrate, test, generate; several seeds.

COMMAND   ELASTIC_LM_SHARED=DIR python experiments/ee_tuning/run.py --out runs/ee_tuning
HARDWARE  CPU
DURATION  about twenty minutes when nothing else runs (estimated)
EXPECTED  README.md beside this file

DIR holds data/weights/stories260K (a Hugging Face folder) and data/text/tinystories_cased_0.9MB.txt.
"""

import argparse
import dataclasses
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

import elastic_lm as el
from elastic_lm.decode import generated
from elastic_lm.depth.threshold_search import exit_outcome
from elastic_lm.models.decoder import Params
from elastic_lm.quickstart import measure
from elastic_lm.report.machine import hardware, versions

METRICS = ("max_prob", "margin", "entropy")  # these exits have no gates
TARGETS = (0.9, 0.95, 0.98, 0.99, 0.995)
SPLITS = {"train": range(6), "calibration": range(6, 8), "test": range(8, 10)}  # story number mod 10
FULL = "full depth"


def main() -> None:
    """Runs every seed and writes results.json."""
    args = parse()
    out = Path(args.out)
    shared = Path(os.environ["ELASTIC_LM_SHARED"]) / "data"
    weights = shared / "weights" / "stories260K"
    write_stories(shared / "text" / "tinystories_cased_0.9MB.txt", out)
    (out / "tokenizer").mkdir(exist_ok=True)
    shutil.copy(weights / "tokenizer.json", out / "tokenizer")  # alone: stories end without an end token
    result: dict[str, Any] = {
        "args": vars(args),
        "hardware": hardware(),
        "versions": versions(),
        "before": before_tuning(args, weights, out),
        "runs": [],
    }
    for seed in range(args.seeds):
        result["runs"].append(one_seed(args, weights, out, seed))
        (out / "results.json").write_text(json.dumps(result, indent=1) + "\n")


def parse() -> argparse.Namespace:
    """Flags of this study."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", default="runs/ee_tuning")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--layers", type=int, nargs="+", default=[2, 3])
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    return parser.parse_args()


def write_stories(file: Path, out: Path) -> None:
    """Splits the stories (single newline between them, blank line between paragraphs) into JSON lines."""
    text = file.read_text(encoding="utf-8").replace("\n\n", "\0")
    stories = [line.replace("\0", "\n\n") for line in text.split("\n") if len(line) > 200]
    out.mkdir(parents=True, exist_ok=True)
    for split, residues in SPLITS.items():
        kept = [story for i, story in enumerate(stories) if i % 10 in residues]
        (out / f"{split}.jsonl").write_text("".join(json.dumps({"text": s}) + "\n" for s in kept))


def data_config(out: Path, held_out: str, seed: int = 0) -> el.DataConfig:
    """Whole stories in rows of 512 tokens; `held_out` names the split that evaluation reads."""
    return el.DataConfig(
        source="jsonl",
        paths=(str(out / "train.jsonl"),),
        eval_paths=(str(out / f"{held_out}.jsonl"),),
        tokenizer=str(out / "tokenizer"),
        seq_len=512,
        batch_size=4,
        packing="first_fit",
        seed=seed,
    )


def tune(args: argparse.Namespace, weights: Path, out: Path, seed: int) -> tuple[el.ModelConfig, Params]:
    """Exits with their own MLP and head, copied from the model and tuned on the training stories."""
    train = el.TrainConfig(
        init_from=str(weights),
        steps=args.steps,
        lr=args.lr,
        warmup=20,
        weight_decay=0.0,
        seed=seed,
        log_every=50,
        eval_every=0,
        eval_batches=0,
        save_every=100,
    )
    run = el.RunConfig(
        exits=exits(args),
        data=data_config(out, "test", seed),
        method=el.depth.EETuningConfig(),
        train=train,
    )
    config, params, _ = el.train.fit(run, out / f"seed_{seed}")  # run again, it goes on from its checkpoint
    return config, params


def exits(args: argparse.Namespace) -> tuple[el.ExitConfig, ...]:
    """The exits of this study."""
    return tuple(el.ExitConfig(layer, "mlp") for layer in args.layers)


def one_seed(args: argparse.Namespace, weights: Path, out: Path, seed: int) -> dict[str, Any]:
    """Tunes, calibrates, tests and generates with one seed."""
    config, params = tune(args, weights, out, seed)
    tokenizer = el.Tokenizer.load(out / "tokenizer")

    def seen(split: Any, metric: str) -> el.depth.Observations:
        batches = el.data.eval_batches(data_config(out, split), tokenizer, split)
        return el.depth.observe(config, params, batches, metric=metric)

    tested = {metric: seen("test", metric) for metric in METRICS}
    policies = {
        metric: el.depth.calibrate(
            config,
            params,
            el.data.eval_batches(data_config(out, "calibration"), tokenizer, "calibration"),
            target=0.99,
            metric=metric,
            targets=TARGETS,
            model="stories260K",
            data="TinyStories, stories 6 and 7 of every 10",
            seed=seed,
        )
        for metric in METRICS
    }
    policies["max_prob"].save(out / f"seed_{seed}" / "thresholds.json")
    depths = (*(e.layer for e in config.exits), config.n_layers)
    teacher_forced = {
        metric: [
            {
                "target": point.target,
                "thresholds": point.thresholds,
                "calibration": point.agreement,
                **dataclasses.asdict(
                    exit_outcome(tested[metric].confidence, tested[metric].agrees, depths, point.thresholds)
                ),
            }
            for point in policy.curve
            if point.target in TARGETS
        ]
        for metric, policy in policies.items()
    }
    return {
        "seed": seed,
        "test_tokens": tested["max_prob"].tokens,
        "calibration_tokens": policies["max_prob"].provenance["data"],
        "depths": [dataclasses.asdict(row) for row in el.evaluate.by_depth(tested["max_prob"])],
        "teacher_forced": teacher_forced,
        "one_threshold": [
            dataclasses.asdict(p) for p in el.evaluate.shared_threshold_curve(tested["max_prob"])
        ],
        "generation": generation(args, config, params, tokenizer, out, policies["max_prob"]),
    }


def generation(
    args: argparse.Namespace,
    config: el.ModelConfig,
    params: Params,
    tokenizer: el.Tokenizer,
    out: Path,
    policy: Any,
) -> list[dict[str, Any]]:
    """Greedy decoding at batch 1, every target against full depth without exits, taking turns."""
    lines = (out / "test.jsonl").read_text().splitlines()[: args.prompts]
    prompts = [tokenizer.encode(json.loads(line)["text"], bos=True)[:24] for line in lines]
    backbone = {name: tree for name, tree in params.items() if not name.startswith("exit_")}
    samplers = {FULL: el.Sampler(el.Decoder(config.with_exits(())), backbone, tokenizer)}
    for target in TARGETS:
        samplers[str(target)] = el.Sampler(el.Decoder(config), params, tokenizer, exit=policy.at(target))
    found = measure.generate(samplers, prompts, args.new_tokens, args.rounds)
    full = found[FULL]
    return [
        {
            "target": target,
            "tokens_per_s": found[str(target)].tokens_per_s,
            "full_tokens_per_s": full.tokens_per_s,
            "speedup": found[str(target)].speedup(full),
            "mean_layers": found[str(target)].mean_layers,
            "agreement": float(
                np.mean(generated.agreeing(config, params, prompts, found[str(target)].texts))
            ),
            "same_as_full_run": same_tokens(found[str(target)].samples, full.samples),
        }
        for target in TARGETS
    ]


def same_tokens(samples: Sequence[Any], full: Sequence[Any]) -> float:
    """Share of positions where a free-running text equals the full model's own free-running text."""
    pairs = [(a.tokens, b.tokens) for a, b in zip(samples, full, strict=True)]
    return float(np.mean([x == y for a, b in pairs for x, y in zip(a, b, strict=True)]))


def before_tuning(args: argparse.Namespace, weights: Path, out: Path) -> list[dict[str, Any]]:
    """Every depth on the test stories with exits that were copied and never trained."""
    import jax

    model, params = el.load(weights)
    config, params = el.attach_exits(model.config, params, exits(args), jax.random.key(0))
    tokenizer = el.Tokenizer.load(out / "tokenizer")
    batches = el.data.eval_batches(data_config(out, "test"), tokenizer, "test")
    return [
        dataclasses.asdict(row) for row in el.evaluate.by_depth(el.depth.observe(config, params, batches))
    ]


if __name__ == "__main__":
    main()
