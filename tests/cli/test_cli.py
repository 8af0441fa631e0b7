"""Every command on a tiny model, and what it says to bad input."""

import gzip
import json
import pathlib
import re
import shutil
import subprocess
import sys

import jax
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

import elastic_lm as el
from elastic_lm import testing
from elastic_lm.checkpoints import native as checkpoint
from elastic_lm.cli import generate
from elastic_lm.cli import main as cli
from elastic_lm.cli.parser import Parser
from elastic_lm.data.stdlib import stdlib_files
from elastic_lm.data.tokenizer import train_bpe
from elastic_lm.decode import generated
from elastic_lm.depth.policies import ConfidenceExit
from elastic_lm.files.atomic import prepare_output
from elastic_lm.models.registry import init_params

COMMANDS = (
    "quickstart",
    "plan",
    "convert",
    "export",
    "push",
    "train",
    "calibrate",
    "preview",
    "drafter",
    "latency",
    "subnets",
    "generate",
    "chat",
    "evaluate",
    "cascade",
    "bench",
)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    file = tmp_path_factory.mktemp("text") / "code.txt"
    file.write_text("\n".join(path.read_text() for path in stdlib_files("test")[:4])[:40_000])
    return file


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, text: pathlib.Path) -> pathlib.Path:
    """An elastic checkpoint with two exits and random weights."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer = train_bpe([text.read_text()], 300)
    config = testing.tiny_config(exits=(1, 2), n_layers=3, vocab_size=300)
    checkpoint.save_model(folder, config, init_params(config, jax.random.key(0)), tokenizer)
    return folder


def run(*arguments: object) -> object:
    """Exit status of the command."""
    try:
        return cli.main([str(a) for a in arguments])
    except SystemExit as stop:
        return stop.code


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one line that a command says to bad input."""
    assert run(*arguments) == 2
    captured = capsys.readouterr()
    lines = captured.err.strip().splitlines()
    assert len(lines) == 1, captured.err
    assert "Traceback" not in captured.err
    assert lines[0].startswith("elastic-lm")
    return lines[0]


def test_help_is_instant_and_complete() -> None:
    code = "import sys; from elastic_lm.cli.main import build_parsers as b; b(); print(sorted(sys.modules))"
    modules = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    for heavy in ("jax", "numpy", "flax", "scipy", "matplotlib", "tokenizers"):
        assert f"'{heavy}'" not in modules
    _, commands = cli.build_parsers()
    assert tuple(commands) == COMMANDS
    for name, parser in commands.items():
        assert f"elastic-lm {name}" in parser.format_help().partition("options:")[0].partition("\n\n")[2]


def test_module_runs_as_a_program() -> None:
    ran = subprocess.run([sys.executable, "-m", "elastic_lm", "--help"], capture_output=True, text=True)
    assert ran.returncode == 0
    assert "quickstart" in ran.stdout


