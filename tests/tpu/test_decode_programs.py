"""Decoding compiled for TPUs: no weight is copied, no token goes through the host, and few devices talk.

Two layers stand for all layers of a model, which are alike; what they take is compared with the arguments of
as many layers.
"""

import importlib.util

import pytest
from decode_programs import (
    LLAMA_1B,
    LLAMA_8B,
    SMOL_135M,
    Decoding,
    config_of,
)

import elastic_lm as el

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu: the extra tpu-aot"),
]
EXIT = {"exits": (el.ExitConfig(1, kind="norm", tied=True),)}
SMALL = {**SMOL_135M, "dtype": "float32", "param_dtype": "float32"}
ONE_CHIP = {
    "plain 135M float32": Decoding(config_of(SMALL)),
    "exits 135M": Decoding(config_of(SMOL_135M, **EXIT)),
    "lossless with lookup 1B": Decoding(config_of(LLAMA_1B, **EXIT), window=4, mode="verify", lookup=True),
    "lossless 8B": Decoding(config_of(LLAMA_8B, **EXIT), mode="verify"),
}
