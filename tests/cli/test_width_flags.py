"""Sub-networks after training: evaluate, export, calibrate and generate take --subnet and --budget."""

import dataclasses
import json
import pathlib

import jax
import numpy as np
import pytest

import elastic_lm as el
from elastic_lm.checkpoints import native as checkpoint
from elastic_lm.cli import main as cli
from elastic_lm.cli.width_flags import SubnetText, subnet_of
from elastic_lm.config.subnet import Budget, Menu, Subnet
from elastic_lm.data.tokenizer import train_bpe
from elastic_lm.depth.policies import ConfidenceExit
from elastic_lm.models.registry import init_params
from elastic_lm.testing import all_logits, random_tokens, tiny_config
from elastic_lm.width.chooser import SubnetChooser
from elastic_lm.width.slicing import slice_params

CONFIG = tiny_config(exits=(1, 3), n_heads=8, n_kv_heads=2, head_dim=8, vocab_size=300, elastic_groups=16)
MENU = Menu(mlp=(0.25, 0.5, 1.0), heads=(0.25, 0.5, 1.0))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("elastic") / "model"
    tokenizer = train_bpe(["def f(x):\n    return x\n" * 50], 300)
    checkpoint.save_model(folder, CONFIG, init_params(CONFIG, jax.random.key(0)), tokenizer, menu=MENU)
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text("def f(x):\n    return x + 1\n" * 40)
    return file


