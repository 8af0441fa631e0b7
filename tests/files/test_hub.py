"""Names of models on the Hub, against a Hub on loopback, in processes that import `huggingface_hub` anew."""

import json
from pathlib import Path

import pytest

from elastic_lm.files.hub import NAME, local_model
from tests import hub_server

CONFIG = b'{"model_type": "llama"}'
MODEL = {
    "README.md": b"# a model",
    "config.json": CONFIG,
    "tokenizer.json": b"{}",
    "chat_template.jinja": b"{{ messages }}",
    "model.safetensors": b"weights",
    "pytorch_model.bin": b"pickled",
    "onnx/model.onnx": b"other",
    "onnx/config.json": b"other",
}
SHARDS = ["model-1.safetensors", "model-2.safetensors"]
SHARDED = {
    "config.json": b'{"model_type": "llama", "elastic": {}}',
    "model.safetensors.index.json": json.dumps({"weight_map": {"a": SHARDS[0], "b": SHARDS[1]}}).encode(),
    **dict.fromkeys(SHARDS, b"shard"),
    "consolidated.safetensors": b"the same again",
    "elastic_exits.safetensors": b"exits",
}
NATIVE = {
    "elastic_config.json": b"{}",
    "params/d/1": b"one",
    "params/manifest": b"two",
    "curve.png": b"picture",
}
# Prints, for every line of JSON with arguments, the files of the folder, or the error.
SCRIPT = """
import json, sys
from pathlib import Path
from elastic_lm.files.hub import local_model
for line in sys.argv[1:]:
    name, how = json.loads(line)
    try:
        path = local_model(name, **how)
        files = {p.relative_to(path).as_posix(): p.read_text() for p in path.rglob("*") if p.is_file()}
        print(json.dumps({"files": files, "at": str(path)}))
    except Exception as error:
        print(json.dumps({"error": type(error).__name__, "message": str(error)}))
"""


def ask(env, *calls):
    done = hub_server.python(SCRIPT, env, *(json.dumps(call) for call in calls))
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()], done.stderr


@pytest.fixture(scope="module")
def hub():
    with hub_server.running() as hub:
        hub.add("acme/tiny", MODEL)
        hub.add("acme/tiny", MODEL | {"model.safetensors": b"older"}, "v1")
        hub.add("acme/sharded", SHARDED)
        hub.add("acme/native", NATIVE)
        hub.add("acme/pickled", {"config.json": CONFIG, "pytorch_model.bin": b"pickled"})
        hub.add("acme/hole", {name: SHARDED[name] for name in SHARDED if name != SHARDS[1]})
        hub.add("acme/ggufs", {"small.gguf": b"GGUF", "q/large.gguf": b"GGUF2"})
        yield hub


def test_only_the_files_that_are_needed_are_downloaded_and_once(hub, tmp_path):
    env = hub_server.environment(hub, tmp_path)
    hub.asked.clear()
    (described,), _ = ask(env, ("acme/tiny", {"weights": False}))
    assert described["files"].keys() == {"config.json", "tokenizer.json", "chat_template.jinja"}
    assert hub.downloads() == sorted(described["files"])

    hub.asked.clear()
    (whole, again), errors = ask(env, ("acme/tiny", {}), ("acme/tiny", {}))
    assert whole["files"] == described["files"] | {"model.safetensors": "weights"} == again["files"]
    assert hub.downloads() == ["model.safetensors"]
    assert errors == ""

    hub.asked.clear()
    (sharded, native), _ = ask(env, ("acme/sharded", {}), ("acme/native", {}))
    assert sharded["files"].keys() == SHARDED.keys() - {"consolidated.safetensors"}
    assert native["files"].keys() == NATIVE.keys() - {"curve.png"}

    # Offline, what was downloaded is read, and the rest is refused in one line.
    hub.asked.clear()
    offline = env | {"HF_HUB_OFFLINE": "1"}
    found, _ = ask(offline, ("acme/tiny", {}), ("acme/native", {}), ("acme/hole", {}), ("acme/tiny@v1", {}))
    assert found[0]["files"] == whole["files"]
    assert found[1]["files"] == native["files"]
    for refused in found[2:]:
        assert refused["error"] == "FileNotFoundError"
        assert "HF_HUB_OFFLINE is set: unset it" in refused["message"]
    assert hub.asked == []


def test_revisions(hub, tmp_path):
    env = hub_server.environment(hub, tmp_path)
    commit = hub.commit("acme/tiny", "v1")
    calls = [
        ("acme/tiny@v1", {}),
        ("acme/tiny", {"revision": "v1"}),
        (f"acme/tiny@{commit}", {}),
        ("acme/tiny", {}),
    ]
    calls += [("acme/tiny@v1", {"revision": "main"}), ("acme/tiny", {"revision": "v9"})]
    answers, _ = ask(env, *calls)
    assert [answer["files"]["model.safetensors"] for answer in answers[:4]] == ["older"] * 3 + ["weights"]
    assert len({answer["at"] for answer in answers[:4]}) == 2
    assert answers[4]["message"] == "revision='main': acme/tiny@v1 names another; give one of them"
    assert (
        "acme/tiny: has no revision 'v9' on the Hub; name a branch, a tag or a commit"
        in answers[5]["message"]
    )


