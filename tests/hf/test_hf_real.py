"""Real weights: the TinyStories models under $ELASTIC_LM_SHARED/data/weights."""

import functools
import os
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hf_models import TOLERANCE, export_and_reload, load_theirs, relative_error, their_logits

import elastic_lm as el
from elastic_lm import hf
from elastic_lm.config.model import ModelConfig
from elastic_lm.models.decoder import Decoder, Params

SHARED = os.environ.get("ELASTIC_LM_SHARED", "")
pytestmark = pytest.mark.skipif(not SHARED, reason="set ELASTIC_LM_SHARED to the folder with data/weights")

DATA = Path(SHARED) / "data"
LOSSES = {"stories260K": 1.6409, "tinystories_656k": 3.2267}  # nats per token, as transformers gives them
ROWS = 10


def stories(name: str, count: int = 100) -> list[list[int]]:
    """The first stories of more than 200 characters, with the tokenizer's own start, 512 tokens at most."""
    tokenizer = el.Tokenizer.load(DATA / "weights" / name)
    text = (DATA / "text" / "tinystories_cased_0.9MB.txt").read_text(encoding="utf-8")
    texts = [story.strip() for story in re.split(r"(?<!\n)\n(?!\n)", text) if len(story.strip()) > 200]
    return [tokenizer.encode(story, bos=True)[:512] for story in texts[:count]]


def padded(rows: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    """([B, T] ids, [B, T] whether they are there); padding follows the text, so it changes nothing."""
    length = max(map(len, rows))
    tokens = np.asarray([row + [0] * (length - len(row)) for row in rows])
    return tokens, np.asarray([[i < len(row) for i in range(length)] for row in rows])


@jax.jit
def sum_of_losses(logits: jax.Array, tokens: jax.Array, there: jax.Array) -> jax.Array:
    """Cross-entropy in nats of every token that is there, given those before it."""
    log_p = jax.nn.log_softmax(logits[:, :-1])
    picked = jnp.take_along_axis(log_p, tokens[:, 1:, None], axis=-1)[..., 0]
    return -jnp.sum(jnp.where(there[:, 1:], picked, 0.0))


@functools.partial(jax.jit, static_argnums=0)
def logits_of(config: ModelConfig, params: Params, tokens: np.ndarray) -> jax.Array:
    """[B, T, V] logits; both tests use one shape, so each model is compiled once."""
    return Decoder(config).bind({"params": params})(tokens).logits


def mean_loss(config: ModelConfig, params: Params, rows: list[list[int]]) -> float:
    """Nats per token over `rows`."""
    tokens, there = padded(rows)
    total = 0.0
    for i in range(0, len(rows), ROWS):
        part = slice(i, i + ROWS)
        logits = logits_of(config, params, tokens[part])
        total += float(sum_of_losses(logits, tokens[part], there[part]))
    return total / int(there[:, 1:].sum())


@pytest.mark.long
@pytest.mark.parametrize("name", sorted(LOSSES))
def test_perplexity_equals_that_of_transformers_to_four_digits(name: str) -> None:
    config, params = hf.load(DATA / "weights" / name)
    loss = mean_loss(config, params, stories(name))
    assert round(loss, 4) == LOSSES[name]
    assert np.exp(loss) == pytest.approx(np.exp(LOSSES[name]), rel=1e-4)


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_logits_and_loss_agree_with_transformers_and_survive_export(name: str, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    tokens, there = (x[:ROWS] for x in padded(stories(name)))
    model = load_theirs(DATA / "weights" / name)
    theirs = their_logits(model, tokens)
    config, params = hf.load(DATA / "weights" / name)
    ours = np.asarray(logits_of(config, params, tokens))
    assert relative_error(ours, theirs) < TOLERANCE
    losses = [float(sum_of_losses(logits, tokens, there)) for logits in (ours, theirs)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    back = export_and_reload(config, params, tmp_path / "out")
    np.testing.assert_array_equal(their_logits(back, tokens[:, :32]), their_logits(model, tokens[:, :32]))


def test_the_tokenizer_travels_with_the_model(tmp_path: Path) -> None:
    name = "stories260K"
    tokenizer = el.Tokenizer.load(DATA / "weights" / name)
    config, params = hf.load(DATA / "weights" / name)
    hf.export(config, params, tmp_path / "out", tokenizer)
    again = el.Tokenizer.load(tmp_path / "out")
    text = "Once upon a time, there was a little girl."
    ids = tokenizer.encode(text, bos=True)
    assert again.encode(text, bos=True) == ids
    assert (again.bos_id, again.eos_ids) == (1, (2,)) == (config.bos_id, config.eos_ids)
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert theirs(text)["input_ids"] == ids
    assert (theirs.bos_token_id, theirs.eos_token_id) == (1, 2)
