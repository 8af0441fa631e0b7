"""Sorted LLaMA in small: plain fine-tuning, separate heads after it, sorted fine-tuning, on instructions.

COMMAND   python experiments/sorted_llama/prepare.py --source FOLDER --out data/english
          python experiments/sorted_llama/run.py --base runs/english/model --data data/english \\
              --out runs/sorted_english --seeds 0 1 2 --steps 100
HARDWARE  CPU
DURATION  ten to twenty minutes of compilation and measurement for the first seed on one busy core, less for
          later ones, and a few seconds per step of each fine-tuning (embedded model)
EXPECTED  at smaller depths the loss of soft is below that of sft+ict, which is below that of sft; at full
          depth soft is close to sft

    sft       the full model's loss alone; its sub-models are its first n layers, final norm and head
    sft+ict   then a norm and a vocabulary head of its own for every smaller depth, on the frozen sft model
    soft      the mean of the losses of all sub-models, which share norm and head

Rows hold whole records (`packing="first_fit"`): prompt, response, ending id, cut after --seq-len tokens.
Only responses and their ending ids count, in training and in every number below. Every number of one depth
is of greedy or teacher-forced text of the model that ends there. Finished fine-tunings are kept in
OUT/seed_SEED/NAME and measured seeds in OUT/seed_SEED/numbers.json, so the same command goes on after a stop.

Paper: Sorted LLaMA, arXiv 2309.08968.
"""

import argparse
import dataclasses
import functools
import itertools
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from report import plot, tables

import elastic_lm as el
from elastic_lm.checkpoints.loading import load_decoder
from elastic_lm.data import Batch
from elastic_lm.decode import generated
from elastic_lm.decode.results import Sample
from elastic_lm.depth.calibration import fit_thresholds
from elastic_lm.depth.threshold_search import exit_outcome
from elastic_lm.models.decoder import Params
from elastic_lm.quickstart import measure
from elastic_lm.report.machine import hardware, versions
from elastic_lm.train.run import MODEL_FOLDER

Model = tuple[el.ModelConfig, Params]
Numbers = dict[str, Any]

THRESHOLDS = (0.95, 0.90, 0.80)  # max_prob, falling with depth as in the paper
WINDOW = 16
TARGET = 0.95  # agreement that thresholds are calibrated for
RECORDS, NEW_TOKENS = 48, 48  # generated answers and their length
ROWS = 16  # answers checked against full depth at a time
TIMED, ROUNDS = 8, 5


def main() -> None:
    """Runs every seed; rewrites results.json after each, then prints the tables and draws depths.png."""
    args = parse()
    out = Path(args.out)
    base = str(el.embedded_model()) if args.base == "embedded" else args.base
    check(args, out)
    result: Numbers = {"args": vars(args), "hardware": hardware(), "versions": versions(), "runs": []}
    for seed in args.seeds:
        kept = out / f"seed_{seed}" / "numbers.json"
        if not kept.is_file():
            numbers = one_seed(args, base, kept.parent, seed)
            kept.write_text(json.dumps(numbers, indent=1) + "\n")
        result["runs"].append(json.loads(kept.read_text()))
        result["tables"] = tables(result["runs"])
        (out / "results.json").write_text(json.dumps(result, indent=1) + "\n")
    print(result["tables"])
    plot(result["runs"], out / "depths.png")


