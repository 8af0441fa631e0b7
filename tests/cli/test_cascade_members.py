"""`elastic-lm cascade` of more than two models: parts of one, services of the OpenAI API, slices."""

import contextlib
import json
import pathlib
import threading
from collections.abc import Iterator

import jax
import numpy as np
import openai_server
import pytest

from elastic_lm.cascade.joint_rule import JointRule
from elastic_lm.cascade.scores import Scoring
from elastic_lm.checkpoints import native as checkpoint
from elastic_lm.cli import main as cli
from elastic_lm.cli.cascade import fit as fit_command
from elastic_lm.cli.cascade import run as run_command
from elastic_lm.cli.cascade.models import make_members, service_key
from elastic_lm.config.encoder import EncoderConfig
from elastic_lm.data.tokenizer import train_bpe
from elastic_lm.files.journal import read_records
from elastic_lm.models.registry import init_params
from elastic_lm.report.slices import FailureSlices

ROWS = 120


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int | None, str, str]:
    code = cli.main(["cascade", *map(str, arguments)])
    return code, *capsys.readouterr()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """An encoder with two exits, and records that it answers in all ways."""
    folder = tmp_path_factory.mktemp("members")
    shape = {"d_model": 16, "n_layers": 3, "n_heads": 2, "d_mlp": 32, "max_len": 32}
    config = EncoderConfig(vocab_size=260, **shape, n_labels=2, labels=("no", "yes"), exits=(1, 2))
    params = jax.tree.map(lambda x: 8 * x, init_params(config, jax.random.key(0)))
    checkpoint.save_model(folder / "model", config, params, train_bpe(["some text"], 260))
    rng = np.random.default_rng(0)
    texts = ["".join(rng.choice(list("abcdefgh "), rng.integers(2, 30))) + str(i) for i in range(ROWS)]
    rows = [
        {"text": text, "label": openai_server.known(text)[0], "file": f"f{i % 2}.txt", "kind": "abc"[i % 3]}
        for i, text in enumerate(texts)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@contextlib.contextmanager
def served(**how) -> Iterator[str]:
    server = openai_server.server(0, **how)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1/chat/completions"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.mark.long
def test_exit_whole_and_service(folder: pathlib.Path, tmp_path: pathlib.Path, capsys) -> None:
    log, rule, out = (tmp_path / name for name in ("log", "rule.json", "out.jsonl"))
    data = ("--data", folder / "rows.jsonl")
    with served(log=log) as url:
        parts = ("--swift", f"{folder}/model@exit=1", "--between", f"{folder}/model", "--super", url)
        common = (*parts, "--style", "chat", "--super-cost", 1e6, *data)
        goal = ("--target-accuracy", 0.7, "--slice-by", "kind", "--plot", tmp_path / "p.png", "--out", rule)
        code, printed, error = run(capsys, "fit", *common, *goal)
        assert code == 0, error
        assert len(log.read_text().splitlines()) == ROWS
        assert "swift alone" in printed
        assert "agreement with the Super by " in printed

        fitted = JointRule.load(rule)
        assert [stage.score for stage in fitted.stages] == ["max_prob", "max_prob"]
        assert fitted.measured is not None
        assert 0.7 <= fitted.measured.accuracy < 1.0
        assert list(fitted.provenance["models"].values()) == [
            f"{folder}/model exit 1", f"{folder}/model", url
        ]  # fmt: skip
        slices = FailureSlices.from_json(fitted.provenance["slices"])
        assert {one.by for one in slices.slices} == {"answered by", "label", "file", "kind", "words"}
        # The server is right about all, so that to agree with it is to be right.
        assert slices.average.agreement == pytest.approx(fitted.measured.accuracy)
        files = [one for one in slices.slices if one.by == "file"]
        assert sum(one.agreement * one.items for one in files) == pytest.approx(
            slices.average.agreement * ROWS
        )

        assert run(capsys, "fit", *common, "--agreement", "--super-accuracy", "--out", rule)[0] == 0
        again = JointRule.load(rule)
        assert again.measured is not None
        assert again.measured.accuracy == 1.0
        assert len(log.read_text().splitlines()) == ROWS  # another goal asks no model
        assert {one.by for one in FailureSlices.from_json(again.provenance["slices"]).slices} == {
            "answered by", "file", "words"
        }  # fmt: skip

        assert run(capsys, "fit", *common, "--target-accuracy", 0.7, "--out", rule)[0] == 0
        code, printed, error = run(capsys, "run", *common, "--rule", rule, "--out", out)
        assert code == 0, error
        assert "middle: asked about" in printed
        lines = list(read_records(out))
        rows = list(read_records(folder / "rows.jsonl"))
        right = [line["output"] == row["label"] for line, row in zip(lines, rows, strict=True)]
        assert np.mean(right) == pytest.approx(fitted.measured.accuracy)
        assert np.mean([line["cost"] for line in lines]) == pytest.approx(fitted.measured.cost)
        models = [line["model"] for line in lines]
        shares = [models.count(name) / ROWS for name in ("swift", "middle", "super")]
        assert shares == pytest.approx(fitted.measured.shares)
        assert len(log.read_text().splitlines()) == ROWS + models.count("super")
        assert (
            "120 of 120 records are there already"
            in run(capsys, "run", *common, "--rule", rule, "--out", out)[2]
        )

        two = ("--swift", f"{folder}/model@exit=1", "--super", f"{folder}/model", *data, "--out", out)
        assert "is a rule of 3 models, and 2 are named" in run(capsys, "run", *two, "--rule", rule)[2]


@pytest.mark.long
def test_a_service_without_log_probabilities_cannot_be_the_first(
    folder: pathlib.Path, tmp_path: pathlib.Path, capsys
) -> None:
    with served(logprobs=False) as url:
        models = ("--swift", url, "--super", f"{folder}/model", "--style", "chat", "--cost", "seconds")
        given = ("--data", folder / "rows.jsonl", "--super-accuracy", "--out", tmp_path / "rule.json")
        code, _, error = run(capsys, "fit", *models, *given)
    assert code == 2
    assert f"{url}: choices[0].logprobs: the server returns none" in error.splitlines()[-1]


@pytest.mark.long
def test_a_service_as_the_swift(folder: pathlib.Path, tmp_path: pathlib.Path, capsys) -> None:
    with served() as url:
        models = ("--swift", url, "--super", url, "--style", "chat", "--cost", "seconds")
        given = ("--data", folder / "rows.jsonl", "--super-accuracy", "--out", tmp_path / "rule.json")
        code, printed, error = run(capsys, "fit", *models, *given, "--service-model", "a,b")
    assert code == 0, error
    assert "Swift alone 1.0000, Super alone 1.0000" in printed


def made(*given: object):
    parser, _ = cli.build_parsers()
    given = ("cascade", "run", *map(str, given), "--threshold", "0,0", "--out", "o", "--data", "d")
    return run_command.Options.from_flags(parser.parse_args(given))


def test_services_have_models_of_their_own() -> None:
    url = "http://h/v1/chat/completions"
    places = ("--swift", url, "--between", url, "--super", url, "--style", "chat")
    options = made(*places, "--service-model", "a,b,c", "--top-logprobs", 3)
    members = make_members(options, {"text": "x"}, Scoring(), options.scored_by)
    record = {"text": "Which?", "choices": ["red", "blue"]}
    bodies = [member._body(record) for member in members]
    assert [body["model"] for body in bodies] == ["a", "b", "c"]
    assert [body.get("top_logprobs") for body in bodies] == [3, 3, 3]
    assert "A. red\nB. blue" in bodies[2]["messages"][0]["content"]
    plain = made(*places, "--service-choices", "ignored")
    bodies = [m._body(record) for m in make_members(plain, record, Scoring(), plain.scored_by)]
    assert [body.get("top_logprobs") for body in bodies] == [5, 5, None]
    assert bodies[0]["messages"][0]["content"] == "Which?"
    assert plain.scored_by == ("max_prob", "max_prob")
    assert list(plain.names) == ["swift", "middle", "super"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("--between", "b", "--score", "margin,energy,margin"), "--score='margin,energy,margin': give one"),
        (("--between", "b", "--score", "margin,mood"), "--score='mood': must be one of"),
        (("--between", "http://h/", "--service-model", "a,b"), "--service-model='a,b': give one for all"),
        (("--between", "b", "--top-logprobs", 0), "--top-logprobs=0: must be at least 1"),
    ],
)
def test_options_that_do_not_fit(given: tuple, message: str) -> None:
    with pytest.raises(ValueError) as e:  # noqa: PT011
        made("--swift", "a", "--super", "c", *given)
    assert message in str(e.value)


