"""Runs that learn a head on the encoder of an encoder-decoder, and a cascade that decides by its energy."""

import dataclasses
from pathlib import Path

import chex
import jax
import numpy as np
import pytest
from test_task_runs import WORDS, write_records
from training_runs import metric_lines

from elastic_lm.cascade.rule import CascadeRule
from elastic_lm.checkpoints import native as checkpoint
from elastic_lm.checkpoints.loading import load
from elastic_lm.cli import main as cli
from elastic_lm.config.encoder_decoder import EncoderDecoderConfig
from elastic_lm.config.parse import to_dict
from elastic_lm.config.task import TaskConfig
from elastic_lm.cost.sequences import text_to_text_flops
from elastic_lm.data import labelled
from elastic_lm.data.tokenizer import Tokenizer, train_bpe
from elastic_lm.decode.seq2seq import TextToText
from elastic_lm.files.journal import read_records
from elastic_lm.models.registry import init_params
from elastic_lm.train.config import TaskRun, TrainConfig
from elastic_lm.train.run import fit
from elastic_lm.train.tasks.config import TaskTuningConfig
from elastic_lm.train.tasks.tuning import TaskBatch, task_logits

CONFIG = EncoderDecoderConfig(
    vocab_size=300, d_model=32, n_layers=1, n_heads=2, d_mlp=32, relative_buckets=8, relative_max_distance=16
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of random weights, and records."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer = train_bpe(["review: " + " ".join(WORDS[4:])] * 9, 300)
    config = dataclasses.replace(CONFIG, eos_ids=tokenizer.eos_ids)
    checkpoint.save_model(folder / "t5", config, init_params(config, jax.random.key(0)), tokenizer)
    write_records(folder / "train.jsonl", 200, 0)
    write_records(folder / "dev.jsonl", 40, 1)
    return folder


@pytest.fixture(scope="module")
def run(folder: Path) -> TaskRun:
    task = TaskConfig(
        paths=(str(folder / "train.jsonl"),),
        eval_paths=(str(folder / "dev.jsonl"),),
        text_field="review",
        prefix="review: ",
        max_len=64,
        batch_size=16,
    )
    train = TrainConfig(init_from=str(folder / "t5"), steps=40, warmup=4)
    train = dataclasses.replace(train, lr=2e-2, eval_every=0, eval_batches=0)
    return TaskRun(task, train, TaskTuningConfig(tuned="head", z_loss=1e-4))


@pytest.fixture(scope="module")
def trained(run: TaskRun, folder: Path) -> dict[str, float]:
    """Last metrics of a head that the command trains into `folder / "run"`."""
    recipe = folder / "recipe.py"
    recipe.write_text(f"def get_config(arg=''):\n    return {to_dict(run)!r}\n")
    assert cli.main(["train", "--config", str(recipe), "--workdir", str(folder / "run")]) == 0
    return metric_lines(folder / "run")[-1]


def changed(run: TaskRun, part: str, **fields) -> TaskRun:
    return dataclasses.replace(run, **{part: dataclasses.replace(getattr(run, part), **fields)})


def test_the_head_alone_is_learned(run: TaskRun, folder: Path, trained: dict[str, float]) -> None:
    assert trained["eval_accuracy"] > 0.8
    _, before = load(folder / "t5")
    model, after = load(folder / "run" / "model")
    assert isinstance(model.config, EncoderDecoderConfig)
    assert (model.config.n_labels, model.config.labels) == (2, ("neg", "pos"))
    head = after.pop("encoder_head")
    chex.assert_trees_all_equal(after, before)
    assert head["kernel"].shape == (2, 32)
    assert float(np.abs(head["bias"]).max()) > 0


def test_it_reads_what_text_to_text_reads(run: TaskRun, folder: Path, trained: dict[str, float]) -> None:
    model, params = load(folder / "run" / "model")
    tokenizer = Tokenizer.load(folder / "run" / "model")
    assert isinstance(model.config, EncoderDecoderConfig)
    batch = next(
        iter(labelled.eval_batches(run.task, tokenizer, ("neg", "pos"), model.config.pad_id, model.config))
    )
    logits = task_logits(model.config, params, TaskBatch(**batch))
    texts = ["review: " + row["review"] for row in read_records(folder / "dev.jsonl")][:16]
    assert logits.dtype == np.float32
    np.testing.assert_allclose(logits, TextToText(model, params, tokenizer).encoder_logits(texts), atol=1e-5)


def test_a_head_is_kept_and_teaches(run: TaskRun, folder: Path, trained: dict[str, float], tmp_path) -> None:
    model, learned = str(folder / "run" / "model"), load(folder / "run" / "model")[1]["encoder_head"]
    again = changed(run, "train", init_from=model, steps=1, warmup=0, lr=1e-12, weight_decay=0.0)
    _, params, metrics = fit(again, tmp_path / "again")
    chex.assert_trees_all_close(params["encoder_head"], learned, atol=1e-9)
    assert set(metrics) == {"loss", "accuracy"}
    assert metrics["accuracy"] == pytest.approx(trained["eval_accuracy"], abs=1e-3)
    taught = changed(run, "method", teacher_from=model, distil=1.0, z_loss=0.0)
    _, params, _ = fit(taught, tmp_path / "taught")
    assert "teacher" not in params
    kernel, aim = (head["kernel"] for head in (params["encoder_head"], learned))
    difference = kernel[0] - kernel[1], aim[0] - aim[1]
    assert np.corrcoef(*difference)[0, 1] > 0.8
    with pytest.raises(ValueError, match="has a head of 2 classes on its encoder, and the task 3"):
        fit(changed(again, "task", labels=("neg", "pos", "odd")), tmp_path / "three")
    with pytest.raises(ValueError, match="tells neg, pos apart, in this order, and the task has pos, neg"):
        fit(changed(again, "task", labels=("pos", "neg")), tmp_path / "turned")
    turned = changed(taught, "task", labels=("pos", "neg"))
    with pytest.raises(ValueError, match=r"method\.teacher_from=.*'neg', 'pos'"):
        fit(turned, tmp_path / "turned")


def test_route_asks_the_head_and_decodes_only_what_is_kept(
    folder: Path, trained: dict[str, float], tmp_path: Path, capsys
) -> None:
    _, super_params = load(folder / "t5")
    super_ = dataclasses.replace(CONFIG, eos_ids=Tokenizer.load(folder / "t5").eos_ids)
    checkpoint.save_model(tmp_path / "super", super_, super_params, Tokenizer.load(folder / "t5"))
    models = ("--swift", folder / "run" / "model", "--super", tmp_path / "super")
    models += ("--data", folder / "dev.jsonl", "--text-field", "review", "--template", "review: {review}")
    models += ("--labels", "neg,pos")
    rule, out = tmp_path / "rule.json", tmp_path / "out.jsonl"
    command = ("--target-cost", 1e12, "--score", "encoder_energy", "--out", rule)
    assert cli.main([str(a) for a in ("cascade", "fit", *models, *command)]) == 0
    fitted = CascadeRule.load(rule)
    middle = fitted.curve[len(fitted.curve) // 2]
    dataclasses.replace(fitted, threshold=middle.threshold).save(rule)
    assert cli.main([str(a) for a in ("cascade", "run", *models, "--rule", rule, "--out", out)]) == 0
    lines = list(read_records(out))
    assert {line["model"] for line in lines} == {"swift", "super"}
    assert np.mean([line["cost"] for line in lines]) == pytest.approx(middle.cost)
    tokenizer = Tokenizer.load(folder / "run" / "model")
    for line, row in zip(lines, read_records(folder / "dev.jsonl"), strict=True):
        read = len(tokenizer.encode("review: " + row["review"])) + len(tokenizer.eos_ids[:1])
        whole = text_to_text_flops(super_, read, 1)
        known = text_to_text_flops(super_, read, 0) if line["model"] == "super" else 0
        assert line["cost"] == known + whole + 2 * 2 * super_.d_model
    none = ("--swift", tmp_path / "super", "--threshold", 0, "--score", "encoder_energy")
    none += ("--out", tmp_path / "none.jsonl")
    assert cli.main([str(a) for a in ("cascade", "run", *models, *none)]) == 2
    assert "encoder_head=True: the model has none; train one" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("part", "fields", "message"),
    [
        (
            "method",
            {"tuned": "all"},
            r"method\.tuned='all': .*set task\.problem='text_to_text'.*tuned='head'",
        ),
        ("task", {"problem": "regression", "prefix": ""}, r"task\.problem='regression': .*make classes"),
        ("task", {"pair_field": "again"}, r"task\.pair_field='again': .*reads one text"),
        ("train", {"init_layers": 1}, r"train\.init_layers=1: .*no layers are left out"),
    ],
)
def test_what_a_head_cannot_do_is_refused(run: TaskRun, tmp_path, part, fields, message) -> None:
    asked = changed(changed(run, "method", z_loss=0.0), part, **fields)
    with pytest.raises(ValueError, match=message):
        fit(asked, tmp_path)
