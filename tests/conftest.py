"""How the tests compile: fast and once, because compilation is most of what they cost.

The caller's own XLA_FLAGS and JAX_COMPILATION_CACHE_DIR stay. `XLA_FLAGS= python -m pytest` compiles as
users' programs do.
"""

import atexit
import gc
import os
import shutil
import tempfile
from pathlib import Path

import jax
import pytest

from elastic_lm.config.data import DataConfig
from elastic_lm.config.model import ModelConfig
from elastic_lm.train.config import RunConfig, TrainConfig

MOST_RESIDENT = 2 * 2**30  # bytes of a test process between two files
LINE = "def f{0}(x):\n    return x * {0} + {1}\n\n"

os.environ["HF_HUB_OFFLINE"] = "1"  # tests of the Hub have one of their own, in processes of their own

if "XLA_FLAGS" not in os.environ:
    # Read by XLA when its first device is asked for, and by processes that inherit the environment.
    flags = ["--xla_backend_optimization_level=0"]
    if jax.__version_info__ < (0, 11):  # jax 0.12 does not know this flag and ends
        flags.append("--xla_cpu_use_fusion_emitters=false")
    os.environ["XLA_FLAGS"] = " ".join(flags)


if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    # Both workers, and the processes that tests start, take from one folder what one of them has compiled.
    # Half of the programs are single operations, which take longer to compile than to read.
    programs = tempfile.mkdtemp(prefix="elastic_lm_programs_")
    atexit.register(shutil.rmtree, programs, ignore_errors=True)
    settings = {
        "jax_compilation_cache_dir": programs,
        "jax_persistent_cache_min_compile_time_secs": 0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    for name, value in settings.items():
        jax.config.update(name, value)  # for this process
        os.environ[name.upper()] = str(value)  # for those that it starts


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    """About 30 KB of code-like text."""
    file = tmp_path / "text.txt"
    file.write_text("".join(LINE.format(i, i * i) for i in range(800)))
    return file


@pytest.fixture
def run_config(text_file: Path) -> RunConfig:
    """Two layers, six steps, a checkpoint every two."""
    return RunConfig(
        model=ModelConfig(
            vocab_size=300, d_model=32, n_layers=2, n_heads=4, n_kv_heads=2, d_mlp=64, max_len=64, tied=True
        ),
        data=DataConfig(
            source="text",
            paths=(str(text_file),),
            eval_paths=(str(text_file),),
            seq_len=32,
            batch_size=8,
            span=200,
        ),
        train=TrainConfig(
            steps=6, lr=1e-2, warmup=2, log_every=1, eval_every=3, eval_batches=2, save_every=2
        ),
    )


def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """Forgets compiled programs between the rooms, and between files where they are many.

    A process that keeps the programs of two thousand tests spends more and more of its time on them, and
    runs out of memory maps in the end. What is needed again is read from the folder.
    """
    here, there = item.path, nextitem.path if nextitem else None
    if there is None or here == there:
        return
    if resident_bytes() > MOST_RESIDENT or here.parent != there.parent:
        jax.clear_caches()
        gc.collect()


def resident_bytes() -> int:
    """Memory of this process; 0 where the system does not tell."""
    statm = Path("/proc/self/statm")
    if not statm.is_file():
        return 0
    pages = int(statm.read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with long tests come first, so that no worker is left with one of them in the end."""
    long = {item.path for item in items if item.get_closest_marker("long")}
    items.sort(key=lambda item: item.path not in long)


def pytest_collection_finish() -> None:
    """Keeps what the imports left behind out of later garbage collections."""
    gc.collect()
    gc.freeze()
