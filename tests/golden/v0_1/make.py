"""Writes the files of this folder. It runs with elastic_lm 0.1 alone, whose modules had other names.

    python make.py FOLDER CONFIGS

`FOLDER` is emptied first. The files name each other by paths relative to it, so that a run is the same one in
every checkout. `CONFIGS` is the folder `configs/` of that version.
"""

# ruff: noqa: I001  (the modules of 0.1 look like another package's)

import contextlib
import dataclasses
import io
import json
import os
import shutil
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tokenizers
from safetensors.numpy import save_file
from tokenizers import models, pre_tokenizers, processors

import elastic_lm
from elastic_lm import cli
from elastic_lm.calibrate.risk_control import RiskControl
from elastic_lm.calibrate.routing_rule import RoutingRule
from elastic_lm.calibrate.thresholds import ConfidenceExit, calibrate
from elastic_lm.checkpoint import load_menu
from elastic_lm.config import DataConfig, ExitConfig, ModelConfig, RunConfig, TrainConfig
from elastic_lm.data import pipeline
from elastic_lm.data.tokenizer import Tokenizer
from elastic_lm.decode.elastic import Elastic
from elastic_lm.decode.sampler import Sampler
from elastic_lm.elastic import Budget, Subnet
from elastic_lm.encoder_config import EncoderConfig
from elastic_lm.encoder_decoder_config import EncoderDecoderConfig
from elastic_lm.latency_table import LatencyTable
from elastic_lm.loading import load
from elastic_lm.methods.routers import Routers
from elastic_lm.slicing import slice_params
from elastic_lm.task_config import TaskConfig, TaskRun
from elastic_lm.testing import all_logits
from elastic_lm.train.configs import load_config
from elastic_lm.train.identity import save_identity
from elastic_lm.train.run import fit
from elastic_lm.train.tasks import fit_task

STOPPED, STEPS = 4, 8  # steps done in a workdir that is half finished, and of the whole run
LONG = 400  # steps of the models that decode
PROMPT = "def f7(x):\n    return"
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "good", "bad", "film", "plot", "very", "not", "the", "is"]

DECODER = ModelConfig(
    vocab_size=264, d_model=8, n_layers=3, n_heads=4, n_kv_heads=2, d_mlp=16, max_len=64, tied=True
)
DATA = DataConfig(
    source="text", paths=("train.txt",), eval_paths=("held_out.txt",), seq_len=16, batch_size=4, span=200
)
TRAIN = TrainConfig(
    steps=STEPS, lr=1e-3, warmup=1, log_every=2, eval_every=0, eval_batches=2, save_every=STOPPED, keep=2
)
EXITS = (ExitConfig(1, "norm", tied=True, gate=4), ExitConfig(2, "norm", tied=True, gate=4))
TASK = TaskConfig(
    paths=("records.jsonl",), eval_paths=("records.jsonl",), max_len=16, batch_size=8, tokenizer="words.json"
)
ENCODER = EncoderConfig(vocab_size=len(WORDS), d_model=8, n_layers=2, n_heads=2, d_mlp=16, max_len=16)
PAIRS = TaskConfig(
    problem="text_to_text", paths=("pairs.jsonl",), eval_paths=("pairs.jsonl",), text_field="en",
    label_field="de", max_len=16, max_target=16, batch_size=4,
)  # fmt: skip
WRITER = EncoderDecoderConfig(vocab_size=264, d_model=8, n_layers=1, n_heads=2, d_mlp=16)

