"""What a type checker says about a user's program: public names have types, wrong keywords are errors."""

import dataclasses
import json
import pathlib
import subprocess
import sys
import typing

import pytest

from elastic_lm.decode.options import DecodeKeywords, DecodeOptions

ROOT = pathlib.Path(__file__).parent.parent
PYRIGHT = (sys.executable, "-m", "pyright")

SCRIPT = """\
import elastic_lm as el
reveal_type(el.load("models/my-model"))
reveal_type(el.Sampler(el.Decoder(el.testing.tiny_config()), {}, window=8, exit=None))
reveal_type(el.DecodeOptions(lossless=True))
reveal_type(el.depth.calibrate(el.testing.tiny_config(exits=(2,)), {}, []))
reveal_type(el.train.fit(el.RunConfig(), "runs/x"))
el.Sampler(el.Decoder(el.testing.tiny_config()), {}, windows=8)
el.Sampler(el.Decoder(el.testing.tiny_config()), {}, window="8")
"""

# Parameters are nested dicts of arrays, for which Python has no type.
REVEALED = [
    "tuple[Decoder | Encoder | EncoderDecoder, PARAMS]",
    "Sampler",
    "DecodeOptions",
    "ConfidenceExit",
    "tuple[ModelConfig, PARAMS, dict[str, float]]",
]


def test_the_keywords_of_a_sampler_are_the_fields_of_its_options() -> None:
    fields = {field.name for field in dataclasses.fields(DecodeOptions)}
    hints = typing.get_type_hints(DecodeOptions)
    assert typing.get_type_hints(DecodeKeywords) == {name: hints[name] for name in fields}
    assert not DecodeKeywords.__required_keys__


@pytest.fixture(scope="module")
def messages(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """What pyright says about the script."""
    try:
        subprocess.run([*PYRIGHT, "--version"], check=True, capture_output=True, timeout=60)
    except (OSError, subprocess.SubprocessError) as error:
        pytest.skip(f"pyright, or the node that runs it, is not installed: {error}")

    folder = tmp_path_factory.mktemp("typed")
    (folder / "script.py").write_text(SCRIPT)
    config = {"pythonVersion": "3.11", "extraPaths": [str(ROOT)]}
    (folder / "pyrightconfig.json").write_text(json.dumps(config))
    command = [*PYRIGHT, "--project", str(folder), "--pythonpath", sys.executable, "--outputjson"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    return json.loads(done.stdout)["generalDiagnostics"]


def test_public_names_have_types(messages: list[dict]) -> None:
    found = [one["message"] for one in messages if one["severity"] == "information"]
    types = [message.partition('" is "')[2][:-1].replace("dict[str, Any]", "PARAMS") for message in found]
    assert types == REVEALED


def test_wrong_keywords_of_a_sampler_are_errors(messages: list[dict]) -> None:
    errors = {one["range"]["start"]["line"]: one["rule"] for one in messages if one["severity"] == "error"}
    lines = SCRIPT.splitlines()
    assert {lines[line].split()[-1]: rule for line, rule in errors.items()} == {
        "windows=8)": "reportCallIssue",
        'window="8")': "reportArgumentType",
    }
