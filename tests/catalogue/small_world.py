"""Folders and files that bad inputs are made of: one tiny model of every kind, and what belongs to them."""

import dataclasses
import json
import os
import pathlib

from elastic_lm import hf
from elastic_lm.cascade.rule import CascadeRule
from elastic_lm.checkpoints import native
from elastic_lm.config.encoder import EncoderConfig
from elastic_lm.config.encoder_decoder import EncoderDecoderConfig
from elastic_lm.config.subnet import Menu
from elastic_lm.cost.counted import Workload, counted_table
from elastic_lm.cost.latency_table import Device, LatencyTable
from elastic_lm.data.tokenizer import train_bpe
from elastic_lm.depth.policies import ConfidenceExit
from elastic_lm.models.exits import without_exits
from elastic_lm.testing import random_params, tiny_config

LINE = "def f{0}(x):\n    return x * {0}\n\n"
MENU = Menu(mlp=(0.5, 1.0), heads=(0.5, 1.0))
SHAPE = {"vocab_size": 300, "d_model": 16, "n_layers": 1, "n_heads": 2, "d_mlp": 32}


def make_world(root: pathlib.Path) -> dict[str, pathlib.Path]:
    """Writes everything below a folder; returns where it is, by the names that bad commands use."""
    tokenizer = train_bpe([LINE.format(1) * 50], 300)
    config = tiny_config(exits=(1, 2), n_layers=3, vocab_size=300, d_model=16, elastic_groups=16)
    params = random_params(config)

    native.save_model(root / "ck", config, params, tokenizer, menu=MENU)
    plain = dataclasses.replace(config, elastic_groups=0)
    hf.export(plain, params, root / "hf", tokenizer)
    bare, bare_params = without_exits(plain, params)
    hf.export(bare, bare_params, root / "bare", tokenizer)

    labels = {"n_labels": 2, "labels": ("no", "yes"), "max_len": 64}
    for name, config_of in {
        "enc": EncoderConfig(**SHAPE, **labels),
        "reg": EncoderConfig(**SHAPE, n_labels=1, problem="regression", max_len=64),
        "t5": EncoderDecoderConfig(**SHAPE),
    }.items():
        native.save_model(root / name, config_of, random_params(config_of), tokenizer)

    (root / "book.txt").write_text("".join(LINE.format(i) for i in range(300)))
    records = [{"text": f"def f{i}", "label": "yes" if i % 2 else "no"} for i in range(6)]
    (root / "records.jsonl").write_text("".join(json.dumps(one) + "\n" for one in records))
    choices = [{"text": "def", "choices": ["f", "g"], "label": 0}] * 4
    (root / "choices.jsonl").write_text("".join(json.dumps(one) + "\n" for one in choices))

    ConfidenceExit("max_prob", (0.5, 0.5), (1, 2)).save(root / "thresholds.json")
    ConfidenceExit("max_prob", (0.5,), (2,)).save(root / "other_thresholds.json")
    CascadeRule(1.0, "energy").save(root / "rule.json")
    costs = dataclasses.replace(counted_table(config, MENU, "parameters"), kind="latency_ms")
    LatencyTable(
        config.with_exits(()), MENU, Workload(1, 8), Device.here(), costs, costs,
        {"decode": 0.0, "prefill": 0.0}, 1, "", {},
    ).save(root / "table.json")  # fmt: skip
    return {path.stem: path for path in root.iterdir()}


def contents(folder: pathlib.Path) -> dict[str, bytes | str]:
    """Everything in a folder: names with contents, links with their targets."""
    found: dict[str, bytes | str] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_symlink():
            found[name] = f"-> {os.readlink(path)}"
        else:
            found[name] = path.read_bytes() if path.is_file() else "folder"
    return found


def stamps(folder: pathlib.Path) -> dict[str, tuple[int, int]]:
    """Size and time of every file in a folder, which is quicker to look at than what they hold."""
    stats = {str(path): path.stat() for path in folder.rglob("*")}
    return {name: (stat.st_size, stat.st_mtime_ns) for name, stat in stats.items()}
