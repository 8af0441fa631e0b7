"""Compiled programs on disk: which folder, who decides about it, and what happens where it cannot be used."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from elastic_lm.files import compilation_cache

PROGRAM = """
import elastic_lm as el
folder = el.use_compilation_cache({argument})
import jax, jax.numpy as jnp
made = []
jax.monitoring.register_event_listener(lambda name, **_: made.append(name))
print(float(jax.jit(lambda x: jnp.sin(x) * 41)(0.5)))
print(folder)
print(made.count("/jax/compilation_cache/cache_hits") > 0)
"""


def run(program: str, home: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """A process of a user who has set these variables only."""
    own = {name: value for name, value in os.environ.items() if not name.startswith(("JAX_", "ELASTIC_LM"))}
    own |= {"HOME": str(home), "XDG_CACHE_HOME": "", "JAX_PLATFORMS": "cpu", **variables}
    return subprocess.run([sys.executable, "-c", program], env=own, capture_output=True, text=True)


def test_a_second_process_compiles_nothing(tmp_path: Path) -> None:
    program = PROGRAM.format(argument="")
    first = run(program, tmp_path).stdout.splitlines()
    assert Path(first[1]).parent == tmp_path / ".cache" / "elastic_lm"
    assert any(Path(first[1]).iterdir())
    second = run(program, tmp_path).stdout.splitlines()
    assert (first[2], second[2]) == ("False", "True")
    assert first[:2] == second[:2]


def test_it_may_begin_after_a_program_was_compiled(tmp_path: Path) -> None:
    before = "import jax; jax.jit(lambda x: x + 1)(1.0)\n"
    run(PROGRAM.format(argument=""), tmp_path)
    done = run(before + PROGRAM.format(argument=""), tmp_path)
    assert done.stdout.splitlines()[2] == "True", done.stderr


def environment(monkeypatch: pytest.MonkeyPatch, **variables: str) -> dict[str, str]:
    """What the command line sets for jax, with these variables of the user."""
    values = dict(variables)
    with monkeypatch.context() as patch:
        patch.setattr(os, "environ", values)
        patch.delitem(sys.modules, "jax", raising=False)
        compilation_cache.set_environment()
    return {name: value for name, value in values.items() if name not in variables}


def test_the_command_line_chooses_the_users_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = environment(monkeypatch, XDG_CACHE_HOME=str(tmp_path))
    assert Path(found["JAX_COMPILATION_CACHE_DIR"]).parent == tmp_path / "elastic_lm"
    assert found["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] == "0.0"
    found = environment(monkeypatch, ELASTIC_LM_CACHE=str(tmp_path / "mine"))
    assert Path(found["JAX_COMPILATION_CACHE_DIR"]).parent == tmp_path / "mine"


@pytest.mark.parametrize(
    "variables",
    [{"ELASTIC_LM_CACHE": "off"}, {"ELASTIC_LM_CACHE": "0"}, {"JAX_COMPILATION_CACHE_DIR": "/elsewhere"}],
)
def test_it_is_off_or_jaxs_own(variables: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert environment(monkeypatch, **variables) == {}


def test_a_folder_that_cannot_be_used_stops_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    assert environment(monkeypatch, XDG_CACHE_HOME=str(tmp_path / "file")) == {}
    assert capfd.readouterr().err == ""
    for folder in (str(tmp_path / "file"), "gs://bucket/programs"):
        assert environment(monkeypatch, ELASTIC_LM_CACHE=folder) == {}
        assert f"ELASTIC_LM_CACHE={folder}: compiled programs are not kept: " in capfd.readouterr().err
    with pytest.raises(ValueError, match="remote paths"):
        compilation_cache.use_compilation_cache("gs://bucket/programs")


def test_a_damaged_program_is_compiled_again(tmp_path: Path) -> None:
    program = PROGRAM.format(argument=repr(str(tmp_path / "programs")))
    first = run(program, tmp_path).stdout.splitlines()
    for file in Path(first[1]).iterdir():
        file.write_bytes(file.read_bytes()[:-20])
    again = run(program, tmp_path)
    assert again.returncode == 0, again.stderr
    assert again.stdout.splitlines()[:2] == first[:2]


def test_the_oldest_programs_make_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for age, name in enumerate("cab"):
        (tmp_path / name).write_bytes(b"x" * 10)
        os.utime(tmp_path / name, (1000 - age, 1000 - age))
    monkeypatch.setattr(compilation_cache, "MOST", 25)
    compilation_cache._trim(tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a", "c"]


def test_processors_that_differ_share_no_programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = compilation_cache._machine()
    assert here == compilation_cache._machine()
    monkeypatch.setattr("platform.machine", lambda: "another")
    assert compilation_cache._machine() != here
