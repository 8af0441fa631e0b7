"""Config files and overrides: what they become and what is refused."""

import dataclasses
from pathlib import Path

import pytest

from elastic_lm.config.parse import from_dict
from elastic_lm.config.subnet import Menu
from elastic_lm.train.config import RunConfig, TrainConfig
from elastic_lm.train.recipes import load_config
from elastic_lm.train.registry import METHODS, method_class

CONFIGS = Path(__file__).parents[2] / "configs"
FILE = """
def get_config(arg=""):
    return {
        "model": {"vocab_size": 300, "d_model": 32, "n_layers": 2, "n_heads": 4, "d_mlp": 64},
        "train": {"steps": 500, "lr": 1e-2 if arg == "fast" else 1e-3},
    }
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.py"
    path.write_text(FILE)
    return path


def test_argument_and_overrides(file: Path) -> None:
    assert load_config(str(file)).train.lr == 1e-3
    config = load_config(
        f"{file}:fast",
        [
            "--config.train.steps=700",
            "data.source=text",
            "--config.data.paths=('a.txt',)",
            "train.remat=true",
        ],
    )
    assert (config.train.lr, config.train.steps, config.train.remat) == (1e-2, 700, True)
    assert (config.data.source, config.data.paths) == ("text", ("a.txt",))
    assert config.model is not None
    assert config.model.n_kv_heads == 4


@pytest.mark.parametrize(
    ("menu", "expected"),
    [
        ("method.menu.mlp=(0.5, 1.0)", Menu(mlp=(0.5, 1.0), heads=(1.0,))),
        ("method.menu.dropped=(1,)", Menu(heads=(1.0,), dropped=(1,))),
        ("method.menu.heads=(0.5, 1.0)", Menu()),
        ("method.menu={}", Menu(heads=(1.0,))),
    ],
)
def test_a_part_of_a_menu_overrides_only_the_fields_that_it_names(
    file: Path, menu: str, expected: Menu
) -> None:
    assert load_config(str(file), ["method.name=flextron", menu]).method.menu == expected


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.stepz=3", r"unknown key train\.stepz=3: did you mean train\.steps\?"),
        ("trian.steps=3", r"unknown key trian=.*did you mean train\?"),
        ("train.steps=many", r"train\.steps='many': must be of type int"),
        ("train.steps=1.5", r"train\.steps=1\.5: must be of type int"),
        ("train.remat=1", r"train\.remat=1: must be True or False, or one of none"),
        ("train.schedule=step", r"train\.schedule='step': must be one of cosine"),
        ("train.warmup=500", r"train\.warmup=500: must be below steps=500"),
        ("exits=({'layer': 1},)", r"method\.name='pretraining': trains no exits"),
        ("train.dtype=fp8", r"train\.dtype='fp8': must be one of"),
        ("train.accumulate=3", r"train\.accumulate=3: must divide data\.batch_size=16"),
        ("train.steps.more=3", r"train\.steps\.more: steps has no keys"),
        ("--seed=3", r"'--seed=3' is not an override"),
        ("train.steps", r"'train\.steps' is not an override"),
        ("exits=3", r"exits=3: must be a tuple: write \(3,\)"),
        ("data.paths=5", r"data\.paths=5: must be a tuple: write \(.5.,\)"),
        ("model.windows=3", r"model\.windows=3: must be a tuple"),
        ("train=3", r"train=3: must be a mapping"),
        ("exits=[{'kind': 'norm'}]", r"exits\[0\].*needs exits\[0\]\.layer"),
        ("model={'d_model': 32}", r"model=.*needs model\.vocab_size, model\.n_layers"),
        ("train.clip=-1.0", r"train\.clip=-1\.0: must be at least 0"),
        ("train.b1=1.5", r"train\.b1=1\.5: must be in \[0, 1\)"),
        ("train.b2=-0.1", r"train\.b2=-0\.1: must be in \[0, 1\)"),
        ("train.eps=0.0", r"train\.eps=0\.0: must be positive"),
        ("train.weight_decay=-0.1", r"train\.weight_decay=-0\.1: must be at least 0"),
        ("train.decay_share=1.5", r"train\.decay_share=1\.5: is a share"),
        ("train.eval_every=-1", r"train\.eval_every=-1: must be at least 0"),
        ("train.eval_batches=-1", r"train\.eval_batches=-1: must be at least 0"),
        (
            "train.menu_groups=(0.5, 1.0)",
            r"menu_groups=.*'pretraining', only with flextron \(as method\.menu\.groups\)",
        ),
        ("train.samples=3", r"samples=3: not read with method\.name='pretraining', only with flextron"),
        ("method.samples=3", r"method=.*'samples': 3.*: must be a mapping with a name: one of pretraining"),
        ("method={'steps': 3}", r"method=.*: must be a mapping with a name: one of pretraining"),
        ("method.name=other", r"method\.name='other': must be one of pretraining"),
        ("train.init_layers=3", r"train\.init_layers=3: .*name it in train\.init_from"),
        ("train.seed=-1", r"train\.seed=-1: must be in"),
        ("data.seed=-1", r"data\.seed=-1: must be in"),
        (
            "train.cached_batches=8",
            r"cached_batches=8: not read with method\.name='pretraining', only with self_supervised_exits",
        ),
        (
            "train.layer_dropout=0.1",
            r"layer_dropout=0\.1: .* only with sorted_finetuning \(as method\.layer_dropout\)",
        ),
        (
            "train.exit_weights=(1.0,)",
            r"train\.exit_weights=.*ee_tuning \(as method\.weights\), joint",
        ),
    ],
)
def test_refused_overrides_name_the_key(file: Path, override: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_config(str(file), [override])


@pytest.mark.parametrize(
    ("method", "override", "message"),
    [
        ("ee_tuning", "weights=0.4", r"method\.weights=0\.4: must be a tuple: write \(0\.4,\)"),
        ("ee_tuning", "weights=(-1.0,)", r"method\.weights=\(-1\.0,\): must be at least 0 and finite"),
        ("ee_tuning", "warmup_from=1e999", r"method\.warmup_from=inf: must be at least 0 and finite"),
        ("ee_tuning", "warmup_steps=-1", r"method\.warmup_steps=-1: must be at least 0"),
        ("sorted_finetuning", "depths=(2, 1)", r"method\.depths=\(2, 1\): must be distinct layers"),
        (
            "sorted_finetuning",
            "depths=(0, 1)",
            r"method\.depths=\(0, 1\): must be distinct layers, counted from 1",
        ),
        (
            "sorted_finetuning",
            "depth_weights=cubic",
            r"method\.depth_weights='cubic': must be one of uniform",
        ),
        ("sorted_finetuning", "depth_scale=0.0", r"method\.depth_scale=0\.0: must be positive"),
        ("sorted_finetuning", "curriculum=some", r"method\.curriculum='some': must be one of all, sampled"),
        ("sorted_finetuning", "curriculum=rotational", r"method\.curriculum_period=0: .*must be at least 1"),
        ("sorted_finetuning", "layer_dropout=1.5", r"method\.layer_dropout=1\.5: must be in \[0, 1\]"),
        ("sorted_finetuning", "dropout_ramp=-1", r"method\.dropout_ramp=-1: must be at least 0"),
        ("self_supervised_exits", "objective=mse", r"method\.objective='mse': must be one of kl"),
        ("self_supervised_exits", "top_k=-1", r"method\.top_k=-1: must be at least 0"),
        ("self_supervised_exits", "alpha=2.0", r"method\.alpha=2\.0: must be in \[0, 1\]"),
        ("flextron", "menu.mlp=(0.5, 0.25, 1.0)", r"menu\.mlp=\(0\.5, 0\.25, 1\.0\): must be shares"),
        ("flextron", "menu.heads=(0.5,)", r"menu\.heads=\(0\.5,\): .*the last one 1\.0"),
        ("flextron", "menu.groups=(1.0, 0.5)", r"menu\.groups=\(1\.0, 0\.5\): must be shares"),
        ("flextron", "draw=all", r"method\.draw='all': must be one of per_layer"),
        ("flextron", "teacher=other", r"method\.teacher='other': must be one of live"),
        ("flextron", "samples=0", r"method\.samples=0: must be at least 1"),
        ("flextron", "distil=1.5", r"method\.distil=1\.5: must be in \[0, 1\]"),
        ("flextron", "smallest_share=-0.5", r"method\.smallest_share=-0\.5: must be in \[0, 1\]"),
        ("flextron", "elastic_groups=-1", r"method\.elastic_groups=-1: must be at least 0"),
        ("flextron", "menu.dropped=(1,1)", r"menu\.dropped=\(1, 1\): names a layer twice"),
    ],
)
def test_refused_options_of_methods_name_the_key(
    file: Path, method: str, override: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        load_config(str(file), [f"method.name={method}", f"method.{override}"])


@pytest.mark.parametrize(
    ("recipe", "override", "message"),
    [
        ("self_supervised_exits.py:argmax", "top_k=8", r"top_k=8: not read with method\.objective='argmax'"),
        ("self_supervised_exits.py", "alpha=0.5", r"alpha=0\.5: .* only with penalised; set 0\.9"),
        (
            "sorted_finetuning.py",
            "curriculum_period=4",
            r"curriculum_period=4: not read with .*'all', only with",
        ),
        ("flextron.py:matformer", "samples=3", r"samples=3: not read with method\.draw='one_per_step', only"),
        ("flextron.py", "teacher=frozen", r"teacher='frozen': not read with method\.distil=0\.0; raise that"),
        ("flextron.py:scratch", "rank_batches=4", r"rank_batches=4: not read with train\.init_from=''"),
        (
            "sorted_finetuning.py",
            "dropout_ramp=4",
            r"dropout_ramp=4: not read with method\.layer_dropout=0\.0",
        ),
    ],
)
def test_options_that_nothing_reads_are_refused(recipe: str, override: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_config(str(CONFIGS / recipe), [f"method.{override}"])


def test_a_method_that_recomputes_nothing_refuses_remat() -> None:
    with pytest.raises(ValueError, match=r"train\.remat=True: not read with .*'self_supervised_exits'"):
        load_config(str(CONFIGS / "self_supervised_exits.py"), ["train.remat=true"])


@pytest.mark.parametrize("name", METHODS)
def test_a_method_has_every_option_of_its_section(name: str) -> None:
    method = method_class(name)
    assert method.section.name == name
    assert {field.name for field in dataclasses.fields(method.section)} <= set(method.__dataclass_fields__)


def test_refused_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none\.py does not exist"):
        load_config(str(tmp_path / "none.py"))
    (tmp_path / "empty.py").touch()
    with pytest.raises(ValueError, match="has no function get_config"):
        load_config(str(tmp_path / "empty.py"))


def test_a_run_needs_a_model() -> None:
    with pytest.raises(ValueError, match=r"model=None: describe a model"):
        RunConfig()


def test_integers_count_as_floats() -> None:
    assert from_dict(TrainConfig, {"lr": 1}).lr == 1


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.py")), ids=lambda p: p.stem)
def test_recipes_are_valid_and_say_what_they_cost(path: Path) -> None:
    head = path.read_text().split('"""')[1]
    for word in ("COMMAND", "HARDWARE", "DURATION"):
        assert word in head, word
    assert load_config(str(path)).train.steps > 0


