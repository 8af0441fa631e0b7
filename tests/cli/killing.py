"""Kills commands at random moments, or interrupts them, and looks at what is there afterwards.

    python tests/cli/killing.py --kills 50 --interrupts 20 --folder /tmp/kills
    python tests/cli/killing.py --processes 2 --kills 20 --folder /tmp/kills

Every command works on a target that is absent or old. After a kill the target is absent, old or new; the
next run goes on, and what the last run leaves is what a run that nobody killed leaves, bit by bit and name by
name. Of several processes one is killed: the others must end by themselves.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cascade_process
import chex
import jax
import joined_train

import elastic_lm as el
from elastic_lm import hf
from elastic_lm.cascade.answerer import Answer
from elastic_lm.data.tokenizer import train_bpe
from elastic_lm.files.journal import read_records
from elastic_lm.quickstart.folders import FILES

DEADLINE = 1800.0  # seconds for one process; far above what it takes
SOON = 5.0  # seconds from Ctrl-C to the end
# Seconds from the death of one process to the end of the others: at once where they wait for its part of a
# sum, by the heartbeats where they wait for it while a checkpoint is finished, or before all have met.
LEFT_ALONE = joined_train.STARTING + 6 * joined_train.HEARTBEAT
FEWER = ("--config.train.steps=18", "--config.train.save_every=3")  # of several, which take longer
LOST = ("elastic-lm train: error: another process of this run", "another task died")
RECORDS = 10_000
RECIPE = """
def get_config(arg=""):
    return {{
        "model": {{"vocab_size": 300, "d_model": 64, "n_layers": 2, "n_heads": 4, "d_mlp": 128, "max_len": 64, "tied": True}},
        "data": {{"source": "text", "paths": ({text!r},), "seq_len": 32, "batch_size": 4, "span": 200}},
        "train": {{"steps": 60, "lr": 1e-2, "warmup": 2, "log_every": 3, "eval_every": 0, "save_every": 2}},
    }}
