"""The library on one GPU: correctness, the card's ceilings, decoding, transformers, training steps.

COMMAND   PYTHONPATH=. python experiments/gpu/run.py --out runs/gpu --cache runs/programs
          PYTHONPATH=. python experiments/gpu/run.py --out runs/gpu_tiny --tiny
          (CPU, about a minute; without the sections that run the same code as others)
HARDWARE  one NVIDIA GPU of 80 GB (measured: README.md beside this file), 16 CPU cores
DURATION  five minutes, most of which is compilation; estimates per section are in SECTIONS
EXPECTED  README.md beside this file

Sections run in order of worth. Each one that fails leaves its traceback in OUT/results.json and the next
one begins; from --seconds on those that are left are skipped. `--only NAME ...` runs some of them.

    logits            forward passes against the CPU's in float32, as ||out - ref|| / ||ref||: products in
                      TF32 (jax's default on such a card), in float32, and bfloat16
    invariants        tokens of the embedded model with an exit, products in float32: GPU against CPU, batch
                      against single rows, drafted against full depth, an exit never taken against none
    invariants_tf32   the same with products in TF32
    ceilings          bytes/s of a copy, FLOP/s of matrix products, microseconds of a loop's parts
    decode_B          tokens/s at batch B of a Llama of 1.1 billion bfloat16 weights: full depth, an exit at
                      half depth never taken, always taken; against bytes over the copy's bandwidth
    graphs_*          the same at batch 1 in processes of their own with other CUDA graphs
    transformers      `generate` of the same weights; *_static with its compiled forward pass and static cache
    training          seconds per step of SFT, EE-tuning and SoFT, and the share of the FLOP/s ceiling
"""

import argparse
import faulthandler
import importlib
import importlib.util
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from record import Record, gpu_state

# name: (module, function, arguments, seconds on an H200, from invariants_tf32 on and of graphs_loops guessed)
SECTIONS: dict[str, tuple[str, str, tuple, float]] = {
    "logits": ("correctness", "logits", (), 62),
    "invariants": ("correctness", "invariants", ("highest",), 65),
    "ceilings": ("ceilings", "ceilings", (), 12),
    "decode_1": ("decoding", "decode", (1,), 62),
    "decode_8": ("decoding", "decode", (8,), 39),
    "graphs_loops": ("graphs", "graphs", ("+CONDITIONAL,+WHILE",), 35),
    "transformers": ("theirs", "transformers", ("dynamic",), 30),
    "training": ("training", "training", (), 40),
    "invariants_tf32": ("correctness", "invariants", ("default",), 35),
    "graphs_off": ("graphs", "graphs", ("",), 30),
    "decode_32": ("decoding", "decode", (32,), 25),
    "graphs_branches": ("graphs", "graphs", ("+CONDITIONAL",), 30),
    "transformers_static": ("theirs", "transformers", ("static",), 60),
}
REPEATED = ("invariants_tf32", "graphs_off", "graphs_branches", "decode_32", "transformers_static")
GRACE = 60  # seconds after the limit until a section that hangs is ended with everything else


def main() -> None:
    """Runs the sections and writes results.json."""
    args = parse()
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    faulthandler.dump_traceback_later(args.seconds + GRACE, exit=True)
    prepare(args.tiny, args.cache)
    from elastic_lm.report.machine import hardware, versions

    head = {"args": vars(args), "hardware": hardware(), "versions": versions(), "gpu": gpu_state()}
    record = Record(out / "results.json", args.seconds, **head)
    record.save()
    chosen = args.only or [name for name in SECTIONS if not (args.tiny and name in REPEATED)]
    for name, (module, function, rest, needs) in SECTIONS.items():
        if name in chosen:
            record.run(name, 0 if args.tiny else needs, section(module, function, *rest, args=args))
    record.section = "all"
    record.result["gpu_after"] = gpu_state()
    record.save()
    record.say(f"{record.path} is complete\n{record.summary()}")
    faulthandler.cancel_dump_traceback_later()


def section(module: str, function: str, *rest: object, args: argparse.Namespace) -> Callable[[Record], None]:
    """A section, whose module is imported where a failure is caught."""

    def call(record: Record) -> None:
        getattr(importlib.import_module(module), function)(record, *rest, args=args)

    return call


def prepare(tiny: bool, cache: str) -> None:
    """Chooses platforms before jax is imported, and ends a full-size run that finds no GPU.

    Both platforms are named so that the CPU backend, which gives the references, exists beside the GPU's.
    """
    card = bool(shutil.which("nvidia-smi")) or Path("/dev/nvidia0").exists()
    plugin = any(importlib.util.find_spec(f"jax_cuda{n}_plugin") for n in (12, 13))
    os.environ["JAX_PLATFORMS"] = "cuda,cpu" if card and plugin else "cpu"
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.7")  # the rest is for child processes
    import jax

    if cache:
        jax.config.update("jax_compilation_cache_dir", cache)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    if jax.devices()[0].platform == "cpu" and not tiny:
        raise SystemExit(f"jax finds no GPU (nvidia card: {card}, plugin of jax: {plugin}); try --tiny")


def parse() -> argparse.Namespace:
    """Arguments of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", required=True, help="folder of results.json")
    parser.add_argument("--tiny", action="store_true", help="models that only show that the script runs")
    parser.add_argument("--seconds", type=float, default=290, help="no section begins after these")
    parser.add_argument("--cache", default="", help="folder of compiled programs, kept between runs")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds per side")
    parser.add_argument("--only", nargs="*", default=[], choices=list(SECTIONS), help="sections to run")
    return parser.parse_args()


if __name__ == "__main__":
    main()