def test_costs_that_nobody_knows() -> None:
    common = {"swift": "a", "data": "d", "super_accuracy": True, "style": "chat"}
    with pytest.raises(ValueError, match=r"--super-cost 0: the service does not say"):
        fit_command.Options(**common, super_="http://h/")
    with pytest.raises(ValueError, match=r"--between http://h/: is a service that does not say .* --cost s"):
        fit_command.Options(**common, super_="b", between=("http://h/",))
    fit_command.Options(**common, super_="b", between=("http://h/",), cost="seconds")
    with pytest.raises(ValueError, match=r"--label-field x: is not read with --agreement"):
        fit_command.Options(**{**common, "style": "rows"}, super_="b", agreement=True, label_field="x")


def test_no_key_is_sent_to_two_hosts(monkeypatch) -> None:
    near, far = "http://localhost:8000/v1/chat/completions", "https://example.org/v1/chat/completions"

    def keys(value: str, *places: str) -> list[str]:
        monkeypatch.setenv("ELASTIC_LM_API_KEY", value)
        swift, between, large = places
        options = made("--swift", swift, "--between", between, "--super", large, "--style", "chat")
        return [service_key(options, number) for number in range(3)]

    assert keys("one\n", far, far, far) == ["one", "one", "one"]
    assert keys("", near, far, far) == ["", "", ""]
    assert keys(",two, three", near, far, far) == ["", "two", "three"]
    with pytest.raises(
        ValueError, match=r"ELASTIC_LM_API_KEY='\.\.\.': is one key for 2 hosts; give one for each"
    ):
        keys("secret", near, far, far)
    with pytest.raises(ValueError, match=r"ELASTIC_LM_API_KEY: count=2: are keys of 3 services"):
        keys("a,b", near, far, far)