def test_a_token_is_sent_and_files_are_named(hub, tmp_path):
    env = hub_server.environment(hub, tmp_path, HF_TOKEN="hf_secret")
    hub.tokens.clear()
    (path,), _ = ask(env, ("acme/ggufs/q/large.gguf", {}))
    assert path["at"].endswith("q/large.gguf")
    assert Path(path["at"]).read_bytes() == b"GGUF2"
    assert hub.tokens == {"hf_secret"}


REFUSED = {
    "acme/nothing": ("FileNotFoundError", "no such folder here, and no such model on", "correct the name"),
    "acme/private": ("FileNotFoundError", "no such folder here, and no such model on", "HF_TOKEN"),
    "acme/gated": ("PermissionError", "is gated: ask for access at", "hf auth login"),
    "acme/forbidden": ("PermissionError", "refuses access (403", "hf auth login"),
    "acme/crowded": ("OSError", "answers 429, too many requests", "wait a while"),
    "acme/broken": ("OSError", "fails with 500", "try again later"),
    "acme/away": ("OSError", "fails with 503", "HF_HUB_OFFLINE=1 reads what was downloaded"),
    "acme/pickled": ("FileNotFoundError", "there is no model.safetensors", "convert it with transformers"),
    "acme/hole": ("FileNotFoundError", "there is no model-2.safetensors", "name another model or revision"),
    "acme/ggufs": ("FileNotFoundError", "has no config.json", "acme/ggufs/small.gguf"),
    "acme/ggufs/none.gguf": ("FileNotFoundError", "there is no none.gguf", "acme/ggufs/small.gguf"),
    "acme/a--b": ("ValueError", "is no folder here and no name on the Hub", "acme/a--b"),
}


def test_what_the_hub_refuses_is_one_line(hub, tmp_path):
    env = hub_server.environment(hub, tmp_path)
    answers, errors = ask(env, *((name, {}) for name in REFUSED))
    assert errors == ""
    for (name, (kind, what, fix)), answer in zip(REFUSED.items(), answers, strict=True):
        assert answer["error"] == kind, answer
        message = answer["message"]
        assert message.startswith(f"{name}: "), message
        assert what in message, message
        assert fix in message, message
        assert "\n" not in message


def test_no_network_is_one_line(hub, tmp_path):
    env = hub_server.environment(hub, tmp_path) | {"HF_ENDPOINT": "http://127.0.0.1:9"}  # nobody answers
    (answer,), _ = ask(env, ("acme/tiny", {}))
    assert answer["error"] == "ConnectionError"
    assert "http://127.0.0.1:9 cannot be reached" in answer["message"]
    assert "\n" not in answer["message"]


def test_no_message_holds_a_password_of_the_endpoint(hub, tmp_path):
    env = hub_server.environment(hub, tmp_path)
    for address in ("127.0.0.1:9", hub.url.removeprefix("http://")):
        login = {"HF_ENDPOINT": f"http://someone:secret%40pw@{address}"}
        answers, errors = ask(env | login, *((name, {}) for name in ("acme/tiny2", *REFUSED)))
        assert "secret" not in errors
        for answer in answers:
            assert "secret" not in answer.get("message", ""), answer
            assert "someone" not in answer.get("message", ""), answer
        assert any(f"http://{address}" in answer["message"] for answer in answers)


def test_a_file_that_is_missing_in_a_folder_here_is_not_looked_for_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "small").mkdir(parents=True)
    assert local_model("models/small/tiny.gguf") == Path("models/small/tiny.gguf")
    assert NAME.fullmatch("models/small.gguf/tiny.gguf")["file"] == "tiny.gguf"


def test_what_lies_here_wins(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "acme" / "tiny").mkdir(parents=True)
    assert local_model("acme/tiny") == Path("acme/tiny")
    with pytest.raises(ValueError, match="revision='v1': acme/tiny is a path on this machine"):
        local_model("acme/tiny", revision="v1")


@pytest.mark.parametrize(
    "name",
    [
        *("nowhere", "./acme/tiny", "/acme/tiny", "a/b/c", "acme/", "~/tiny", "../tiny"),
        *("models/tiny.gguf", "models/tiny.GGUF@v1", "a/b/../../x.gguf", "a/b/./x.gguf", "a/b//x.gguf"),
    ],
)
def test_other_names_are_paths(name):
    assert NAME.fullmatch(name) is None
    assert local_model(name) == Path(name)
