"""What pip is told: floors, one version, recipes in the wheel, and dependencies that something imports."""

import ast
import pathlib
import re
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import requires

import pytest

import elastic_lm

ROOT = pathlib.Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
REQUIREMENT = re.compile(r"([\w-]+)(?:\[[\w,]+\])?>=([\d.]+)")
MODULES = {"orbax-checkpoint": "orbax", "absl-py": "absl"}  # others are imported by their own names
COLAB = {  # its GPU image of June 2026
    "jax": "0.7.2",
    "flax": "0.11.2",
    "optax": "0.2.8",
    "orbax-checkpoint": "0.12.0",
    "grain": "0.2.17",
    "tensorstore": "0.1.84",
    "absl-py": "1.4.0",
    "etils": "1.14.0",
    "numpy": "2.0.2",
    "scipy": "1.16.3",
    "safetensors": "0.7.0",
    "tokenizers": "0.22.2",
    "rich": "13.9.4",
    "matplotlib": "3.10.0",
}


def version(text: str) -> tuple[int, ...]:
    """Numbers of a version, as many as any has."""
    numbers = [int(part) for part in text.split(".")]
    return tuple(numbers + [0] * (4 - len(numbers)))


def floors() -> dict[str, str]:
    matches = [REQUIREMENT.match(line) for line in PROJECT["dependencies"]]
    return {match[1]: match[2] for match in matches if match}


def test_what_is_tested_as_the_lowest_is_the_lowest() -> None:
    lines = (ROOT / "tests" / "floors.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    assert pins.pop("jaxlib") == pins["jax"]
    assert {name: version(v) for name, v in pins.items()} == {n: version(v) for n, v in floors().items()}


def test_no_floor_is_above_what_colab_ships() -> None:
    assert len(floors()) == len(PROJECT["dependencies"])
    above = [name for name, v in floors().items() if name in COLAB and version(v) > version(COLAB[name])]
    assert not above


def test_every_dependency_is_imported() -> None:
    files = [*(ROOT / "elastic_lm").rglob("*.py"), *(ROOT / "configs").glob("*.py")]
    found: set[str] = set()
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                found.add(str(node.module).partition(".")[0])
    if any(needed.startswith("tensorstore") for needed in requires("orbax-checkpoint") or ()):
        found.add("tensorstore")  # for every array of a checkpoint
    unused = [name for name in floors() if MODULES.get(name, name) not in found]
    assert not unused


def test_the_version_stands_in_one_place() -> None:
    assert PROJECT["dynamic"] == ["version", "readme"]
    text = (ROOT / "elastic_lm" / "__init__.py").read_text()
    assert text.count(f'__version__ = "{elastic_lm.__version__}"') == 1


@pytest.mark.long
def test_a_wheel_works_away_from_the_sources(tmp_path: pathlib.Path) -> None:
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    subprocess.run([*pip, "wheel", "--no-deps", "-w", tmp_path, ROOT], check=True)
    (wheel,) = tmp_path.glob("elastic_lm-*.whl")
    assert wheel.name.startswith(f"elastic_lm-{elastic_lm.__version__}-")
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    recipes = {file.name for file in (tmp_path / "site" / "elastic_lm" / "recipes").iterdir()}
    assert recipes >= {file.name for file in (ROOT / "configs").glob("*.*") if file.suffix in (".py", ".gin")}

    script = (
        "import elastic_lm as el; from elastic_lm.files.recipes import recipe_folder; print(el.__file__);"
        "print(recipe_folder()); print(el.train.load_config('ee_tuning:3').exits[0].layer)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={"PYTHONPATH": str(tmp_path / "site"), "PATH": "", "HOME": str(tmp_path), "JAX_PLATFORMS": "cpu"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    module, folder, layer = done.stdout.splitlines()
    assert module == str(tmp_path / "site" / "elastic_lm" / "__init__.py")
    assert (folder, layer) == (str(tmp_path / "site" / "elastic_lm" / "recipes"), "3")