@pytest.mark.long
@pytest.mark.parametrize(
    ("places", "message"),
    [
        (("model@exit=2", "model@exit=1"), "name exits in increasing order"),
        (("model@exit=x", "model"), "--swift: exit='x': must be the number of a layer"),
        (("model@subnet=mlp=50%", "model"), "only decoders have sub-networks"),
        (("model@exit=5", "model"), "exit=5: the model has exits after layers (1, 2)"),
    ],
)
def test_parts_that_are_not_there(folder, tmp_path, capsys, places: tuple, message: str) -> None:
    swift, between = (f"{folder}/{place}" for place in places)
    given = ("--swift", swift, "--between", between, "--super", "http://h/", "--data", folder / "rows.jsonl")
    code, _, error = run(capsys, "run", *given, "--threshold", "0,0", "--out", tmp_path / "o")
    assert (code, error.strip().count("\n")) == (2, 0)
    assert message in error


@pytest.mark.long
def test_a_sub_network_by_its_name(folder: pathlib.Path) -> None:
    """Parts of a folder become members of one model, loaded once."""
    from elastic_lm import testing

    config = testing.tiny_config(exits=(1,), n_layers=2, vocab_size=260)
    place = folder / "decoder"
    checkpoint.save_model(place, config, testing.random_params(config), train_bpe(["some text"], 260))
    options = made("--swift", f"{place}@exit=1", "--between", f"{place}@subnet=mlp=50%", "--super", place)
    record, contents = {"text": "a", "choices": ["b", "c"]}, {}
    members = make_members(options, record, Scoring(), options.scored_by, contents=contents)
    assert [member._part.exit for member in members] == [1, None, None]
    assert members[1]._part.subnet.mlp == (config.d_mlp // 2,) * 2
    assert members[0].weights is members[2].weights
    assert members[1].weights is None
    assert contents["swift"] == contents["middle"] == contents["super"]
    assert all(a is b for a, b in zip(*(jax.tree.leaves(m._params) for m in members[:2]), strict=True))
