"""Budgets become sub-networks within them; menus travel with checkpoints."""

import dataclasses
import json
import pathlib

import jax
import pytest

import elastic_lm as el
from elastic_lm.checkpoints import native as checkpoint
from elastic_lm.config.subnet import Budget, Menu, Subnet
from elastic_lm.cost.counted import CostTable, Workload, counted_table, model_cost
from elastic_lm.cost.latency_table import Device, LatencyTable
from elastic_lm.models.decoder import Decoder
from elastic_lm.models.registry import init_params
from elastic_lm.testing import tiny_config
from elastic_lm.width.chooser import SubnetChooser
from elastic_lm.width.search import uniform_subnet
from elastic_lm.width.slicing import slice_params

CONFIG = tiny_config(n_heads=6, n_kv_heads=2, head_dim=8, elastic_groups=16)
MENU = Menu(mlp=(0.25, 0.5, 1.0), heads=(1 / 3, 2 / 3, 1.0), dropped=(2,))
WORK = Workload(batch=2, context=40)


def table(fixed: float = 1.0) -> LatencyTable:
    """What every choice takes here, by hand: a millisecond per 10 000 weights."""
    counted = counted_table(CONFIG, MENU, "parameters")
    attention = tuple(tuple(tuple(c / 1e4 for c in row) for row in layer) for layer in counted.attention)
    mlp = tuple(tuple(c / 1e4 for c in layer) for layer in counted.mlp)
    costs = CostTable("latency_ms", fixed, attention, mlp)
    residuals = {"decode": 0.0, "prefill": 0.0}
    return LatencyTable(CONFIG, MENU, WORK, Device.here(), costs, costs, residuals, 1, "", {})


def whole_cost(chooser: SubnetChooser, kind: str) -> float:
    return chooser.costs(kind).range(MENU)[1]


@pytest.mark.parametrize("kind", ["parameters", "flops", "memory_bytes"])
def test_counted_budgets_are_kept_exactly_by_the_slice(kind: str) -> None:
    chooser = SubnetChooser(CONFIG, MENU, workload=WORK)
    whole = getattr(model_cost(CONFIG, WORK), kind)
    params, seen = init_params(CONFIG, jax.random.key(0)), set()
    for share in (0.5, 0.65, 0.8, 0.9, 0.99, 1.0, 3.0):
        budget = Budget(**{kind: share * whole})
        subnet = chooser.subnet(budget)
        config, cut = slice_params(CONFIG, params, subnet)
        cost = model_cost(config, WORK)
        assert getattr(cost, kind) <= budget.amount
        assert cost.parameters == sum(leaf.size for leaf in jax.tree.leaves(cut))
        assert (subnet == Subnet.full(CONFIG)) == (share >= 1)
        seen.add(subnet)
    assert len(seen) > 4


def test_exits_do_not_count() -> None:
    with_exits = tiny_config(exits=(1, 3), n_heads=6, n_kv_heads=2, head_dim=8, elastic_groups=16)
    budget = Budget(parameters=0.7 * model_cost(CONFIG).parameters)
    assert SubnetChooser(with_exits, MENU).subnet(budget) == SubnetChooser(CONFIG, MENU).subnet(budget)


def test_latency_budgets_are_kept_by_the_table() -> None:
    chooser = SubnetChooser(CONFIG, MENU).with_latency(table())
    whole = whole_cost(chooser, "latency_ms")
    assert whole == pytest.approx(table().total(Subnet.full(CONFIG)))
    assert chooser.subnet(Budget(latency_ms=whole)) == Subnet.full(CONFIG)
    assert chooser.subnet(Budget(latency_ms=2 * whole)) == Subnet.full(CONFIG)
    found = [chooser.subnet(Budget(latency_ms=share * whole)) for share in (0.6, 0.8)]
    assert len(set(found)) == 2
    assert table().total(found[0]) <= 0.6 * whole < table().total(found[1]) <= 0.8 * whole
    assert chooser.subnet(Budget(parameters=1e9)) == Subnet.full(CONFIG)  # counted as before
    assert SubnetChooser(CONFIG, MENU, table().checked(CONFIG, MENU)) == chooser


def test_a_router_decides_below_the_cost_of_the_whole_model() -> None:
    asked = []
    chosen = MENU.smallest(CONFIG)

    def choose(budget: Budget) -> Subnet:
        asked.append(budget)
        return chosen

    chooser = SubnetChooser(CONFIG, MENU, choose=choose)
    whole = model_cost(CONFIG).parameters
    assert chooser.subnet(Budget(parameters=whole)) == Subnet.full(CONFIG)
    assert not asked
    budget = Budget(parameters=whole - 1)
    assert chooser.subnet(budget) == chosen
    assert asked == [budget]
    without = dataclasses.replace(chooser, choose=None)
    assert without.subnet(budget) == uniform_subnet(CONFIG, MENU, without.costs("parameters"), budget)


