"""Perplexity of a text in order is the number that the perplexity page of transformers computes."""

import json
import math
import os
import pathlib
from typing import Any

import pytest

import elastic_lm as el
from elastic_lm.cli import main as cli
from elastic_lm.testing import random_params, tiny_config

SHARED = os.environ.get("ELASTIC_LM_SHARED", "")
needs_shared = pytest.mark.skipif(not SHARED, reason="set ELASTIC_LM_SHARED to the folder with data/weights")
# A larger model, such as SmolLM2-135M-Instruct: about 10 minutes on two cores.
MODEL = os.environ.get("ELASTIC_LM_REAL_MODEL", "")
needs_model = pytest.mark.skipif(not MODEL, reason="set ELASTIC_LM_REAL_MODEL to a Hugging Face folder")


def theirs(
    folder: pathlib.Path | str, text: str, context: int, stride: int, tokens: int
) -> tuple[float, int]:
    """(perplexity, predicted tokens) of the first tokens of a text, window by window, by transformers.

    Losses are weighted by the labels that they are means of. The page weights all but the first window by one
    label less, which changes the fifth digit.
    """
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    ids = tokenizer(text, return_tensors="pt").input_ids[:, :tokens]
    nats, count, done = 0.0, 0, 0
    for begin in range(0, ids.shape[1], stride):
        end = min(begin + context, ids.shape[1])
        labels = ids[:, begin:end].clone()
        labels[:, : labels.shape[1] - (end - done)] = -100
        with torch.no_grad():
            loss = model(ids[:, begin:end], labels=labels).loss.item()
        predicted = int((labels[:, 1:] != -100).sum())
        nats, count, done = nats + loss * predicted, count + predicted, end
        if end == ids.shape[1]:
            break
    return math.exp(nats / count), count


def ours(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    capsys.readouterr()
    assert cli.main(["evaluate", *map(str, arguments), "--json", "-"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("stride", [64, 24])
def test_a_small_model_gives_their_number(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str], stride: int
) -> None:
    source = el.embedded_model()
    tokenizer = el.Tokenizer.load(source)
    # Weights that are large enough for tokens to be far from equally likely.
    config = tiny_config(vocab_size=tokenizer.vocab_size, max_len=64, exits=())
    el.hf.export(config, random_params(config), tmp_path / "model", tokenizer)
    text = tmp_path / "text.txt"
    text.write_text(el.data.stdlib_files("test")[0].read_text(encoding="utf-8")[:6000], encoding="utf-8")

    sizes = ("--data", text, "--tokens", 1000, "--context", 64, "--stride", stride)
    found = ours(capsys, "--model", tmp_path / "model", *sizes)
    expected, count = theirs(tmp_path / "model", text.read_text(encoding="utf-8"), 64, stride, 1000)
    assert found["tokens"] == count
    assert found["depths"][-1]["perplexity"] == pytest.approx(expected, rel=2e-5)


def assert_equal_on_wikitext(
    capsys: pytest.CaptureFixture[str], folder: pathlib.Path | str, tokens: int, stride: int
) -> None:
    """Compares the perplexity of the first tokens of WikiText-2 to four digits, and far closer."""
    text = pathlib.Path(SHARED) / "data" / "text" / "wikitext2_raw_valid.txt"
    sizes = ("--data", text, "--tokens", tokens, "--context", 512, "--stride", stride)
    found = ours(capsys, "--model", folder, *sizes)
    expected, count = theirs(folder, text.read_text(encoding="utf-8"), 512, stride, tokens)
    assert found["tokens"] == count
    assert f"{found['depths'][-1]['perplexity']:.4g}" == f"{expected:.4g}"
    assert found["depths"][-1]["perplexity"] == pytest.approx(expected, rel=2e-5)


@needs_shared
@pytest.mark.parametrize("stride", [512, 128])
def test_real_weights_give_their_number(capsys: pytest.CaptureFixture[str], stride: int) -> None:
    folder = pathlib.Path(SHARED) / "data" / "weights" / "stories260K"
    assert_equal_on_wikitext(capsys, folder, 6000, stride)


@needs_shared
@needs_model
@pytest.mark.long
@pytest.mark.parametrize("stride", [512, 256])
def test_a_larger_model_gives_their_number(capsys: pytest.CaptureFixture[str], stride: int) -> None:
    assert_equal_on_wikitext(capsys, MODEL, 4096, stride)
