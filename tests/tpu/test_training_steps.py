"""Every method's training step, compiled for slices of TPUs on a machine that has none.

Small models stand for the structure: which collectives there are, and that nothing talks to the host. The
8B and the 70B stand for memory.
"""

import json
from pathlib import Path
from typing import Any

import pytest

from elastic_lm.bench.topology_plan import TopologyPlan, held_bytes, plan_training
from elastic_lm.checkpoints.describing import describe_model
from elastic_lm.config.data import DataConfig
from elastic_lm.config.encoder import EncoderConfig
from elastic_lm.config.mesh import MeshConfig
from elastic_lm.config.model import ExitConfig, ModelConfig
from elastic_lm.config.parse import to_dict
from elastic_lm.config.subnet import Menu
from elastic_lm.config.task import TaskConfig
from elastic_lm.cost.compiled import Program, compile_program
from elastic_lm.cost.topologies import GIB, devices, parse_topology
from elastic_lm.depth.ee_tuning import EETuningConfig
from elastic_lm.depth.self_supervised import SelfSupervisedConfig
from elastic_lm.depth.sorted_finetuning import SortedFineTuningConfig
from elastic_lm.files.atomic import write_text_whole
from elastic_lm.models.sharding import make_mesh
from elastic_lm.train.abstract import AbstractRun, abstract_run
from elastic_lm.train.config import RunConfig, TaskRun, TrainConfig
from elastic_lm.train.method import MethodConfig
from elastic_lm.train.pretraining import PretrainingConfig
from elastic_lm.width.elastic_training import ElasticTrainingConfig
from elastic_lm.width.router_training import RouterTrainingConfig

pytest.importorskip("libtpu", reason='compiles for TPUs: pip install "elastic-lm[tpu-aot]"')
pytestmark = pytest.mark.long

DESIGNED = {"all-gather", "all-reduce", "reduce-scatter"}
SLICES = {"v5e:2x4": (1, 4, 2), "v5p:2x2x2": (2, 2, 2)}  # topology: devices on data, fsdp and tensor
MENU = Menu(mlp=(0.5, 1.0), heads=(0.5, 1.0))
EXITS = (ExitConfig(1, kind="mlp", init="copy"), ExitConfig(2, kind="mlp", init="copy"))


def small(**more: Any) -> ModelConfig:
    """Dimensions that tile well, so that what is copied or padded is not for their sake."""
    sizes: dict[str, Any] = {"vocab_size": 1024, "d_model": 256, "n_layers": 4, "n_heads": 8, "n_kv_heads": 4}
    sizes |= {"d_mlp": 512, "max_len": 256, "dtype": "bfloat16", "param_dtype": "bfloat16"}
    return ModelConfig(**sizes | more)


def text_run(
    method: MethodConfig, exits: tuple[ExitConfig, ...] = (), init_from: str = "x", **train: Any
) -> RunConfig:
    return RunConfig(
        exits=exits,
        data=DataConfig(source="stdlib", seq_len=256, batch_size=8),
        method=method,
        train=TrainConfig(init_from=init_from, loss_chunk=128, **train),
    )


def abstract_on(topology: str, run: RunConfig | TaskRun, model: Any) -> AbstractRun:
    mesh = make_mesh(*SLICES[topology], devices=devices(parse_topology(topology)))
    return abstract_run(run, mesh, model)


def compiled(run: AbstractRun) -> Program:
    return compile_program(run.step, run.state, run.frozen, run.batch)


def check(run: AbstractRun, topology: str) -> Program:
    """Compiles a step: its arguments are those that are counted, it fits, and it talks to no host."""
    program = compiled(run)
    # Small arrays are padded to tiles of the hardware, and a program is not given what it does not read.
    assert program.arguments <= 1.05 * sum(held_bytes(run).values()) + 2**20
    assert program.total < parse_topology(topology).chip.hbm_bytes
    assert program.host_transfers == 0
    assert program.flops > 0
    return program


METHODS: dict[str, tuple[MethodConfig, tuple[ExitConfig, ...]]] = {
    "pretraining": (PretrainingConfig(), ()),
    "ee_tuning": (EETuningConfig(), EXITS),
    "self_supervised": (SelfSupervisedConfig(), EXITS),
    "cached_taps": (SelfSupervisedConfig(cached_batches=4), EXITS),
    "sorted_finetuning": (SortedFineTuningConfig(depths=(1, 2)), ()),
    "flextron": (ElasticTrainingConfig(menu=MENU), ()),
    "routers": (RouterTrainingConfig(budgets=(0.75, 1.0)), ()),
}


