"""The shape of the package: imports point one way, files stay short, every module imports."""

import ast
import importlib
import pathlib

import pytest

import elastic_lm

PACKAGE = pathlib.Path(elastic_lm.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))

CONFIGS = {"config", "encoder_config", "encoder_decoder_config", "rope_config", "task_config", "train_config"}
CORE = CONFIGS | {"plain", "elastic", "cost"}
LAYERS = CORE | {"nn", "models"}
LEAVES = {"hf", "checkpoint", "sharding", "data", "metrics"}

# Room -> the other rooms that it may import. A room is a top-level module or sub-package.
ARROWS = {
    "__init__": set(),
    "plain": set(),
    "rope_config": {"plain"},
    "train_config": {"plain"},
    "config": {"rope_config", "train_config", "plain"},
    "encoder_config": {"config", "train_config", "plain"},
    "encoder_decoder_config": {"config", "train_config", "plain"},
    "task_config": {"config", "encoder_config", "encoder_decoder_config", "train_config", "plain"},
    "elastic": {"config", "plain"},
    "cost": {"config", "elastic", "plain"},
    "sequence_cost": CONFIGS | {"cost"},
    "jsonl": {"plain"},
    "fingerprints": set(),
    "machine": set(),
    "latency_table": LAYERS | {"machine"},
    "nn": CORE,
    "models": CORE | {"nn"},
    "slicing": LAYERS,
    "sharding": LAYERS,
    "metrics": {"plain"},
    "data": CORE | {"methods", "sharding"},  # batches are `methods.losses.Batch`
    "hf": LAYERS | {"sharding"},
    "checkpoint": LAYERS | {"sharding", "data", "hf"},
    "loading": LAYERS | LEAVES,
    "methods": LAYERS | {"slicing"},
    "calibrate": LAYERS | {"methods", "data", "sharding"},
    "decode": LAYERS | {"sequence_cost", "calibrate", "checkpoint", "data", "methods", "sharding", "slicing"},
    "train": LAYERS | LEAVES | {"methods", "loading", "latency_table"},
    "evaluate": LAYERS | LEAVES | {"methods", "calibrate", "decode", "loading"},
    "render": set(),
    "embedded": set(),
    "testing": LAYERS | {"data"},
}
EVERYTHING = set(ARROWS) - {"testing", "__init__"}
ARROWS["held_out"] = EVERYTHING
ARROWS["generation"] = EVERYTHING | {"held_out", "latency"}
ARROWS["routing"] = EVERYTHING | {"generation"}
ARROWS["bench"] = EVERYTHING
ARROWS["latency"] = LAYERS | {"machine", "latency_table", "metrics", "slicing", "decode", "bench"}
ARROWS["quickstart"] = EVERYTHING | {"bench", "generation"}  # its timing, its coloured text
ARROWS["commands"] = ARROWS["quickstart"] | {"latency", "quickstart", "held_out", "routing"}
ARROWS["flags"] = {"routing"}
ARROWS["cli"] = {"flags", "commands"}
ARROWS["__main__"] = {"cli"}


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


def test_imports_point_one_way() -> None:
    wrong = []
    for path, names in all_imports().items():
        allowed = ARROWS[room(path)] | {room(path)}
        rooms = {name.split(".")[1] for name in names if name.startswith("elastic_lm.")}
        wrong += [f"{path.relative_to(PACKAGE)} imports {r}" for r in sorted(rooms - allowed)]
    assert not wrong, "\n".join(wrong)


def test_arrows_have_no_cycle() -> None:
    settled: set[str] = set()
    while len(settled) < len(ARROWS):
        ready = {name for name, uses in ARROWS.items() if uses & set(ARROWS) <= settled} - settled
        assert ready, f"cycle among {sorted(set(ARROWS) - settled)}"
        settled |= ready


def test_no_tensorflow_no_pickle() -> None:
    forbidden = {"tensorflow", "tf", "pickle", "cloudpickle", "dill"}
    for path, names in all_imports().items():
        assert not {name.split(".")[0] for name in names} & forbidden, path


def test_torch_and_transformers_are_never_needed() -> None:
    for path, names in all_imports().items():
        if room(path) != "bench":  # benchmarks compare with them where they are installed
            assert not {name.split(".")[0] for name in names} & {"torch", "transformers"}, path


def test_files_are_short_and_have_a_subject() -> None:
    assert not [path for path in FILES if path.stem in ("utils", "util", "helpers", "misc")]
    lengths = {str(p.relative_to(PACKAGE)): len(p.read_text().splitlines()) for p in FILES}
    assert not {name: n for name, n in lengths.items() if n > 400}


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