# Recipes of 0.1 whose run.json today's recipes of the same name have to accept: (file:argument, overrides).
INIT = "train.init_from=models/base"
RECIPES: dict[str, tuple[str, tuple[str, ...]]] = {
    "ee_tuning": ("ee_tuning.py", (INIT, "train.exit_weights=(1.0,0.5)", "train.exit_warmup=20")),
    "layerskip": ("layerskip.py", (INIT,)),
    "layerskip_gradual": ("layerskip.py:gradual", (INIT,)),
    "sorted": ("sorted_finetuning.py", (INIT,)),
    "sorted_sampled": ("sorted_finetuning.py:sortednet", (INIT,)),
    "self_supervised": ("self_supervised_exits.py", (INIT,)),
    "self_supervised_penalised": ("self_supervised_exits.py:penalised", (INIT, "train.imitation=0.8")),
    "self_supervised_cached": ("self_supervised_exits.py:cached", (INIT,)),
    "flextron": ("flextron.py", (INIT,)),
    "routers": ("routers.py:runs/elastic/model", ()),
    "routers_surrogate": ("routers.py:runs/elastic/model,surrogate", ()),
    "routers_joint": ("routers.py:runs/elastic/model,joint", ()),
    "glue": ("glue.py:data/glue,mrpc", ()),
    "glue_taught": ("glue.py:data/glue,sst2", ("train.teacher_from=runs/super/model", "train.distil=0.5")),
    "translation": ("translation.py:data/elang,swift", ()),
    "english": ("english.py:data/english", ()),
    "embedded": ("embedded.py", ()),
}


