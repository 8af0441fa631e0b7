"""Files and folders in an object store, here fsspec's in memory, which takes what every store does."""

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

import elastic_lm as el
from elastic_lm.checkpoints import native
from elastic_lm.cli.main import main
from elastic_lm.cli.train import Options
from elastic_lm.cli.train import run as train_command
from elastic_lm.data.sources import find_files
from elastic_lm.data.tokenizer import train_bpe
from elastic_lm.files import remote, remote_folders, remote_models, remote_workdirs
from elastic_lm.files.atomic import prepare_output, whole_file, write_text_whole
from elastic_lm.files.fingerprints import checkpoint_fingerprint
from elastic_lm.files.hub import local_model
from elastic_lm.files.remote import address_of, fetched, is_remote, listing, named, read_object, write_object
from elastic_lm.files.remote_models import MARK, UNFINISHED
from elastic_lm.files.remote_workdirs import LEASE, flush, stored_at, working_folder
from elastic_lm.files.text_files import read_lines
from elastic_lm.testing import assert_same_tree, random_params, tiny_config


@pytest.fixture(autouse=True)
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(remote, "cache_folder", lambda: tmp_path / "cache")
    monkeypatch.setattr(remote_models, "cache_folder", lambda: tmp_path / "cache")
    files = fsspec.filesystem("memory")
    files.store.clear()
    files.pseudo_dirs[:] = [""]
    yield
    files.store.clear()


def test_addresses() -> None:
    assert address_of("memory://b/x/") == "memory://b/x"
    assert address_of(Path("memory://b/x")) == "memory://b/x"  # which has lost a slash
    assert address_of("MEMORY://b/X") == "memory://b/X"
    assert not is_remote("C:/models")
    assert not is_remote("a:b")
    with pytest.raises(ValueError, match="hdfs://b/x: remote paths of this kind are not supported"):
        address_of("hdfs://b/x")
    with pytest.raises(ValueError, match="memory:///: names no bucket; write memory://BUCKET/FOLDER"):
        address_of("memory:///")


