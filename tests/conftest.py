"""How the tests compile: fast, because compilation is most of what they cost.

An XLA_FLAGS of the caller's own stays; `XLA_FLAGS= python -m pytest` compiles as users' programs do.
"""

import os

import jax
import pytest

if "XLA_FLAGS" not in os.environ:
    # Read by XLA when its first device is asked for, and by processes that inherit the environment.
    flags = ["--xla_backend_optimization_level=0"]
    if jax.__version_info__ < (0, 11):  # jax 0.12 does not know this flag and ends
        flags.append("--xla_cpu_use_fusion_emitters=false")
    os.environ["XLA_FLAGS"] = " ".join(flags)


@pytest.fixture(scope="session")
def programs_on_disk(tmp_path_factory: pytest.TempPathFactory):
    """From its first use on, programs that take long to compile are compiled once per session."""
    jax.config.update("jax_compilation_cache_dir", str(tmp_path_factory.mktemp("compiled")))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    yield
    jax.config.update("jax_compilation_cache_dir", None)
