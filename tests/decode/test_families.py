"""Decoding with a cache equals recomputing everything, for every family's norms, windows and positions."""

from pathlib import Path

import jax
import numpy as np
import pytest

from elastic_lm import hf
from elastic_lm.config.model import ExitConfig
from elastic_lm.models.exits import attach_exits

GOLDEN = Path(__file__).parents[1] / "golden" / "hf"
# One of each kind of position, norm and window; the others are long tests.
KINDS = ("bloom", "gemma3_text", "gpt2", "llama")
FAMILIES = [
    folder.name if folder.name in KINDS else pytest.param(folder.name, marks=pytest.mark.long)
    for folder in sorted(GOLDEN.iterdir())
]


@pytest.mark.parametrize("family", FAMILIES)
def test_cached_decoding_equals_recomputation(family, make_model):
    config, params = hf.load(GOLDEN / family)
    model = make_model(*attach_exits(config, params, (ExitConfig(1, "mlp"),), jax.random.key(0)))
    prompts = [np.random.default_rng(i).integers(0, config.vocab_size, 4 + 7 * i).tolist() for i in range(2)]
    new = min(16, config.max_len - 11)
    width = config.recomputed_from or 64  # padding counts as text
    confidences = [float(model.newest(padded(p, width), len(p) - 1)[0][0, 0]) for p in prompts]
    for threshold in (2.0, float(np.mean(confidences)), 0.0):
        outputs = model.sampler((threshold,), window=4).sample(prompts, new, ignore_eos=True)
        expected = [model.reference(p, new, (threshold,)) for p in prompts]
        assert [(o.tokens, o.exit_layers) for o in outputs] == expected


def padded(prompt, width):
    tokens = np.zeros((1, width), np.int32)
    tokens[0, : len(prompt)] = prompt
    return tokens
