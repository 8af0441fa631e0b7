"""Notebooks run from top to bottom on the tiny setting, and stay notebooks: no layers defined in them."""

import ast
import importlib.util
import pathlib
import re
import types

import nbformat
import pytest
from nbclient import NotebookClient

import elastic_lm

NOTEBOOKS = sorted((pathlib.Path(__file__).parent.parent / "colab").glob("*.ipynb"))


def read(path: pathlib.Path) -> nbformat.NotebookNode:
    return nbformat.read(path, as_version=4)


@pytest.mark.long
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_runs(path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    monkeypatch.setenv("ELASTIC_LM_TINY", "1")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    notebook = read(path)
    NotebookClient(
        notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": tmp_path}}
    ).execute()
    outputs = [o for cell in notebook.cells for o in cell.get("outputs", ())]
    kinds = {kind for o in outputs if "data" in o for kind in o["data"]}
    assert {"text/html", "image/png"} <= kinds


@pytest.fixture(scope="module")
def maker() -> types.ModuleType:
    """The script that runs the notebooks and keeps their outputs."""
    spec = importlib.util.spec_from_file_location("make_notebooks", NOTEBOOKS[0].parent / "make_notebooks.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_saved_outputs_are_of_the_cells_and_the_version(path: pathlib.Path, maker: types.ModuleType) -> None:
    notebook = read(path)
    assert not maker.out_of_date(notebook), "run python colab/make_notebooks.py"
    assert path.stat().st_size < maker.LIMIT
    kinds = {kind for cell in notebook.cells for o in cell.get("outputs", ()) for kind in o.get("data", ())}
    assert {"text/html", "image/png"} <= kinds

    changed = read(path)
    changed.cells[-1]["source"] += "\n"
    assert maker.out_of_date(changed) == "its cells have changed since it was run"
    earlier = read(path)
    earlier.metadata[maker.KEY]["version"] = "0.0.1"
    assert maker.out_of_date(earlier) == "it was run with version 0.0.1 of the package"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_opens_on_an_accelerator_with_forms(path: pathlib.Path) -> None:
    notebook = read(path)
    kind = ("TPU", "V5E1") if path.stem == "06_pod" else ("GPU", "T4")
    assert (notebook.metadata["accelerator"], notebook.metadata["colab"]["gpuType"]) == kind
    code = [cell for cell in notebook.cells if cell["cell_type"] == "code"]
    forms = [cell for cell in code if cell["source"].startswith("# @title ")]
    assert all(cell["metadata"]["cellView"] == "form" for cell in forms)
    assert sum(cell["source"].count("  # @param {") for cell in forms) >= 3
    assert "files.download(" in code[-1]["source"]
    # pip may bring no other jax than the one that is there.
    installs = [line for line in code[0]["source"].splitlines() if "%pip install" in line]
    assert len(installs) == 2
    assert all('"jax=={jax_version}"' in line for line in installs)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_is_well_formed(path: pathlib.Path) -> None:
    notebook = read(path)
    nbformat.validate(notebook)
    code = [cell["source"] for cell in notebook.cells if cell["cell_type"] == "code"]
    assert len(code) <= 15
    assert "colab-badge.svg" in notebook.cells[0]["source"]
    assert [source for source in code if "%pip" in source] == code[:1]
    assert '"google.colab" in sys.modules' in code[0]
    assert not any("nn.Module" in source for source in code)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_uses_public_names(path: pathlib.Path) -> None:
    code = [cell["source"] for cell in read(path).cells if cell["cell_type"] == "code"]
    nodes = [node for source in code if "%pip" not in source for node in ast.walk(ast.parse(source))]
    imported = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    assert [name for name in imported if name.startswith("elastic_lm")] == ["elastic_lm"]
    assert not [
        node.module
        for node in nodes
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("elastic_lm")
    ]

    used = {ast.unparse(node) for node in nodes if isinstance(node, ast.Attribute)}
    for name in filter(re.compile(r"el(\.\w+)+").fullmatch, used):
        face, parts = elastic_lm, name.split(".")[1:]
        while parts and isinstance(face, types.ModuleType):
            assert parts[0] in face.__all__, name
            face = getattr(face, parts.pop(0))