def test_export_then_convert_gives_the_same_model(
    model: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("export", "--from", model, "--to", tmp_path / "hf") == 0
    assert "and 2 exits" in capsys.readouterr().out
    assert load_file(tmp_path / "hf" / "model.safetensors")["model.norm.weight"].shape == (32,)
    assert run("convert", "--from", tmp_path / "hf", "--to", tmp_path / "back") == 0
    before, after = checkpoint.load_model(model)[1], checkpoint.load_model(tmp_path / "back")[1]
    testing.assert_same_tree(before, after)
    assert (tmp_path / "back" / "tokenizer.json").is_file()


def test_export_of_the_full_depth_model_in_another_dtype(
    model: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "hf"
    assert run("export", "--from", model, "--to", target, "--without-exits", "--dtype", "bfloat16") == 0
    assert "exits" not in capsys.readouterr().out
    assert not list(target.glob("*exits*"))
    assert "elastic" not in json.loads((target / "config.json").read_text())
    with safe_open(target / "model.safetensors", "numpy") as weights:
        assert {weights.get_slice(name).get_dtype() for name in weights.keys()} == {"BF16"}  # noqa: SIM118


def test_convert_replaces_checkpoints_only(
    model: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, target = tmp_path / "hf", tmp_path / "ckpt"
    run("export", "--from", model, "--to", source)
    convert = ("convert", "--from", source, "--to", target)
    assert run(*convert) == 0
    assert "exists already" in refused(capsys, *convert)
    assert run(*convert, "--overwrite") == 0
    thesis = target / "params" / "thesis.txt"
    thesis.touch()
    assert "thesis.txt: not written by this package" in refused(capsys, *convert, "--overwrite")
    assert thesis.exists()
    into_itself = ("convert", "--from", source, "--to", source, "--overwrite")
    assert "is no elastic checkpoint" in refused(capsys, *into_itself)


def test_a_checkpoint_is_replaced_whole_or_not_at_all(
    model: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(model, folder)
    config, params = checkpoint.load_model(folder)
    other = jax.tree.map(lambda leaf: leaf + 1, params)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "to_dict", lambda _: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            checkpoint.save_model(folder, config, other, None, overwrite=True)
    testing.assert_same_tree(checkpoint.load_model(folder)[1], params)
    checkpoint.save_model(folder, config, other, None, overwrite=True)
    testing.assert_same_tree(checkpoint.load_model(folder)[1], other)
    assert not (folder / "tokenizer.json").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_folders_for_results_are_made(tmp_path: pathlib.Path) -> None:
    (tmp_path / "old.json").write_text("kept until the work is done")
    for file in ("old.json", "new/x.json", "-"):
        prepare_output(str(tmp_path / file) if file != "-" else file)
    assert (tmp_path / "old.json").read_text() == "kept until the work is done"
    assert list((tmp_path / "new").iterdir()) == []


@pytest.mark.long
def test_coloured_text_is_the_plain_text(model: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_ = ("generate", "--model", model, "--prompt", "def f(", "--max-new-tokens", 8)
    assert run(*run_) == 0
    stop = capsys.readouterr().out.strip("\n")[-2:]
    texts = []
    for colour in ("never", "always"):
        assert run(*run_, "--stop", stop, "--color", colour) == 0
        texts.append(re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out))
    assert stop not in texts[0]
    assert texts[0] == texts[1]


def test_output_folders_are_made_before_the_work(
    model: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    inside = tmp_path / "file" / "x.json"
    nowhere = tmp_path / "nowhere"  # were the model looked at first, it would be complained about
    assert str(tmp_path / "file") in refused(
        capsys, "generate", "--model", nowhere, "--prompt", "a", "--json", inside
    )
    assert str(tmp_path / "file") in refused(capsys, "evaluate", "--model", nowhere, "--json", inside)
    assert str(tmp_path / "file") in refused(capsys, "calibrate", "--model", nowhere, "--out", inside)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"prompt": 5}', "prompt=5 must"),
        (b'{"prompt": "\\ud800"}', "prompt='\\ud800' holds half of a character"),
        (b"\xff", "UTF-8"),
        ('{"prompt": "a"}'.encode("utf-16"), "is not UTF-8 text but UTF-16"),
        (b'{"promt": "a"}', 'expected a JSON object with a "prompt"; found: promt'),
    ],
)
def test_prompts_that_are_no_text(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str], content: bytes, message: str
) -> None:
    file = tmp_path / "p.jsonl"
    file.write_bytes(content)
    printed = refused(capsys, "generate", "--prompts-file", file)
    assert message in printed
    assert str(file) in printed


def test_prompts_files_of_all_kinds(tmp_path: pathlib.Path) -> None:
    odd = "one\x0ctwo\u2028three\u0085"
    lines = json.dumps({"prompt": odd}, ensure_ascii=False) + "\r\n\n"
    for name, text in (("a.txt", f"{odd}\r\n\n"), ("a.jsonl", lines), ("a.JSON", lines)):
        for packed in ("", ".gz"):
            data = text.encode("utf-8-sig")
            file = tmp_path / (name + packed)
            file.write_bytes(gzip.compress(data) if packed else data)
            assert generate.read_prompts((), str(file)) == [odd], file.name


@pytest.mark.long
def test_control_characters_are_shown_and_not_carried_out(
    model: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompt, out = "a\x1b[2J\tb\n\x9b", tmp_path / "out.jsonl"
    run_ = ("generate", "--model", model, "--prompt", prompt, "--max-new-tokens", 1)
    for more in ((), ("--stream",)):
        assert run(*run_, *more) == 0
        assert capsys.readouterr().out.startswith("a\\x1b[2J\tb\n\\x9b")
        assert run(*run_, *more, "--raw") == 0
        assert capsys.readouterr().out.startswith(prompt)
    assert run(*run_, "--json", out) == 0
    assert json.loads(out.read_text())["prompt"] == prompt
    capsys.readouterr()
    assert "\x1b" not in refused(capsys, "generate", "--model", "\x1b[31m", "--prompt", "a")


def test_numbers_in_scientific_notation_are_no_flags() -> None:
    parser = Parser()
    parser.add_argument("--threshold", type=float)
    for number in ("-1e-3", "-.5E+2", "-3.", "-inf"):
        assert parser.parse_args(["--threshold", number]).threshold == float(number)
    with pytest.raises(SystemExit):
        parser.parse_args(["--threshold", "-e3"])


def test_a_text_of_one_token_has_no_bytes_to_count(
    model: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "a"}\n')
    assert run("evaluate", "--model", model, "--data", file, "--seq-len", 8, "--tokens", 8) == 0
    assert capsys.readouterr().out.splitlines()[2].split()[3] == "-"


def test_generate_prints_prompt_and_continuation(
    model: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_ = ("generate", "--model", model, "--prompt", "def f(", "--max-new-tokens", 4)
    assert run(*run_) == 0
    plain = capsys.readouterr()
    assert plain.out.startswith("def f(")
    assert "4 tokens" in plain.err
    assert run(*run_, "--color", "always", "--threshold", 0) == 0
    assert "\x1b[38;2;" in capsys.readouterr().out
    assert run(*run_, "--stream") == 0
    assert capsys.readouterr().out.strip() == plain.out.strip()


@pytest.fixture
def replaced(monkeypatch: pytest.MonkeyPatch) -> list[pathlib.Path]:
    """Files that got their content in one step, from a partial file beside them."""
    files: list[pathlib.Path] = []
    replace = pathlib.Path.replace

    def remember(self: pathlib.Path, target: pathlib.Path) -> pathlib.Path:
        assert self.name.startswith(f".{target.name}.partial-")
        files.append(target)
        return replace(self, target)

    monkeypatch.setattr(pathlib.Path, "replace", remember)
    return files


def test_generate_from_files_to_json(
    model: pathlib.Path,
    tmp_path: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
    replaced: list[pathlib.Path],
) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "import os"}\n\n{"prompt": "class A:"}\n')
    policy = ConfidenceExit("max_prob", (2.0, 0.0), (1, 2))
    policy.save(tmp_path / "t.json")
    common = ("generate", "--model", model, "--prompts-file", prompts, "--max-new-tokens", 4)
    assert run(*common, "--thresholds", tmp_path / "t.json", "--json", tmp_path / "out.jsonl") == 0
    assert tmp_path / "out.jsonl" in replaced
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in rows] == ["import os", "class A:"]
    assert all(row["exit_layers"] == [2] * 4 for row in rows)
    assert rows[0]["stats"]["mean_layers"] == 2.0
    capsys.readouterr()
    assert run(*common, "--json", "-") == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert all(row["exit_layers"] == [3] * 4 for row in rows)


def test_calibrate_then_evaluate(
    model: pathlib.Path,
    text: pathlib.Path,
    tmp_path: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
    replaced: list[pathlib.Path],
) -> None:
    sizes = ("--data", text, "--tokens", 2000, "--seq-len", 64, "--continuations", 0)
    thresholds = tmp_path / "thresholds.json"
    assert run("calibrate", "--model", model, *sizes, "--target", 0.9, "--out", thresholds) == 0
    policy = ConfidenceExit.load(thresholds)
    assert policy.target == 0.9
    assert [len(policy.calibrated_on[part]) for part in ("weights", "tokenizer")] == [16, 16]
    assert "never" in capsys.readouterr().out
    result = tmp_path / "result.json"
    assert run("evaluate", "--model", model, *sizes, "--thresholds", thresholds, "--json", result) == 0
    assert replaced == [thresholds, result]
    numbers = json.loads(result.read_text())
    assert [row["layers"] for row in numbers["depths"]] == [1, 2, 3]
    assert numbers["depths"][-1]["agreement"] == 1.0
    assert 0 <= numbers["policy"]["agreement"] <= 1
    assert numbers["policy"]["generated"] is None
    assert "perplexity" in capsys.readouterr().out


@pytest.mark.long
def test_agreement_on_generated_text_stands_beside_that_on_given_text(
    model: pathlib.Path,
    text: pathlib.Path,
    tmp_path: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sizes = ("--data", text, "--tokens", 2000, "--seq-len", 32, "--new-tokens", 4)
    thresholds, result = tmp_path / "thresholds.json", tmp_path / "result.json"
    write = ("calibrate", "--model", model, *sizes, "--target", 0.01, "--out", thresholds)
    assert run(*write, "--continuations", 2) == 0
    assert "on text generated with these thresholds: agreement" in capsys.readouterr().out
    policy = ConfidenceExit.load(thresholds)
    assert policy.provenance["generated"]["tokens"] == 8

    measure = ("evaluate", "--model", model, *sizes, "--thresholds", thresholds, "--json", result)
    assert run(*measure, "--continuations", 2) == 0
    found = json.loads(result.read_text())["policy"]
    assert found["generated"]["tokens"] == 8
    assert not found["degenerate"]
    assert "on text generated with these thresholds" in capsys.readouterr().out

    assert run(*write, "--continuations", 0) == 0
    assert "generated" not in ConfidenceExit.load(thresholds).provenance

    # A way to decode that loops is refused, and the file of before stays.
    before = thresholds.read_text()
    looping = generated.GeneratedText(16, 0.9, 0.95, 0.8, 0.1)
    monkeypatch.setattr(generated, "measure", lambda *_: looping)
    assert run(*write) == 2
    error = capsys.readouterr().err
    assert "--target 0.01: its text loops: 80%" in error
    assert "--continuations 0" in error
    assert thresholds.read_text() == before


@pytest.mark.long
def test_calibrate_on_text_of_the_model_itself(
    model: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own, thresholds = tmp_path / "own.jsonl", tmp_path / "thresholds.json"
    write = ("generate", "--model", model, "--unprompted", 34, "--temperature", 1, "--max-new-tokens", 24)
    assert run(*write, "--json", own) == 0
    assert "34/34 texts" in capsys.readouterr().err
    texts = [json.loads(line)["text"] for line in own.read_text().splitlines()]
    assert len(texts) == 34
    assert len(set(texts)) > 30
    sizes = ("--data", own, "--tokens", 500, "--seq-len", 16, "--out", thresholds, "--continuations", 0)
    assert run("calibrate", "--model", model, *sizes, "--strategy", "platt") == 0
    assert str(own) in ConfidenceExit.load(thresholds).provenance["data"]["description"]
    capsys.readouterr()
    both = ("--epsilon", 0.1, "--strategy", "platt")
    assert "--strategy platt: with --epsilon" in refused(capsys, "calibrate", "--model", model, *sizes, *both)


def test_forecast_of_a_model_without_exits(
    tmp_path: pathlib.Path, text: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = testing.tiny_config(n_layers=3, vocab_size=320)
    bare = tmp_path / "bare"
    tokenizer = train_bpe([text.read_text()], 320)
    checkpoint.save_model(bare, config, init_params(config, jax.random.key(0)), tokenizer)
    given = ("calibrate", "--model", bare, "--data", text, "--tokens", 600, "--seq-len", 32)
    assert run(*given, "--forecast", "--out", tmp_path / "t.json") == 0
    printed = capsys.readouterr()
    assert "exits after layers [1, 2] that nothing tuned" in printed.err
    assert "forecast at batch size 1" in printed.out
    assert not (tmp_path / "t.json").exists()
    assert "has no exits: tune some" in refused(capsys, *given, "--out", tmp_path / "t.json")


def test_calibrate_with_a_guarantee_and_a_forecast(
    model: pathlib.Path, text: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    thresholds = tmp_path / "thresholds.json"
    common = ("calibrate", "--model", model, "--data", text, "--out", thresholds, "--continuations", 0)
    sizes = ("--tokens", 4000, "--seq-len", 32)
    assert run(*common, *sizes, "--target", 0.05, "--epsilon", 0.1, "--delta", 0.9, "--forecast") == 0
    printed = capsys.readouterr().out
    assert "guaranteed: with probability at least 0.9" in printed
    assert "worst tenth of the sequences" in printed
    assert "forecast at batch size 1, window 16" in printed
    assert "exit 1: its head costs" in printed
    guarantee = ConfidenceExit.load(thresholds).guarantee
    assert guarantee is not None
    assert (guarantee.target, guarantee.epsilon, guarantee.delta) == (0.05, 0.1, 0.9)
    assert guarantee.achieved
    assert run(*common, "--tokens", 512, "--seq-len", 32, "--target", 0.9, "--epsilon", 0.05) == 0
    assert "not achievable with this data" in capsys.readouterr().out
    assert "--epsilon" in refused(capsys, *common, *sizes, "--delta", 0.1)
    assert "no gate" in refused(capsys, *common, *sizes, "--metric", "learned")


def test_train_with_overrides_and_resume(
    tmp_path: pathlib.Path, text: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "recipe.py"
    values = {
        "model": {"vocab_size": 300, "d_model": 16, "n_layers": 2, "n_heads": 2, "d_mlp": 16},
        "data": {"source": "text", "paths": [str(text)], "seq_len": 32, "batch_size": 2},
        "train": {"steps": 3, "warmup": 1, "log_every": 1},
    }
    config.write_text(f"def get_config(arg=''):\n    return {values!r}\n")
    command = ("train", "--config", config, "--workdir", tmp_path / "run", "--config.train.steps=2")
    assert run(*command) == 0
    assert "2 layers" in capsys.readouterr().out
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["step"] == 2
    assert run(*command) == 0
    assert checkpoint.load_model(tmp_path / "run" / "model")[0].d_model == 16
    unknown = refused(capsys, *command[:-1], "--config.train.stepz=2")
    assert "stepz" in unknown
    assert "did you mean train.steps?" in unknown
    assert "is not an override" in refused(capsys, *command[:-1], "--steps", 2)


def test_bench_refuses_unknown_names(capsys: pytest.CaptureFixture[str]) -> None:
    assert "'nope' does not exist" in refused(capsys, "bench", "nope")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--prompt", ""), "--prompt 1 is empty: give at least one character"),
        ((), "no prompt: give --prompt TEXT or --prompts-file FILE"),
        (("--prompt", "def " * 500), "max_len=128"),
        (("--prompt", "a", "--temperature", "-1"), "temperature=-1.0"),
        (("--prompt", "a", "--threshold", "-1"), "thresholds=(-1.0, -1.0)"),
        (("--prompt", "a", "--thresholds", "nowhere.json"), "nowhere.json: no such thresholds file"),
        (("--prompts-file", "nowhere.txt"), "nowhere.txt: No such file or directory"),
        (("--prompt", "a", "--max-new-tokens", "0"), "max_new_tokens=0: must be at least 1"),
        (("--prompt", "a", "--tempertaure", "1"), "did you mean --temperature?"),
        (("--prompt", "a", "--prompt", "b", "--stream"), "--stream shows one prompt at a time"),
        (("--prompt", "a", "--lossless"), "--lossless: nothing drafts"),
        (("--prompt", "a", "--missing", "propagate"), "--missing propagate: is about early tokens"),
        (("--prompt", "a", "--metric", "margin"), "--metric margin: goes with --threshold"),
        (("--unprompted", "2"), "--unprompted 2: greedy texts are all the same; give --temperature 1"),
        (("--unprompted", "-1"), "--unprompted -1: must be at least 1"),
        (("--unprompted", "2", "--prompt", "a"), "--unprompted 2: the model begins by itself"),
    ],
)
def test_generate_refuses(
    model: pathlib.Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], message: str
) -> None:
    assert message in refused(capsys, "generate", "--model", model, *arguments)


def test_models_that_cannot_be_read(
    model: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompt = ("--prompt", "a")
    assert "nowhere" in refused(capsys, "generate", "--model", tmp_path / "nowhere", *prompt)
    run("export", "--from", model, "--to", tmp_path / "hf")
    weights = tmp_path / "hf" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    capsys.readouterr()
    assert "model.safetensors" in refused(
        capsys, "convert", "--from", tmp_path / "hf", "--to", tmp_path / "x"
    )
    damaged = tmp_path / "damaged"
    shutil.copytree(model, damaged)
    settings = json.loads((damaged / "elastic_config.json").read_text())
    (damaged / "elastic_config.json").write_text(json.dumps({**settings, "d_modle": 1}))
    assert "did you mean model.d_model?" in refused(capsys, "generate", "--model", damaged, *prompt)


def test_thresholds_of_another_model(
    model: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ConfidenceExit("max_prob", (0.5,), (2,)).save(tmp_path / "t.json")
    arguments = ("--model", model, "--prompt", "a", "--thresholds", tmp_path / "t.json")
    assert "exits after layers (2,), the model has (1, 2)" in refused(capsys, "generate", *arguments)


def test_debug_shows_where(
    monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ELASTIC_LM_DEBUG", "1")
    assert run("generate", "--model", tmp_path / "nowhere", "--prompt", "a") == 2
    assert "Traceback" in capsys.readouterr().err


class Panic(BaseException):
    """As libraries in Rust raise it."""


@pytest.mark.parametrize("error", [RuntimeError("a\nb"), RecursionError(), KeyError("k"), Panic("a b")])
def test_an_error_that_nobody_foresaw_is_one_line_too(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: BaseException
) -> None:
    def fail(options: object) -> None:
        raise error

    monkeypatch.setattr("elastic_lm.cli.generate.run", fail)
    assert run("generate", "--prompt", "a") == 70
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"elastic-lm generate: error: unexpected {type(error).__name__}: ")
    assert "with --debug: https://github.com/" in line

    assert run("generate", "--prompt", "a", "--debug") == 70
    *above, line = capsys.readouterr().err.splitlines()
    assert above[0] == "Traceback (most recent call last):"
    assert "with what is above: https://github.com/" in line


def test_exit_statuses_are_in_the_help() -> None:
    text = cli.build_parsers()[0].format_help()
    for status in (cli.REFUSED, cli.UNEXPECTED, cli.INTERRUPTED):
        assert f" {status} " in text


@pytest.mark.long
def test_dtype_is_that_of_parameters_and_activations(
    model: pathlib.Path, text: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    losses = {}
    for dtype in ("float32", "bfloat16"):
        common = ("--model", model, "--dtype", dtype, "--data", text, "--tokens", 512, "--seq-len", 64)
        assert run("evaluate", *common, "--json", tmp_path / "out.json") == 0
        losses[dtype] = json.loads((tmp_path / "out.json").read_text())["depths"][-1]["nats_per_token"]
    assert losses["float32"] != losses["bfloat16"]
    assert losses["float32"] == pytest.approx(losses["bfloat16"], rel=0.02)

    thresholds = tmp_path / "t.json"
    assert run("calibrate", *common, "--continuations", 0, "--out", thresholds) == 0
    capsys.readouterr()
    generated = (
        "generate",
        "--model",
        model,
        "--thresholds",
        thresholds,
        "--prompt",
        "a",
        "--max-new-tokens",
        2,
    )
    assert run(*generated, "--dtype", "bfloat16") == 0
    assert "differ from those" not in capsys.readouterr().err
    assert (
        generate.make_sampler(generate.Options(model=str(model), dtype="float16"))[0].config.dtype
        == "float16"
    )


def test_version_names_what_it_runs_on(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--version") == 0
    line = capsys.readouterr().out
    assert line.startswith(f"elastic-lm {el.__version__} (python ")
    assert f"jax {jax.__version__}" in line
