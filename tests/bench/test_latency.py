"""Latency tables recover known costs, keep them in a file, and refuse what they are not about."""

import dataclasses
import json
import pathlib
import re

import jax
import numpy as np
import pytest

from elastic_lm.bench import latency_build as build
from elastic_lm.bench import latency_measure as measure
from elastic_lm.bench import latency_verify as verify
from elastic_lm.cli import main as cli
from elastic_lm.config.model import ExitConfig, ModelConfig
from elastic_lm.config.subnet import Menu, Subnet
from elastic_lm.cost import latency_table as table
from elastic_lm.cost.counted import CostTable, Workload
from elastic_lm.cost.latency_table import Device, LatencyTable
from elastic_lm.decode.sampler import Sampler
from elastic_lm.models.decoder import Decoder
from elastic_lm.models.registry import init_params
from elastic_lm.testing import tiny_config

LLAMA = ModelConfig(32000, d_model=768, n_layers=12, n_heads=12, n_kv_heads=6, d_mlp=2048, max_len=1024)
WINDOWED = dataclasses.replace(LLAMA, windows=(64, 0) * 6)
UNEQUAL = dataclasses.replace(LLAMA, layer_mlp=(2048, 1024, 512) * 4)
MENU = Menu(groups=(0.5, 1.0))
LOAD = Workload(context=128)
HERE = Device("cpu", "cpu", "A Processor", 2)


def true_costs(config: ModelConfig, menu: Menu, phase: table.Phase) -> CostTable:
    """Costs near what is counted, but different for every choice and class; milliseconds."""
    counted = build.counted_shares(config, menu, LOAD, phase)
    other = np.random.default_rng(len(counted)).uniform(0.8, 1.25, len(counted))
    return build.cost_table(config, menu, 40.0 * counted * other)


class FakeTimer:
    """Stands in for `measure`: times by known costs, noisy, on a machine of any speed."""

    def __init__(self, menu: Menu, noise: float = 0.0, slower: float = 1.0) -> None:
        self.menu, self.noise, self.slower = menu, noise, slower
        self.rng = np.random.default_rng(0)

    def __call__(self, config: ModelConfig, params, subnets, load, **_) -> measure.Measured:
        full: dict[table.Phase, float] = {}
        relative: dict[table.Phase, np.ndarray] = {}
        for phase in table.PHASES:
            costs = true_costs(config, self.menu, phase)
            full[phase] = self.slower * costs.total(config, self.menu, Subnet.full(config))
            times = np.asarray([self.slower * costs.total(config, self.menu, s) for s in subnets])
            relative[phase] = times / full[phase] * self.rng.normal(1.0, self.noise, len(times))
        return measure.Measured(full, relative)


@pytest.fixture
def timer(monkeypatch: pytest.MonkeyPatch):
    """Makes every measurement one of a `FakeTimer`, on the device `HERE`."""
    monkeypatch.setattr(Device, "here", classmethod(lambda cls: HERE))

    def use(**settings) -> None:
        for module in (build, verify):
            monkeypatch.setattr(module, "measure", FakeTimer(**settings))

    return use


def built(config: ModelConfig = LLAMA, menu: Menu = MENU) -> LatencyTable:
    return build.build(config, menu, LOAD, params={})


@pytest.fixture
def small(timer) -> LatencyTable:
    timer(menu=Menu())
    return built(tiny_config(), Menu())


@pytest.mark.parametrize("noise", [0.0, 0.03])
@pytest.mark.parametrize("config", [LLAMA, WINDOWED, UNEQUAL])
def test_totals_of_unseen_subnets_are_recovered(timer, config: ModelConfig, noise: float):
    timer(menu=MENU, noise=noise)
    found, rng = built(config), np.random.default_rng(1)
    for phase in table.PHASES:
        assert (found.residuals[phase] < 1e-4) == (noise == 0)
        assert found.residuals[phase] < 2 * noise + 1e-4
        truth, subnets = true_costs(config, MENU, phase), [MENU.sample(config, rng) for _ in range(30)]
        errors = [found.total(s, phase) / truth.total(config, MENU, s) - 1 for s in subnets]
        assert np.median(np.abs(errors)) < noise + 2e-4