def main() -> None:
    """Makes everything, one part after the other."""
    out, configs = (Path(arg).absolute() for arg in sys.argv[1:3])
    for path in out.iterdir():
        if path.name not in ("make.py", "README.md"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    os.chdir(out)
    write_data()
    with tempfile.TemporaryDirectory() as scratch:
        numbers = models_that_decode(Path(scratch))
    numbers |= thresholds() | latency() | cascade()
    for name, run in runs().items():
        half_finished(name, run)
    Path("recipes.json").write_text(json.dumps(recipes(configs), separators=(",", ":")) + "\n")
    Path("numbers.json").write_text(json.dumps(numbers, indent=1) + "\n")


def write_data() -> None:
    """Text, labelled records, pairs of texts, rows with choices, and a tokenizer of words."""
    lines = [f"def f{i}(x):\n    return x * {i} + {i * i}\n\n" for i in range(60)]
    Path("train.txt").write_text("".join(lines))
    Path("held_out.txt").write_text("".join(lines[5:45:2]))

    rng = np.random.default_rng(0)
    records = []
    for _ in range(40):
        words, label = rng.choice(WORDS[6:], 4).tolist(), int(rng.integers(2))
        words.insert(int(rng.integers(5)), ("bad", "good")[label])
        records.append({"sentence": " ".join(words), "label": ("neg", "pos")[label]})
    write_lines("records.jsonl", records)
    write_lines("pairs.jsonl", [{"en": f"the film is {w}", "de": f"der Film ist {w}"} for w in WORDS[4:]])

    rows = []
    for i in range(24):
        right = int(rng.integers(3))
        choices = [f" x * {(i + right - c) % 60} + 1" for c in range(3)]
        rows.append({"text": f"def f{i}(x):\n    return", "choices": choices, "label": right})
    write_lines("rows.jsonl", rows)

    words = {word: i for i, word in enumerate(WORDS)}
    backend = tokenizers.Tokenizer(models.WordPiece(words, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    backend.add_special_tokens(WORDS[:4])
    backend.save("words.json", pretty=False)


def write_lines(file: str, rows: list[dict[str, Any]]) -> None:
    Path(file).write_text("".join(json.dumps(row) + "\n" for row in rows))


def models_that_decode(scratch: Path) -> dict[str, Any]:
    """models/base, models/exits with gates, and models/elastic with menu and routers; what they compute."""
    long = dataclasses.replace(TRAIN, steps=LONG, lr=1e-2, warmup=10, save_every=LONG)
    keep(fit(RunConfig(DECODER, data=DATA, train=long), scratch / "base"), scratch / "base", "base")
    start = dataclasses.replace(long, init_from="models/base")
    exits = dataclasses.replace(start, method="self_supervised_exits")
    keep(fit(RunConfig(exits=EXITS, data=DATA, train=exits), scratch / "exits"), scratch / "exits", "exits")
    widths = dataclasses.replace(start, method="flextron", menu_mlp=(0.25, 0.5, 1.0), menu_heads=(0.5, 1.0))
    fit(RunConfig(data=DATA, train=dataclasses.replace(widths, elastic_groups=4)), scratch / "elastic")
    routers = dataclasses.replace(
        long, method="routers", init_from=str(scratch / "elastic" / "model"), router_width=8,
        budgets=(0.8, 0.9, 1.0),
    )  # fmt: skip
    keep(fit(RunConfig(data=DATA, train=routers), scratch / "routers"), scratch / "routers", "elastic")

    arrays: dict[str, np.ndarray] = {}
    numbers: dict[str, Any] = {"version": elastic_lm.__version__, "prompt": PROMPT}
    for name in ("base", "exits", "elastic"):
        model, params = load(f"models/{name}")
        tokens = np.asarray([Tokenizer.load(f"models/{name}").encode(PROMPT)], np.int32)
        numbers["tokens"] = tokens[0].tolist()
        for depth, logits in all_logits(model.config, params, tokens).items():
            arrays[f"{name}/depth_{depth}"] = np.asarray(logits[0, -1])
    numbers |= widths_of(arrays)
    save_file(arrays, "logits.safetensors")
    return numbers


def keep(_: Any, workdir: Path, name: str) -> None:
    """Copies a finished model, without what only its training needed."""
    shutil.copytree(workdir / "model", Path("models") / name)


def widths_of(arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    """Sub-networks that the routers and the search choose, and what the former compute."""
    model, params = load("models/elastic")
    chosen, tokenizer = Elastic.load("models/elastic", model.config), Tokenizer.load("models/elastic")
    routers = Routers.load("models/elastic", model.config)
    found: dict[str, Any] = {"menu": dataclasses.asdict(load_menu("models/elastic")), "routed": [], "own": []}
    for share in (0.8, 0.85, 0.9, 1.0):
        budget = Budget(parameters=share * chosen.costs("parameters").range(chosen.menu)[1])
        subnet = chosen.subnet(budget)
        found["routed"].append({"share": share, "subnet": dataclasses.asdict(subnet)})
        found["own"].append(dataclasses.asdict(routers.own(budget)))
        tokens = np.asarray([tokenizer.encode(PROMPT)], np.int32)
        config, sliced = slice_params(model.config, params, subnet)
        logits = all_logits(config, sliced, tokens)[config.n_layers]
        arrays[f"elastic/share_{share}"] = np.asarray(logits[0, -1])
    least, whole = chosen.costs("flops").range(chosen.menu)
    budget = Budget(flops=(least + whole) / 2)
    sampler = Sampler(model, params, tokenizer, elastic=chosen)
    sample = sampler.sample(PROMPT, 8, budget=budget)
    found |= {"flops": budget.flops, "searched": dataclasses.asdict(chosen.subnet(budget))}
    return {"widths": {**found, "generated": sample.tokens}}


def thresholds() -> dict[str, Any]:
    """Files of thresholds: plain, with gates and with a guarantee; and what decoding by them gives."""
    model, params = load("models/exits")
    tokenizer = Tokenizer.load("models/exits")
    batches = list(pipeline.eval_batches(DATA, tokenizer))
    made: dict[str, ConfidenceExit] = {}
    how: dict[str, dict[str, Any]] = {
        "plain": {"target": 0.97, "metric": "max_prob"},
        "gated": {"target": 0.97, "metric": "margin"},
        "learned": {"target": 0.8, "metric": "learned"},
        "guaranteed": {"risk": RiskControl(0.8, 0.2, 0.9), "metric": "margin"},
    }
    plain = dataclasses.replace(model.config, exits=tuple(dataclasses.replace(e, gate=0) for e in EXITS))
    for name, options in how.items():
        config = plain if name == "plain" else model.config
        made[name] = calibrate(config, params, batches, targets=(0.6, 0.95), model="exits", **options)
    found = {}
    Path("thresholds").mkdir()
    sampler = Sampler(model, params, tokenizer)
    for name, policy in made.items():
        policy.save(f"thresholds/{name}.json")
        sample = sampler.sample(PROMPT, 12, exit=policy, ignore_eos=True)
        found[name] = {
            "thresholds": policy.thresholds,
            "at_0.6": policy.at(0.6).thresholds,
            "gates": policy.gates,
            "achieved": policy.guarantee and policy.guarantee.achieved,
            "tokens": sample.tokens,
            "exit_layers": sample.exit_layers,
        }
    return {"thresholds": found}


def command(*words: str) -> str:
    """Runs `elastic-lm` and returns what it printed."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert cli.main(words) == 0, words
    return printed.getvalue()


def latency() -> dict[str, Any]:
    """A latency table of models/elastic, and what is chosen by it."""
    command("latency", "build", "--model", "models/elastic", "--context", "8", "--out", "latency.json")
    table = LatencyTable.load("latency.json")
    model, _ = load("models/elastic")
    chosen = Elastic.load("models/elastic", model.config).with_latency(table)
    least, whole = table.decode.range(table.menu)
    budget = Budget(latency_ms=(least + 2 * whole) / 3)
    subnet = dataclasses.replace(chosen, routers=None).subnet(budget)
    return {
        "latency": {
            "device": dataclasses.asdict(table.device),
            "budget": budget.latency_ms,
            "searched": dataclasses.asdict(subnet),
            "routed": dataclasses.asdict(chosen.subnet(budget)),
            "whole": [table.total(Subnet.full(model.config), phase) for phase in ("decode", "prefill")],
            "milliseconds": table.total(subnet),
            "text": table.text(),
        }
    }


FIT = ("route", "fit", "--swift-exit", "1", "--super", "models/exits", "--data", "rows.jsonl")
RUN = ("route", "run", "--swift-exit", "1", "--super", "models/exits", "--data", "rows.jsonl")


def cascade() -> dict[str, Any]:
    """Rules with the journal of the answers that they were fitted on, and the results of a run."""
    as_the_super_says()
    printed = {
        "accuracy": command(*FIT, "--super-accuracy", "--out", "cascade/rule.json"),
        "risk": command(
            *FIT, "--risk", "0.4", "--epsilon", "0.3", "--seed", "1", "--out", "cascade/guaranteed.json"
        ),
    }
    # Journals are named after their rule. The second rule's holds the same answers.
    for answers in Path("cascade").glob("guaranteed.answers-*"):
        answers.unlink()
    printed["run"] = command(*RUN, "--rule", "cascade/rule.json", "--out", "cascade/out.jsonl")
    rule, sure = (RoutingRule.load(f"cascade/{name}.json") for name in ("rule", "guaranteed"))
    guarantee = sure.guarantee
    return {
        "cascade": {
            "threshold": rule.threshold,
            "guaranteed": sure.threshold,
            "guarantee": guarantee and dataclasses.asdict(guarantee),
            "printed": printed,
        }
    }


def as_the_super_says() -> None:
    """Labels that the Super gives to all rows but two, so that a threshold has something to decide."""
    rows = [json.loads(line) for line in Path("rows.jsonl").read_text().splitlines()]
    with tempfile.TemporaryDirectory() as scratch:
        command(*FIT, "--super-accuracy", "--out", f"{scratch}/rule.json")
        (answers,) = Path(scratch).glob("rule.answers-*.jsonl")
        lines = [json.loads(line) for line in answers.read_text().splitlines()]
    for i, (row, line) in enumerate(zip(rows, lines, strict=True)):
        row["label"] = (line["super"]["output"] + (i in (3, 11))) % 3
    write_lines("rows.jsonl", rows)


def runs() -> dict[str, RunConfig | TaskRun]:
    """One short run per method."""
    start = dataclasses.replace(TRAIN, init_from="models/base")

    def text(exits: tuple[ExitConfig, ...] = (), **train: Any) -> RunConfig:
        return RunConfig(exits=exits, data=DATA, train=dataclasses.replace(start, **train))

    mlps = (ExitConfig(1, "mlp", tied=True), ExitConfig(2, "norm", tied=True))
    task = dataclasses.replace(TRAIN, method="task_tuning", z_loss=1e-4)
    return {
        "pretraining": RunConfig(
            dataclasses.replace(DECODER, n_layers=2),
            data=DATA,
            train=dataclasses.replace(TRAIN, optimizer="muon", schedule="wsd", accumulate=2, remat=True),
        ),
        "ee_tuning": text(
            mlps, method="ee_tuning", exit_weights=(1.0, 0.5), exit_warmup=6, confidence_weighted=True
        ),
        "sorted_finetuning": text(
            method="sorted_finetuning", depths=(1, 2, 3), curriculum="rotational", curriculum_period=2,
            layer_dropout=0.2, dropout_ramp=6, depth_weights="layerskip", depth_scale=0.5,
        ),
        "self_supervised_exits": text(EXITS, method="self_supervised_exits", cached_batches=3, top_k=8),
        "flextron": text(
            method="flextron", menu_mlp=(0.5, 1.0), menu_heads=(0.5, 1.0), menu_dropped=(1,), samples=1,
            distil=0.5, teacher="frozen", elastic_groups=4, rank_batches=2,
        ),
        "routers": RunConfig(
            data=DATA,
            train=dataclasses.replace(
                TRAIN, method="routers", init_from="models/elastic", router_width=8, budgets=(0.8, 0.9, 1.0),
                train_model=True, router_lr=10.0, distil=0.5,
            ),
        ),
        "routers_surrogate": RunConfig(
            data=DATA,
            train=dataclasses.replace(
                TRAIN, method="routers", init_from="models/elastic", router_width=8, budgets=(0.8, 0.9, 1.0),
                scheme="surrogate", surrogate_error=5.0,
            ),
        ),
        "task_tuning": TaskRun(TASK, dataclasses.replace(task, exit_weights=(0.5,)), ENCODER, exits=(1,)),
        "text_to_text": TaskRun(PAIRS, task, encoder_decoder=WRITER),
    }  # fmt: skip


def half_finished(name: str, run: RunConfig | TaskRun) -> None:
    """Runs to the end, keeps the final parameters and forgets everything after step `STOPPED`."""
    workdir = Path("workdirs") / name
    _, params, metrics = fit_task(run, workdir) if isinstance(run, TaskRun) else fit(run, workdir)
    flat = jax.tree_util.tree_leaves_with_path(params)
    final = {"/".join(k.key for k in path): np.asarray(leaf) for path, leaf in flat}
    if name.startswith("routers"):
        model, _ = load(workdir / "model")
        routers = jax.tree_util.tree_leaves_with_path(Routers.load(workdir / "model", model.config).params)
        own = {"routers/" + "/".join(k.key for k in path): np.asarray(leaf) for path, leaf in routers}
        final = {**(final if run.train.train_model else {}), **own}
    elif name in ("ee_tuning", "self_supervised_exits"):
        final = {key: leaf for key, leaf in final.items() if key.startswith("exit_")}  # the rest is frozen
    save_file(final, workdir / "final.safetensors")
    Path(workdir, "final.json").write_text(json.dumps(metrics, indent=1) + "\n")

    shutil.rmtree(workdir / "checkpoints" / str(STEPS))
    kept = ("run.json", "metrics.jsonl", "checkpoints", "tokenizer.json", "tokenizer_config.json")
    with tarfile.open(workdir / "workdir.tar.xz", "w:xz") as archive:
        for path in (workdir / part for part in kept):
            if path.exists():
                archive.add(path, path.name)
    for path in workdir.iterdir():
        if path.name not in ("workdir.tar.xz", "run.json", "final.safetensors", "final.json"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def recipes(configs: Path) -> dict[str, Any]:
    """run.json of every recipe in `RECIPES`."""
    found = {}
    for name, (recipe, overrides) in RECIPES.items():
        config = load_config(str(configs / recipe), overrides)
        with tempfile.TemporaryDirectory() as workdir:
            save_identity(config, Path(workdir))
            identity = json.loads(Path(workdir, "run.json").read_text())
        found[name] = {"recipe": recipe, "overrides": overrides, "run": identity}
    return found


if __name__ == "__main__":
    main()
