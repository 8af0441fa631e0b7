"""Decoding compiled for TPUs: no weight is copied, no token goes through the host, and devices talk little.

Two layers stand for all layers of a model, which are alike: what they take is compared with the arguments of
as many layers.
"""

import importlib.util
from typing import Any

import pytest

import elastic_lm as el
from elastic_lm.bench.decode_programs import DecodeProgram, copied_weights, steps

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu: the extra tpu-aot"),
]

# vocabulary, width, heads, key/value heads, neurons, and whether the head is the embedding, of Llamas
SIZES = {
    "135M": (49152, 576, 9, 3, 1536, True),
    "1B": (128256, 2048, 32, 8, 8192, True),
    "8B": (128256, 4096, 32, 8, 14336, False),
    "70B": (128256, 8192, 64, 8, 28672, False),
}
FIELDS = ("vocab_size", "d_model", "n_heads", "n_kv_heads", "d_mlp", "tied")


def llama(size: str, *, exit: bool = False, dtype: str = "bfloat16") -> el.ModelConfig:
    """Two layers, with an exit between them or without."""
    exits = (el.ExitConfig(1, kind="norm", tied=True),) if exit else ()
    fields: dict[str, Any] = dict(zip(FIELDS, SIZES[size], strict=True))
    return el.ModelConfig(**fields, n_layers=2, max_len=4096, exits=exits, dtype=dtype, param_dtype=dtype)


def part(config: el.ModelConfig) -> el.ModelConfig:
    """A sub-network: its MLP is no multiple of the 128 numbers of a tile's row."""
    return el.Subnet.uniform(config, mlp=1000 / config.d_mlp).sliced(config)


PROGRAMS = {
    "plain, 135M in float32": DecodeProgram(config=llama("135M", dtype="float32")),
    "exits, 135M": DecodeProgram(config=llama("135M", exit=True)),
    "sub-network, 135M": DecodeProgram(config=part(llama("135M"))),
    "lossless with lookup, 1B": DecodeProgram(config=llama("1B"), window=3, mode="verify", lookup=True),
    "lossless, 8B": DecodeProgram(config=llama("8B", exit=True), mode="verify"),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_chip_decodes_without_copying_a_weight(name: str) -> None:
    decoding = PROGRAMS[name]
    program = decoding.loop()
    assert copied_weights(program, decoding.params) == []
    assert program.temporaries <= 0.05 * program.arguments
    assert (program.host_transfers, program.collectives) == (0, ())


def test_devices_that_share_layers_add_up_two_states_per_layer() -> None:
    decoding = DecodeProgram(config=llama("70B"), topology="v5e:2x4", tensor=8)
    program = decoding.loop()
    assert copied_weights(program, decoding.params) == []
    assert program.temporaries <= 0.05 * program.arguments
    assert program.host_transfers == 0

    # One after the embedding, one after attention and one after the MLP of each layer. What else is added up
    # is a few numbers per row, to draw a token from divided logits, and logits where they are truncated.
    assert set(program.counts()) == {"all-reduce"}
    width = decoding.config.d_model
    wide = [each for _, each in steps(program) if each.opcode == "all-reduce" and f",{width}]" in each.type]
    assert len(wide) == 1 + 2 * decoding.config.n_layers
    assert program.counts()["all-reduce"] <= len(wide) + 6


def test_a_prompt_is_read_without_copying_a_weight() -> None:
    decoding = DecodeProgram(config=llama("1B"), prompt=256, capacity=512)
    program = decoding.prefill()
    assert copied_weights(program, decoding.params) == []
    assert (program.host_transfers, program.collectives) == (0, ())


def test_what_the_tests_above_would_find() -> None:
    decoding = DecodeProgram(config=llama("135M"), placed=False)
    program = decoding.loop()
    assert any("49152,576" in copied for copied in copied_weights(program, decoding.params))
    assert program.temporaries > 0.5 * program.arguments
