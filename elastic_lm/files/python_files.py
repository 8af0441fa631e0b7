"""Python files of users that are run: configs, and answerers of a cascade."""

import contextlib
import runpy
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any


def run_file(what: str, file: Path) -> dict[str, Any]:
    """Runs a Python file.

    Args:
      what: such a file is called in messages.
      file: the file.

    Returns:
      What it defines, by name.

    Raises:
      OSError: it cannot be read.
      ValueError: it raised an error, or ended the program; names the line.
    """
    with file.open("rb"):  # so that an error of the system is about this file
        pass
    return attempt(what, file, lambda: runpy.run_path(str(file)))


@contextlib.contextmanager
def beside(file: Path, forget: bool = True) -> Iterator[None]:
    """Lets a file that is run import its neighbours, as a script does.

    Args:
      file: the file; its folder is searched first.
      forget: what it imported from there is forgotten afterwards: another file may have another neighbour of
        that name.
    """
    folder, before = str(file.resolve().parent), set(sys.modules)
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):
            sys.path.remove(folder)
        new = {name.partition(".")[0] for name in set(sys.modules) - before} - before if forget else set()
        for name in [name for name in sys.modules if name.partition(".")[0] in new]:
            if _lies_in(sys.modules[name], folder):
                del sys.modules[name]


def _lies_in(module: Any, folder: str) -> bool:
    """Whether a module, or a package that it is part of, was found in a folder."""
    parts = getattr(module, "__name__", "").split(".")
    place = Path(getattr(module, "__file__", None) or ".").resolve()
    above = place.parents[len(parts) if place.name == "__init__.py" else len(parts) - 1 :]
    return bool(above) and str(above[0]) == folder


def attempt(what: str, file: Path, run: Callable[[], Any]) -> Any:
    """What `run`, code of a file that was run, gives.

    Args:
      what: such a file is called in messages.
      file: the file.
      run: the code.

    Raises:
      ValueError: the code raised an error, or ended the program; names the line.
    """
    try:
        return run()
    except (Exception, SystemExit) as error:
        raise ValueError(f"{what} {_place(file, error)}: {_complaint(error)}") from error


def _place(file: Path, error: BaseException) -> str:
    """The file and line of an error: the file's last line, as what it calls may fail far away."""
    if isinstance(error, SyntaxError) and error.lineno:
        return f"{error.filename or file} line {error.lineno}"
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if frame.filename == str(file)]
    return f"{file} line {lines[-1]}" if lines else str(file)


def _complaint(error: BaseException) -> str:
    """What an error says, and the fix."""
    if isinstance(error, SyntaxError):
        return f"{type(error).__name__}: {error.msg}; fix this line"
    if type(error) is ValueError:
        return str(error)  # a refusal, by the file or by what it calls, which has a fix of its own
    fix = "install it, or fix the file" if isinstance(error, ImportError) else "fix the file"
    return f"{type(error).__name__}: {error}; {fix}"
