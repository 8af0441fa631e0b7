"""Paths of this machine, and which flags take others; what is refused is refused before any work."""

import argparse
from collections.abc import Iterator
from pathlib import Path

import pytest

import elastic_lm as el
from elastic_lm.checkpoints import native
from elastic_lm.cli import main as cli
from elastic_lm.cli.model_folder import writing_target
from elastic_lm.cli.parser import PLACES, Parser, config_place, local_place
from elastic_lm.files import remote
from elastic_lm.files.local import local_path
from elastic_lm.files.locks import LOCK_FILE
from elastic_lm.testing import random_params, tiny_config


@pytest.mark.parametrize("path", ["memory://bucket/run", Path("memory://b/x")])
def test_remote_paths(path: str | Path) -> None:
    with pytest.raises(ValueError, match="remote paths are not supported here; name a local file"):
        local_path(path)


@pytest.mark.parametrize("path", ["hdfs://h/x", "http://h/x", Path("hdfs://h/x")])
def test_remote_paths_of_another_kind(path: str | Path) -> None:
    with pytest.raises(ValueError, match=r"remote paths of this kind are not supported; .* gs:// or s3://"):
        local_path(path)


@pytest.mark.parametrize("path", ["a/b", "/a:b/c", "./gs:/x", "C:/models", "a:b", "größe [1]"])
def test_local_paths(path: str) -> None:
    assert local_path(path) == Path(path)


def parsers(parser: Parser, name: str = "") -> Iterator[tuple[str, Parser]]:
    """Every parser with flags of its own, by the words that are typed."""
    below = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
    if not below:
        yield name, parser
    for action in below:
        for word, deeper in action.choices.items():
            yield from parsers(deeper, f"{name} {word}".strip())


FLAGS = [
    (name, action.option_strings[0])
    for name, parser in parsers(cli.build_parsers()[0])
    for action in parser._actions
    if action.option_strings and action.metavar in PLACES
]


def test_the_commands_have_such_flags() -> None:
    commands = {name.split()[0] for name, _ in FLAGS}
    assert commands == {*cli.COMMANDS}
    assert len(FLAGS) > 30


LOCAL = [  # what these name is locked, moved, sent to the Hub, or written by JAX's profiler
    ("quickstart", "--out"),
    ("quickstart", "--hf-dir"),
    ("quickstart", "--data"),
    ("push", "--model"),
    ("push", "--thresholds"),
    ("generate", "--profile"),
    ("cascade fit", "--out"),
    ("cascade run", "--out"),
]


@pytest.mark.parametrize(("command", "flag"), FLAGS)
def test_every_flag_names_what_a_remote_path_needs(
    command: str,
    flag: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(remote.STORES, "s3", ("no_such_s3fs", "s3"))
    needs = 'remote paths at s3:// need no_such_s3fs: pip install "elastic-lm[s3]"'
    local = (command, flag) in LOCAL
    says = {
        "s3://bucket/x": "remote paths are not supported here" if local else needs,
        "hdfs://bucket/x": "remote paths of this kind are not supported",
        "memory:///": "remote paths are not supported here" if local else "names no bucket",
    }
    for path, what in says.items():
        with pytest.raises(SystemExit) as stopped:
            cli.main([*command.split(), flag, path])
        assert stopped.value.code == 2
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1
        assert f"{path}: {what}" in lines[0]
    assert not [*tmp_path.iterdir()]


def test_flags_for_files_of_this_machine_alone() -> None:
    kinds = {
        (name, action.option_strings[0]): action.type
        for name, parser in parsers(cli.build_parsers()[0])
        for action in parser._actions
        if action.option_strings and action.metavar in PLACES
    }
    assert [flag for flag, kind in kinds.items() if kind is local_place] == LOCAL
    with pytest.raises(argparse.ArgumentTypeError, match="memory://b/x: remote paths are not supported here"):
        local_place("memory://b/x")


@pytest.mark.parametrize(("command", "flag"), FLAGS)
def test_no_flag_takes_an_empty_path(
    command: str, flag: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """As "$MODEL" is, where the variable is not set."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        cli.main([*command.split(), flag, ""])
    assert stopped.value.code == 2
    assert f"argument {flag}: path='': is empty; name a file" in capsys.readouterr().err
    assert not [*tmp_path.iterdir()]


def test_an_argument_behind_a_config_may_be_a_path() -> None:
    for text in ("english.py:/data/english", "english:hdfs://b/x", "a/b.py", "a.py:", "name"):
        assert config_place(text) == text
    assert config_place("memory://b/a.py:x") == "memory://b/a.py:x"
    with pytest.raises(argparse.ArgumentTypeError, match=r"hdfs://b/a\.py: remote paths"):
        config_place("hdfs://b/a.py:x")


def test_functions_refuse_them_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config, policy = tiny_config(exits=(2,)), el.ConfidenceExit("margin", (0.5,), (2,))
    calls = [
        lambda: el.load("hdfs://b/m"),
        lambda: el.hf.load("hdfs://b/m"),
        lambda: el.hf.export(config, random_params(config), "hdfs://b/m"),
        lambda: el.Tokenizer.load("hdfs://b/m"),
        lambda: policy.save("hdfs://b/t.json"),
        lambda: el.data.train_batches(el.DataConfig("text", paths=("hdfs://b/t.txt",)), None),  # pyright: ignore
    ]
    for call in calls:
        with pytest.raises(ValueError, match="remote paths of this kind are not supported"):
            call()
    assert not [*tmp_path.iterdir()]


def test_places_that_are_written(tmp_path: Path) -> None:
    with (
        pytest.raises(ValueError, match="/: is the root of all folders and is not replaced"),
        writing_target("/"),
    ):
        pass
    long = tmp_path / ("é" * 125)
    with writing_target(str(long)):
        assert any(path.name.endswith(LOCK_FILE) for path in tmp_path.iterdir())


def test_several_processes_refuse_what_orbax_cannot_write_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert native.check_target(tmp_path / "a[1]", overwrite=False).name == "a[1]"
    monkeypatch.setattr(native.jax, "process_count", lambda: 2)
    with pytest.raises(ValueError, match=r"a\[1\]': holds one of .*; choose a path without"):
        native.check_target(tmp_path / "a[1]", overwrite=False)
