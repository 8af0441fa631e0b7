"""Overrides on the command line: references, blanks, indices, neighbours; config_flags as the judge."""

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
from absl import flags
from ml_collections import ConfigDict, config_flags

from elastic_lm.train.overrides import override, pairs, parsed
from elastic_lm.train.recipes import load_config

RECIPE = """
from ml_collections import ConfigDict


def get_config(arg=""):
    c = ConfigDict()
    c.exits = [{"layer": 1, "kind": "norm"}, {"layer": 3, "kind": "norm"}]
    c.model = {"vocab_size": 300, "d_model": 32, "n_layers": 4, "n_heads": 4, "d_mlp": 64}
    c.data = {"source": "text", "paths": ("a.txt", "b.txt"), "seq_len": 64, "text_field": "text"}
    c.method = {"name": "joint", "weights": (0.5, 0.25)}
    c.train = {"steps": 1000, "lr": 1e-3, "remat": False}
    c.train.warmup = c.train.get_ref("steps") // 10
    c.train.save_every = c.train.get_ref("warmup") * 2
    return c
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.py"
    path.write_text(RECIPE)
    return path


def by_config_flags(recipe: Path, arguments: list[str]) -> dict[str, Any]:
    """What `ml_collections.config_flags` makes of a command line."""
    values = flags.FlagValues()
    argv = ["prog", f"--config={recipe}", *arguments]
    config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=argv)
    values(argv)
    return values.config.to_dict()


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--config.train.steps=200"],
        ["--config.train.steps", "200"],
        ["--config.train.steps=200", "--config.train.warmup=7"],
        ["--config.train.warmup=7", "--config.train.steps=200"],
        ["--config.train.lr", "3e-4", "--config.exits[0].layer=2", "--config.train.steps", "50"],
        ["--config.exits[1].layer", "2"],
        ["--config.exits[-1].layer=2"],
        ["--config.exits[0].kind", "mlp"],
        ["--config.train.remat=true"],
        ["--config.train.steps=300", "--config.train.steps=400"],
        ["--config.data.text_field=5"],
        ["--config.data.text_field", "a=b"],
        ["--config.data.paths=('c.txt',)"],
        ["--config.data.paths", "('c.txt', 'd.txt')"],
        ["--config.data.source=stdlib"],
    ],
)
def test_a_command_line_means_what_config_flags_makes_of_it(recipe: Path, arguments: list[str]) -> None:
    theirs = by_config_flags(recipe, arguments)
    spec = importlib.util.spec_from_file_location("recipe_here", recipe)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    ours = module.get_config()
    for key, text in pairs(arguments):
        override(ours, key, text)
    assert ours.to_dict() == theirs

    run = load_config(str(recipe), arguments)
    assert (run.train.steps, run.train.warmup, run.train.lr) == tuple(
        theirs["train"][name] for name in ("steps", "warmup", "lr")
    )
    assert [(exit.layer, exit.kind) for exit in run.exits] == [
        (e["layer"], e["kind"]) for e in theirs["exits"]
    ]
    assert (run.data.text_field, run.data.paths) == (theirs["data"]["text_field"], theirs["data"]["paths"])


def test_references_follow_overrides(recipe: Path) -> None:
    run = load_config(str(recipe), ["--config.train.steps=200"])
    assert (run.train.steps, run.train.warmup, run.train.save_every) == (200, 20, 40)


def test_a_value_that_a_reference_cannot_take_is_refused_in_one_line(recipe: Path) -> None:
    with pytest.raises(ValueError, match=r"recipe\.py: TypeError: .*; fix the file"):
        load_config(str(recipe), ["--config.train.steps=many"])


def test_an_entry_of_a_tuple_is_replaced(recipe: Path) -> None:
    run = load_config(str(recipe), ["--config.data.paths[1]=c.txt", "--config.method.weights[-1]", "1.0"])
    assert run.data.paths == ("a.txt", "c.txt")
    assert run.method.weights == (0.5, 1.0)


def test_tuples_within_tuples_are_replaced() -> None:
    config = ConfigDict({"menu": ({"mlp": (0.5, 1.0)}, 3)})
    override(config, "menu[0].mlp[0]", "0.25")
    assert config.to_dict() == {"menu": ({"mlp": (0.25, 1.0)}, 3)}


def test_placeholders_are_filled_or_refused(tmp_path: Path) -> None:
    (tmp_path / "recipe.py").write_text(
        "from ml_collections import ConfigDict, config_dict\n\n\n"
        "def get_config(arg=''):\n"
        "    c = ConfigDict({'train': {'init_from': 'm', 'dtype': config_dict.placeholder(str)}})\n"
        "    c.train.steps = config_dict.required_placeholder(int)\n"
        "    c.train.warmup = 20\n"
        "    return c\n"
    )
    given = ["--config.train.steps", "80", "--config.train.dtype=bfloat16"]
    run = load_config(str(tmp_path / "recipe.py"), given)
    assert (run.train.steps, run.train.warmup, run.train.dtype) == (80, 20, "bfloat16")
    with pytest.raises(ValueError, match=r"recipe\.py.*RequiredValueError"):
        load_config(str(tmp_path / "recipe.py"), given[2:])


def test_a_frozen_config_can_be_overridden(recipe: Path) -> None:
    text = RECIPE.replace("import ConfigDict", "import ConfigDict, FrozenConfigDict")
    text = text.replace("return c", "del c.exits, c.method\n    return FrozenConfigDict(c)")
    recipe.write_text(text)
    assert load_config(str(recipe), ["train.lr=0.5"]).train.lr == 0.5


def test_one_path_needs_no_tuple(recipe: Path) -> None:
    assert load_config(str(recipe), ["--config.data.paths=c.txt"]).data.paths == ("c.txt",)
    assert load_config(str(recipe), ["--config.data.paths", "c.txt"]).data.paths == ("c.txt",)


def test_a_section_that_the_recipe_leaves_out_can_be_set(recipe: Path) -> None:
    assert load_config(str(recipe), ["--config.mesh.fsdp", "2"]).mesh.fsdp == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config.exits[2].layer=2"], r"exits\[2\]\.layer: exits has 2 entries, counted from 0"),
        (["--config.train[0]=2"], r"train\[0\]: train is no list; leave \[0\] out"),
        (["--config.exits[a].layer=2"], r"'exits\[a\]\.layer' is not the key of a config"),
        (["--config.exits.layer=2"], r"exits\.layer: exits has no keys of its own"),
        (["--config.train..lr=2"], r"'train\.\.lr' is not the key of a config"),
        (["--config.train.lr", "--config.train.steps=2"], r"'--config\.train\.lr' is not an override"),
        (["--config.train.lr"], r"'--config\.train\.lr' is not an override"),
        (["train.lr", "2"], r"'train\.lr' is not an override"),
    ],
)
def test_what_leads_nowhere_is_refused(recipe: Path, arguments: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_config(str(recipe), arguments)


@pytest.mark.parametrize(
    ("text", "before", "value"),
    [
        ("5", None, 5),
        ("5", "text", "5"),
        ("'5'", "text", "5"),
        ("none", 3, None),
        ("none", "text", "none"),
        ("True", None, True),
        ("(1, 2)", (), (1, 2)),
        ("a b", None, "a b"),
    ],
)
def test_a_value_that_was_a_text_stays_one(text: str, before: Any, value: Any) -> None:
    assert parsed(text, before) == value


def test_a_recipe_imports_its_neighbour_and_another_one_another(tmp_path: Path) -> None:
    for name, steps in (("one", 300), ("two", 400)):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "common_steps.py").write_text(f"STEPS = {steps}\n")
        (folder / "recipe.py").write_text(
            "import common_steps\n"
            "def get_config(arg=''):\n"
            "    return {'train': {'init_from': 'm', 'steps': common_steps.STEPS}}\n"
        )
        before = list(sys.path)
        assert load_config(str(folder / "recipe.py")).train.steps == steps
        assert sys.path == before
        assert "common_steps" not in sys.modules
