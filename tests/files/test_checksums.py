"""Checksums of folders: every flipped bit is noticed, and what has none still loads."""

import contextlib
import json
import random
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import elastic_lm as el
from elastic_lm import testing
from elastic_lm.checkpoints import native, orbax_folders, read_back
from elastic_lm.data.tokenizer import train_bpe
from elastic_lm.files import unfinished
from elastic_lm.files.atomic import new_beside
from elastic_lm.files.checksums import FILE, check_files, update_checksums, write_checksums
from elastic_lm.hf import exporting

FLIPS = 20  # bits that are flipped, at random places


class Batches:
    """A data iterator whose position is all that counts."""

    def __init__(self) -> None:
        self.state: Any = {"next": 3, "rest": (1, 2)}

    def get_state(self) -> Any:
        return self.state

    def set_state(self, state: Any) -> None:
        self.state = state


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checksums") / "model"
    config = testing.tiny_config(exits=(2,), n_layers=3, vocab_size=260)
    native.save_model(folder, config, testing.random_params(config), train_bpe(["some text"], 260))
    return folder


@pytest.fixture(scope="module")
def exported(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported") / "hf"
    config, params = native.load_model(model)
    el.hf.export(config, params, folder, el.Tokenizer.load(model), max_shard_bytes=40_000)
    return folder


def flipped_bits(folder: Path, seed: int, count: int = FLIPS) -> list[tuple[Path, int, int]]:
    """(file, byte, bit) at random places of all the files of a folder, large and small ones alike."""
    draw = random.Random(seed)
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.stat().st_size)
    places = []
    for _ in range(count):
        file = draw.choice(files)
        places.append((file, draw.randrange(file.stat().st_size), draw.randrange(8)))
    return places


def flip(file: Path, byte: int, bit: int) -> None:
    content = bytearray(file.read_bytes())
    content[byte] ^= 1 << bit
    file.write_bytes(content)


@pytest.mark.parametrize("folder", ["model", "exported"])
def test_every_flipped_bit_of_a_model_is_noticed(folder: str, request: pytest.FixtureRequest) -> None:
    place: Path = request.getfixturevalue(folder)
    el.load(place)
    for file, byte, bit in flipped_bits(place, seed=18):
        flip(file, byte, bit)
        with pytest.raises((ValueError, OSError)):
            el.load(place)
        flip(file, byte, bit)
    el.load(place)


def test_a_flipped_bit_names_the_file_and_the_fix(model: Path) -> None:
    data = max((path for path in model.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    flip(data, 1000, 3)
    with pytest.raises(ValueError, match=rf"{data.name}: is damaged or was changed: .* remove .*{FILE}"):
        el.load(model)
    flip(data, 1000, 3)

    flip(model / FILE, 10, 0)
    with pytest.raises(ValueError, match=rf"{FILE}: is damaged"):
        el.load(model)
    flip(model / FILE, 10, 0)


def test_a_changed_tokenizer_is_noticed_without_the_model(model: Path) -> None:
    text = (model / "tokenizer_config.json").read_text()
    (model / "tokenizer_config.json").write_text(text.replace("PreTrained", "Pretrained"))
    with pytest.raises(ValueError, match=r"tokenizer_config\.json: is damaged or was changed"):
        el.Tokenizer.load(model)
    (model / "tokenizer_config.json").write_text(text)
    el.Tokenizer.load(model)


def test_every_flipped_bit_of_a_step_is_noticed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    states = {
        step: {"a": step + jnp.arange(50.0), "b": {"c": jnp.ones((3, 4), jnp.bfloat16)}} for step in (2, 4)
    }
    checkpoints = native.Checkpoints(tmp_path)
    for step, state in states.items():
        checkpoints.save(step, state, Batches())  # pyright: ignore[reportArgumentType]
    checkpoints.close()

    def resumed() -> int:
        checkpoints = native.Checkpoints(tmp_path)
        abstract = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), states[4]
        )
        found = checkpoints.restore(abstract, Batches())  # pyright: ignore[reportArgumentType]
        checkpoints.close()
        assert found is not None
        step, state = found
        assert np.array_equal(state["a"], states[step]["a"])
        return step

    assert resumed() == 4
    for file, byte, bit in flipped_bits(tmp_path / "4", seed=7):
        caplog.clear()
        flip(file, byte, bit)
        assert resumed() == 2, file
        assert "4 cannot be read and is skipped" in caplog.text
        flip(file, byte, bit)

    for step in ("2", "4"):
        (tmp_path / step / FILE).write_text("{}")
    with pytest.raises(ValueError, match=r"no checkpoint in .* can be read.*checksums\.json: is damaged"):
        resumed()
    for step in ("2", "4"):  # as releases before this one wrote them
        (tmp_path / step / FILE).unlink()
    assert resumed() == 4