def run(command: str, *arguments: object) -> int:
    return cli.main([command, *map(str, arguments)])


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["mlp=50%", "heads=0.5"], SubnetText("mlp=50% heads=0.5", (("mlp", 0.5), ("heads", 0.5)))),
        (["layers=0-2,5"], SubnetText("layers=0-2,5", (), (0, 1, 2, 5))),
        (["part.json"], SubnetText("part.json", file="part.json")),
    ],
)
def test_words_name_a_subnetwork(words: list[str], expected: SubnetText) -> None:
    assert subnet_of(words) == expected


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["mlp=150%"], "'150%' in 'mlp=150%' must be above 0 and at most 1"),
        (["mlp=half"], "'half' in 'mlp=half' is not a share like 0.5 or 50%"),
        (["width=0.5"], "'width=0.5' is not KEY=SHARE, KEY one of mlp, heads"),
        (["layers=0-x"], "'0-x' in 'layers=0-x' is no list of layers like 0-3,6"),
        (["mlp=0.5", "a.json"], "'a.json' is not KEY=SHARE"),
    ],
)
def test_words_that_name_none(words: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        subnet_of(words)


def test_a_share_is_one_of_the_whole_model() -> None:
    chooser = SubnetChooser(CONFIG, MENU)
    least, whole = chooser.costs("parameters").range(MENU)
    for share in (0.7, 0.9):
        written = f"{100 * share:g}%"
        amount = chooser.subnet(Budget(parameters=share * whole))
        assert chooser.subnet(Budget(parameters=written)) == amount != Subnet.full(CONFIG)
    assert chooser.subnet(Budget(parameters="100%")) == Subnet.full(CONFIG)
    assert Budget(flops="62.5%").of(8.0) == Budget(flops=5.0)
    with pytest.raises(ValueError, match=rf"budget.parameters='1%': the cheapest .* costs {least:.6g}"):
        chooser.subnet(Budget(parameters="1%"))
    for wrong in ("70", "0%", "101%", "a%", "70%%", "%"):
        with pytest.raises(ValueError, match="must be a number, or a share of the whole model like '70%'"):
            Budget(parameters=wrong)
    with pytest.raises(ValueError, match=r"is a share; budget\.of"):
        _ = Budget(parameters="70%").amount


def test_an_export_is_a_plain_smaller_model(
    model: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("export", "--from", model, "--to", tmp_path / "small", "--budget", "parameters=70%") == 0
    subnet = SubnetChooser.load(model).subnet(Budget(parameters="70%"))
    assert f"runs 4 of 4 layers, {sum(subnet.mlp)} of 256 neurons" in capsys.readouterr().err
    whole, params = el.load(model)
    config, sliced = slice_params(whole.config, params, subnet)
    assert (config.d_mlp, config.n_heads) != (CONFIG.d_mlp, CONFIG.n_heads)

    small, read = el.load(tmp_path / "small")
    tokens = random_tokens(config, batch=2, length=9)
    ours = all_logits(config, sliced, tokens)
    for depth, logits in all_logits(small.config, read, tokens).items():
        np.testing.assert_array_equal(logits, ours[depth])

    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "small", dtype=torch.float32).eval()
    assert theirs.config.intermediate_size == config.d_mlp
    with torch.no_grad():
        found = theirs(torch.tensor(np.asarray(tokens))).logits.numpy()
    np.testing.assert_allclose(found, ours[4], rtol=1e-4, atol=1e-4 * np.abs(ours[4]).max())


def test_heads_that_transformers_may_refuse_are_told(
    model: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    part = ("--subnet", "heads=75%")  # 6 of 8 heads, and 32 channels
    assert run("export", "--from", model, "--to", tmp_path / "odd", *part) == 0
    assert "warning: d_model=32 is no multiple of its 6 heads" in capsys.readouterr().err
    assert el.load(tmp_path / "odd")[0].config.n_heads == 6


def test_evaluate_measures_parts_as_their_slices(
    model: pathlib.Path, text: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    part = tmp_path / "part.json"
    half = Subnet.uniform(CONFIG, mlp=0.5, layers=(0, 2))
    part.write_text(json.dumps({"subnet": dataclasses.asdict(half)}))
    sizes = ("--data", text, "--tokens", 200, "--context", 32)
    named = ("--subnet", "mlp=50%", "layers=0,2", "--subnet", part, "--budget", "parameters=70%")
    assert run("evaluate", "--model", model, *sizes, *named, "--json", "-") == 0
    printed = capsys.readouterr()
    assert printed.err.count("the first 200 tokens are read") == 1  # for all parts
    found = json.loads(printed.out)["subnets"]
    assert found[0]["depths"] == found[1]["depths"]
    # After the last layer there is the head, and no exit.
    assert [row["layers"] for row in found[0]["depths"]] == [1, 2]
    assert found[0]["tokens"] == 200 - -(-200 // 32)

    small = tmp_path / "small"
    assert run("export", "--from", model, "--to", small, "--subnet", "mlp=50%", "layers=0,2") == 0
    capsys.readouterr()
    assert run("evaluate", "--model", small, *sizes, "--json", "-") == 0
    alone = json.loads(capsys.readouterr().out)["depths"]
    assert alone[-1]["nats_per_token"] == pytest.approx(found[0]["depths"][-1]["nats_per_token"], rel=1e-6)

    assert run("evaluate", "--model", model, *sizes, *named) == 0
    assert "sub-network of 2 layers, " in capsys.readouterr().out


@pytest.mark.long
def test_thresholds_of_a_part_are_used_with_that_part(
    model: pathlib.Path, text: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, part = tmp_path / "thresholds.json", ("--subnet", "mlp=50%", "layers=0,2")
    sizes = ("--data", text, "--tokens", 1000, "--seq-len", 32, "--continuations", 0)
    assert run("calibrate", "--model", model, *sizes, *part, "--target", 0.5, "--out", file) == 0
    policy = ConfidenceExit.load(file)
    assert policy.layers == (1, 3)  # the whole model's
    assert policy.thresholds[1] > 1  # after the part's last layer there is no exit
    assert policy.calibrated_on["n_layers"] == 4
    assert max(point.mean_layers for point in policy.curve) <= 2
    assert len(policy.curve[0].shares) == 3

    written = ("--model", model, "--prompt", "def f(", "--max-new-tokens", 3, "--thresholds", file)
    capsys.readouterr()
    assert run("generate", *written, *part, "--json", "-") == 0
    printed = capsys.readouterr()
    assert "warning" not in printed.err
    assert max(json.loads(printed.out)["exit_layers"]) <= 2
    assert run("generate", *written) == 0
    assert "was calibrated on a sub-network, not on what runs" in capsys.readouterr().err
    assert run("evaluate", "--model", model, *sizes, *part, "--thresholds", file, "--json", "-") == 0
    printed = capsys.readouterr()
    assert "warning" not in printed.err
    assert len(json.loads(printed.out)["subnets"][0]["policy"]["thresholds"]) == 1

    # The part as a model of its own, with its thresholds: the same text, at the same depths.
    assert run("generate", *written, *part, "--json", "-") == 0
    expected = json.loads(capsys.readouterr().out)
    exported = tmp_path / "small"
    assert run("export", "--from", model, "--to", exported, *part, "--thresholds", file) == 0
    own = exported / "thresholds.json"
    assert ConfidenceExit.load(own).calibrated_on["n_layers"] == 2
    capsys.readouterr()
    prompt = ("--prompt", "def f(", "--max-new-tokens", 3)
    assert run("generate", "--model", exported, *prompt, "--thresholds", own, "--json", "-") == 0
    printed = capsys.readouterr()
    assert "warning" not in printed.err
    found = json.loads(printed.out)
    assert (found["text"], found["exit_layers"]) == (expected["text"], expected["exit_layers"])

    for other in ((), ("--subnet", "mlp=25%", "layers=0,2")):
        assert run("export", "--from", model, "--to", tmp_path / "other", *other, "--thresholds", file) == 2
        assert "was calibrated on a sub-network, not on the part" in capsys.readouterr().err
        assert not (tmp_path / "other").exists()
    assert run("export", "--from", exported, "--to", tmp_path / "other", "--thresholds", file) == 2
    assert "thresholds are for exits after layers (1, 3)" in capsys.readouterr().err


@pytest.mark.long
def test_a_guarantee_is_about_the_part_that_it_was_tested_on(
    model: pathlib.Path, text: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, part = tmp_path / "thresholds.json", ("--subnet", "mlp=50%", "layers=0-2")
    sizes = ("--data", text, "--tokens", 4000, "--seq-len", 32, "--continuations", 0)
    goal = ("--target", 0.01, "--epsilon", 0.2, "--out", file)
    assert run("calibrate", "--model", model, *sizes, *part, *goal) == 0
    assert "guaranteed: with probability at least 0.8" in capsys.readouterr().out
    policy = ConfidenceExit.load(file)
    assert policy.guarantee is not None
    assert policy.guarantee.achieved

    written = ("--model", model, "--prompt", "def f(", "--max-new-tokens", 3, "--thresholds", file)
    assert run("generate", *written, *part) == 0
    capsys.readouterr()
    for other in ((), ("--subnet", "mlp=50%")):
        assert run("generate", *written, *other) == 2
        assert "its guarantee is about that part alone" in capsys.readouterr().err
        # What is verified is the part's own text, whatever the thresholds promise.
        assert run("generate", *written, *other, "--lossless") == 0
        assert "warning" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "arguments", "message"),
    [
        ("evaluate", ["--subnet", "mlp=0.3"], "--subnet mlp=0.3: mlp=0.3: must give a multiple of 16 of 64"),
        ("evaluate", ["--subnet", "layers=0-9"], "--subnet layers=0-9: subnet.layers="),
        ("evaluate", ["--budget", "parameters=1%"], "budget.parameters='1%': the cheapest"),
        ("evaluate", ["--budget", "latency_ms=70%"], "--budget latency_ms=70%: needs --latency-table"),
        ("evaluate", ["--budget", "parameters=170%"], "must be a number, or a share of the whole model"),
        ("evaluate", ["--budget-context", "8"], "--budget-context 8: is read for --budget flops=N"),
        ("evaluate", ["--stride", "9", "--context", "8"], "--stride 9: must be from 1 to --context 8"),
        ("evaluate", ["--context", "5000"], "--context 5000: must be at most 128, which is all that"),
        ("evaluate", ["--stride", "129"], "--stride 129: must be from 1 to --context, which is 128"),
        ("calibrate", ["--subnet", "mlp=0.5", "--budget", "flops=50%"], "each says what runs; give one"),
        ("calibrate", ["--subnet", "none.json"], "none.json"),
    ],
)
def test_what_is_refused(
    model: pathlib.Path,
    text: pathlib.Path,
    tmp_path: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
    command: str,
    arguments: list[str],
    message: str,
) -> None:
    out = ("--out", tmp_path / "thresholds.json") if command == "calibrate" else ()
    try:
        status = run(command, "--model", model, "--data", text, *arguments, *out)
    except SystemExit as stop:
        status = stop.code
    assert status == 2
    error = capsys.readouterr().err
    assert message in error
    assert not (tmp_path / "thresholds.json").exists()


def test_a_stride_needs_text_in_order(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("evaluate", "--data", tmp_path / "a.jsonl", "--stride", 8) == 2
    assert "--stride 8: is for text that is read in order; give --data FILE.txt" in capsys.readouterr().err


@pytest.mark.long
def test_generate_says_where_a_part_is_of_a_model_that_was_not_made_elastic(
    model: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    loaded, params = el.load(model)
    plain = tmp_path / "plain"
    checkpoint.save_model(plain, loaded.config, params, el.Tokenizer.load(model))
    for folder, noted in ((plain, True), (model, False)):
        part = ("--prompt", "def f(", "--max-new-tokens", 2, "--subnet", "mlp=50%")
        assert run("generate", "--model", folder, *part) == 0
        said = capsys.readouterr().err
        assert ("was not made elastic" in said) == noted
        assert said.count("runs 4 of 4 layers, 128 of 256 neurons") == 1


def test_the_name_that_the_context_of_a_budget_had_is_still_read(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("generate", "--prompt", "a", "--context", 8) == 2
    said = capsys.readouterr().err
    assert "generate --context is now --budget-context; the old name goes in 0.3" in said
    assert "--budget-context 8: is read for --budget flops=N" in said
    with pytest.raises(SystemExit):
        run("chat", "--context", 8)