@pytest.mark.parametrize(
    ("recipe", "variants"),
    [
        ("sorted_finetuning", "soft lite calm sortednet sft extracted-3 ict"),
        ("layerskip", "rotational gradual scratch"),
        ("self_supervised_exits", "kl topk argmax penalised balcony cached gates"),
        ("flextron", "flextron uniform live frozen matformer scratch mha"),
    ],
)
def test_recipes_have_the_variants_that_they_name(recipe: str, variants: str) -> None:
    runs = [load_config(f"{CONFIGS / recipe}.py:{variant}") for variant in variants.split()]
    assert len(set(runs)) == len(runs)
    with pytest.raises(ValueError, match=rf"--config {recipe}:other: choose from {variants.split()[0]}"):
        load_config(f"{CONFIGS / recipe}.py:other")


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("extracted-x", "extracted-x: 'x' is no number of layers; write extracted-3"),
        ("extracted-", "extracted-: '' is no number"),
        ("extracted-0", "extracted-0: '0' is no number"),
        ("soft-9", "soft-9: soft takes no number; write soft"),
    ],
)
def test_sorted_recipe_names_a_wrong_argument(argument: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_config(f"{CONFIGS / 'sorted_finetuning'}.py:{argument}")


@pytest.mark.parametrize("argument", ["", ":tiny"])
def test_embedded_recipe_attaches_its_exits(argument: str) -> None:
    config = load_config(f"{CONFIGS / 'embedded.py'}{argument}")
    assert config.model is not None
    assert config.model.with_exits(config.exits).n_layers > config.exits[-1].layer


@pytest.mark.parametrize(
    ("argument", "source", "weights"),
    [("longer", "runs/embedded/hf", {3: 0.6, 6: 0.4}), ("late", "runs/longer/hf", {9: 1.0})],
)
def test_embedded_recipe_continues_what_it_made(
    argument: str, source: str, weights: dict[int, float]
) -> None:
    config = load_config(f"{CONFIGS / 'embedded.py'}:{argument}")
    assert config.train.init_from == source
    layers = [e.layer for e in config.exits]
    assert dict(zip(layers, config.method.weights, strict=True)) == weights


def test_embedded_recipe_names_a_wrong_argument() -> None:
    with pytest.raises(ValueError, match=r"--config embedded:longr: choose from tiny, longer, late"):
        load_config(f"{CONFIGS / 'embedded.py'}:longr")


def test_english_recipe_has_a_variant_with_an_exit() -> None:
    recipe = CONFIGS / "english.py"
    assert load_config(f"{recipe}:text,drafting").exits[0].layer == 2
    assert load_config(f"{recipe}:text,drafting").data.paths == ("text/train",)
    assert load_config(f"{recipe}:a,b").exits == ()
    assert load_config(f"{recipe}:a,b").data.paths == ("a,b/train",)
