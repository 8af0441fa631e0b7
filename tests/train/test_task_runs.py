"""Whole runs that learn a task from labelled records."""

import dataclasses
import json
from pathlib import Path

import chex
import jax
import numpy as np
import pytest
import tokenizers
from tokenizers import models, pre_tokenizers, processors
from training_runs import Stopped, changed, metric_lines, stop_at

from elastic_lm.checkpoints.loading import load
from elastic_lm.checkpoints.native import save_model
from elastic_lm.cli import main as cli
from elastic_lm.config.encoder import EncoderConfig
from elastic_lm.config.encoder_decoder import EncoderDecoderConfig
from elastic_lm.config.parse import to_dict
from elastic_lm.config.task import TaskConfig
from elastic_lm.data import labelled
from elastic_lm.data.tokenizer import Tokenizer
from elastic_lm.models.registry import init_params
from elastic_lm.train.config import TaskRun, TrainConfig
from elastic_lm.train.pretraining import PretrainingConfig
from elastic_lm.train.recipes import load_config
from elastic_lm.train.run import fit
from elastic_lm.train.tasks import run as tasks
from elastic_lm.train.tasks.config import TaskTuningConfig
from elastic_lm.train.tasks.tuning import TaskBatch, task_logits

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "good", "bad", "film", "plot", "very", "not"]
WORDS += ["the", "a", "an", "it", "is", "was"]
ENCODER = EncoderConfig(vocab_size=len(WORDS), d_model=32, n_layers=2, n_heads=2, d_mlp=64, max_len=32)
WRITTEN = {"problem": "text_to_text", "pair_field": ""}


