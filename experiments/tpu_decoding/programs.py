"""Decode loops of Llamas compiled for TPUs: bytes, copies of weights, steps of a layer and their cycles.

COMMAND   PYTHONPATH=. JAX_PLATFORMS=cpu python experiments/tpu_decoding/programs.py [NAME ...]
NEEDS     libtpu, and no TPU; half a minute to a minute of one core per program

Two layers stand for all of a model. "as before" is a program without what `nn.linear` and `models.placement`
do for TPUs: parameters lie as a device keeps them by default, and a single token is no tile of eight.
"""

import sys
import time

import elastic_lm as el
from elastic_lm.bench.decode_programs import DecodeProgram, by_layer, copied_weights
from elastic_lm.nn import linear

FIELDS = ("vocab_size", "d_model", "n_heads", "n_kv_heads", "d_mlp", "tied")
SIZES = {
    "135M": (49152, 576, 9, 3, 1536, True),
    "1B": (128256, 2048, 32, 8, 8192, True),
    "8B": (128256, 4096, 32, 8, 14336, False),
    "70B": (128256, 8192, 64, 8, 28672, False),
}


def llama(size: str, exits: tuple[int, ...] = ()) -> el.ModelConfig:
    """Two layers in bfloat16."""
    fields = dict(zip(FIELDS, SIZES[size], strict=True))
    heads = tuple(el.ExitConfig(layer, kind="norm", tied=True) for layer in exits)
    return el.ModelConfig(
        **fields, n_layers=2, max_len=4096, exits=heads, dtype="bfloat16", param_dtype="bfloat16"
    )


PROGRAMS = {
    "135M": DecodeProgram(config=llama("135M")),
    "135M as before": DecodeProgram(config=llama("135M"), placed=False),
    "135M, an exit, window 16": DecodeProgram(config=llama("135M", (1,)), window=16),
    "1B": DecodeProgram(config=llama("1B")),
    "8B": DecodeProgram(config=llama("8B")),
    "8B as before": DecodeProgram(config=llama("8B"), placed=False),
    "8B, 16 rows": DecodeProgram(config=llama("8B"), rows=16),
    "70B on 8 chips": DecodeProgram(config=llama("70B"), topology="v5e:2x4", tensor=8),
}


def main() -> None:
    titles = ("program", "arguments, MB", "temporaries, %", "copied weights", "steps of a layer")
    print(*titles, "its cycles", "cycles of the head", "collectives", sep=" | ")
    for name in sys.argv[1:] or PROGRAMS:
        decoding, began = PROGRAMS[name], time.perf_counter()
        linear.TILE = 0 if name.endswith("before") else 8
        program = decoding.loop()
        parts = by_layer(program)
        steps, cycles = parts["layers_1"]  # the first layer waits for the caches
        share = 100 * program.temporaries / program.arguments
        copies = len(copied_weights(program, decoding.params))
        numbers = f"{program.arguments / 1e6:.0f} | {share:.1f} | {copies} | {steps} | {cycles:,}"
        print(f"{name} | {numbers} | {parts['final_logits'][1]:,} | {program.counts()}", flush=True)
        print(f"{time.perf_counter() - began:.0f} s", file=sys.stderr)


if __name__ == "__main__":
    main()
