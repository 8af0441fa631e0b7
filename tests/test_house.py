"""The shape of the package: a room imports only earlier rooms, faces show what users use, modules import."""

import ast
import importlib
import pathlib
import subprocess
import sys

import pytest

import elastic_lm

PACKAGE = pathlib.Path(elastic_lm.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))

# A room imports only rooms of earlier sets. The dials, depth and width, import nothing of each other.
ORDER = [
    {"config"},
    {"meeting", "processes", "bounds"},
    {"files"},
    {"report", "nn"},
    {"models", "data"},
    {"hf", "cost"},
    {"checkpoints"},
    {"train"},
    {"depth", "width"},
    {"decode"},
    {"cascade", "bench"},
    {"quickstart", "harness"},
    {"cli"},
]
# What stands beside the rooms: lists of names from several of them, and aliases of 0.1, which every face has.
BESIDE = {"__init__", "deprecated", "evaluate", "testing", "__main__"}
ALIASES = "deprecated"
ROOMS = {room: place for place, rooms in enumerate(ORDER) for room in rooms}
PUBLIC_ROOMS = ("cascade", "data", "depth", "evaluate", "hf", "train", "width")


def room(path: pathlib.Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")


def imported_modules(tree: ast.AST) -> list[str]:
    """Dotted names of everything imported at run time, at any depth of the file."""
    names = []
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import"
            names += [f"{node.module}.{alias.name}" for alias in node.names]
        elif not is_type_checking(node):
            names += imported_modules(node)
    return names


def all_imports() -> dict[pathlib.Path, list[str]]:
    return {path: imported_modules(ast.parse(path.read_text())) for path in FILES}


def against_the_order(path: pathlib.Path, names: list[str]) -> list[str]:
    own = room(path)
    rooms = {name.split(".")[1] for name in names if name.startswith("elastic_lm.")} - {own}
    if path.name == "__init__.py":
        rooms -= {ALIASES}
    wrong = [other for other in sorted(rooms) if other not in ROOMS or ROOMS[other] >= ROOMS[own]]
    return [f"{path.relative_to(PACKAGE)} imports {other}" for other in wrong]


def test_every_module_lies_in_a_room() -> None:
    assert {room(path) for path in FILES} <= set(ROOMS) | BESIDE


def test_rooms_import_only_earlier_rooms() -> None:
    wrong = []
    for path, names in all_imports().items():
        if room(path) not in BESIDE:
            wrong += against_the_order(path, names)
    assert not wrong, "\n".join(wrong)


def test_depth_may_not_import_width() -> None:
    wrong = against_the_order(PACKAGE / "depth" / "policies.py", ["elastic_lm.width.slicing.slice_params"])
    assert wrong == ["depth/policies.py imports width"]
    wrong = against_the_order(PACKAGE / "depth" / "__init__.py", ["elastic_lm.width.slicing.slice_params"])
    assert wrong == ["depth/__init__.py imports width"]
    assert not against_the_order(PACKAGE / "decode" / "served.py", ["elastic_lm.width.slicing.slice_params"])


def test_no_tensorflow_no_pickle() -> None:
    forbidden = {"tensorflow", "tf", "pickle", "cloudpickle", "dill"}
    for path, names in all_imports().items():
        assert not {name.split(".")[0] for name in names} & forbidden, path


def test_torch_and_transformers_are_never_needed() -> None:
    for path, names in all_imports().items():
        if room(path) != "bench":  # benchmarks compare with them where they are installed
            assert not {name.split(".")[0] for name in names} & {"torch", "transformers"}, path


def test_files_have_a_subject() -> None:
    assert not [path for path in FILES if path.stem in ("utils", "util", "helpers", "misc")]


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_every_module_imports(path: pathlib.Path) -> None:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    if parts[-1] != "__main__":
        importlib.import_module(".".join(parts).removesuffix(".__init__"))


def test_public_names_resolve() -> None:
    for name in elastic_lm.__all__:
        assert getattr(elastic_lm, name) is not None
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = elastic_lm.no_such_name


@pytest.mark.parametrize("name", PUBLIC_ROOMS)
def test_a_room_lists_what_users_use(name: str) -> None:
    face = importlib.import_module(f"elastic_lm.{name}")
    assert dir(face) == sorted(face.__all__)
    for public in face.__all__:
        assert getattr(face, public) is not None
        # A module of the same name would shadow it as soon as it is imported.
        assert not (PACKAGE / name / f"{public}.py").exists(), public


def test_importing_the_package_loads_no_jax() -> None:
    script = "import sys, elastic_lm; print([m for m in ('jax', 'flax', 'numpy') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
