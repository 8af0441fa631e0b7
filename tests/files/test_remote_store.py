"""Commands whose files all lie at gs://, on a server of Google's JSON API, also where they are killed."""

import contextlib
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import chex
import numpy as np
import pytest
from gcs_server import Store, in_environment, serving
from many_processes import together
from training_runs import changed

import elastic_lm as el
from elastic_lm.files import remote_workdirs
from elastic_lm.files.remote import remove_version, replace_object
from elastic_lm.files.remote_models import UNFINISHED
from elastic_lm.files.remote_workdirs import LeaseLost, leased

DEADLINE = 1200  # seconds for a process; far above what it takes
RECIPE = """
def get_config(paths):
    return {
        "model": {"vocab_size": 300, "d_model": 32, "n_layers": 2, "n_heads": 4, "d_mlp": 64, "max_len": 64,
                  "exits": [{"layer": 1}], "tied": True},
        "data": {"source": "text", "paths": (paths,), "seq_len": 32, "batch_size": 4, "span": 200},
        "method": {"name": "joint"},
        "train": {"steps": 6, "lr": 1e-2, "warmup": 2, "log_every": 1, "eval_every": 0, "eval_batches": 1,
                  "save_every": 2, "keep": 2},
        "log": {"writers": ("jsonl",)},
    }
"""
COMMANDS = """
import sys
from elastic_lm.cli.main import main
for line in sys.stdin:
    status = main(line.split())
    assert not status, (line, status)
"""
WORDS = "the old ship goes up and down the grey sea while a small bird sings of rain and of wind"

pytest.importorskip("gcsfs", reason="the gcs extra is not installed")


@pytest.fixture(scope="module")
def store() -> Iterator[Store]:
    words = WORDS.split()
    draw = np.random.default_rng(0)
    with serving() as server:
        for name in ("a", "b"):
            text = "\n".join(" ".join(draw.choice(words, 12)) for _ in range(300))
            server.put(f"bucket/text/{name}.txt", text.encode())
        server.put("bucket/recipe.py", RECIPE.encode())
        yield server


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def start(store: Store, cache: Path, *command: str) -> subprocess.Popen[str]:
    environment = {**os.environ, **store.environment, "ELASTIC_LM_CACHE": str(cache), "JAX_PLATFORMS": "cpu"}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([sys.executable, *command], env=environment, text=True, **pipes)


TRAIN = ("-m", "elastic_lm", "train", "--config", "gs://bucket/recipe.py:gs://bucket/text/*.txt")


def killed_at(store: Store, cache: Path, prefix: str, workdir: str) -> None:
    """Trains until an object is to be written whose name begins so, and kills the process there."""
    processes: list[subprocess.Popen[str]] = []

    def kill(name: str) -> None:
        if name.startswith(prefix):
            with contextlib.suppress(ProcessLookupError):
                os.kill(processes[0].pid, signal.SIGKILL)
            raise ConnectionAbortedError

    store.before_write = kill
    processes.append(start(store, cache, *TRAIN, "--workdir", workdir))
    _, errors = processes[0].communicate(timeout=DEADLINE)
    store.before_write = lambda name: None
    assert processes[0].returncode == -signal.SIGKILL, errors[-3000:]


def finish(process: subprocess.Popen[str], given: str = "") -> tuple[str, str]:
    output, errors = process.communicate(given, timeout=DEADLINE)
    assert process.returncode == 0, errors[-3000:]
    return output, errors


@pytest.mark.long
def test_training_at_gs_goes_on_after_kills_and_its_model_is_used_there(
    store: Store, cache: Path, tmp_path: Path
) -> None:
    # Killed while the arrays of step 4 are written: step 2 is there, and step 4 does not count.
    killed_at(store, cache, "bucket/run/checkpoints/4/state/ocdbt", "gs://bucket/run")
    assert "bucket/run/checkpoints/2/commit_success.txt" in store.names()
    assert "bucket/run/checkpoints/4/commit_success.txt" not in store.names()

    # The next run goes on from step 2, and is killed while it writes the model.
    killed_at(store, cache, "bucket/run/model/params/state/ocdbt", "gs://bucket/run")
    assert f"bucket/run/model/{UNFINISHED}" in store.names()
    assert "bucket/run/model/elastic_config.json" not in store.names()
    told = "from elastic_lm.checkpoints.native import load_model\nload_model('gs://bucket/run/model')"
    refused = start(store, cache, "-c", told)
    _, errors = refused.communicate(timeout=DEADLINE)
    assert "ValueError: gs://bucket/run/model: is not finished" in errors.splitlines()[-1]

    output, _ = finish(start(store, cache, *TRAIN, "--workdir", "gs://bucket/run"))
    assert "gs://bucket/run/model: 2 layers, 1 exits" in output
    starts = [json.loads(line)["step"] for line in store.objects["bucket/run/starts.jsonl"].data.splitlines()]
    assert starts == [0, 2, 6]
    steps = [json.loads(line)["step"] for line in store.objects["bucket/run/metrics.jsonl"].data.splitlines()]
    assert sorted({*steps}) == [1, 2, 3, 4, 5, 6]
    left = {name.split("/")[2] for name in store.names("bucket/run/")}
    assert left >= {"checkpoints", "model", "metrics.jsonl", "run.json", "inputs.json", "tokenizer.json"}
    assert not left & {"lease.json", UNFINISHED}

    # Started again after its end, it does not touch the model.
    def model() -> dict[str, int]:
        return {name: store.objects[name].generation for name in store.names("bucket/run/model/")}

    before = model()
    finish(start(store, cache, *TRAIN, "--workdir", "gs://bucket/run"))
    assert model() == before

    # The other commands read and write there, each in its turn.
    commands = [
        "calibrate --model gs://bucket/run/model --data gs://bucket/text/b.txt --out gs://bucket/t.json"
        " --tokens 512 --seq-len 32 --continuations 0",
        "generate --model gs://bucket/run/model --prompt the --thresholds gs://bucket/t.json"
        " --max-new-tokens 4 --json gs://bucket/out.jsonl",
        "export --from gs://bucket/run/model --to gs://bucket/hf",
        "convert --from gs://bucket/hf --to gs://bucket/again",
        "generate --model gs://bucket/hf --prompt the --max-new-tokens 4 --json gs://bucket/out_hf.jsonl"
        " --thresholds gs://bucket/t.json",
    ]
    finish(start(store, cache, "-c", COMMANDS), "\n".join(commands) + "\n")
    one, other = (json.loads(store.objects[f"bucket/{name}.jsonl"].data) for name in ("out", "out_hf"))
    assert one["tokens"] == other["tokens"]
    assert one["exit_layers"] == other["exit_layers"]

    # A run on this machine that nobody killed ends with the same parameters, bit by bit.
    for name in [*store.names("bucket/text/"), "bucket/recipe.py", *store.names("bucket/again/")]:
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(store.objects[name].data)
    run = el.train.load_config(f"{tmp_path}/bucket/recipe.py:{tmp_path}/bucket/text/*.txt")
    _, params, _ = el.train.fit(run, tmp_path / "run")
    el.testing.assert_same_tree(params, el.load(tmp_path / "bucket" / "again")[1])