"""  # noqa: E501


@dataclasses.dataclass(frozen=True)
class Case:
    """A command, what may be there after a kill, and what must be there in the end.

    Attributes:
      name: as in the table.
      command: what is run, again and again.
      target: what appears whole or not at all.
      between: asserts what is there after a kill.
      end: asserts what is there after a run that nobody killed; it may prepare the next round.
    """

    name: str
    command: list[str]
    target: Path
    between: Callable[[], None]
    end: Callable[[], None]


def start(command: list[str], cache: Path, stdout: int = subprocess.DEVNULL) -> subprocess.Popen:
    environment = {
        **os.environ,
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    pipes: dict[str, Any] = {"stdout": stdout, "stderr": subprocess.PIPE}
    with children_that(signal.SIG_DFL):
        return subprocess.Popen(command, env=environment, **pipes)


@contextlib.contextmanager
def children_that(do: signal.Handlers) -> Iterator[None]:
    """Processes that are started do this at Ctrl-C and hang-up, whatever a shell has chosen for us."""
    before = {number: signal.signal(number, do) for number in (signal.SIGINT, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def finish(process: subprocess.Popen) -> str:
    printed, errors = process.communicate(timeout=DEADLINE)
    assert process.returncode == 0, errors.decode()[-3000:]
    return (printed or b"").decode()


def listens(process: subprocess.Popen) -> bool:
    """Whether the command has begun, told by its handler of SIGTERM."""
    try:
        status = Path(f"/proc/{process.pid}/status").read_text()
    except OSError:
        return False
    caught = next((line.split()[1] for line in status.splitlines() if line.startswith("SigCgt")), "0")
    return bool(int(caught, 16) >> (signal.SIGTERM - 1) & 1)


def wait(process: subprocess.Popen, until: Callable[[], bool]) -> bool:
    """False where the process ends before."""
    while process.poll() is None:
        if until():
            return True
        time.sleep(0.001)
    return False


def writes(target: Path) -> bool:
    """Whether something half-written lies beside a target, or a checkpoint in it."""
    beside = any(target.parent.glob(f".{target.name}.*-*"))
    try:
        unfinished = ("*/*.orbax-checkpoint-tmp*", "*.orbax-checkpoint-tmp*", ".*.partial-*")
        return beside or any(any(target.glob(pattern)) for pattern in unfinished)
    except FileNotFoundError:  # a folder left while its files were listed
        return True


def moment(case: Case, process: subprocess.Popen, seconds: float, chance: random.Random) -> bool:
    """Waits for a random moment: anywhere in the run, or while something is written."""
    began = time.monotonic()
    if not wait(process, lambda: listens(process) or time.monotonic() - began > seconds / 10):
        return False
    if chance.random() < 0.5:
        if not wait(process, lambda: writes(case.target)):
            return False
        at = time.monotonic() + chance.uniform(0.0, 0.1)
    else:
        at = began + chance.uniform(0.0, seconds)
    return wait(process, lambda: time.monotonic() >= at)


def kill(case: Case, count: int, seconds: float, chance: random.Random, cache: Path) -> int:
    """Kills a command `count` times, and lets it end in between. Returns how often it was writing."""
    killed = writing = in_a_row = 0
    while killed < count:
        process = start(case.command, cache)
        if in_a_row < 5 and moment(case, process, seconds, chance):
            writing += writes(case.target)
            process.kill()
            process.communicate()
            if process.returncode == -signal.SIGKILL:
                killed, in_a_row = killed + 1, in_a_row + 1
                case.between()
                continue
        finish(process)
        case.end()
        in_a_row = 0
    finish(start(case.command, cache))
    case.end()
    return writing


def interrupt(case: Case, count: int, seconds: float, chance: random.Random, cache: Path) -> float:
    """Interrupts a command `count` times. Returns the longest time from there to its end."""
    done, longest = 0, 0.0
    while done < count:
        process = start(case.command, cache)
        at = chance.uniform(0.0, seconds)
        if wait_for(process, at):
            process.send_signal(signal.SIGINT)
            sent = time.monotonic()
            _, errors = process.communicate(timeout=DEADLINE)
            took = time.monotonic() - sent
            if process.returncode == 0 and took < SOON:
                continue  # it was over: the interpreter was at its end
            assert process.returncode == 130, (process.returncode, errors.decode())
            last = errors.decode().splitlines()[-1]
            assert last.startswith("elastic-lm"), errors.decode()
            assert last.endswith("interrupted"), errors.decode()
            assert "Traceback" not in errors.decode(), errors.decode()
            assert took < SOON, took
            done, longest = done + 1, max(longest, took)
            case.between()
            continue
        finish(process)
        case.end()
        seconds *= 0.8
    return longest


def wait_for(process: subprocess.Popen, seconds: float) -> bool:
    """Waits so long, and until the command has begun in any case; False where it ends before."""
    at = time.monotonic() + seconds
    return wait(process, lambda: listens(process)) and wait(process, lambda: time.monotonic() >= at)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def folder_case(name: str, source: Path, target: Path, old: Any, new: Any) -> Case:
    """`convert` or `export`; every other round begins with an old model, the others with none."""
    command = [
        sys.executable,
        "-m",
        "elastic_lm",
        name,
        "--from",
        str(source),
        "--to",
        str(target),
        "--overwrite",
    ]
    target.parent.mkdir(parents=True)
    rounds = iter(range(10**6))

    def between() -> None:
        if target.exists():
            assert_either(el.load(target)[1], (old, new))

    def end() -> None:
        assert names(target.parent) == {target.name}
        chex.assert_trees_all_equal(el.load(target)[1], new)
        shutil.rmtree(target)
        if next(rounds) % 2 == 0:
            shutil.copytree(source.parent / f"old_{source.name}_{name}", target)

    return Case(name, command, target, between, end)


def assert_either(found: Any, choices: tuple[Any, ...]) -> None:
    same = [jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), found, each)) for each in choices]
    assert any(same), "the target is neither the old nor the new model"


def models(folder: Path) -> Iterator[Case]:
    """convert and export of a tiny model, with another one in their place."""
    config = el.testing.tiny_config(vocab_size=300, d_model=256, d_mlp=512, max_len=64)
    old, new = (el.testing.random_params(config, seed=seed) for seed in (0, 1))
    tokenizer = train_bpe(["some text of a few words"], 300)
    from elastic_lm.checkpoints.native import save_model

    hf.export(config, new, folder / "hf", tokenizer)
    save_model(folder / "ck", config, new, tokenizer)
    save_model(folder / "old_hf_convert", config, old, tokenizer)
    hf.export(config, old, folder / "old_ck_export", tokenizer)
    yield folder_case("convert", folder / "hf", folder / "to" / "convert" / "model", old, new)
    yield folder_case("export", folder / "ck", folder / "to" / "export" / "model", old, new)


def train_case(folder: Path, straight: Path) -> Case:
    workdir = folder / "run"
    command = [sys.executable, "-m", "elastic_lm", "train", "--config", str(folder / "recipe.py")]

    def between() -> None:
        if (workdir / "model").exists():
            el.load(workdir / "model")

    def end() -> None:
        chex.assert_trees_all_equal(*(el.load(at / "model")[1] for at in (workdir, straight)))
        assert names(workdir) == names(straight)
        assert names(workdir / "checkpoints") == names(straight / "checkpoints")
        steps = [[json.loads(line)["step"] for line in (at / "metrics.jsonl").read_text().splitlines()]
                 for at in (workdir, straight)]  # fmt: skip
        assert steps[0] == steps[1]
        shutil.rmtree(workdir)

    return Case("train", [*command, "--workdir", str(workdir)], workdir, between, end)


def cascade_case(folder: Path) -> Case:
    data, out = folder / "in.jsonl", folder / "answers" / "out.jsonl"
    data.write_text("".join(f'{{"n": {n}}}\n' for n in range(RECORDS)))
    command = [sys.executable, cascade_process.__file__, str(data), str(out), "0.003"]

    def between() -> None:
        if out.exists():
            whole = [line for line in out.read_text().splitlines(keepends=True) if line.endswith("\n")]
            assert [json.loads(line)["index"] for line in whole] == list(range(len(whole)))

    def end() -> None:
        def answer(n: int) -> Answer:
            record = {"n": n}
            swift = cascade_process.swift(record)
            return swift if swift.scores["energy"] >= 50.0 else cascade_process.super_(record)

        assert [line["output"] for line in read_records(out)] == [answer(n).output for n in range(RECORDS)]
        assert names(out.parent) == {"out.jsonl", "out.jsonl.run.json"}
        shutil.rmtree(out.parent)

    return Case("cascade run", command, out, between, end)


def quickstart_case(folder: Path) -> Case:
    out = folder / "quick"
    command = [sys.executable, "-m", "elastic_lm", "quickstart", "--tiny", "--out", str(out)]

    def between() -> None:
        for file in out.glob("*.json"):
            json.loads(file.read_text())
        if (out / "model").exists():
            el.load(out / "model")

    def end() -> None:
        between()
        assert names(out) == {*FILES, "model", "tuning"}
        left = [path.name for path in out.rglob(".*") if path.name != ".quickstart"]
        assert not left, left

    return Case("quickstart", command, out, between, end)


def generate_case(folder: Path) -> Case:
    options = ("--prompt", "some", "--max-new-tokens", "60", "--stream", "--temperature", "1")
    command = [sys.executable, "-m", "elastic_lm", "generate", "--model", str(folder / "hf"), *options]
    return Case("generate", command, folder / "none", lambda: None, lambda: None)


def seconds_of(case: Case, cache: Path) -> float:
    """How long the command takes once its programs are compiled, and longer than a run takes that goes on."""
    finish(start(case.command, cache))
    case.end()
    began = time.monotonic()
    finish(start(case.command, cache))
    case.end()
    return time.monotonic() - began


def all_cases(folder: Path, cache: Path, wanted: set[str]) -> Iterator[Case]:
    text = folder / "text.txt"
    text.write_text("".join(f"def f{i}(x):\n    return x * {i} + {i * i}\n\n" for i in range(800)))
    (folder / "recipe.py").write_text(RECIPE.format(text=str(text)))
    yield from models(folder)
    yield generate_case(folder)
    yield cascade_case(folder)
    if "train" in wanted:
        straight = folder / "straight"
        command = train_case(folder, straight).command
        finish(start([*command[:-1], str(straight)], cache))
        yield train_case(folder, straight)
    yield quickstart_case(folder)


KILLED = ("train", "convert", "export", "cascade run", "quickstart")
INTERRUPTED = ("generate", "convert", "train", "quickstart")


def run(folder: Path, kills: dict[str, int], interrupts: dict[str, int], seed: int = 0) -> list[str]:
    """Kills and interrupts commands.

    Args:
      folder: an empty one.
      kills: how often, by the names in KILLED.
      interrupts: how often, by the names in INTERRUPTED.
      seed: of the moments.

    Returns:
      A line for every command.
    """
    chance, cache, lines = random.Random(seed), folder / "programs", []
    for case in all_cases(folder, cache, {*kills, *interrupts}):
        kill_count, interrupt_count = kills.get(case.name, 0), interrupts.get(case.name, 0)
        if not kill_count and not interrupt_count:
            continue
        line, seconds = f"{case.name}:", seconds_of(case, cache)
        if kill_count:
            writing = kill(case, kill_count, seconds, chance, cache)
            line += f" {kill_count} kills, {writing} of them while something was written, all well;"
        if interrupt_count:
            longest = interrupt(case, interrupt_count, seconds, chance, cache)
            line += f" {interrupt_count} Ctrl-C, status 130 each, {longest:.2f} s at most;"
        lines.append(f"{line} a whole run takes {seconds:.1f} s")
        print(lines[-1], flush=True)
    return lines


def start_together(
    processes: int, arguments: list[str], cache: Path, stdout: int = subprocess.DEVNULL
) -> list[subprocess.Popen]:
    """Starts one `elastic-lm train` of several processes."""
    with socket.socket() as place:
        place.bind(("", 0))
        port = str(place.getsockname()[1])
    command = [sys.executable, joined_train.__file__, port]
    return [start([*command, str(i), str(processes), *arguments], cache, stdout) for i in range(processes)]


def end_alone(process: subprocess.Popen, began: float) -> float:
    """Seconds until a process ends, one of whose company was killed, and says so in a line."""
    _, errors = process.communicate(timeout=LEFT_ALONE)
    if process.returncode:  # 0: it was over
        assert any(line.find(text) >= 0 for line in errors.decode().splitlines() for text in LOST), (
            errors.decode()
        )
    return time.monotonic() - began


def run_together(folder: Path, count: int, processes: int, seed: int = 0) -> str:
    """Kills one of the processes of a training run `count` times, and starts all of them again.

    Args:
      folder: an empty one.
      count: how often.
      processes: that train together.
      seed: of the moments.

    Returns:
      A line about it.
    """
    chance, cache, straight = random.Random(seed), folder / "programs", folder / "straight"
    text = folder / "text.txt"
    text.write_text("".join(f"def f{i}(x):\n    return x * {i} + {i * i}\n\n" for i in range(800)))
    (folder / "recipe.py").write_text(RECIPE.format(text=str(text)))
    case = train_case(folder, straight)
    # The files that a run writes at its beginning are not what is to be hit.
    case = dataclasses.replace(case, target=case.target / "checkpoints")
    arguments = [*FEWER, *case.command[4:]]

    began = time.monotonic()
    for process in start_together(processes, [*arguments[:-1], str(straight)], cache):
        finish(process)
    seconds = time.monotonic() - began

    killed = writing = in_a_row = 0
    longest = 0.0
    while killed < count or in_a_row:
        started = start_together(processes, arguments, cache)
        victim = chance.choice(started)
        if killed < count and in_a_row < 5 and moment(case, victim, seconds, chance):
            writing += writes(case.target)
            victim.kill()
            victim.communicate()
            began = time.monotonic()
            rest = [end_alone(process, began) for process in started if process is not victim]
            longest = max(longest, *rest)
            if victim.returncode == -signal.SIGKILL:
                killed, in_a_row = killed + 1, in_a_row + 1
                print(f"kill {killed}: the others ended after {time.monotonic() - began:.1f} s", flush=True)
                case.between()
                continue
        for process in started:
            finish(process)
        case.end()
        in_a_row = 0
    return (
        f"train by {processes} processes: {killed} kills of one, {writing} of them while something was "
        f"written, the others ended after {longest:.1f} s at most, all well; a whole run takes "
        f"{seconds:.1f} s"
    )


def shares(total: int, names: tuple[str, ...]) -> dict[str, int]:
    return {name: total // len(names) + (i < total % len(names)) for i, name in enumerate(names)}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--interrupts", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", help="one command")
    parser.add_argument("--processes", type=int, default=1, help="of a training run, one of which is killed")
    parser.add_argument("--folder", type=Path, required=True, help="a new folder")
    given = parser.parse_args()
    given.folder.mkdir(parents=True)
    if given.processes > 1:
        print(run_together(given.folder, given.kills, given.processes, given.seed))
        raise SystemExit
    chosen = (shares(given.kills, KILLED), shares(given.interrupts, INTERRUPTED))
    if given.only:
        chosen = tuple({name: n for name, n in each.items() if name == given.only} for each in chosen)
    run(given.folder, *chosen, seed=given.seed)
