"""Budgets on the command line, with the menu of the checkpoint."""

import contextlib
import dataclasses
import json
import pathlib

import jax
import pytest

from elastic_lm.checkpoints import native as checkpoint
from elastic_lm.cli import main as cli
from elastic_lm.config.subnet import Budget, Menu
from elastic_lm.cost.counted import Workload, counted_table, model_cost
from elastic_lm.cost.latency_table import Device, LatencyTable
from elastic_lm.data.tokenizer import train_bpe
from elastic_lm.models.registry import init_params
from elastic_lm.testing import tiny_config
from elastic_lm.width.chooser import SubnetChooser

CONFIG = tiny_config(exits=(2,), n_heads=6, n_kv_heads=2, head_dim=8, vocab_size=300, elastic_groups=16)
MENU = Menu(mlp=(0.25, 0.5, 1.0), heads=(1 / 3, 2 / 3, 1.0))
WHOLE = model_cost(CONFIG.with_exits(())).parameters


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("elastic") / "model"
    tokenizer = train_bpe(["def f(x):\n    return x\n" * 50], 300)
    checkpoint.save_model(folder, CONFIG, init_params(CONFIG, jax.random.key(0)), tokenizer, menu=MENU)
    return folder


@pytest.fixture
def table(tmp_path: pathlib.Path) -> pathlib.Path:
    """A millisecond per 10 000 weights."""
    costs = dataclasses.replace(counted_table(CONFIG, MENU, "parameters"), kind="latency_ms")
    config, residuals = CONFIG.with_exits(()), {"decode": 0.0, "prefill": 0.0}
    found = LatencyTable(config, MENU, Workload(1, 8), Device.here(), costs, costs, residuals, 1, "", {})
    found.save(tmp_path / "latency.json")
    return tmp_path / "latency.json"


def generate(model: pathlib.Path, *arguments: object) -> int:
    given = ("--model", model, "--prompt", "def f(", "--max-new-tokens", 3, *arguments)
    return cli.main(["generate", *map(str, given)])


@pytest.mark.long
def test_bytes_are_counted_at_a_context(model: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    at = counted_table(CONFIG, MENU, "memory_bytes", Workload(context=64))
    amount = 0.8 * at.range(MENU)[1]
    assert generate(model, "--budget", f"memory_bytes={amount}", "--context", 64, "--json", "-") == 0
    (row,) = map(json.loads, capsys.readouterr().out.splitlines())
    chooser = dataclasses.replace(SubnetChooser.load(model), workload=Workload(context=64))
    chosen = chooser.subnet(Budget(memory_bytes=amount))
    assert row["stats"]["subnet"] == json.loads(json.dumps(dataclasses.asdict(chosen)))
    assert chosen != SubnetChooser.load(model).subnet(Budget(memory_bytes=amount))
    assert generate(model, "--budget", "parameters=9e9", "--context", 64) == 2
    assert "--budget-context 64: is read for --budget flops=N or memory_bytes=N" in capsys.readouterr().err


@pytest.mark.long
@pytest.mark.parametrize("kind", ["parameters", "latency_ms"])
def test_generate_serves_a_budget(
    model: pathlib.Path, table: pathlib.Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    given = ("--latency-table", table) if kind == "latency_ms" else ()
    half = Budget(**{kind: 0.6 * WHOLE})
    assert generate(model, "--budget", f"{kind}={half.amount}", *given, "--json", "-") == 0
    printed = capsys.readouterr()
    (row,) = map(json.loads, printed.out.splitlines())
    chooser = SubnetChooser.load(model)
    if given:
        chooser = chooser.with_latency(LatencyTable.load(table))
    chosen = chooser.subnet(half)
    assert row["stats"]["subnet"] == json.loads(json.dumps(dataclasses.asdict(chosen)))
    assert f"runs 4 of 4 layers, {sum(chosen.mlp)} of 256 neurons, " in printed.err
    assert generate(model, "--budget", f"{kind}={2 * WHOLE}", *given, "--threshold", 0) == 0
    printed = capsys.readouterr()
    assert printed.out.startswith("def f(")
    assert "runs 4 of 4 layers, 256 of 256 neurons, 24 of 24 heads" in printed.err
    assert "mean 2.00 of 4 layers" in printed.err


@pytest.mark.long
def test_streams_and_unprompted_texts_are_served_a_budget_too(
    model: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ("--budget", f"parameters={0.6 * WHOLE}")
    assert generate(model, *given) == 0
    text = capsys.readouterr().out
    assert generate(model, *given, "--stream") == 0
    assert capsys.readouterr().out == text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--budget", "latency=4"), "'latency=4' is not KIND=AMOUNT, KIND one of latency_ms, parameters"),
        (("--budget", "flops"), "'' in 'flops' is not a number"),
        (("--budget", "flops=many"), "'many' in 'flops=many' is not a number"),
        (("--budget", "flops=-1"), "budget.flops=-1.0: must be positive"),
        (("--budget", "flops=1"), "budget.flops=1.0: the cheapest sub-network of this menu costs"),
        (("--budget", "latency_ms=4"), "--budget latency_ms=4: needs --latency-table FILE; write one"),
        (("--latency-table", "t.json"), "--latency-table t.json: is read for --budget latency_ms=N"),
        (("--budget", "flops=1", "--latency-table", "t.json"), "--latency-table t.json: is read for"),
        (("--budget", "latency_ms=4", "--latency-table", "t.json"), "t.json: no such latency table"),
    ],
)
def test_budgets_that_do_not_fit_are_refused(
    model: pathlib.Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], message: str
) -> None:
    with contextlib.suppress(SystemExit):  # raised by the parser itself
        assert generate(model, *arguments) == 2
    said = capsys.readouterr().err
    assert len(said.strip().splitlines()) == 1
    assert message in said


def test_tables_of_another_menu_are_named_by_their_file(
    model: pathlib.Path, table: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = json.loads(table.read_text())
    content["device"]["kind"] = "another"
    table.write_text(json.dumps(content))
    assert generate(model, "--budget", "latency_ms=4", "--latency-table", table) == 2
    assert f"{table}: device.kind='another': this device has" in capsys.readouterr().err


def test_models_without_a_menu_say_how_to_get_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["generate", "--prompt", "a", "--budget", "flops=1e9"]) == 2
    assert "has no menu.json: train an elastic model with --config flextron" in capsys.readouterr().err


def test_latency_is_measured_at_the_menu_of_the_checkpoint(
    model: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    menus = []

    def build(config, menu, load, **how):
        menus.append(menu)
        raise ValueError("measured enough")

    monkeypatch.setattr("elastic_lm.bench.latency_build.build", build)
    common = ["latency", "build", "--model", str(model), "--out", str(tmp_path / "t.json")]
    assert cli.main(common) == cli.main([*common, "--mlp", "0.5,1"]) == 2
    assert menus == [MENU, dataclasses.replace(MENU, mlp=(0.5, 1.0))]
