"""Tiny random T5 models, made with transformers, and the golden files that record two of them.

    python tests/hf/t5_models.py

writes tests/golden/encoder_decoders/<name>: a checkpoint and the logits that transformers gives for it. It
needs torch and transformers (the committed files were made with transformers 5.23 and torch 2.13).
"""

import functools
from pathlib import Path
from typing import Any

import jax
import numpy as np

from elastic_lm.config.encoder_decoder import EncoderDecoderConfig
from elastic_lm.models.decoder import Params
from elastic_lm.models.encoder_decoder import EncoderDecoder

FOLDER = Path(__file__).parents[1] / "golden" / "encoder_decoders"

SIZES = {
    "vocab_size": 48,
    "d_model": 32,
    "d_kv": 12,
    "d_ff": 40,
    "num_layers": 2,
    "num_heads": 4,
    "decoder_start_token_id": 0,
}
V1_1 = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}

GOLDEN: dict[str, dict[str, Any]] = {
    "t5": {},
    "t5_1_1": {**V1_1, "relative_attention_num_buckets": 8, "relative_attention_max_distance": 20},
}

VARIANTS: dict[str, dict[str, Any]] = {
    **GOLDEN,
    "t5-deep-encoder": {"num_layers": 3, "num_decoder_layers": 1, "feed_forward_proj": "gelu"},
    "t5-tied-gated": {"feed_forward_proj": "gated-silu", "relative_attention_num_buckets": 12},
    "t5_1_1-start": {**V1_1, "decoder_start_token_id": 5, "pad_token_id": 3, "eos_token_id": [1, 7]},
}


def random_t5(changes: dict[str, Any], seed: int = 0, scale: float = 0.25) -> Any:
    """A transformers model of SIZES | changes whose every weight is drawn at random."""
    import torch
    from transformers import T5Config, T5ForConditionalGeneration

    model = T5ForConditionalGeneration(T5Config(**{**SIZES, **changes})).float()
    if changes.get("tie_word_embeddings") is False:  # transformers 5 ties all the same
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, scale, generator=generator)
            if parameter.ndim == 1:
                parameter.add_(0.5)
    return model.eval()


def random_pair(batch: int = 3, source: int = 12, target: int = 9, seed: int = 0) -> dict[str, np.ndarray]:
    """Token ids of sources (row i is padded from its end on) and targets, and the mask of the sources."""
    rng = np.random.default_rng(seed)
    mask = np.ones((batch, source), np.int64)
    for i in range(1, batch):
        mask[i, source // (i + 1) :] = 0
    return {
        "source": rng.integers(2, 48, (batch, source)),
        "mask": mask,
        "target": rng.integers(2, 48, (batch, target)),
    }


def their_logits(model: Any, pair: dict[str, np.ndarray]) -> np.ndarray:
    """[B, T, V] float32 logits of a transformers model."""
    import torch

    source, mask, target = (torch.tensor(pair[name]) for name in ("source", "mask", "target"))
    with torch.no_grad():
        output = model(input_ids=source, attention_mask=mask, decoder_input_ids=target)
    return output.logits.float().numpy()


def our_logits(config: EncoderDecoderConfig, params: Params, pair: dict[str, np.ndarray]) -> np.ndarray:
    """[B, T, V] float32 logits of our model."""
    return np.asarray(_logits(config, params, pair["source"], pair["target"], pair["mask"]))


@functools.partial(jax.jit, static_argnums=0)
def _logits(
    config: EncoderDecoderConfig, params: Params, source: jax.Array, target: jax.Array, mask: jax.Array
) -> jax.Array:
    return EncoderDecoder(config).bind({"params": params})(source, target, mask)


def main() -> None:
    """Writes one folder per golden model, and prints its size."""
    for name, changes in GOLDEN.items():
        model, pair = random_t5(changes), random_pair()
        model.save_pretrained(FOLDER / name)
        np.savez_compressed(FOLDER / name / "expected.npz", **pair, logits=their_logits(model, pair))
        print(name, sum(file.stat().st_size for file in (FOLDER / name).iterdir()), "bytes")


if __name__ == "__main__":
    main()
