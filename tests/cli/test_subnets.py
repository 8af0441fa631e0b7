"""Named sub-networks of a folder: listed, measured, added, removed, taken by --subnet, and carried along."""

import dataclasses
import json
import pathlib
import shutil

import jax
import pytest

import elastic_lm as el
from elastic_lm.checkpoints import native
from elastic_lm.cli import main as cli
from elastic_lm.config.subnet import Menu, Subnet
from elastic_lm.config.subnet_table import MeasuredLoss
from elastic_lm.data.tokenizer import train_bpe
from elastic_lm.files.checksums import check_files
from elastic_lm.files.subnet_files import SUBNETS_FILE, load_subnets, save_subnets, subnet_weights
from elastic_lm.hf.model_card import collect_facts, write_card
from elastic_lm.testing import random_params, tiny_config

CONFIG = tiny_config(exits=(1,), n_heads=4, n_kv_heads=2, n_layers=3, vocab_size=300, elastic_groups=16)
MENU = Menu(mlp=(0.25, 0.5, 1.0), heads=(0.5, 1.0))
NAMES = ["w25-h50", "w25", "w50-h50", "w50", "h50", "whole"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("saved") / "elastic"
    tokenizer = train_bpe(["def f(x):\n    return x\n" * 50], 300)
    native.save_model(folder, CONFIG, random_params(CONFIG), tokenizer, menu=MENU)
    return folder


@pytest.fixture
def model(saved: pathlib.Path, tmp_path: pathlib.Path) -> pathlib.Path:
    return shutil.copytree(saved, tmp_path / "elastic")


def run(command: str, *arguments: object) -> int:
    return cli.main([command, *map(str, arguments)])


def measured(folder: pathlib.Path) -> None:
    """Gives one entry a loss, as if it had been measured."""
    table = load_subnets(folder, CONFIG)
    loss = MeasuredLoss(2.5, 100, "text.txt")
    save_subnets(folder, table.replacing([dataclasses.replace(table["w50"], loss=loss)]))


def test_a_model_with_a_menu_has_names(model: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = load_subnets(model, CONFIG)
    assert sorted(table) == sorted(NAMES)
    assert table.weights == subnet_weights(CONFIG, el.load(model)[1])

    assert run("subnets", "--model", model) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:]] == list(table)
    assert all(line.endswith("not measured  not measured") for line in lines[1:])