def test_budgets_that_cannot_be_kept_are_named() -> None:
    plain = SubnetChooser(CONFIG, MENU)
    with pytest.raises(ValueError, match=r"elastic.table=None: .*elastic-lm latency build.*with_latency\("):
        plain.subnet(Budget(latency_ms=3.0))
    with pytest.raises(ValueError, match=r"budget.latency_ms=0.1: the cheapest sub-network of this"):
        plain.with_latency(table()).subnet(Budget(latency_ms=0.1))
    with pytest.raises(ValueError, match=r"budget.flops=1.0: the cheapest"):
        plain.subnet(Budget(flops=1.0))
    channels = SubnetChooser(CONFIG, dataclasses.replace(MENU, d_model=(0.5, 1.0)))
    with pytest.raises(ValueError, match=r"menu.d_model=\(0.5, 1.0\): a table holds costs at"):
        channels.subnet(Budget(flops=1e9))


def test_tables_of_something_else_are_named() -> None:
    plain, wider = SubnetChooser(CONFIG, MENU), dataclasses.replace(CONFIG, d_mlp=128)
    with pytest.raises(ValueError, match=r"t.json: model.d_mlp=64: this model has 128"):
        SubnetChooser(wider, MENU).with_latency(table(), "t.json")
    coarse = dataclasses.replace(MENU, mlp=(0.5, 1.0))
    with pytest.raises(
        ValueError, match=r"latency table: menu.mlp=\(0.25, 0.5, 1.0\): this menu has \(0.5, 1.0\)"
    ):
        SubnetChooser(CONFIG, coarse).with_latency(table())
    moved = dataclasses.replace(table(), device=Device("tpu", "v9", "x", 1))
    with pytest.raises(ValueError, match=r"latency table: device.platform='tpu': this device has"):
        plain.with_latency(moved)
    with pytest.raises(ValueError, match=r"elastic.table='LatencyTable': must be .*with_latency"):
        dataclasses.replace(plain, table=table())
    with pytest.raises(ValueError, match=r"choices of elastic.table=.*is of another menu or model"):
        SubnetChooser(CONFIG, coarse, table().decode)
    with pytest.raises(ValueError, match=r"menu.mlp=0.3: must give a multiple of 16"):
        SubnetChooser(CONFIG, Menu(mlp=(0.3, 1.0)))


@pytest.fixture
def folder(tmp_path: pathlib.Path) -> pathlib.Path:
    checkpoint.save_model(tmp_path / "m", CONFIG, init_params(CONFIG, jax.random.key(0)), None, menu=MENU)
    return tmp_path / "m"


def test_a_menu_travels_with_its_checkpoint(folder: pathlib.Path) -> None:
    assert checkpoint.load_menu(folder) == MENU
    assert checkpoint.load_config(folder) == CONFIG
    assert el.SubnetChooser.load(folder) == SubnetChooser(CONFIG, MENU)
    half = dataclasses.replace(CONFIG, param_dtype="bfloat16")
    assert SubnetChooser.load(folder, half).config == half
    model, params = el.load(folder)
    sampler = el.Sampler(model, params, elastic=SubnetChooser.load(folder), budget=Budget(parameters=40_000))
    stats = sampler.sample([1, 2, 3], 2).stats
    assert stats.subnet is not None
    assert model_cost(stats.subnet.sliced(CONFIG)).parameters <= 40_000


def test_no_menu_of_an_earlier_model_stays(folder: pathlib.Path) -> None:
    config, params = checkpoint.load_model(folder)
    assert (folder / "menu.json").is_file()
    checkpoint.save_model(folder, config, params, None, overwrite=True)
    assert not (folder / "menu.json").exists()
    with pytest.raises(
        FileNotFoundError, match=r"m has no menu.json: train .*--config flextron \(in Python: "
    ):
        SubnetChooser.load(folder)
    with pytest.raises(FileNotFoundError, match="is not an elastic checkpoint"):
        SubnetChooser.load(folder / "nowhere")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mlp": [0.5]}, r"menu.json: menu.mlp=\(0.5,\): must be shares"),
        ({"mpl": [0.5, 1.0]}, r"menu.json: unknown key menu.mpl=.*did you mean menu.mlp\?"),
    ],
)
def test_a_damaged_menu_is_named(folder: pathlib.Path, change: dict, message: str) -> None:
    content = json.loads((folder / "menu.json").read_text())
    (folder / "menu.json").write_text(json.dumps({**content, **change}))
    with pytest.raises(ValueError, match=message):
        checkpoint.load_menu(folder)


def test_latency_budgets_through_the_sampler(folder: pathlib.Path) -> None:
    model, params = el.load(folder)
    chooser = SubnetChooser.load(folder, model.config).with_latency(table())
    budget = Budget(latency_ms=0.7 * whole_cost(chooser, "latency_ms"))
    served = el.Sampler(Decoder(model.config), params, elastic=chooser).sample([1, 2], 2, budget=budget)
    assert served.stats.subnet == chooser.subnet(budget)
