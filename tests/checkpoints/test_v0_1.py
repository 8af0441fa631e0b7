"""Files that elastic_lm 0.1 wrote are read today and give what they gave then (`tests/golden/v0_1`)."""

import dataclasses
import json
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

import elastic_lm as el
from elastic_lm.checkpoints.native import load_menu
from elastic_lm.cli.main import main
from elastic_lm.config.parse import from_dict
from elastic_lm.cost.latency_table import Device
from elastic_lm.testing import all_logits
from elastic_lm.train.identity import check_identity

GOLDEN = Path(__file__).parents[1] / "golden" / "v0_1"
CONFIGS = Path(__file__).parents[2] / "configs"
NUMBERS = json.loads((GOLDEN / "numbers.json").read_text())
RECIPES = json.loads((GOLDEN / "recipes.json").read_text())
STOPPED = 4  # steps that the half-finished runs had done
RENAMED = {  # options of methods that recipes were given
    "train.exit_weights": "method.weights",
    "train.exit_warmup": "method.warmup_steps",
    "train.imitation": "method.alpha",
    "train.teacher_from": "method.teacher_from",
    "train.distil": "method.distil",
}


@pytest.fixture(autouse=True)
def golden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy to work in: the files name each other by paths relative to their folder."""
    shutil.copytree(GOLDEN, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)


def decoder(folder: str) -> tuple[el.Decoder, Any]:
    model, params = el.load(folder)
    assert isinstance(model, el.Decoder)
    return model, params


def prompt_tokens(folder: str) -> Any:
    return np.asarray([el.Tokenizer.load(folder).encode(NUMBERS["prompt"])], np.int32)


def as_subnet(values: dict[str, Any]) -> el.Subnet:
    return from_dict(el.Subnet, values)


@pytest.mark.parametrize("name", ["base", "exits", "elastic"])
def test_checkpoints_compute_the_same_at_every_depth(name: str) -> None:
    model, params = decoder(f"models/{name}")
    tokens = prompt_tokens(f"models/{name}")
    assert tokens[0].tolist() == NUMBERS["tokens"]
    expected = load_file("logits.safetensors")
    found = all_logits(model.config, params, tokens)
    assert {f"{name}/depth_{depth}" for depth in found} == {k for k in expected if f"{name}/depth_" in k}
    for depth, logits in found.items():
        np.testing.assert_allclose(logits[0, -1], expected[f"{name}/depth_{depth}"], rtol=1e-5, atol=1e-5)


def test_menu_and_routers_choose_the_same_subnets() -> None:
    model, params = decoder("models/elastic")
    then, menu = NUMBERS["widths"], load_menu("models/elastic")
    assert menu == from_dict(el.Menu, then["menu"])

    chooser = el.SubnetChooser.load("models/elastic", model.config)
    routers = el.width.Routers.load("models/elastic", model.config)
    whole = chooser.costs("parameters").range(menu)[1]
    expected = load_file("logits.safetensors")
    for routed, own in zip(then["routed"], then["own"], strict=True):
        budget = el.Budget(parameters=routed["share"] * whole)
        subnet = chooser.subnet(budget)
        assert subnet == as_subnet(routed["subnet"])
        assert routers.likeliest(budget) == as_subnet(own)
        config, sliced = el.slice_params(model.config, params, subnet)
        logits = all_logits(config, sliced, prompt_tokens("models/elastic"))[config.n_layers][0, -1]
        name = f"elastic/share_{routed['share']}"
        np.testing.assert_allclose(logits, expected[name], rtol=1e-5, atol=1e-5)

    budget = el.Budget(flops=then["flops"])
    assert chooser.subnet(budget) == as_subnet(then["searched"])
    sampler = el.Sampler(model, params, el.Tokenizer.load("models/elastic"), elastic=chooser)
    assert sampler.sample(NUMBERS["prompt"], 8, budget=budget).tokens == then["generated"]


@pytest.mark.parametrize("name", NUMBERS["thresholds"])
def test_thresholds_decide_the_same(name: str) -> None:
    then = NUMBERS["thresholds"][name]
    model, params = decoder("models/exits")
    policy = el.ConfidenceExit.load(f"thresholds/{name}.json")
    policy.check(model.config)
    assert list(policy.thresholds) == then["thresholds"]
    assert list(policy.gates) == then["gates"]
    assert list(policy.at(0.6).thresholds) == then["at_0.6"]
    assert (policy.guarantee and policy.guarantee.achieved) == then["achieved"]

    sampler = el.Sampler(model, params, el.Tokenizer.load("models/exits"))
    sample = sampler.sample(NUMBERS["prompt"], 12, exit=policy, ignore_eos=True)
    assert sample.tokens == then["tokens"]
    assert sample.exit_layers == then["exit_layers"]

    policy.save("again.json")
    assert Path("again.json").read_text() == Path(f"thresholds/{name}.json").read_text()


def test_latency_table_prices_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    then = NUMBERS["latency"]
    device = Device(**then["device"])
    monkeypatch.setattr(Device, "here", classmethod(lambda cls: device))
    model, _ = decoder("models/elastic")
    table = el.LatencyTable.load("latency.json")
    assert table.device == device
    assert table.text() == then["text"]
    whole = el.Subnet.full(model.config)
    assert [table.total(whole, "decode"), table.total(whole, "prefill")] == then["whole"]

    chooser = el.SubnetChooser.load("models/elastic", model.config).with_latency(table)
    budget = el.Budget(latency_ms=then["budget"])
    assert chooser.subnet(budget) == as_subnet(then["routed"])
    searched = dataclasses.replace(chooser, routers=None).subnet(budget)
    assert table.total(searched) <= then["milliseconds"] + 1e-12
    assert searched == as_subnet(then["searched"])

    table.save("again.json")
    again, before = (json.loads(Path(name).read_text()) for name in ("again.json", "latency.json"))
    # 0.1 did not have some settings of models, and did not record some fields of tables.
    assert from_dict(el.ModelConfig, again.pop("model")) == from_dict(el.ModelConfig, before.pop("model"))
    assert again == before | {field: "" for field in again if field not in before}


PAIR = ("--swift-exit", "1", "--super", "models/exits", "--data", "rows.jsonl")


@pytest.mark.parametrize(
    ("name", "printed", "goal"),
    [
        ("rule", "accuracy", ("--super-accuracy",)),
        ("guaranteed", "risk", ("--risk", "0.4", "--epsilon", "0.3", "--seed", "1")),
    ],
)
def test_rules_are_fitted_again_from_the_answers_that_were_kept(
    name: str,
    printed: str,
    goal: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    then = NUMBERS["cascade"]
    old = el.CascadeRule.load(f"cascade/{name}.json")
    assert old.threshold == then["threshold" if name == "rule" else name]
    assert (old.guarantee is None) == (name == "rule")
    if old.guarantee is not None:
        assert dataclasses.asdict(old.guarantee) == then["guarantee"]

    (answers,) = Path("cascade").glob("rule.answers-*.jsonl")
    whole = answers.read_text()
    monkeypatch.setattr(el.cascade.MultipleChoice, "answer", refuse)
    fit = ["cascade", "fit", *PAIR, *goal, "--score", "energy", "--out", "cascade/rule.json"]
    assert main(fit) == 0
    assert answers.read_text() == whole

    new = el.CascadeRule.load("cascade/rule.json")
    assert (new.threshold, new.measured, new.curve) == (old.threshold, old.measured, old.curve)
    if old.guarantee is not None and new.guarantee is not None:  # scipy's bounds round differently
        bounds, before = dataclasses.asdict(new.guarantee), dataclasses.asdict(old.guarantee)
        before["statement"] = todays_words(before["statement"])
        assert bounds.keys() == before.keys()
        for field, value in before.items():
            close = pytest.approx(value, rel=1e-6) if isinstance(value, float) else value
            assert bounds[field] == close, field
    # Fingerprints of what is in the files, and where the two models disagree.
    assert set(new.provenance) == {*old.provenance, "contents", "slices"}
    assert new.provenance["fingerprints"] == old.provenance["fingerprints"]
    shown = capsys.readouterr()
    assert "\n".join(todays_words(then["printed"][printed]).splitlines()[-5:]) in shown.out
    assert "24 of 24 records are there already" in shown.err


def todays_words(text: str) -> str:
    """A text of 0.1, whose cascades called their records rows."""
    return text.replace("rows", "records")


def refuse(*_: Any, **__: Any) -> Any:
    raise AssertionError("a model was asked")


def test_results_are_continued(capsys: pytest.CaptureFixture[str]) -> None:
    out = Path("cascade/out.jsonl")
    lines = out.read_text().splitlines(keepends=True)
    out.write_text("".join(lines[:9]))
    run = ["cascade", "run", *PAIR, "--rule", "cascade/rule.json", "--out", str(out)]
    assert main(run) == 0
    assert "fit it again" not in capsys.readouterr().err  # these are the checkpoints of the rule
    assert out.read_text().startswith("".join(lines[:9]))
    for new, old in zip(out.read_text().splitlines(), lines, strict=True):
        found, expected = json.loads(new), json.loads(old)
        assert found.pop("score") == pytest.approx(expected.pop("score"), rel=1e-5)
        assert found == expected

    assert main([*run[:-4], "--threshold", "0", "--out", str(out)]) == 2
    assert "was begun with" in capsys.readouterr().err


@pytest.mark.parametrize("name", RECIPES)
def test_workdirs_of_recipes_are_recognised(name: str, tmp_path: Path) -> None:
    stored = RECIPES[name]
    workdir = tmp_path / "workdir"
    workdir.mkdir()
    (workdir / "run.json").write_text(json.dumps(stored["run"], indent=2))
    recipe = str(CONFIGS / stored["recipe"])
    pairs = [override.split("=") for override in stored["overrides"]]
    config = el.train.load_config(recipe, [f"{RENAMED.get(key, key)}={value}" for key, value in pairs])
    check_identity(config, workdir)
    other = dataclasses.replace(config, train=dataclasses.replace(config.train, lr=0.123))
    with pytest.raises(ValueError, match=r"run\.json: the run there has train\.lr="):
        check_identity(other, workdir)


DATA = el.DataConfig(
    source="text", paths=("train.txt",), eval_paths=("held_out.txt",), seq_len=16, batch_size=4, span=200
)
TRAIN = el.TrainConfig(
    steps=8, lr=1e-3, warmup=1, log_every=2, eval_every=0, eval_batches=2, save_every=STOPPED, keep=2
)
MODEL = el.ModelConfig(
    vocab_size=264, d_model=8, n_layers=2, n_heads=4, n_kv_heads=2, d_mlp=16, max_len=64, tied=True
)
GATED = tuple(el.ExitConfig(layer, "norm", tied=True, gate=4) for layer in (1, 2))
ROUTED = dataclasses.replace(TRAIN, init_from="models/elastic")
ROUTERS: dict[str, Any] = {"router_width": 8, "budgets": (0.8, 0.9, 1.0)}


def text_run(method: el.train.MethodConfig, exits: tuple[el.ExitConfig, ...] = ()) -> el.RunConfig:
    train = dataclasses.replace(TRAIN, init_from="models/base")
    return el.RunConfig(exits=exits, data=DATA, method=method, train=train)


def pretraining() -> el.RunConfig:
    train = dataclasses.replace(TRAIN, optimizer="muon", schedule="wsd", accumulate=2, remat=True)
    return el.RunConfig(model=MODEL, data=DATA, train=train)


def ee_tuning() -> el.RunConfig:
    exits = (el.ExitConfig(1, "mlp", tied=True), el.ExitConfig(2, "norm", tied=True))
    method = el.depth.EETuningConfig(weights=(1.0, 0.5), warmup_steps=6, dynamic_token_weights=True)
    return text_run(method, exits)


def sorted_finetuning() -> el.RunConfig:
    method = el.depth.SortedFineTuningConfig(
        depths=(1, 2, 3),
        depth_weights="layerskip",
        depth_scale=0.5,
        curriculum="rotational",
        curriculum_period=2,
        layer_dropout=0.2,
        dropout_ramp=6,
    )
    return text_run(method)


def self_supervised_exits() -> el.RunConfig:
    return text_run(el.depth.SelfSupervisedConfig(cached_batches=3, top_k=8), GATED)


def flextron() -> el.RunConfig:
    method = el.width.ElasticTrainingConfig(
        menu=el.Menu(mlp=(0.5, 1.0), heads=(0.5, 1.0), dropped=(1,)),
        samples=1,
        distil=0.5,
        teacher="frozen",
        elastic_groups=4,
        rank_batches=2,
    )
    return text_run(method)


def routers() -> el.RunConfig:
    method = el.width.RouterTrainingConfig(**ROUTERS, train_model=True, router_lr=10.0, distil=0.5)
    return el.RunConfig(data=DATA, method=method, train=ROUTED)


def routers_surrogate() -> el.RunConfig:
    method = el.width.RouterTrainingConfig(**ROUTERS, scheme="surrogate", surrogate_error=5.0)
    return el.RunConfig(data=DATA, method=method, train=ROUTED)


def task_tuning() -> el.TaskRun:
    return el.TaskRun(
        task=el.TaskConfig(
            paths=("records.jsonl",),
            eval_paths=("records.jsonl",),
            max_len=16,
            batch_size=8,
            tokenizer="words.json",
        ),
        train=TRAIN,
        method=el.train.TaskTuningConfig(z_loss=1e-4, exit_weights=(0.5,)),
        encoder=el.EncoderConfig(vocab_size=12, d_model=8, n_layers=2, n_heads=2, d_mlp=16, max_len=16),
        exits=(1,),
    )


def text_to_text() -> el.TaskRun:
    return el.TaskRun(
        task=el.TaskConfig(
            problem="text_to_text",
            paths=("pairs.jsonl",),
            eval_paths=("pairs.jsonl",),
            text_field="en",
            label_field="de",
            max_len=16,
            max_target=16,
            batch_size=4,
        ),
        train=TRAIN,
        method=el.train.TaskTuningConfig(z_loss=1e-4),
        encoder_decoder=el.EncoderDecoderConfig(vocab_size=264, d_model=8, n_layers=1, n_heads=2, d_mlp=16),
    )


RUNS: list[Callable[[], el.RunConfig | el.TaskRun]] = [
    pretraining,
    ee_tuning,
    sorted_finetuning,
    self_supervised_exits,
    flextron,
    routers,
    routers_surrogate,
    task_tuning,
    text_to_text,
]


@pytest.mark.long
@pytest.mark.parametrize("describe", RUNS, ids=lambda describe: describe.__name__)
def test_half_finished_runs_end_as_they_would_have(describe: Callable[[], Any]) -> None:
    workdir = Path("workdirs") / describe.__name__
    with tarfile.open(workdir / "workdir.tar.xz") as archive:
        archive.extractall(workdir, filter="data")
    begun = metric_lines(workdir, up_to=STOPPED)
    assert begun

    run = describe()
    config, params, metrics = el.train.fit(run, workdir)
    assert metric_lines(workdir, up_to=STOPPED) == begun  # times too: these steps were not run again
    found = flat(params)
    if (workdir / "model" / "routers.json").is_file():
        own = el.width.Routers.load(workdir / "model", config).params
        found |= {f"routers/{name}": leaf for name, leaf in flat(own).items()}

    final = load_file(workdir / "final.safetensors")
    assert final
    for name, leaf in final.items():
        np.testing.assert_allclose(found[name], leaf, rtol=0, atol=1e-6, err_msg=name)
    assert metrics == pytest.approx(json.loads((workdir / "final.json").read_text()), rel=1e-5, abs=1e-6)


def metric_lines(workdir: Path, up_to: int) -> list[str]:
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [line for line in lines if json.loads(line)["step"] <= up_to]


def flat(params: Any) -> dict[str, np.ndarray]:
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {"/".join(key.key for key in path): np.asarray(leaf) for path, leaf in leaves}


def test_workdirs_refuse_another_run() -> None:
    for describe in RUNS:
        run: Any = describe()
        other = dataclasses.replace(run, train=dataclasses.replace(run.train, seed=7))
        with pytest.raises(ValueError, match=r"run\.json: the run there has train\.seed=0, not 7"):
            el.train.fit(other, Path("workdirs") / describe.__name__)
    changed = text_run(el.depth.EETuningConfig(weights=(1.0, 0.25)), ee_tuning().exits)
    with pytest.raises(ValueError, match=r"the run there has method\.w"):
        el.train.fit(changed, Path("workdirs") / "ee_tuning")