def test_folders_without_checksums_load(model: Path, exported: Path) -> None:
    for folder in (model, exported):
        checksums = (folder / FILE).read_text()
        (folder / FILE).unlink()
        el.load(folder)
        (folder / FILE).write_text(checksums)


def test_missing_and_added_files(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    for name in ("a", "deep/b", "größe [1]"):
        (tmp_path / name).write_text(name)
    write_checksums(tmp_path)
    (tmp_path / "notes.txt").write_text("of the user")
    check_files(tmp_path)

    (tmp_path / "a").write_text("b")
    check_files(tmp_path, ("deep/*",))
    update_checksums(tmp_path, ("a",))
    check_files(tmp_path)
    assert [*json.loads((tmp_path / FILE).read_text())["files"]] == ["a", "deep/b", "größe [1]"]

    (tmp_path / "deep" / "b").unlink()
    with pytest.raises(ValueError, match=r"deep/b: is missing, though checksums\.json names it"):
        check_files(tmp_path)
    update_checksums(tmp_path / "deep", ("b",))  # nothing to update


def test_what_does_not_read_back_is_no_success(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, params = native.load_model(model)
    other = jax.tree.map(lambda leaf: np.asarray(leaf) + 1, params)
    native.save_model(tmp_path / "m", config, params, None)
    save = native.ocp.save

    with monkeypatch.context() as patch:
        patch.setattr(native.ocp, "save", lambda path, tree: save(path, other))
        with pytest.raises(OSError, match=r"m: does not read back as it was written .*differs"):
            native.save_model(tmp_path / "m", config, params, None, overwrite=True)
    testing.assert_same_tree(native.load_model(tmp_path / "m")[1], params)
    assert [path.name for path in tmp_path.iterdir()] == ["m"]

    with monkeypatch.context() as patch:
        patch.setattr(exporting, "save_file", lambda tensors, path, **kw: path.write_bytes(b"half"))
        with pytest.raises(OSError, match=r"model\.safetensors: does not read back as it was written"):
            el.hf.export(config, params, tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


def test_a_step_that_does_not_read_back_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints = native.Checkpoints(tmp_path)
    state = {"a": jnp.arange(3.0)}
    checkpoints.save(1, state, Batches())  # pyright: ignore[reportArgumentType]
    checkpoints.settle()
    save = checkpoints._checkpointer.save_checkpointables_async

    def damaged(step: int, parts: dict[str, Any], **options: Any) -> Any:
        return save(step, {**parts, "state": {"a": jnp.arange(3.0).at[1].set(jnp.nan)}}, **options)

    monkeypatch.setattr(checkpoints._checkpointer, "save_checkpointables_async", damaged)
    checkpoints.save(2, state, Batches())  # pyright: ignore[reportArgumentType]
    with pytest.raises(OSError, match=r"2: does not read back as it was written .*'a'.* differs"):
        checkpoints.settle()
    assert [path.name for path in tmp_path.iterdir()] == ["1"]
    checkpoints.close()


@pytest.mark.parametrize(
    "error",
    [MemoryError(), ValueError("RESOURCE_EXHAUSTED: 1 GB"), PermissionError(13, "no"), OSError(28, "full")],
)
def test_what_could_not_be_compared_stays(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(tree: Any, read: Any) -> None:
        raise error

    monkeypatch.setattr(native, "check_same", broken)
    checkpoints = native.Checkpoints(tmp_path)
    checkpoints.save(1, {"a": jnp.arange(3.0)}, Batches())  # pyright: ignore[reportArgumentType]
    with pytest.raises(type(error)) as caught:
        checkpoints.settle()
    assert caught.value is error
    checkpoints.close()
    assert [path.name for path in tmp_path.iterdir()] == ["1"]


def test_one_kept_step_goes_only_when_the_next_was_read_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints = native.Checkpoints(tmp_path, keep=1)
    batches: Any = Batches()
    state = {"a": jnp.arange(3.0), "b": (jnp.ones((2, 2)), jnp.zeros(()))}
    monkeypatch.setattr(read_back, "COMPARED", 4)  # one array at a time
    compare, seen = native.check_same, []

    def check(tree: Any, read: Any) -> None:
        seen.append(sorted(path.name for path in tmp_path.iterdir()))
        compare(tree, read)

    monkeypatch.setattr(native, "check_same", check)
    for step in (1, 2, 3):
        checkpoints.save(step, state, batches)
    checkpoints.settle()
    assert seen == [["1"], ["1", "2"], ["2", "3"]]
    assert [path.name for path in tmp_path.iterdir()] == ["3"]
    checkpoints.close()


def test_later_steps_that_cannot_be_read_do_not_take_the_place_of_good_ones(tmp_path: Path) -> None:
    batches: Any = Batches()
    state = {"a": jnp.arange(3.0)}
    with native.Checkpoints(tmp_path) as checkpoints:
        for step in (4, 6):
            checkpoints.save(step, state, batches)
    file = next(path for path in (tmp_path / "6" / "state").rglob("*") if path.is_file())
    flip(file, 0, 0)
    abstract = {"a": jax.ShapeDtypeStruct((3,), jnp.float32, sharding=state["a"].sharding)}
    with native.Checkpoints(tmp_path, keep=1) as checkpoints:
        found = checkpoints.restore(abstract, batches)
        assert found is not None
        assert found[0] == 4
        checkpoints.save(5, state, batches)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["5", "6"]


def test_a_run_that_goes_on_completes_what_was_left(tmp_path: Path) -> None:
    batches: Any = Batches()
    state = {"a": jnp.arange(3.0)}
    checkpoints = native.Checkpoints(tmp_path)
    checkpoints.save(1, state, batches)
    checkpoints.close()
    (tmp_path / "1" / FILE).unlink()  # killed just before
    left = new_beside(tmp_path / "2")
    (left / "state").mkdir(parents=True)  # killed while it was removed

    checkpoints = native.Checkpoints(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["1"]
    abstract = {"a": jax.ShapeDtypeStruct((3,), jnp.float32, sharding=state["a"].sharding)}
    found = checkpoints.restore(abstract, batches)
    checkpoints.close()
    assert found is not None
    assert (tmp_path / "1" / FILE).is_file()
    check_files(tmp_path / "1")


def test_a_flipped_bit_is_found_by_one_of_several_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [f"part_{i}" for i in range(5)]
    for i, name in enumerate(names):
        (tmp_path / name).write_bytes(bytes(range(10 + i)))
    write_checksums(tmp_path)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    for name in names:
        content = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(bytes([content[0] ^ 1]) + content[1:])
        found = 0
        for process in range(2):
            monkeypatch.setattr(jax, "process_index", lambda process=process: process)
            with contextlib.suppress(ValueError):
                check_files(tmp_path, divided=True)
                continue
            found += 1
        assert found == 1, name
        (tmp_path / name).write_bytes(content)


def test_every_process_checks_its_part_of_a_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches: Any = Batches()
    checkpoints = native.Checkpoints(tmp_path)
    checkpoints.save(1, {"a": jnp.arange(3.0), "b": jnp.arange(40.0)}, batches)
    checkpoints.settle()
    files = [*json.loads((tmp_path / "1" / FILE).read_text())["files"]]
    assert len(files) > 2
    with monkeypatch.context() as patch:
        patch.setattr(jax, "process_count", lambda: 2)
        for name in files:
            file = tmp_path / "1" / name
            content = file.read_bytes()
            if not content:
                continue
            file.write_bytes(bytes([content[0] ^ 1]) + content[1:])
            errors = []
            for process in range(2):
                patch.setattr(jax, "process_index", lambda process=process: process)
                errors.append(checkpoints._damage(tmp_path / "1"))
            assert sum(error is not None for error in errors) == 1, (name, errors)
            file.write_bytes(content)
    checkpoints.close()


def test_links_that_stand_in_go_with_an_interrupted_process(tmp_path: Path) -> None:
    (tmp_path / "a[1]").mkdir()
    with orbax_folders.readable_name(tmp_path / "a[1]") as name:
        assert Path(name).parent in unfinished._paths
    assert not Path(name).parent.exists()
    assert Path(name).parent not in unfinished._paths


@pytest.mark.parametrize("name", ["a[1]", "b\\c", "d*?]"])
def test_paths_with_brackets_and_backslashes(name: str, tmp_path: Path, model: Path) -> None:
    config, params = native.load_model(model)
    folder = tmp_path / name
    native.save_model(folder / "m", config, params, el.Tokenizer.load(model))
    testing.assert_same_tree(native.load_model(folder / "m")[1], params)
    assert el.Tokenizer.load(folder / "m").vocab_size == 260

    checkpoints = native.Checkpoints(folder / "run")
    state = {"a": jnp.arange(3.0)}
    checkpoints.save(1, state, Batches())  # pyright: ignore[reportArgumentType]
    checkpoints.close()
    checkpoints = native.Checkpoints(folder / "run")
    abstract = {"a": jax.ShapeDtypeStruct((3,), jnp.float32, sharding=state["a"].sharding)}
    found = checkpoints.restore(abstract, Batches())  # pyright: ignore[reportArgumentType]
    checkpoints.close()
    assert found is not None
    assert np.array_equal(found[1]["a"], state["a"])
    assert sorted(path.name for path in tmp_path.iterdir()) == [name]
