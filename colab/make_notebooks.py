"""Runs the notebooks of this folder and keeps their outputs, and which cells and version they are of.

    python colab/make_notebooks.py              # run those whose cells, or the version, have changed since
    python colab/make_notebooks.py --all        # run all of them
    python colab/make_notebooks.py --check      # run nothing: exit status 1 where outputs are out of date

Changes of the package within a version are not noticed, because nearly all of them leave the outputs as they
are: where one does not, run all. The cells are edited in the notebooks themselves.
`pip install -e ".[notebook]"` has what this needs.
"""

import argparse
import hashlib
import json
import os
import platform
import sys
import tempfile
import time
from pathlib import Path

import nbformat

import elastic_lm

FOLDER = Path(__file__).resolve().parent
KEY = "elastic_lm"  # of a notebook's metadata: what its outputs come from
LIMIT = 1_500_000  # bytes of a notebook


def source_digest(notebook: nbformat.NotebookNode) -> str:
    """The SHA-256 digest of all cells, without their outputs, in hexadecimal."""
    cells = [[cell["cell_type"], cell["source"]] for cell in notebook.cells]
    return hashlib.sha256(json.dumps(cells).encode()).hexdigest()


def out_of_date(notebook: nbformat.NotebookNode) -> str:
    """Why a notebook's outputs are not those of its cells in this version of the package; "" = they are."""
    made = notebook.metadata.get(KEY, {})
    if made.get("source_sha256") != source_digest(notebook):
        return "its cells have changed since it was run"
    if made.get("version") != elastic_lm.__version__:
        return f"it was run with version {made.get('version')} of the package"
    code = [cell for cell in notebook.cells if cell["cell_type"] == "code"]
    if any(cell["execution_count"] is None for cell in code):
        return "a cell was not run"
    if any(output["output_type"] == "error" for cell in code for output in cell["outputs"]):
        return "a cell ended in an error"
    return ""


def execute(notebook: nbformat.NotebookNode) -> None:
    """Runs all cells in an empty folder, and keeps what they print and draw."""
    from nbclient import NotebookClient

    began = time.perf_counter()
    # The kernel starts elsewhere, and is to find this checkout, not an installed package.
    os.environ["PYTHONPATH"] = os.pathsep.join([str(FOLDER.parent), os.environ.get("PYTHONPATH", "")])
    with tempfile.TemporaryDirectory() as folder:
        resources = {"metadata": {"path": folder}}
        NotebookClient(notebook, timeout=3600, kernel_name="python3", resources=resources).execute()

    for cell in notebook.cells:
        cell["metadata"].pop("execution", None)  # times of day
    notebook.metadata[KEY] = {
        "source_sha256": source_digest(notebook),
        "version": elastic_lm.__version__,
        "python": platform.python_version(),
        "seconds": round(time.perf_counter() - began),
        "date": time.strftime("%Y-%m-%d"),
    }


def main() -> int:
    """Runs or checks the notebooks; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="notebooks without .ipynb (default: all)")
    parser.add_argument("--all", action="store_true", help="run those that are up to date, too")
    parser.add_argument("--check", action="store_true", help="run nothing, and say what is out of date")
    options = parser.parse_args()

    status = 0
    for path in sorted(FOLDER.glob("*.ipynb")):
        if options.names and path.stem not in options.names:
            continue
        notebook = nbformat.read(path, as_version=4)
        reason = out_of_date(notebook)
        if options.check:
            status |= bool(reason)
            print(f"{path.name}: {reason or 'up to date'}")
        elif reason or options.all:
            print(f"{path.name}: runs ({reason or 'asked for'})", flush=True)
            execute(notebook)
            text = nbformat.writes(notebook) + "\n"
            if len(text.encode()) > LIMIT:
                raise ValueError(f"{path.name}: {len(text):,} bytes with its outputs; draw less, or smaller")
            path.write_text(text, encoding="utf-8")
            print(f"{path.name}: {notebook.metadata[KEY]['seconds']} s")
    return status


if __name__ == "__main__":
    sys.exit(main())
