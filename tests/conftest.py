"""How the tests compile: fast, because compilation is most of what they cost.

An XLA_FLAGS of the caller's own stays; `XLA_FLAGS= python -m pytest` compiles as users' programs do.
"""

import os

import jax

if "XLA_FLAGS" not in os.environ:
    # Read by XLA when its first device is asked for, and by processes that inherit the environment.
    flags = ["--xla_backend_optimization_level=0"]
    if jax.__version_info__ < (0, 11):  # jax 0.12 does not know this flag and ends
        flags.append("--xla_cpu_use_fusion_emitters=false")
    os.environ["XLA_FLAGS"] = " ".join(flags)
