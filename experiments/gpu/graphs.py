"""Batch-1 decoding and bare loops in processes of their own, which differ in what runs as a CUDA graph.

XLA records what it can of a program into CUDA graphs. By default neither branches nor loops are among
that, so each `cond` and each iteration ends a graph, and the host reads a flag. COMMANDS of such a
process are a list for XLA's flag xla_gpu_enable_command_buffer: "" = no graphs, "+CONDITIONAL,+WHILE" =
branches and loops too.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from record import Record

MEMORY = "0.2"  # share of the card's
LONGEST = 80.0  # seconds of a process


def graphs(record: Record, commands: str, args: argparse.Namespace) -> None:
    """Puts what a process with these graphs measures beside what it says where it fails."""
    flags = f"--xla_gpu_enable_command_buffer={commands}"
    flags += " --xla_gpu_graph_min_graph_size=1" if commands else ""
    out = record.path.parent / f"{record.section}.json"
    out.unlink(missing_ok=True)
    environment = {**os.environ, "XLA_FLAGS": flags, "XLA_PYTHON_CLIENT_MEM_FRACTION": MEMORY}
    command = [sys.executable, __file__, str(out), str(args.rounds), args.cache, *(["--tiny"] * args.tiny)]
    found = child(command, environment, min(max(record.left(), 20.0), LONGEST))
    measured = json.loads(out.read_text())["sections"] if out.is_file() else {}
    record.put(flags=flags, **found, **measured)


def child(command: list[str], environment: dict[str, str], seconds: float) -> dict[str, Any]:
    """Runs a process; gives the end of what it says where it fails or takes too long."""
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired as error:
        said = error.stderr.decode(errors="replace") if isinstance(error.stderr, bytes) else error.stderr
        return {"timeout": seconds, "stderr": (said or "")[-2000:].splitlines()}
    return {} if done.returncode == 0 else {"rc": done.returncode, "stderr": done.stderr[-2000:].splitlines()}


def main() -> None:
    """The process itself: loops, full depth, then the exit that is always taken."""
    path, rounds, cache = sys.argv[1:4]
    args = argparse.Namespace(tiny="--tiny" in sys.argv, rounds=int(rounds))
    from run import prepare

    prepare(args.tiny, cache)
    from ceilings import loop_times
    from decoding import big_model, make_sides, speeds, traffic

    from elastic_lm.bench.timing import interleave

    record = Record(Path(path), 600)
    record.run("loops", 0, lambda r: r.put(us=loop_times(50 if args.tiny else 2000)))

    def decoding(name: str) -> None:
        big = big_model(args.tiny)
        sides = make_sides(big, 1)
        seconds = interleave({side: sides[side] for side in ("one_token", "plain", name)}, args.rounds)
        record.put(**speeds(name, seconds, traffic(big, 1), 1, float("nan")))

    for name in ("plain", "half"):
        record.run(name, 0, lambda r, name=name: decoding(name))


if __name__ == "__main__":
    main()