@pytest.mark.nightly
@pytest.mark.long
def test_two_processes_train_at_gs_as_one_here(
    store: Store, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {**store.environment, "ELASTIC_LM_CACHE": str(cache)}.items():
        monkeypatch.setenv(name, value)

    def train(steps: int) -> None:
        arguments = [*TRAIN, "--workdir", "gs://bucket/two", f"--config.train.steps={steps}"]
        for each in together([arguments] * 2, seconds=DEADLINE):
            assert each.returncode == 0, each.stderr[-3000:]

    # One flipped bit in what the second process wrote: step 4 does not count any more, and step 2 does.
    train(4)
    name = store.names("bucket/two/checkpoints/4/state/ocdbt.process_1/d/")[0]
    data = store.objects[name].data
    store.objects[name] = dataclasses.replace(store.objects[name], data=bytes([data[0] ^ 1]) + data[1:])
    train(6)
    starts = store.objects["bucket/two/starts.jsonl"].data.splitlines()
    assert [json.loads(line)["step"] for line in starts] == [0, 2]

    run = el.train.load_config("gs://bucket/recipe.py:gs://bucket/text/*.txt")
    el.train.fit(changed(run, steps=4), tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "4")
    _, params, _ = el.train.fit(run, tmp_path / "run")
    chex.assert_trees_all_close(el.load("gs://bucket/two/model")[1], params, rtol=1e-4, atol=1e-4)


@pytest.mark.long
def test_a_bucket_that_is_not_there_is_named(store: Store, cache: Path) -> None:
    store.missing.add("nowhere")
    lines = """
from elastic_lm.files.remote import address_of, fetched, listing
from elastic_lm.files.atomic import prepare_output
for call in (lambda: fetched("gs://nowhere/x.json"), lambda: prepare_output("gs://nowhere/x.json")):
    try:
        call()
    except OSError as error:
        print(error)
"""
    output, _ = finish(start(store, cache, "-c", lines))
    first, second = output.splitlines()
    assert first == "gs://nowhere/x.json: there is no such file; check the bucket and the name"
    assert second.startswith("gs://nowhere/x.json.")
    assert "there is nothing of that name, or no such bucket; check the bucket" in second


def test_a_lease_is_written_only_over_the_version_that_was_read(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    with in_environment(store):
        place, made = "gs://bucket/lease/lease.json", "bucket/lease/lease.json"
        first = replace_object(place, b"1", "")
        assert first is not None
        assert replace_object(place, b"2", "") is None
        second = replace_object(place, b"2", first)
        assert second is not None
        assert replace_object(place, b"3", first) is None
        remove_version(place, first)
        assert store.objects[made].data == b"2"
        remove_version(place, second)
        remove_version(place, second)
        assert made not in store.objects
        assert replace_object(place, b"3", second) is None
        store.missing.add("nowhere")
        with pytest.raises(OSError, match=r"gs://nowhere/lease\.json: .* no such bucket"):
            replace_object("gs://nowhere/lease.json", b"", "")

        # Another process writes between what this one reads and what it writes.
        monkeypatch.setattr(remote_workdirs, "BEAT", 0.0)
        with leased("gs://bucket/lease", "wait") as lease:
            lease.check()
            store.put(made, b'{"holder": "process 1 on host"}')
            with pytest.raises(LeaseLost, match="gs://bucket/lease: was taken over by process 1 on host"):
                lease.check()
        assert store.objects[made].data == b'{"holder": "process 1 on host"}'
        store.remove(made)