def test_what_choices_save_and_what_is_fixed_are_recovered(timer):
    timer(menu=MENU)
    menu = dataclasses.replace(MENU, dropped=(5,))  # only programs that lack layers tell what is fixed
    found, truth = built(menu=menu).decode, true_costs(LLAMA, MENU, "decode")
    assert found.fixed == pytest.approx(truth.fixed, rel=1e-2)
    saved = np.asarray(truth.mlp[0])[-1] - np.asarray(truth.mlp[0])
    np.testing.assert_allclose(np.asarray(found.mlp[0])[-1] - np.asarray(found.mlp[0]), saved, atol=1e-3)
    saved = np.asarray(truth.attention[0])[-1, -1] - np.asarray(truth.attention[0])
    np.testing.assert_allclose(found.attention[0][-1][-1] - np.asarray(found.attention[0]), saved, atol=1e-3)
    assert found.mlp[0] == found.mlp[11]
    least = min(map(min, found.attention[0]))  # not 0: bytes say how a layer's time splits
    assert 0.3 < least / truth.attention[0][0][0] < 3


def test_layers_of_one_size_and_window_are_a_class():
    assert build.layer_classes(LLAMA) == [tuple(range(12))]
    assert build.layer_classes(WINDOWED) == [tuple(range(0, 12, 2)), tuple(range(1, 12, 2))]
    assert [layers[0] for layers in build.layer_classes(UNEQUAL)] == [0, 1, 2]


def test_a_dozen_programs_cover_a_homogeneous_model():
    subnets = build.programs(LLAMA, Menu(), seed=0)
    assert subnets[0] == Subnet.full(LLAMA)
    assert len(subnets) == len(set(subnets)) <= 12
    assert all(len(s.layers) == 12 for s in subnets)
    dropping = build.programs(LLAMA, Menu(dropped=(3,)), seed=0)
    assert {len(s.layers) for s in dropping} == {3, 6, 11, 12}
    one_layer = tiny_config(n_layers=1)
    assert build.programs(one_layer, Menu((1.0,), (1.0,)), seed=0) == [Subnet.full(one_layer)]


def test_a_total_is_the_sum_of_its_modules(small: LatencyTable):
    subnet = Subnet((0, 2), (16, 48), (2, 1), (2, 2), 32)
    for phase in table.PHASES:
        costs: CostTable = getattr(small, phase)
        attention = costs.attention[0][1][0] + costs.attention[2][0][0]
        expected = costs.fixed + attention + costs.mlp[0][0] + costs.mlp[2][2]
        assert small.total(subnet, phase) == pytest.approx(expected)
    with pytest.raises(ValueError, match=r"subnet.mlp\[0\]=8: is not on the menu"):
        small.total(Subnet.uniform(small.model, mlp=0.125))


def test_saved_and_loaded_is_the_same(small: LatencyTable, tmp_path: pathlib.Path):
    small.save(tmp_path / "new" / "t.json")
    again = LatencyTable.load(tmp_path / "new" / "t.json")
    assert again == small
    assert again.text() == small.text()
    again.check(small.model.with_exits((ExitConfig(1),)))
    rounded = Menu(mlp=(0.250001, 0.5, 0.75, 1.0))  # of the same neurons
    again.check(small.model, rounded)


def test_text_names_every_choice_once(small: LatencyTable):
    lines = small.text().splitlines()
    assert "at batch 1 after 128 tokens" in lines[0]
    assert [line for line in lines if "layers" in line] == ["each of layers 0,1,2,3"]
    assert sum("MLP of" in line for line in lines) == 4
    assert sum("2 groups of" in line for line in lines) == 2


def damaged(content: dict) -> list[tuple[str, str]]:
    """(text of a file, what is said about it)."""
    whole = json.dumps(content)
    short = {**content, "decode": {**content["decode"], "mlp": content["decode"]["mlp"][:-1]}}
    narrow = {**content, "prefill": {**content["prefill"], "mlp": [[1.0, 2.0]] * 4}}
    endless = {**content, "decode": {**content["decode"], "fixed": float("nan")}}
    return [
        (whole[:-20], "Expecting|delimiter|Unterminated"),
        ("[]", '"format" is not'),
        ('{"format": "elastic_lm thresholds 1"}', '"format" is not'),
        (json.dumps({**content, "menue": 1}), "did you mean menu"),
        (json.dumps({k: v for k, v in content.items() if k != "device"}), "needs device"),
        (json.dumps(short), "give both for every layer"),
        (json.dumps(narrow), "prefill='costs of 4 layers': does not hold one number for each choice"),
        (json.dumps(endless), "decode=nan: milliseconds must be"),
        (json.dumps({**content, "residuals": {}}), "residuals.decode=None"),
    ]


