"""Where `--config` finds a config: recipes of the package from anywhere, and files of users."""

import shutil
from pathlib import Path

import pytest

from elastic_lm.files import recipes
from elastic_lm.files.recipes import find_recipe, recipe_names, recipe_summaries, split_argument
from elastic_lm.train.recipes import load_config

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("ee_tuning", ("ee_tuning", "")),
        ("ee_tuning:6,12", ("ee_tuning", "6,12")),
        ("routers:runs/elastic:2/model", ("routers", "runs/elastic:2/model")),
        ("configs/glue.py:DATA,sst2", ("configs/glue.py", "DATA,sst2")),
        ("/a/b.py:", ("/a/b.py", "")),
        ("glue:a.py:b", ("glue", "a.py:b")),
        ("a/b", ("a/b", "")),
        ("a/b:c", ("a/b:c", "")),
        ("/a/b.py", ("/a/b.py", "")),
    ],
)
def test_an_argument_stands_behind_the_colon(text: str, expected: tuple[str, str]) -> None:
    assert split_argument(text) == expected


def test_recipes_are_found_by_name_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert recipe_names() == sorted(file.stem for file in CONFIGS.glob("*.py"))
    for name in recipe_names():
        assert load_config(name) == load_config(str(CONFIGS / f"{name}.py"))
    assert load_config("ee_tuning:2", ["train.steps=70"]).exits[0].layer == 2
    assert "frozen" in recipe_summaries()["ee_tuning"]


def test_a_file_goes_before_a_recipe_of_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copy(CONFIGS / "flextron.py", "ee_tuning.py")
    assert find_recipe("ee_tuning") == find_recipe("ee_tuning.py") == Path("ee_tuning.py")
    assert load_config("ee_tuning:uniform").method.name == "flextron"


def test_a_wheel_holds_the_recipes_beside_the_modules(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(CONFIGS, tmp_path / "recipes")
    monkeypatch.setattr(recipes, "INSTALLED", tmp_path / "recipes")
    monkeypatch.setattr(recipes, "CHECKOUT", tmp_path / "none")
    assert find_recipe("glue") == tmp_path / "recipes" / "glue.py"


@pytest.mark.parametrize(
    ("name", "fix"),
    [
        ("configs/ee_tuning.py", r"the recipe of that name in the package is --config ee_tuning$"),
        ("ee_tuning.py", r"the recipe of that name in the package is --config ee_tuning$"),
        ("eetuning", r"did you mean --config ee_tuning, a recipe of the package\?"),
        ("x", r"give a file of yours, or a recipe of the package: ee_tuning, embedded, .*translation$"),
        ("nowhere/ee_tuning", r"the recipe of that name in the package is --config ee_tuning$"),
    ],
)
def test_what_is_not_found_says_what_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, fix: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=rf"config file {name} does not exist; {fix}"):
        find_recipe(name)
