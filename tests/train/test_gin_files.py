"""gin files bind the dataclasses that Python recipes make; what is wrong in them is one line."""

import dataclasses
import sys
from pathlib import Path
from typing import Any

import pytest

from elastic_lm.train import gin_files
from elastic_lm.train.gin_files import load_gin, read_gin
from elastic_lm.train.recipes import load_config

gin = pytest.importorskip("gin", reason="gin-config is not installed")

CONFIGS = Path(__file__).parents[2] / "configs"
RECIPES = sorted(CONFIGS.glob("*.py"))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_gin_file_beside_every_recipe_gives_the_same_run(recipe: Path, tmp_path: Path) -> None:
    theirs, operative = read_gin([recipe.with_suffix(".gin")])
    assert theirs == load_config(str(recipe))

    (tmp_path / "operative.gin").write_text(operative)
    assert load_gin([tmp_path / "operative.gin"]) == theirs


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_the_command_in_a_gin_file_needs_no_sources(recipe: Path, tmp_path: Path, monkeypatch) -> None:
    command = recipe.with_suffix(".gin").read_text().partition("COMMAND")[2].splitlines()[0].split()
    assert command[:2] == ["elastic-lm", "train"]
    monkeypatch.chdir(tmp_path)
    assert read_gin([command[command.index("--gin_file") + 1]])[0] == load_config(recipe.stem)


@pytest.mark.parametrize(
    ("recipe", "params", "variant"),
    [
        (
            "english",
            [
                "RunConfig.exits = (@ExitConfig(),)",
                "ExitConfig.layer = 2",
                "ExitConfig.kind = 'norm'",
                "ExitConfig.tied = True",
                "RunConfig.method = @JointTrainingConfig()",
                "JointTrainingConfig.weights = (0.7,)",
            ],
            "data/english,drafting",
        ),
        ("self_supervised_exits", ["ExitConfig.gate = 64"], "gates"),
        ("flextron", ["ElasticTrainingConfig.draw = 'uniform'"], "uniform"),
        ("ee_tuning", ["first/ExitConfig.layer = 6", "second/ExitConfig.layer = 9"], "6,9"),
    ],
)
def test_variants_are_bindings(recipe: str, params: list[str], variant: str) -> None:
    run = load_gin([CONFIGS / f"{recipe}.gin"], params)
    assert run == load_config(f"{CONFIGS / recipe}.py:{variant}")


def test_later_files_and_params_win(tmp_path: Path) -> None:
    (tmp_path / "more.gin").write_text("STEPS = 70\nTrainConfig.steps = %STEPS\nTrainConfig.warmup = 3\n")
    run = load_gin([CONFIGS / "ee_tuning.gin", tmp_path / "more.gin"], ["TrainConfig.warmup=5"])
    assert (run.train.steps, run.train.warmup, run.train.lr) == (70, 5, 1e-3)


def test_a_file_includes_and_imports_its_neighbours(tmp_path: Path) -> None:
    (tmp_path / "base.gin").write_text("TrainConfig.init_from = 'm'\nTrainConfig.steps = 70\n")
    (tmp_path / "neighbour_of_gin.py").write_text(
        "import gin\n\n@gin.configurable\ndef tenth(of=1):\n    return of // 10\n"
    )
    text = "import neighbour_of_gin\ninclude 'base.gin'\nTrainConfig.warmup = @tenth()\ntenth.of = 70\n"
    (tmp_path / "run.gin").write_text(text)
    for _ in range(2):  # a sweep reads a file more than once
        run = load_gin([tmp_path / "run.gin"])
        assert (run.train.init_from, run.train.warmup) == ("m", 7)
    assert str(tmp_path) not in sys.path
    assert not any(str(tmp_path) in prefix for prefix in gin.config._LOCATION_PREFIXES)


def test_what_a_program_has_bound_is_left_as_it_was() -> None:
    @gin.configurable
    def of_the_program(size: int = 1) -> int:
        return size

    gin.parse_config("of_the_program.size = 3")
    gin.finalize()
    try:
        run = load_gin(params=["TrainConfig.init_from='m'"])
        assert run.train.init_from == "m"
        assert of_the_program() == 3
        assert gin.config_is_locked()
        with pytest.raises(ValueError, match="must be at least 1"):
            load_gin(params=["TrainConfig.init_from='m'", "TrainConfig.steps=0"])
        assert "TrainConfig" not in gin.config_str()
        assert of_the_program() == 3
    finally:
        gin.clear_config()


def test_the_dataclasses_are_the_same_classes() -> None:
    run = load_gin([CONFIGS / "ee_tuning.gin"])
    changed = dataclasses.replace(run, train=dataclasses.replace(run.train, lr=0.5))
    assert type(changed.train) is type(run.train) is gin_files.TrainConfig


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("TrainConfig.lrr = 1.0", r"line 2: TrainConfig has no parameter lrr: did you mean lr\?"),
        ("TrianConfig.lr = 1.0", r"line 2: there is no TrianConfig: did you mean TrainConfig\?"),
        ("TrainConfig.lr = ", r"line 2: .*; fix the line"),
        ("TrainConfig.lr = 1.0 2.0", r"line 2: .*; fix the line"),
        ("RunConfig.method = @EETunin()", r"there is no EETunin: did you mean EETuningConfig\?"),
        ("TrainConfig.steps = 0", r"^train\.steps=0: must be at least 1"),
        ("TrainConfig.steps = '5'", r"^train\.steps='5': must be a whole number"),
        ("TrainConfig.steps = %STEPS", r"gin: %STEPS is bound nowhere; write STEPS = VALUE"),
        ("DataConfig.paths = 'a.txt'", r"^data\.paths='a\.txt': must be a tuple: write \('a\.txt',\)"),
        ("import no_such_module_here", r"line 2: No module named 'no_such_module_here'"),
        ("include 'none.gin'", r"line 2: .*none\.gin"),
        (
            "EETuningConfig.weights = (1.0,)",
            r"EETuningConfig\.weights=\(1\.0,\): nothing reads it: this RunConfig with .*'pretraining'",
        ),
        ("other/TrainConfig.lr = 1.0", r"other/TrainConfig\.lr=1\.0: nothing reads it"),
        ("RunConfig.exits = (@ExitConfig(),)", r"ExitConfig missing 1 .*: 'layer'; bind ExitConfig\.NAME"),
        ("RunConfig.exits = (@JointTrainingConfig(),)", r"exits\[0\]=.*: must be of type ExitConfig"),
    ],
)
def test_what_is_wrong_is_one_line(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "run.gin").write_text(f"TrainConfig.init_from = 'm'\n{text}\n")
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        load_gin([tmp_path / "run.gin"])
    assert "\n" not in str(caught.value)
    assert not gin.config_str()


def test_params_that_are_wrong_are_named() -> None:
    with pytest.raises(
        ValueError, match=r"--gin_param 'TrainConfig\.lrr=1': TrainConfig has no parameter lrr"
    ):
        load_gin(params=["TrainConfig.lrr=1"])
    with pytest.raises(ValueError, match=r"--gin_param 'TrainConfig\.lr'.*; fix the line"):
        load_gin(params=["TrainConfig.lr"])


def test_a_missing_file_and_a_missing_library_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FileNotFoundError, match=r"gin file none\.gin does not exist"):
        load_gin(["none.gin"])

    def missing(name: str) -> Any:
        raise ImportError(name)

    monkeypatch.setattr(gin_files.importlib, "import_module", missing)
    with pytest.raises(ValueError, match=r'pip install "elastic-lm\[gin\]"'):
        load_gin(["none.gin"])