def test_unusable_files_are_refused(small: LatencyTable, tmp_path: pathlib.Path):
    path = tmp_path / "t.json"
    small.save(path)
    for text, message in damaged(json.loads(path.read_text())):
        path.write_text(text)
        with pytest.raises(ValueError, match=message) as refused:
            LatencyTable.load(path)
        assert str(refused.value).startswith(f"{path}: not a usable latency table (")
        assert "measure again: elastic-lm latency build" in str(refused.value)
    with pytest.raises(FileNotFoundError, match="no such latency table; measure again: elastic-lm"):
        LatencyTable.load(tmp_path / "nowhere.json")


def test_another_model_or_menu_is_refused(small: LatencyTable):
    with pytest.raises(ValueError, match=r"t.json: model.d_mlp=64: this model has 128; .*latency build"):
        small.check(tiny_config(d_mlp=128), source="t.json")
    with pytest.raises(ValueError, match=r"model.dtype='float32': this model has 'bfloat16'"):
        small.check(tiny_config(dtype="bfloat16"))
    message = r"t.json: menu.dropped=\(\): this menu drops layers \(1,\), of which no time is known"
    with pytest.raises(ValueError, match=message):
        small.check(small.model, Menu(dropped=(1,)), "t.json")
    message = r"t.json: menu.heads=\(0.5, 1.0\): this menu has \(1.0,\); .*latency build --heads 1"
    with pytest.raises(ValueError, match=message):
        small.check(small.model, Menu(heads=(1.0,)), source="t.json")
    small.check(dataclasses.replace(small.model, elastic_groups=8, max_len=64))


@pytest.mark.parametrize(
    "change", [{"platform": "gpu"}, {"kind": "other"}, {"processor": "Another"}, {"cores": 64}]
)
def test_another_device_is_refused(small: LatencyTable, change: dict):
    (field, value), *_ = change.items()
    moved = dataclasses.replace(small, device=dataclasses.replace(HERE, **change))
    message = f"t.json: device.{field}={value!r}: this device has {getattr(HERE, field)!r}"
    with pytest.raises(ValueError, match=f"{re.escape(message)}, .*measure again: elastic-lm latency build"):
        moved.check(small.model, source="t.json")


def test_the_host_of_a_gpu_does_not_matter(monkeypatch: pytest.MonkeyPatch):
    gpu = Device("gpu", "H100", "A Processor", 2)
    monkeypatch.setattr(Device, "here", classmethod(lambda cls: gpu))
    dataclasses.replace(gpu, processor="Another", cores=64).check("t.json")


def test_verification_by_the_same_costs_is_exact_and_notices_a_slower_machine(timer):
    timer(menu=MENU)
    found = built()
    rows, checked = verify.verify(found, LLAMA, params={}, count=5)
    by_name = {row.name: row for row in rows}
    assert by_name["latency/median_error"].measured < 1e-3
    assert by_name["latency/median_error"].ideal == 0.1
    assert by_name["latency/prefill_median_error"].measured < 1e-3
    assert by_name["latency/half_width_vs_ideal"].ratio == pytest.approx(1.0, abs=0.25)
    assert len(checked) == len(verify.text(checked).splitlines()) - 1 == 5
    assert not {c.subnet for c in checked} & set(build.programs(LLAMA, MENU, seed=0))
    timer(menu=MENU, slower=1.25)
    rows, checked = verify.verify(found, LLAMA, params={}, count=5)
    by_name = {row.name: row for row in rows}
    assert by_name["latency/median_error"].measured == pytest.approx(0.2, abs=1e-3)
    assert by_name["latency/full_vs_table"].ratio == pytest.approx(1.25, abs=1e-3)
    with pytest.raises(ValueError, match="count=0"):
        verify.verify(found, LLAMA, params={}, count=0)


def test_half_the_heads_are_half_the_groups_where_heads_share_none():
    assert verify.half_width(LLAMA) == Subnet.uniform(LLAMA, mlp=0.5, heads=0.5)
    alone = dataclasses.replace(LLAMA, n_kv_heads=12)
    assert verify.half_width(alone) == Subnet.uniform(alone, mlp=0.5, groups=0.5)
    assert build.default_menu(alone) == Menu(heads=(1.0,), groups=(0.5, 1.0))
    odd = dataclasses.replace(LLAMA, n_heads=3, n_kv_heads=3)
    assert verify.half_width(odd) is None
    assert build.default_menu(odd) == Menu(heads=(1.0,))
    assert build.default_menu(LLAMA) == Menu()