def write_tokenizer(folder: Path) -> Path:
    """A BERT-like tokenizer.json of a few words."""
    backend = tokenizers.Tokenizer(models.WordPiece({w: i for i, w in enumerate(WORDS)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    backend.add_special_tokens(WORDS[:4])
    folder.mkdir(exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


def write_records(file: Path, count: int, seed: int) -> Path:
    """Reviews of random words; the label says whether "good" or "bad" is among them."""
    rng, rows = np.random.default_rng(seed), []
    for _ in range(count):
        words = rng.choice(WORDS[6:], rng.integers(2, 9)).tolist()
        label = int(rng.integers(2))
        words.insert(int(rng.integers(len(words) + 1)), ("bad", "good")[label])
        rows.append({"review": " ".join(words), "again": "the film", "label": ("neg", "pos")[label]})
    file.write_text("\n".join(map(json.dumps, rows)))
    return file


@pytest.fixture
def run(tmp_path: Path) -> TaskRun:
    task = TaskConfig(
        paths=(str(write_records(tmp_path / "train.jsonl", 200, 0)),),
        eval_paths=(str(write_records(tmp_path / "dev.jsonl", 50, 1)),),
        text_field="review",
        pair_field="again",
        max_len=32,
        batch_size=16,
        tokenizer=str(write_tokenizer(tmp_path)),
    )
    train = TrainConfig(steps=60, lr=5e-3, warmup=5, eval_every=0, eval_batches=0, save_every=20)
    return TaskRun(task, train, encoder=ENCODER)


@pytest.mark.long
def test_a_task_is_learned_resumed_and_taught_on(
    run: TaskRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, params, metrics = fit(run, tmp_path / "straight")
    assert metrics["accuracy"] == 1.0
    assert (config.n_labels, config.labels) == (2, ("neg", "pos"))
    with monkeypatch.context() as patch:
        stop_at(patch, 30, tasks)
        with pytest.raises(Stopped):
            fit(run, tmp_path / "stopped")
    _, again, _ = fit(run, tmp_path / "stopped")
    chex.assert_trees_all_equal(again, params)
    model, loaded = load(tmp_path / "straight" / "model")
    assert model.config == config
    chex.assert_trees_all_equal(loaded, params)

    small = dataclasses.replace(ENCODER, d_model=16, embed_dim=0, n_layers=1, d_mlp=32)
    teacher = str(tmp_path / "straight" / "model")
    taught = dataclasses.replace(
        changed(run, teacher_from=teacher, distil=1.0, temperature=2.0, steps=150, lr=1e-2), encoder=small
    )
    student, own, metrics = fit(taught, tmp_path / "taught")
    assert metrics["accuracy"] == 1.0
    batch = next(iter(labelled.eval_batches(run.task, Tokenizer.load(run.task.tokenizer), config.labels, 0)))
    placed = TaskBatch(**batch)
    wide, narrow = task_logits(config, params, placed), task_logits(student, own, placed)
    probabilities = jax.nn.softmax(wide / 2.0), jax.nn.softmax(narrow / 2.0)
    assert float(np.abs(probabilities[0] - probabilities[1]).max()) < 0.1

    lowest = dataclasses.replace(run.train, init_from=teacher, init_layers=1, steps=20)
    exit_ = dataclasses.replace(run, train=lowest, encoder=None, method=TaskTuningConfig(tuned="head"))
    shallow, head, metrics = fit(exit_, tmp_path / "exit")
    assert shallow.n_layers == 1
    assert "layers_1" not in head
    for name in ("embed", "layers_0"):
        chex.assert_trees_all_equal(head[name], params[name])
    assert float(np.abs(head["head"]["kernel"] - params["head"]["kernel"]).max()) > 0

    exits_only = changed(exit_, init_layers=0, tuned="exits")
    exited, both, metrics = fit(dataclasses.replace(exits_only, exits=(1,)), tmp_path / "e")
    assert exited.exits == (1,)
    assert set(metrics) == {"loss", "accuracy/exit_1"}
    for name in params:
        chex.assert_trees_all_equal(both[name], params[name])
    assert float(np.abs(both["exit_1"]["head"]["kernel"] - params["head"]["kernel"]).max()) > 0
    beside = changed(exit_, init_from=str(tmp_path / "e" / "model"), init_layers=0)
    jointly = changed(beside, tuned="all", exit_weights=(0.5,))
    again, joint, metrics = fit(jointly, tmp_path / "joint")
    assert again == exited
    assert set(metrics) == {"loss", "accuracy", "accuracy/exit_1"}
    assert metrics["accuracy/exit_1"] > 0.9
    kernels = (tree["layers_1"]["mlp"]["up"]["kernel"] for tree in (joint, params))
    assert not np.array_equal(*kernels)
    more = changed(jointly, exit_weights=(0.5, 1.0))
    with pytest.raises(ValueError, match=r"method\.exit_weights=\(0\.5, 1\.0\): needs one weight for each"):
        fit(more, tmp_path / "more")
    with pytest.raises(ValueError, match=r"method\.tuned='exits': the model has no exits; name their layers"):
        fit(exits_only, tmp_path / "none")
    with pytest.raises(ValueError, match=r"exits=\(2,\): must lie between 1 and 1"):
        fit(dataclasses.replace(exits_only, exits=(2,)), tmp_path / "last")
    three = dataclasses.replace(run.task, labels=("neg", "pos", "odd"))
    with pytest.raises(ValueError, match=r"method\.tuned='exits': .* answers .*: tune it on the task first"):
        fit(dataclasses.replace(exits_only, exits=(1,), task=three), tmp_path / "three")
    with pytest.raises(ValueError, match=r"exits=\(1,\): these exits do not train with method\.tuned='head'"):
        dataclasses.replace(exit_, exits=(1,))

    other = dataclasses.replace(run.task, labels=("pos", "neg"))
    with pytest.raises(ValueError, match=r"method\.teacher_from=.*answers .*, not .*tune it on the task"):
        fit(dataclasses.replace(taught, task=other), tmp_path / "other")


def test_heads_without_names_count(run: TaskRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = dataclasses.replace(ENCODER, n_labels=2)
    params, tokenizer = init_params(config, jax.random.key(3)), Tokenizer.load(run.task.tokenizer)
    save_model(tmp_path / "unnamed", config, params, tokenizer)
    unnamed = str(tmp_path / "unnamed")
    train = dataclasses.replace(run.train, steps=1, warmup=0, lr=1e-9, init_from=unnamed)
    taught = TaskTuningConfig(teacher_from=unnamed, distil=0.5)
    kept, same, _ = fit(TaskRun(run.task, train, taught), tmp_path / "kept")
    assert kept.labels == ("neg", "pos")
    chex.assert_trees_all_close(same["head"], params["head"], atol=1e-6)
    missing = TaskRun(run.task, dataclasses.replace(train, init_from=str(tmp_path / "nothing")))
    with pytest.raises(FileNotFoundError, match=r"nothing: expected .* ORG/NAME"):
        fit(dataclasses.replace(missing, task=dataclasses.replace(run.task, tokenizer="")), tmp_path / "no")


def test_the_command_learns_from_a_config_file(run: TaskRun, tmp_path: Path) -> None:
    values = to_dict(changed(run, steps=6, warmup=1))
    values["task"] |= {"labels": (), "pair_field": ""}
    (tmp_path / "recipe.py").write_text(f"def get_config(arg=''):\n    return {values!r}\n")
    assert isinstance(load_config(str(tmp_path / "recipe.py")), TaskRun)
    command = ["train", "--config", str(tmp_path / "recipe.py"), "--workdir", str(tmp_path / "run")]
    assert cli.main(command) == 0
    lines = metric_lines(tmp_path / "run")
    assert lines[0]["records_per_s"] > 0
    assert "eval_accuracy" in lines[-1]


def test_batches_are_padded_and_weighed(run: TaskRun) -> None:
    tokenizer = Tokenizer.load(run.task.tokenizer)
    batches = list(labelled.eval_batches(run.task, tokenizer, ("neg", "pos"), 7))
    assert [b["tokens"].shape for b in batches] == [(16, 16)] * 4
    assert sum(b["weights"].sum() for b in batches) == 50
    first = batches[0]
    row = first["tokens"][0][first["mask"][0]]
    assert row[0] == 2
    assert list(row).count(3) == 2
    assert first["types"][0].sum() == 3  # "the film [SEP]"
    assert set(first["tokens"][~first["mask"]].tolist()) == {7}
    words = {4: 1, 5: 0}  # "good" and "bad"
    found = [next(words[t] for t in tokens if t in words) for tokens in first["tokens"].tolist()]
    assert found == first["targets"].tolist()


def test_training_batches_are_of_similar_lengths(run: TaskRun, tmp_path: Path) -> None:
    lengths = [2, 20] * 200
    rows = [{"review": " ".join(["good"] * n), "label": str(i % 2)} for i, n in enumerate(lengths)]
    (tmp_path / "lengths.jsonl").write_text("\n".join(map(json.dumps, rows)))
    task = dataclasses.replace(run.task, paths=(str(tmp_path / "lengths.jsonl"),), pair_field="")
    batches = iter(labelled.train_batches(task, Tokenizer.load(task.tokenizer), ("0", "1"), 0))
    widths = [next(batches)["tokens"].shape[1] for _ in range(32)]
    assert set(widths) == {16, 32}
    assert widths.count(16) > 12
    assert widths != sorted(widths)


def test_numbers_are_classes_in_their_order_or_targets(run: TaskRun, tmp_path: Path) -> None:
    file = tmp_path / "numbers.csv"
    file.write_text("review,label\ngood,10\nbad,9\ngood,9\n")
    task = dataclasses.replace(run.task, paths=(str(file),), eval_paths=(str(file),), pair_field="")
    assert labelled.classes(task) == ("9", "10")
    numbers = dataclasses.replace(task, problem="regression")
    batch = next(iter(labelled.eval_batches(numbers, Tokenizer.load(task.tokenizer), (), 0)))
    assert batch["targets"][:3].tolist() == [10.0, 9.0, 9.0]
    assert batch["targets"].dtype == np.float32
    file.write_text("review,label\ngood,ten\nbad,9\n")
    with pytest.raises(ValueError, match=r"numbers.csv line 2: label='ten': must be a number"):
        list(labelled.eval_batches(numbers, Tokenizer.load(task.tokenizer), (), 0))
    with pytest.raises(ValueError, match=r"line 2: label='ten': is no class of the task; choose from 9, 10"):
        list(labelled.eval_batches(task, Tokenizer.load(task.tokenizer), ("9", "10"), 0))
    file.write_text("review,label\ngood,1\nbad,1\n")
    with pytest.raises(ValueError, match=r"task\.label_field=label=\['1'\]: is the same everywhere"):
        labelled.classes(task)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"method": PretrainingConfig()}, r"method\.name='pretraining': reads text: .* a section 'data'"),
        ({"encoder": None}, r"train\.init_from='': name a model to start from"),
        ({"method": {"distil": 0.5}}, r"method\.distil=0\.5: goes with method\.teacher_from=''"),
        ({"task": {"tokenizer": ""}}, r"task\.tokenizer='': a new encoder has none"),
        ({"task": {"problem": "regression", "labels": ("a", "b")}}, r"task\.labels=.*: not read with"),
        (
            {"task": {"problem": "regression"}, "method": {"z_loss": 1e-4}},
            r"method\.z_loss=0\.0001: is about classes and texts",
        ),
        ({"task": {"labels": ("a", "a")}}, r"task\.labels=.*names a class twice"),
        ({"task": {"paths": ()}}, r"task\.paths=\(\): name the training files"),
        ({"train": {"accumulate": 3}}, r"train\.accumulate=3: must divide task\.batch_size=16"),
        (
            {"task": WRITTEN},
            r"task\.problem='text_to_text': an encoder cannot write text: use encoder_decoder",
        ),
        (
            {"encoder": None, "encoder_decoder": EncoderDecoderConfig(300, 32, 1, 4, 40)},
            r"task\.problem='classification': a new encoder_decoder learns to write: use encoder, or problem",
        ),
        (
            {"task": WRITTEN, "encoder": None, "train": {"init_from": "t5"}, "exits": (1,)},
            r"exits=\(1,\): exits are heads for classes or numbers, and a text_to_text task has none: leave",
        ),
    ],
)
def test_what_does_not_fit_is_refused(run: TaskRun, fields: dict, message: str) -> None:
    def refused() -> None:
        parts = {
            name: dataclasses.replace(getattr(run, name), **value) if isinstance(value, dict) else value
            for name, value in fields.items()
        }
        dataclasses.replace(run, **parts)

    with pytest.raises(ValueError, match=message):
        refused()


@pytest.mark.long
def test_pairs_are_learned_by_a_new_model_with_a_tokenizer_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("one two", "three", "four five", "six seven", "eight")
    file = tmp_path / "pairs.csv"

    file.write_text("low,up\n" + "".join(f"{w},{w.upper()}\n" for w in words))
    task = TaskConfig(
        "text_to_text", (str(file),), (str(file),), "low", label_field="up", max_len=16, max_target=16
    )
    model = EncoderDecoderConfig(300, 32, 1, 4, 40, eos_ids=(0,))
    train = TrainConfig(steps=12, warmup=2, eval_every=0, save_every=4)
    run = TaskRun(dataclasses.replace(task, batch_size=4), train, encoder_decoder=model)
    config, params, metrics = fit(run, tmp_path / "straight")
    assert set(metrics) == {"loss", "cross_entropy", "accuracy"}
    with monkeypatch.context() as patch:
        stop_at(patch, 7, tasks)
        with pytest.raises(Stopped):
            fit(run, tmp_path / "stopped")
    _, again, _ = fit(run, tmp_path / "stopped")
    chex.assert_trees_all_equal(again, params)
    folder = tmp_path / "straight" / "model"
    loaded, same = load(folder)
    assert loaded.config == config
    chex.assert_trees_all_equal(same, params)
    assert Tokenizer.load(folder).decode(Tokenizer.load(folder).encode("Seven")) == "Seven"
    taught = changed(run, teacher_from=str(folder), distil=0.5, steps=3)
    small = dataclasses.replace(taught, encoder_decoder=dataclasses.replace(model, d_model=16))
    given = dataclasses.replace(small, task=dataclasses.replace(run.task, tokenizer=str(folder)))
    assert fit(given, tmp_path / "taught")[0].d_model == 16