@pytest.fixture
def elastic_folder(tmp_path: Path) -> Path:
    """What a run of routers reads of its initial model: a folder with a menu."""
    write_text_whole(tmp_path / "menu.json", json.dumps(to_dict(MENU)))
    return tmp_path


@pytest.mark.parametrize("topology", SLICES)
@pytest.mark.parametrize("name", METHODS)
def test_collectives_are_those_of_the_design(name: str, topology: str, elastic_folder: Path) -> None:
    """Parameters are gathered, gradients and the tensor axis's sums are reduced, and nothing else moves."""
    method, exits = METHODS[name]
    model = small(elastic_groups=8) if name in ("flextron", "routers") else small()
    run = text_run(method, exits, init_from=str(elastic_folder))
    program = check(abstract_on(topology, run, model), topology)
    assert set(program.counts()) <= DESIGNED


@pytest.mark.parametrize("topology", SLICES)
def test_a_task_is_learned_with_the_same_collectives(topology: str) -> None:
    """But for its head, which has one state per record: the compiler may send that, as it is smaller."""
    task = TaskConfig(paths=("records.jsonl",), labels=("bad", "good"), max_len=64, tokenizer="t")
    encoder = EncoderConfig(vocab_size=1024, d_model=256, n_layers=2, n_heads=8, d_mlp=512, dtype="bfloat16")
    run = TaskRun(task=task, train=TrainConfig(init_from="x"))
    program = check(abstract_on(topology, run, encoder), topology)
    others = [each for each in program.collectives if each.kind not in DESIGNED]
    assert all(each.bytes < 2**18 for each in others)
    assert all("pooler" in name or "head" in name for each in others for name in each.names)


def check_rings(plan: TopologyPlan) -> None:
    """Large kernels are gathered in parts around a ring, each beside its product; nothing else is sent."""
    assert {each.kind for each in plan.collectives} <= DESIGNED | {"collective-permute"}
    for each in plan.collectives:
        if each.kind == "collective-permute":
            assert all(name.endswith("dot_general") for name in each.names)


def test_an_8b_at_full_size() -> None:
    """EE-Tuning of a Llama 3 8B on 16 chips; what is counted is what the program is given."""
    run = RunConfig(
        exits=(ExitConfig(8, kind="mlp", init="copy"), ExitConfig(16, kind="mlp", init="copy")),
        data=DataConfig(source="stdlib", seq_len=2048, batch_size=16),
        method=EETuningConfig(),
        train=TrainConfig(init_from="llama-3-8b", remat=True),
        mesh=MeshConfig(data=1, fsdp=4, tensor=4),
    )
    plan = plan_training(run, parse_topology("v5e:4x4"), describe_model("llama-3-8b"))
    assert plan.fits
    unread = 128256 * 4096 * 2 // 16  # the head, which exits do not read: JAX leaves out what nobody reads
    assert plan.program["arguments"] + unread == pytest.approx(sum(plan.held.values()), rel=0.01)
    assert plan.needed == plan.program["total"] < 8 * GIB
    check_rings(plan)


def test_a_70b_at_full_size() -> None:
    """EE-Tuning of a Llama 2 70B on 256 chips of 16 GB each."""
    run = RunConfig(
        exits=(ExitConfig(40, kind="mlp", init="copy"),),
        data=DataConfig(source="stdlib", seq_len=4096, batch_size=64),
        method=EETuningConfig(),
        train=TrainConfig(init_from="llama-2-70b", remat=True),
        mesh=MeshConfig(data=1, fsdp=32, tensor=8),
    )
    plan = plan_training(run, parse_topology("v5e:16x16"), describe_model("llama-2-70b"))
    assert plan.fits
    check_rings(plan)
    assert plan.program["arguments"] == pytest.approx(sum(plan.held.values()), rel=0.01)
    # The chips of a host, two by two, belong to two groups that share layers: it reads the rows of both.
    assert (plan.host.hosts, plan.host.rows, plan.host.shared_rows) == (64, 4, 4)