def test_names_are_added_and_removed(model: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("subnets", "--model", model, "--add", "mine", "--subnet", "mlp=50%", "layers=0,2") == 0
    assert load_subnets(model)["mine"].subnet == Subnet.uniform(CONFIG, mlp=0.5, layers=(0, 2))
    capsys.readouterr()
    assert run("subnets", "--model", model, "--remove", "mine", "w25", "--json", "-") == 0
    assert sorted(load_subnets(model)) == sorted(set(NAMES) - {"w25"})
    check_files(model)  # the model still loads
    assert json.loads(capsys.readouterr().out)["format"] == "elastic_lm subnets 1"


def test_commands_take_names(
    model: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("export", "--from", model, "--to", tmp_path / "half", "--subnet", "w50") == 0
    assert "128 of 192 neurons" not in (said := capsys.readouterr().err)
    assert "runs 3 of 3 layers, 96 of 192 neurons" in said
    assert el.load(tmp_path / "half")[0].config.d_mlp == 32
    assert not (tmp_path / "half" / SUBNETS_FILE).exists()  # the names are the whole model's

    assert run("export", "--from", model, "--to", tmp_path / "none", "--subnet", "w51") == 2
    assert "--subnet w51: subnet='w51': the model has no sub-network of this name; did you mean w50" in (
        capsys.readouterr().err
    )
    (model / SUBNETS_FILE).unlink()
    (model / "checksums.json").unlink()
    assert run("export", "--from", model, "--to", tmp_path / "none", "--subnet", "w50") == 2
    assert "there are whole" in capsys.readouterr().err


def test_names_go_along_and_numbers_stay_with_their_weights(
    model: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    measured(model)
    before = load_subnets(model)
    assert run("export", "--from", model, "--to", tmp_path / "hf") == 0
    assert run("convert", "--from", tmp_path / "hf", "--to", tmp_path / "back") == 0
    for folder in ("hf", "back"):
        assert load_subnets(tmp_path / folder, CONFIG) == before
        check_files(tmp_path / folder)
    assert run("export", "--from", model, "--to", tmp_path / "hf", "--overwrite") == 0

    # Exits are no part of what was measured; other weights are.
    params = el.load(model)[1]
    bare, bare_params = el.depth.without_exits(CONFIG, params)
    native.save_model(tmp_path / "bare", bare, bare_params, None, source=model)
    assert load_subnets(tmp_path / "bare")["w50"].loss is not None
    changed = jax.tree.map(lambda leaf: leaf + 1, params)
    native.save_model(tmp_path / "changed", CONFIG, changed, None, menu=MENU, source=model)
    assert list(load_subnets(tmp_path / "changed")) == list(before)
    assert load_subnets(tmp_path / "changed")["w50"].loss is None


def test_a_menu_that_does_not_fit_keeps_no_model_from_being_saved(tmp_path: pathlib.Path) -> None:
    odd = Menu(mlp=(0.3, 1.0))
    native.save_model(tmp_path / "odd", CONFIG, random_params(CONFIG), None, menu=odd)
    assert native.load_menu(tmp_path / "odd") == odd
    assert not (tmp_path / "odd" / SUBNETS_FILE).exists()


def test_the_card_shows_names_and_what_was_measured(model: pathlib.Path) -> None:
    measured(model)
    card = write_card(collect_facts(model, "org/name"))
    assert "| `w50` | 3 | 50% |" in card
    assert "| 2.5000 | not measured | not measured |" in card
    assert "Losses are on text.txt." in card


def test_a_crash_between_two_writes_leaves_a_model_that_loads(
    model: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def crash(*_: object) -> None:
        raise OSError("the power went out")

    table = load_subnets(model).without("w25")
    for broken in ("write_text_whole", "checksums.update_checksums"):
        with monkeypatch.context() as patch:
            patch.setattr(f"elastic_lm.files.subnet_files.{broken}", crash)
            with pytest.raises(OSError, match="power"):
                save_subnets(model, table)
        check_files(model)
        assert len(load_subnets(model)) in (len(table), len(table) + 1)
        el.load(model)


def test_a_damaged_table_is_named(model: pathlib.Path) -> None:
    file = model / SUBNETS_FILE
    file.write_text(file.read_text().replace('"w50"', '"w5O"'))
    with pytest.raises(ValueError, match=r"subnets\.json: is damaged or was changed"):
        load_subnets(model)
    file.write_text("{}")
    with pytest.raises(ValueError, match=r"subnets\.json: not a usable table of sub-networks"):
        load_subnets(model)


@pytest.mark.long
def test_loss_and_time_are_measured(
    model: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("def f(x):\n    return x + 1\n" * 40)
    sizes = ("--data", text, "--tokens", 256, "--seq-len", 32)
    assert run("subnets", "--model", model, "--measure", *sizes, "--names", "w50", "whole") == 0
    table = load_subnets(model, CONFIG)
    assert (table["w25"].loss, table["w25"].time) == (None, None)
    half, whole = table["w50"], table["whole"]
    assert half.loss is not None
    assert half.time is not None
    assert whole.time is not None
    assert whole.time.speedup == 1.0
    assert half.time.ms_per_token > 0
    assert half.loss.text == "text.txt, up to 256 tokens"

    # The loss is that of the exported slice on the same text.
    assert run("export", "--from", model, "--to", tmp_path / "half", "--subnet", "w50") == 0
    small, params = el.load(tmp_path / "half")
    data = el.DataConfig(source="text", paths=(str(text),), eval_paths=(str(text),), seq_len=32, batch_size=8)
    tokenizer = el.Tokenizer.load(model)
    batches = [el.data.Batch(**b) for b in el.data.eval_batches(data, tokenizer)][:1]
    alone = el.evaluate.evaluate(small.config, params, batches)[-1].nats_per_token
    assert half.loss.nats_per_token == pytest.approx(alone, rel=1e-5)
    capsys.readouterr()
    assert run("subnets", "--model", model) == 0
    assert f"{alone:.4f} nats/token" in capsys.readouterr().out