@pytest.mark.parametrize("scheme", ["gs", "s3"])
def test_the_extra_is_named(scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    package, extra = remote.STORES[scheme]
    monkeypatch.setattr(remote, "_is_installed", lambda name: name != package)
    message = (
        rf'{scheme}://b/x: remote paths at {scheme}:// need {package}: pip install "elastic-lm\[{extra}\]"'
    )
    with pytest.raises(ValueError, match=message):
        el.load(f"{scheme}://b/x")
    with pytest.raises(ValueError, match=message):
        prepare_output(f"{scheme}://b/x")


def test_a_file_appears_whole_or_not_at_all() -> None:
    write_text_whole("memory://b/x.txt", "one\n")

    def stopped() -> None:
        with whole_file("memory://b/x.txt") as file:
            file.write(b"half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        stopped()
    assert read_object("memory://b/x.txt") == b"one\n"
    prepare_output("memory://b/y.json")
    assert [*listing("memory://b")] == ["x.txt"]


def test_copies_are_made_once_a_version(monkeypatch: pytest.MonkeyPatch) -> None:
    write_object("memory://b/x.txt", b"one\n")
    downloads = []
    download = remote.download
    monkeypatch.setattr(remote, "download", lambda *given: (downloads.append(given), download(*given)))
    assert read_lines("memory://b/x.txt") == ["one", ""]
    copy = fetched("memory://b/x.txt")
    assert named(copy) == "memory://b/x.txt"
    assert len(downloads) == 1

    time.sleep(0.01)  # the store in memory tells versions apart by their time
    write_object("memory://b/x.txt", b"two\n")
    assert read_lines("memory://b/x.txt") == ["two", ""]
    assert len(downloads) == 2
    assert copy.read_text() == "one\n"  # of a reader that has it open
    with pytest.raises(
        FileNotFoundError, match=r"memory://b/no\.txt: there is no such file; check the bucket"
    ):
        fetched("memory://b/no.txt")


def test_a_listing_tells_the_same_version_as_the_object() -> None:
    write_object("memory://b/x.txt", b"one\n")
    entry = remote.entry_of("memory://b/x.txt")
    assert entry is not None
    assert entry.changed
    assert listing("memory://b") == {"x.txt": entry}


def test_a_store_that_tells_no_versions_is_not_copied_from(monkeypatch: pytest.MonkeyPatch) -> None:
    write_object("memory://b/x.txt", b"one\n")
    files = fsspec.filesystem("memory")
    info = files.info
    monkeypatch.setattr(type(files), "info", lambda self, path, **_: {**info(path), "created": None})
    with pytest.raises(ValueError, match=r"/b/x\.txt: the store tells neither version nor time"):
        fetched("memory://b/x.txt")


def test_data_files() -> None:
    for name in ("d/b.jsonl", "d/a.jsonl", "d/deep/c.jsonl", "d/note.md", "e.txt"):
        write_object(f"memory://b/{name}", b"x\n")
    found = find_files(["memory://b/d", "memory://b/e.txt", "memory://b/d/*.jsonl"], (".jsonl",))
    names = ["d/a.jsonl", "d/b.jsonl", "d/deep/c.jsonl", "e.txt", "d/a.jsonl", "d/b.jsonl"]
    assert [named(file) for file in found] == [f"memory://b/{name}" for name in names]
    for path in ("memory://b/none", "memory://b/none*.jsonl"):
        with pytest.raises(
            FileNotFoundError, match="no file matches this pattern, or there is none of that name"
        ):
            find_files([path], (".jsonl",))
    with pytest.raises(FileNotFoundError, match=r"data path memory://b/d: no file ending in \.parquet in it"):
        find_files(["memory://b/d"], (".parquet",))


def test_thresholds() -> None:
    policy = el.ConfidenceExit("margin", (0.5,), (2,))
    policy.save("memory://b/t.json")
    assert el.ConfidenceExit.load("memory://b/t.json") == policy


def written(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of objects in the order in which they are written and, with a minus, removed."""
    order: list[str] = []
    changes = {"write_object": "", "upload": "", "remove_object": "-"}
    for name, sign in changes.items():
        old = getattr(remote, name)

        def noted(*given: object, old=old, sign=sign):
            address = next(text for text in given if isinstance(text, str))
            order.append(sign + address.rpartition("/")[2])
            return old(*given)

        for module in (remote, remote_folders):
            monkeypatch.setattr(module, name, noted)
    return order


@pytest.mark.parametrize("kind", ["hf", "native"])
def test_models(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_config(vocab_size=300, exits=(2,))
    params, place = random_params(config), f"memory://b/{kind}"
    tokenizer = train_bpe(["a good film"], 270)

    def save(overwrite: bool = False) -> None:
        if kind == "hf":
            el.hf.export(config, params, place, tokenizer, overwrite=overwrite)
        else:
            native.save_model(place, config, params, tokenizer, overwrite=overwrite)

    order = written(monkeypatch)
    save()
    last = "config.json" if kind == "hf" else "elastic_config.json"
    assert order[0] == UNFINISHED
    assert order[-2:] == [last, f"-{UNFINISHED}"]  # the config is written last

    model, loaded = el.load(place)
    assert model.config.exits == config.exits
    assert_same_tree(params, loaded)
    assert el.Tokenizer.load(place).vocab_size == tokenizer.vocab_size
    assert checkpoint_fingerprint(place) == checkpoint_fingerprint(local_model(place))

    with pytest.raises(
        FileExistsError, match=rf"{place}: exists already; choose another path, or overwrite it"
    ):
        save()
    del order[:]
    save(overwrite=True)
    assert order[:2] == [UNFINISHED, f"-{last}"]  # and removed first
    assert_same_tree(params, el.load(place)[1])
    write_object(f"{place}/thesis.txt", b"mine")
    with pytest.raises(FileExistsError, match=r"thesis\.txt: not written by"):
        save(overwrite=True)


@pytest.mark.parametrize("uploads", [0, 1, 3])
def test_a_folder_that_is_not_finished_is_no_model(uploads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_config(vocab_size=300)
    params, place = random_params(config), "memory://b/m"
    el.hf.export(config, params, place)
    upload, done = remote_folders.upload, []

    def breaking(source: Path, address: str) -> None:
        if len(done) == uploads:
            raise OSError("the network is gone")
        done.append(address)
        upload(source, address)

    monkeypatch.setattr(remote_folders, "upload", breaking)
    with pytest.raises(OSError, match="the network is gone"):
        el.hf.export(config, params, place, overwrite=True)
    with pytest.raises(
        ValueError, match=rf"{place}: is not finished: .*process {os.getpid()} on .*; wait, or run"
    ):
        el.load(place)
    monkeypatch.setattr(remote_folders, "upload", upload)
    el.hf.export(config, params, place)  # which goes on without --overwrite
    assert_same_tree(params, el.load(place)[1])


def test_what_others_put_into_an_unfinished_folder_stays() -> None:
    config = tiny_config(vocab_size=300)
    params = random_params(config)
    calls = [
        lambda place: el.hf.export(config, params, place),
        lambda place: native.save_model(place, config, params, None),
    ]
    for mark in (b"things to do", MARK.encode()):
        for name in ("notes.txt", UNFINISHED, "unfinished.txt"):
            write_object(f"memory://b/notes/{name}", mark)
        before = {name: read_object(f"memory://b/notes/{name}") for name in listing("memory://b/notes")}
        for call in calls:
            with pytest.raises(FileExistsError, match="memory://b/notes"):
                call("memory://b/notes")
            assert {n: read_object(f"memory://b/notes/{n}") for n in listing("memory://b/notes")} == before


def test_several_processes_do_not_write_where_one_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_config(vocab_size=300)
    params = random_params(config)
    monkeypatch.setattr(native.jax, "process_count", lambda: 2)
    with pytest.raises(ValueError, match=r"memory://b/m: takes a model from one process, and there are 2"):
        native.save_model("memory://b/m", config, params, None)
    assert not listing("memory://b/m")


def test_arrays_without_a_config_are_no_model() -> None:
    write_object("memory://b/m/params/manifest.ocdbt", b"x")
    with pytest.raises(ValueError, match="memory://b/m: is not finished"):
        el.load("memory://b/m")
    with pytest.raises(FileNotFoundError, match="memory://b/none: no such folder or file"):
        el.load("memory://b/none")
    write_object("memory://b/other/x.txt", b"x")
    with pytest.raises(FileNotFoundError, match="memory://b/other: expected a Hugging Face folder"):
        el.load("memory://b/other")


def test_one_flipped_bit_is_noticed() -> None:
    config = tiny_config(vocab_size=300)
    native.save_model("memory://b/m", config, random_params(config), None)
    name = next(name for name in listing("memory://b/m") if "/d/" in name)
    content = bytearray(read_object(f"memory://b/m/{name}"))
    content[len(content) // 2] ^= 1
    write_object(f"memory://b/m/{name}", bytes(content))
    with pytest.raises(ValueError, match="is damaged or was changed: its CRC-32"):
        el.load("memory://b/m")


def test_training_writes_to_gs_alone() -> None:
    run = el.RunConfig(model=tiny_config(vocab_size=300))
    with pytest.raises(
        ValueError, match="memory://b/w: training writes checkpoints to this machine and to gs://"
    ):
        el.train.fit(run, "memory://b/w")
    members = Options(workdir="memory://b/w", config="embedded:tiny", sweep=("train.seed=0,1",))
    with pytest.raises(ValueError, match="memory://b/w: remote paths are not supported here"):
        train_command(members)
    assert not listing("memory://b")


def test_a_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_workdirs, "BEAT", 0.2)
    write_object("memory://b/w/run.json", b"{}")
    write_object("memory://b/w/model/config.json", b"{}")  # which stays where it is
    with working_folder("memory://b/w") as folder:
        assert [path.name for path in folder.iterdir()] == ["run.json"]
        assert named(folder / "model") == "memory://b/w/model"
        (folder / "metrics.jsonl").write_text("1\n")
        (folder / ".lock").touch()
        flush("memory://b/w/checkpoints/2")
        assert read_object("memory://b/w/metrics.jsonl") == b"1\n"
        (folder / "metrics.jsonl").write_text("1\n2\n")
        flush("memory://b/other")
        assert read_object("memory://b/w/metrics.jsonl") == b"1\n"
        with (
            pytest.raises(ValueError, match=r"memory://b/w: in use by process"),
            working_folder("memory://b/w"),
        ):
            pass
    assert read_object("memory://b/w/metrics.jsonl") == b"1\n2\n"
    assert [*listing("memory://b/w")] == ["metrics.jsonl", "model/config.json", "run.json"]
    with (
        pytest.raises(ValueError, match=r"^memory://b/w/run\.json: is bad$"),
        working_folder("memory://b/w") as at,
    ):
        raise ValueError(f"{at / 'run.json'}: is bad")
    with working_folder(tmp_path) as folder:
        assert folder == tmp_path
        assert stored_at(folder / "model") == tmp_path / "model"


def lease(**entries: object) -> None:
    write_object(f"memory://b/w/{LEASE}", json.dumps({"holder": "process 1 on host", **entries}).encode())


def test_a_lease_of_a_process_that_is_gone_is_taken_over(monkeypatch: pytest.MonkeyPatch) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    lease(**remote_workdirs._here(), pid=gone.pid)
    began = time.monotonic()
    with working_folder("memory://b/w"):
        assert time.monotonic() - began < 5
    assert not listing("memory://b/w")

    # Of another machine nothing is known but that it writes the lease no more.
    monkeypatch.setattr(remote_workdirs, "PATIENCE", 0.1)
    lease(host="elsewhere", pid=1)
    with working_folder("memory://b/w"):
        assert json.loads(read_object(f"memory://b/w/{LEASE}"))["host"] == socket.gethostname()


def test_a_container_of_the_same_name_is_another_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    for key in ("boot", "pid_namespace"):
        lease(**{**remote_workdirs._here(), key: "another"}, pid=gone.pid, beat=1)
        monkeypatch.setattr(remote_workdirs.time, "sleep", lambda _: lease(host="its", beat=2))  # it is alive
        with pytest.raises(ValueError, match="memory://b/w: in use by"), working_folder("memory://b/w"):
            pass


def test_of_two_that_find_a_folder_free_one_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    found_free, inside, refused = threading.Barrier(2), [], []
    wait = remote_workdirs._await_end

    def both(*given: str) -> str:
        version = wait(*given)
        found_free.wait(10)
        return version

    monkeypatch.setattr(remote_workdirs, "_await_end", both)
    end = threading.Event()

    def run() -> None:
        try:
            with remote_workdirs.leased("memory://b/w", "wait"):
                inside.append(1)
                end.wait(10)
        except ValueError as error:
            refused.append(str(error))
            end.set()

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(inside) == len(refused) == 1
    assert refused[0].startswith("memory://b/w: in use by process")
    assert not listing("memory://b/w")


def test_a_run_that_has_lost_its_lease_writes_and_removes_nothing_more(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = tiny_config(vocab_size=300)

    def lost() -> None:
        with working_folder("memory://b/w") as folder:
            lease(host="elsewhere", pid=1)
            before = {name: read_object(f"memory://b/w/{name}") for name in listing("memory://b/w")}
            monkeypatch.setattr(remote_workdirs, "BEAT", 0.0)  # as if it had stood still for long
            (folder / "metrics.jsonl").write_text("1\n")
            calls = [
                lambda: flush("memory://b/w/checkpoints/2"),
                lambda: remote_workdirs.check_held("memory://b/w/checkpoints"),
                lambda: native.save_model("memory://b/w/model", config, random_params(config), None),
            ]
            for call in calls:
                with pytest.raises(ValueError, match="memory://b/w: was taken over by process 1 on host"):
                    call()
            assert {n: read_object(f"memory://b/w/{n}") for n in listing("memory://b/w")} == before

    with pytest.raises(ValueError, match="was taken over"):
        lost()
    assert [*listing("memory://b/w")] == [LEASE]


def test_a_probe_of_a_killed_process_is_not_copied() -> None:
    write_object(f"memory://b/w/metrics.jsonl.17{remote.PROBE}", b"")
    with working_folder("memory://b/w") as folder:
        assert not [*folder.iterdir()]


def test_a_lease_that_is_renewed_is_respected(monkeypatch: pytest.MonkeyPatch) -> None:
    lease(host="elsewhere", pid=1, beat=1)
    monkeypatch.setattr(remote_workdirs.time, "sleep", lambda _: lease(host="elsewhere", pid=1, beat=2))
    with (
        pytest.raises(
            ValueError, match="memory://b/w: in use by process 1 on host; wait for its end, or choose"
        ),
        working_folder("memory://b/w"),
    ):
        pass


def test_errors_name_the_address_and_not_the_copy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_object("memory://b/hf/config.json", b"{}")
    write_object("memory://b/bad/config.json", b"{")
    for name in ("hf", "bad"):
        for load in (el.load, el.hf.load):
            with pytest.raises((ValueError, OSError), match=f"^memory://b/{name}") as raised:
                load(f"memory://b/{name}")
            assert str(tmp_path) not in str(raised.value)
        assert main(["convert", "--from", f"memory://b/{name}", "--to", str(tmp_path / "out")]) == 2
        line = capsys.readouterr().err
        assert f"error: memory://b/{name}" in line
        assert str(tmp_path) not in line


@pytest.mark.parametrize("more", [(), ("--backbone",)])
def test_a_step_in_a_store_is_named_as_one(
    more: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    step = "memory://b/run/checkpoints/500"
    write_object(f"{step}/state/x", b"x")
    assert main(["convert", "--from", step, "--to", str(tmp_path / "out"), *more]) == 2
    assert f"--from {step}: a checkpoint of a training run is read here" in capsys.readouterr().err
    assert not (tmp_path / "cache").exists()


def test_what_a_store_says_becomes_one_line() -> None:
    class HttpError(Exception):
        code = 403

    cases = [
        (
            FileNotFoundError("x"),
            FileNotFoundError,
            "gs://b/x: there is nothing of that name, or no such bucket",
        ),
        (
            HttpError("Anonymous caller"),
            PermissionError,
            r"gs://b/x: access is refused \(HttpError: Anonymous",
        ),
        (
            RuntimeError("DefaultCredentialsError"),
            PermissionError,
            "log in with `gcloud auth application-default",
        ),
        (
            OSError("timeout\nmore"),
            ConnectionError,
            r"the store does not answer as it should \(OSError: timeout\)",
        ),
    ]
    for error, kind, says in cases:
        with pytest.raises(kind, match=says), remote.explained("gs://b/x"):
            raise error