def parse() -> argparse.Namespace:
    """Flags of this study."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--base", default="embedded", help="model folder, or embedded")
    parser.add_argument("--data", default="data/english", help="folder made by prepare.py")
    parser.add_argument("--out", default="runs/sorted_english")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=100, help="of sft, of soft, and again of the heads")
    parser.add_argument("--lr", type=float, default=5e-4, help="of sft and soft")
    parser.add_argument("--ict-lr", type=float, default=1e-3, help="of the separate heads")
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=8)
    return parser.parse_args()


def check(args: argparse.Namespace, out: Path) -> None:
    """Refuses missing data, and an output folder of a study with other flags.

    Raises:
      FileNotFoundError: --data lacks a file that prepare.py writes.
      ValueError: OUT/study.json has other flags.
    """
    for file in files(args):
        if not file.is_file():
            raise FileNotFoundError(
                f"{file}: no such file; make it with `python experiments/sorted_llama/prepare.py --source "
                f"FOLDER --out {args.data}`"
            )
    flags = {name: value for name, value in vars(args).items() if name not in ("out", "seeds")}
    kept = out / "study.json"
    if kept.is_file() and (old := json.loads(kept.read_text())) != flags:
        raise ValueError(f"{kept}: the study there has the flags {old}, not {flags}; choose another --out")
    out.mkdir(parents=True, exist_ok=True)
    kept.write_text(json.dumps(flags, indent=1) + "\n")


def files(args: argparse.Namespace) -> tuple[Path, Path]:
    """Training and held-out records."""
    folder = Path(args.data)
    return folder / "instructions_train.jsonl", folder / "instructions_held_out.jsonl"


def one_seed(args: argparse.Namespace, base: str, folder: Path, seed: int) -> Numbers:
    """Fine-tunes in every way and measures every depth."""
    began = time.perf_counter()
    models = fine_tuned(args, base, folder, seed)
    trained = time.perf_counter()
    tokenizer = el.Tokenizer.load(base)
    batches = list(held_out(args, tokenizer))
    records = [json.loads(line) for line in files(args)[1].read_text().splitlines()[:RECORDS]]
    seen = {name: observed(model, batches) for name, model in models.items()}
    run: Numbers = {"seed": seed, "tokens": len(seen["sft"].targets), "base": base_loss(base, batches)}
    run["identity"] = {name: identity(model, batches[0]) for name, model in models.items()}
    run["depths"] = {
        name: depth_rows(model, seen[name], seen["sft"].choice[:, -1], tokenizer, records)
        for name, model in models.items()
    }
    depths_done = time.perf_counter()
    exits = tuple(e.layer for e in models["soft"][0].exits)
    fixed = el.ConfidenceExit("max_prob", THRESHOLDS, exits)
    fitted, run["calibrated"] = calibrated(models["soft"], batches, seed)
    run["dynamic"] = {
        "sft+ict, the paper's thresholds": dynamic(models["sft+ict"], fixed, tokenizer, records),
        "soft, the paper's thresholds": dynamic(models["soft"], fixed, tokenizer, records),
        "soft, calibrated": dynamic(models["soft"], fitted, tokenizer, records),
    }
    run["seconds"] = {
        "fine-tuning": trained - began,
        "depths": depths_done - trained,
        "dynamic": time.perf_counter() - depths_done,
    }
    print(json.dumps(run, indent=1), flush=True)
    return run


def fine_tuned(args: argparse.Namespace, base: str, folder: Path, seed: int) -> dict[str, Model]:
    """The three models, each with an exit at every smaller depth.

    Exits of sft and soft are copies of the final norm before the shared head: the same as the sub-models.
    """
    depths = sub_depths(load_decoder(base)[0].config.n_layers)
    plain = el.TrainConfig(
        init_from=base,
        steps=args.steps,
        lr=args.lr,
        warmup=args.steps // 10,
        weight_decay=0.1,
        eval_every=0,
        save_every=50,
        keep=1,
        seed=seed,
    )
    sft = el.RunConfig(data=dataclasses.replace(data_config(args), seed=seed), train=plain)
    heads = dataclasses.replace(
        plain, init_from=str(folder / "sft" / MODEL_FOLDER), lr=args.ict_lr, weight_decay=0.0
    )
    runs = {
        "sft": sft,
        "sft+ict": dataclasses.replace(
            sft,
            exits=tuple(el.ExitConfig(n, "norm") for n in depths[:-1]),
            method=el.depth.EETuningConfig(),
            train=heads,
        ),
        "soft": dataclasses.replace(sft, method=el.depth.SortedFineTuningConfig(depths=depths)),
    }
    models = {name: finished(run, folder / name) for name, run in runs.items()}

    shared = [el.ExitConfig(n, "norm", tied=True) for n in depths[:-1]]
    for name in ("sft", "soft"):
        models[name] = el.attach_exits(*models[name], shared, jax.random.key(seed))
    return models


def sub_depths(n_layers: int) -> tuple[int, ...]:
    """Four evenly spaced depths, the full one included."""
    return tuple(n_layers * i // 4 for i in range(1, 5))


def finished(run: el.RunConfig, folder: Path) -> Model:
    """The trained model, from `folder` where it is finished."""
    if (folder / MODEL_FOLDER).is_dir():
        decoder, params = load_decoder(folder / MODEL_FOLDER)
        return decoder.config, params
    config, params, _ = el.train.fit(run, folder)
    return config, params


def data_config(args: argparse.Namespace) -> el.DataConfig:
    """Whole records in rows; held-out ones are read by `held_out` alone."""
    return el.DataConfig(
        source="instruction",
        paths=(str(files(args)[0]),),
        seq_len=args.seq_len,
        batch_size=args.batch_size,
        packing="first_fit",
    )


def held_out(args: argparse.Namespace, tokenizer: el.Tokenizer) -> Iterator[Batch]:
    """Every held-out record."""
    data = dataclasses.replace(data_config(args), eval_paths=(str(files(args)[1]),))
    return (Batch(**arrays) for arrays in el.data.eval_batches(data, tokenizer))


@dataclasses.dataclass(frozen=True)
class Seen:
    """Every depth on the held-out response tokens; D depths, N tokens.

    Attributes:
      nats: [N, D] cross-entropy.
      choice: [N, D] the likeliest token.
      targets: [N] the text's token.
    """

    nats: np.ndarray
    choice: np.ndarray
    targets: np.ndarray


def observed(model: Model, batches: Sequence[Batch]) -> Seen:
    """Runs all held-out batches through every depth."""
    parts = []
    for batch in batches:
        nats, choice = jax.device_get(every_depth(*model, batch))
        counted = np.asarray(batch.weights) > 0
        parts.append((nats[counted], choice[counted], np.asarray(batch.targets)[counted]))
    return Seen(*(np.concatenate(column) for column in zip(*parts, strict=True)))


@functools.partial(jax.jit, static_argnames="config")
def every_depth(config: el.ModelConfig, params: Params, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """Cross-entropy and likeliest token of every exit and of the full model: [B, T, D] each."""
    output = el.Decoder(config).bind({"params": params})(batch.tokens, batch.positions, batch.segments)
    nats, choice = [], []
    for logits in (*output.exit_logits, output.logits):
        target = jnp.take_along_axis(logits, batch.targets[..., None], axis=-1)[..., 0]
        nats.append(jax.nn.logsumexp(logits, axis=-1) - target)
        choice.append(jnp.argmax(logits, axis=-1))
    return jnp.stack(nats, axis=-1), jnp.stack(choice, axis=-1)


def base_loss(base: str, batches: Sequence[Batch]) -> float:
    """Nats per response token of the model before any fine-tuning, at full depth."""
    decoder, params = load_decoder(base)
    return float(observed((decoder.config.with_exits(()), params), batches).nats.mean())


def sub_models(model: Model) -> list[Model]:
    """One model without exits per depth: the layers up to an exit, its norm and its head."""
    config, params = model
    found = []
    for e in config.exits:
        small, kept = el.depth.extract(config, params, e.layer)
        own = params[e.name]
        kept["final_norm"] = own["norm"]
        if "head" in own:
            small, kept["head"] = dataclasses.replace(small, tied=False), own["head"]
        found.append((small, kept))
    return [*found, el.depth.extract(config, params, config.n_layers)]


def identity(model: Model, batch: Batch) -> float:
    """Largest difference in nats between an exit and the model that ends there.

    Raises:
      AssertionError: it is more than rounding.
    """
    nats, _ = every_depth(*model, batch)
    alone = jnp.concatenate([every_depth(*small, batch)[0] for small in sub_models(model)], axis=-1)
    np.testing.assert_allclose(nats, alone, rtol=1e-3, atol=1e-3)
    return float(jnp.max(jnp.abs(nats - alone)))


def depth_rows(
    model: Model, seen: Seen, sft: np.ndarray, tokenizer: el.Tokenizer, records: Sequence[dict]
) -> list[Numbers]:
    """Quality of every depth; `sft` [N] are the tokens of the plainly fine-tuned full model."""
    rows = []
    for i, (config, params) in enumerate(sub_models(model)):
        choice = seen.choice[:, i]
        sampler = el.Sampler(el.Decoder(config), params, tokenizer)
        prompts: list[str] = [record["prompt"] for record in records]
        texts = [sample.text for sample in sampler.sample(prompts, NEW_TOKENS)]
        rows.append(
            {
                "layers": config.n_layers,
                "loss": float(seen.nats[:, i].mean()),
                "accuracy": float((choice == seen.targets).mean()),
                "agreement": float((choice == seen.choice[:, -1]).mean()),
                "agreement_sft": float((choice == sft).mean()),
                **answers(texts, records),
            }
        )
    return rows


def answers(texts: Sequence[str], records: Sequence[dict]) -> dict[str, float]:
    """Mean ROUGE-L and share of exact matches of generated texts."""
    pairs = [(text, record["response"]) for text, record in zip(texts, records, strict=True)]
    return {
        "rouge_l": float(np.mean([rouge_l(*pair) for pair in pairs])),
        "exact_match": float(np.mean([text.strip() == wanted.strip() for text, wanted in pairs])),
    }


def rouge_l(text: str, reference: str) -> float:
    """F1 of the longest common subsequence of lower-cased words."""
    words, wanted = text.lower().split(), reference.lower().split()
    lengths = [0] * (len(wanted) + 1)
    for word in words:
        before = lengths
        lengths = [0]
        for j, other in enumerate(wanted):
            lengths.append(before[j] + 1 if word == other else max(before[j + 1], lengths[j]))
    return 2 * lengths[-1] / max(len(words) + len(wanted), 1)


def dynamic(
    model: Model, policy: el.ConfidenceExit, tokenizer: el.Tokenizer, records: Sequence[dict]
) -> Numbers:
    """Each token leaves at the first depth that is sure of it: answers one by one, and their speed."""
    config, params = model
    full_config, full_params = el.depth.extract(config, params, config.n_layers)
    samplers = {
        "dynamic": el.Sampler(el.Decoder(config), params, tokenizer, exit=policy, window=WINDOW),
        "full": el.Sampler(el.Decoder(full_config), full_params, tokenizer),
    }
    prompts = [tokenizer.encode(record["prompt"], bos=True) for record in records]
    found = {name: [s.sample(p, NEW_TOKENS) for p in prompts] for name, s in samplers.items()}
    timed = measure.generate(samplers, prompts[:TIMED], NEW_TOKENS, ROUNDS)
    emitted = found["dynamic"]
    return {
        "mean_layers": float(np.mean([depth for sample in emitted for depth in sample.exit_layers])),
        "agreement": agreement(full_config, full_params, prompts, emitted),
        "same_text": same_tokens(emitted, found["full"]),
        **answers([sample.text for sample in emitted], records),
        "timed_mean_layers": timed["dynamic"].mean_layers,
        "tokens_per_s": timed["dynamic"].tokens_per_s,
        "full_tokens_per_s": timed["full"].tokens_per_s,
        "speedup": timed["dynamic"].speedup(timed["full"]),
    }


def agreement(
    config: el.ModelConfig, params: Params, prompts: Sequence[list[int]], samples: Sequence[Sample]
) -> float:
    """Share of emitted tokens that full depth chooses after the same tokens."""
    texts = [sample.tokens for sample in samples]
    agrees = [
        generated.agreeing(config, params, prompts[i : i + ROWS], texts[i : i + ROWS])
        for i in range(0, len(texts), ROWS)
    ]
    return float(np.concatenate(agrees).mean())


def same_tokens(samples: Sequence[Sample], full: Sequence[Sample]) -> float:
    """Share of positions where a text equals full depth's own text; the longer one's positions count."""
    pairs = [itertools.zip_longest(a.tokens, b.tokens) for a, b in zip(samples, full, strict=True)]
    return float(np.mean([x == y for pair in pairs for x, y in pair]))


def calibrated(model: Model, batches: Sequence[Batch], seed: int) -> tuple[el.ConfidenceExit, Numbers]:
    """Thresholds from half of the held-out rows, measured on the other half, teacher-forced."""
    config, params = model
    first, second = el.depth.observe(config, params, batches, metric="margin").halves(seed)
    policy = fit_thresholds(first, target=TARGET, metric="margin", seed=seed)
    depths = (*second.layers, second.n_layers)
    result = exit_outcome(second.confidence, second.agrees, depths, policy.thresholds)
    return policy, {"target": TARGET, "thresholds": policy.thresholds, **dataclasses.asdict(result)}


if __name__ == "__main__":
    main()