def test_what_cannot_be_measured_is_refused():
    with pytest.raises(ValueError, match=r"menu.d_model=\(0.5, 1.0\): times are measured at the model"):
        build.build(LLAMA, Menu(d_model=(0.5, 1.0)), LOAD)
    for context in (0, 97):
        with pytest.raises(ValueError, match=rf"workload.context={context}: must be from 1 to 96"):
            build.build(tiny_config(), Menu(), Workload(context=context), params={})


def test_the_programs_that_are_timed_are_those_of_the_sampler():
    config = tiny_config(n_layers=1)
    params = init_params(config, jax.random.key(0))
    sampler = Sampler(Decoder(config), params)
    sampler.sample([[1] * 5] * 2, measure.NEW_TOKENS, ignore_eos=True)
    before = Sampler.compilations()
    program = measure.Program(config, params, Workload(2, 5), seed=0)
    program.run()
    program.run()
    assert Sampler.compilations() == before
    assert {phase: len(runs) for phase, runs in program.runs.items()} == {"decode": 2, "prefill": 2}


def run(*arguments: object) -> int:
    return cli.main(["latency", *map(str, arguments)])


@pytest.mark.long
def test_verify_and_build_on_the_command_line(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(build, "RANDOM", 1)
    file, result = tmp_path / "new" / "t.json", tmp_path / "v.json"
    sizes = ("--mlp", "0.5,1", "--heads", "1", "--groups", "1", "--context", 8, "--batch", 2)
    few = ("--tiny", "--rounds", 1)
    assert run("verify", *few, *sizes, "--subnets", 2, "--json", result) == 0
    printed = capsys.readouterr().out
    assert "predicted / measured" in printed
    assert re.search(r"step \d+/\d+ .* left", printed)
    found = json.loads(result.read_text())
    names = ("median_error", "prefill_median_error", "full_vs_table", "half_width_vs_ideal")
    assert [row["name"] for row in found["rows"]] == [f"latency/{name}" for name in names]
    assert all(np.isfinite([row["measured"], row["ideal"], row["ratio"]]).all() for row in found["rows"])
    assert len(found["subnets"]) == 2
    assert {"hardware", "versions", "options"} <= set(found)
    assert run("build", *few, *sizes, "--out", file) == 0
    assert "at batch 2 after 8 tokens" in capsys.readouterr().out
    built = LatencyTable.load(file)
    assert built.menu == Menu((0.5, 1.0), (1.0,))
    assert (built.workload, built.rounds, built.device) == (Workload(2, 8), 1, Device.here())
    assert run("verify", *few, "--table", file, "--subnets", 1) == 0
    assert "latency/half_width_vs_ideal" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("build", "--json", "x.json"), "--json x.json: goes with `latency verify`; leave it out"),
        (("build", "--subnets", 3), "--subnets 3: goes with `latency verify`"),
        (("verify", "--subnets", 0), "--subnets 0: must be at least 1"),
        (("build", "--rounds", 0), "--rounds 0: must be at least 1"),
        (("verify", "--table", "t", "--mlp", "1"), "--mlp (1.0,): is settled by --table t"),
        (("verify", "--table", "t", "--context", 0), "--context 0: is settled by --table t"),
        (("build", "--tiny", "--model", "m"), "--tiny: stands for a model of its own; leave it or --model m"),
        (("verify", "--table", "nowhere.json"), "nowhere.json: no such latency table"),
        (("build", "--tiny", "--heads", "0.5,1"), "menu.heads=0.5: must give a whole number of the"),
        (("build", "--tiny", "--batch", 0), "workload.batch=0: must be at least 1"),
        (("build", "--tiny", "--mlp", "0.5"), "menu.mlp=(0.5,): must be shares in (0, 1]"),
    ],
)
def test_flags_that_do_not_fit_are_refused(
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[object, ...],
    message: str,
):
    monkeypatch.chdir(tmp_path)
    assert run(*arguments) == 2
    said = capsys.readouterr().err
    assert len(said.strip().splitlines()) == 1
    assert message in said


def test_a_table_of_another_model_is_refused_by_its_file(
    small: LatencyTable, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
):
    small.save(tmp_path / "t.json")
    assert run("verify", "--tiny", "--table", tmp_path / "t.json") == 2
    assert "t.json: model.n_layers=4: this model has 2; name the table's model" in capsys.readouterr().err
