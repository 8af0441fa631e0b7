"""Every bad command of the catalogue: exit status, the one line that it says, and what is still on disk."""

import fnmatch
import json
import pathlib
import re
import shlex
import shutil

import pytest
from bad_commands import CASES, Case
from small_world import contents, make_world, stamps

from elastic_lm import meeting
from elastic_lm.cli import main as cli
from elastic_lm.files.checksums import FILE as CHECKSUMS


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return tmp_path_factory.mktemp("world")


@pytest.fixture(scope="module")
def world(root: pathlib.Path) -> dict[str, pathlib.Path]:
    return make_world(root)


def marks(case: Case) -> list[pytest.MarkDecorator]:
    return [pytest.mark.long] if case.long else []


def prepare(case: Case, world: dict[str, pathlib.Path], here: pathlib.Path) -> None:
    """Copies folders of the world, changes them, and writes the files of a case."""
    touched = {*case.changes, *case.removed, *case.files}
    for name, of in case.copies.items():
        shutil.copytree(world[of], here / name)
        if any(file.startswith(f"{name}/") for file in touched):  # the file itself is to be refused
            (here / name / CHECKSUMS).unlink(missing_ok=True)
    for name, values in case.changes.items():
        path = here / name
        kept = json.loads(path.read_text())
        path.write_text(json.dumps({**kept, **values}))
    for name in case.removed:
        path = here / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    for name, size in case.cut.items():
        path = here / name
        path.write_bytes(path.read_bytes()[:size])
    for name, content in case.files.items():
        path = here / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))


def arguments(case: Case, world: dict[str, pathlib.Path]) -> list[str]:
    command = case.command
    for name, path in world.items():
        command = command.replace(f"{{{name}}}", str(path))
    return [*shlex.split(command), *case.more]


@pytest.mark.parametrize(
    "case", [pytest.param(case, id=f"{i} {case.id}", marks=marks(case)) for i, case in enumerate(CASES)]
)
def test_it_is_refused_in_one_line(
    case: Case,
    world: dict[str, pathlib.Path],
    root: pathlib.Path,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("ELASTIC_LM_DEBUG", raising=False)
    # One process runs all cases, and has used its devices long before.
    monkeypatch.setattr(meeting, "_require_unused_backend", lambda: None)
    prepare(case, world, tmp_path)
    before, world_before = contents(tmp_path), stamps(root)

    try:
        status = cli.main(arguments(case, world))
    except SystemExit as stop:  # of the parser
        status = stop.code

    printed = capsys.readouterr()
    lines = printed.err.strip().splitlines()
    assert status == case.status, printed.err
    assert "Traceback" not in printed.err + printed.out
    assert len(lines) == 1 + case.notes, printed.err
    assert lines[-1].startswith(f"elastic-lm {case.command.split()[0]}")
    assert re.search(".*".join(map(re.escape, case.says.split(" … "))), lines[-1]), lines[-1]
    assert case.prints or not printed.out

    after = contents(tmp_path)
    assert {name: after[name] for name in after if name in before} == before
    new = [name for name in after if name not in before]
    assert not [name for name in new if not any(fnmatch.fnmatch(name, one) for one in case.leaves)], new
    assert stamps(root) == world_before


def test_there_are_many_and_every_command_has_some() -> None:
    assert len(CASES) >= 250
    commands = {case.command.split()[0] for case in CASES}
    assert commands == set(cli.COMMANDS)
