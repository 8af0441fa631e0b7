"""Fingerprints of weights and tokenizers, and what is said where two that belong together differ."""

import dataclasses
import json
import warnings
from pathlib import Path

import jax
import numpy as np
import pytest

import elastic_lm as el
from elastic_lm import testing
from elastic_lm.checkpoints import native
from elastic_lm.cli import belonging, generate
from elastic_lm.config.subnet import Menu
from elastic_lm.cost.counted import Workload, counted_table
from elastic_lm.cost.latency_table import Device, LatencyTable
from elastic_lm.data.tokenizer import train_bpe
from elastic_lm.depth.guarantee import Guarantee
from elastic_lm.files.fingerprints import differing_parts, file_digest, weights_fingerprint
from elastic_lm.models.decoder import stack_layers

MENU = Menu(mlp=(0.5, 1.0), heads=(1.0,))
CONFIG = testing.tiny_config(exits=(2,), n_layers=3, vocab_size=260)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two models of one shape."""
    folder = tmp_path_factory.mktemp("fingerprints")
    tokenizer = train_bpe(["some text"], 260)
    for seed, name in enumerate(("first", "second")):
        native.save_model(folder / name, CONFIG, testing.random_params(CONFIG, seed), tokenizer)
    return folder / "first", folder / "second"


def test_one_model_has_one_fingerprint(folders: tuple[Path, Path], tmp_path: Path) -> None:
    params = native.load_model(folders[0])[1]
    found = weights_fingerprint(params)
    assert len(found) == 16
    el.hf.export(CONFIG, params, tmp_path / "hf", el.Tokenizer.load(folders[0]))
    config, loaded = el.hf.load(tmp_path / "hf")
    assert weights_fingerprint(loaded) == found
    native.save_model(tmp_path / "converted", config, loaded, None)
    assert weights_fingerprint(native.load_model(tmp_path / "converted")[1]) == found
    assert weights_fingerprint(el.load(folders[0], dtype="bfloat16")[1]) == found
    assert weights_fingerprint(stack_layers(params)) == found
    assert weights_fingerprint(jax.device_get(params)) == found
    assert el.Tokenizer.load(tmp_path / "hf").fingerprint == el.Tokenizer.load(folders[0]).fingerprint


def test_other_models_have_others(folders: tuple[Path, Path]) -> None:
    params = jax.tree.map(np.array, native.load_model(folders[0])[1])
    found = {weights_fingerprint(params), weights_fingerprint(native.load_model(folders[1])[1])}
    for leaf in jax.tree.leaves(params):
        leaf[(-1,) * leaf.ndim] += 1  # in the tree, and the next ones on top
        found.add(weights_fingerprint(params))
    assert len(found) == 2 + len(jax.tree.leaves(params))

    tokenizers = [
        train_bpe(["some text"], 260),
        train_bpe(["other words"], 260),
        train_bpe(["some text"], 258),
    ]
    assert len({tokenizer.fingerprint for tokenizer in tokenizers}) == 3


def test_a_large_parameter_is_sampled() -> None:
    table = np.zeros((40_000, 8), np.float32)
    found = weights_fingerprint({"table": table})
    assert weights_fingerprint({"table": table + 1}) != found
    table[-1, 3] = 1  # the ends always count
    assert weights_fingerprint({"table": table}) != found


def test_digests_of_files(tmp_path: Path) -> None:
    small, large = tmp_path / "small", tmp_path / "large"
    small.write_bytes(b"a" * 1000)
    large.write_bytes(bytes(2**21))
    assert file_digest(small)[1]
    digest, whole = file_digest(large)
    assert not whole
    large.write_bytes(bytes(2**21 - 1) + b"a")
    assert file_digest(large)[0] != digest


@pytest.mark.parametrize(
    ("recorded", "other"),
    [
        ({"weights": "1", "tokenizer": "2"}, ""),
        ({"weights": "3", "tokenizer": "2"}, "weights"),
        ({"weights": "3", "tokenizer": "4"}, "weights and tokenizer"),
        ({"weights": "", "tokenizer": None}, ""),
        ({}, ""),
        ("text", ""),
        (None, ""),
    ],
)
def test_differing_parts(recorded: object, other: str) -> None:
    assert differing_parts(recorded, {"weights": "1", "tokenizer": "2"}) == other


def thresholds_of(folder: Path, file: Path, guarantee: Guarantee | None = None) -> str:
    """A thresholds file that says that it was calibrated on the model in `folder`."""
    model, params = el.load(folder)
    recorded = {"path": str(folder), **belonging.parts_of(params, el.Tokenizer.load(folder))}
    policy = el.ConfidenceExit("margin", (0.5,), (2,), guarantee=guarantee, provenance={"model": recorded})
    policy.check(model.config)
    policy.save(file)
    return str(file)


def test_thresholds_of_other_weights(
    folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = folders
    file = thresholds_of(first, tmp_path / "t.json")
    options = generate.Options(model=str(first), prompt=("a",), thresholds=file)

    def said(options: generate.Options) -> str:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # one line on stderr is enough
            generate.make_sampler(options)
        return capsys.readouterr().err

    assert said(options) == ""
    line = said(dataclasses.replace(options, model=str(second)))
    assert line.count("\n") == 1
    assert f"{file}: was calibrated on {first}, whose weights differ from those of {second}" in line
    assert f"elastic-lm calibrate --model {second} --out {file}, or pass --force" in line
    assert said(dataclasses.replace(options, model=str(second), force=True)) == ""

    content = json.loads(Path(file).read_text())
    content["provenance"] = {"model": {"path": "x", "n_layers": 3}}  # of an earlier release
    Path(file).write_text(json.dumps(content))
    assert said(dataclasses.replace(options, model=str(second))) == ""


def test_a_latency_table_of_other_weights(capsys: pytest.CaptureFixture[str]) -> None:
    costs = dataclasses.replace(counted_table(CONFIG, MENU, "parameters"), kind="latency_ms")
    here, work = Device("cpu", "cpu", "a", 1), Workload(1, 8)
    fields = (CONFIG, MENU, work, here, costs, costs, {"decode": 0.0, "prefill": 0.0}, 1, "", {})
    table = LatencyTable(*fields, path="first", weights="1")
    belonging.check_table(table, "t.json", "second", {"weights": "1"}, force=False)
    belonging.check_table(LatencyTable(*fields), "t.json", "second", {"weights": "2"}, force=False)
    belonging.check_table(table, "t.json", "second", {"weights": "2"}, force=True)
    assert capsys.readouterr().err == ""
    belonging.check_table(table, "t.json", "second", {"weights": "2"}, force=False)
    line = capsys.readouterr().err
    assert "t.json: was measured on first, whose weights differ from those of second; measure again" in line


def test_a_guarantee_is_about_one_model(folders: tuple[Path, Path], tmp_path: Path) -> None:
    fields = {f.name: 0 for f in dataclasses.fields(Guarantee)}
    guarantee = Guarantee(**{**fields, "achieved": True, "statement": "kept"})  # pyright: ignore
    file = thresholds_of(folders[0], tmp_path / "t.json", guarantee)
    options = generate.Options(model=str(folders[1]), prompt=("a",), thresholds=file)
    with pytest.raises(ValueError, match=r"its guarantee is about that model alone; calibrate again"):
        generate.make_sampler(options)
    generate.make_sampler(dataclasses.replace(options, force=True))
    # Drafts are verified by the full model, whatever the thresholds were fitted on.
    generate.make_sampler(dataclasses.replace(options, lossless=True))


def test_a_sampler_warns(folders: tuple[Path, Path], tmp_path: Path) -> None:
    policy = el.ConfidenceExit.load(thresholds_of(folders[0], tmp_path / "t.json"))
    model, params = el.load(folders[1])
    with pytest.warns(UserWarning, match=rf"fitted on {folders[0]}, whose weights differ"):
        el.Sampler(model, params, exit=policy)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        el.Sampler(model, params, exit=policy.for_any_weights())
        el.Sampler(*el.load(folders[0]), el.Tokenizer.load(folders[0]), exit=policy)
