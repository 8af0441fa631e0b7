"""Tiny random relatives of T5, and BARTs and Marians, made with transformers; their golden files.

    python tests/hf/seq2seq_models.py

writes tests/golden/encoder_decoders/<name>: a checkpoint, the logits that transformers gives for it, and what
its `generate` writes greedily. It needs torch and transformers (the committed files were made with
transformers 5.23 and torch 2.13).
"""

from typing import Any

import numpy as np
from t5_models import FOLDER, random_pair, their_logits

T5_SIZES = {"vocab_size": 48, "d_model": 16, "d_kv": 6, "d_ff": 24, "num_layers": 2, "num_heads": 4}
SIZES = {
    **{"vocab_size": 48, "d_model": 16, "max_position_embeddings": 24},
    **{"encoder_layers": 2, "encoder_attention_heads": 4, "encoder_ffn_dim": 24},
    **{"decoder_layers": 1, "decoder_attention_heads": 4, "decoder_ffn_dim": 24},
}
MARIAN = {
    **{"pad_token_id": 47, "decoder_start_token_id": 47, "scale_embedding": True},
    **{"activation_function": "swish"},
}

# Name -> (model_type, class of transformers, entries of config.json).
FORMS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "mt5": ("mt5", "MT5ForConditionalGeneration", {**T5_SIZES, "relative_attention_num_buckets": 8}),
    "umt5": ("umt5", "UMT5ForConditionalGeneration", {**T5_SIZES, "relative_attention_max_distance": 20}),
    "bart": ("bart", "BartForConditionalGeneration", SIZES),
    "mbart": ("mbart", "MBartForConditionalGeneration", {**SIZES, "decoder_start_token_id": 5}),
    "pegasus": ("pegasus", "PegasusForConditionalGeneration", {**SIZES, "scale_embedding": True}),
    "marian": ("marian", "MarianMTModel", {**SIZES, **MARIAN}),
}
VARIANTS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "mt5-plain": ("mt5", "MT5ForConditionalGeneration", {**T5_SIZES, "feed_forward_proj": "relu"}),
    "bart-scaled": (
        "bart",
        "BartForConditionalGeneration",
        {**SIZES, "scale_embedding": True, "decoder_layers": 3, "forced_eos_token_id": None},
    ),
}
# What generation_config.json says besides.
GENERATION = {"bart": {"forced_bos_token_id": 0}, "marian": {"bad_words_ids": [[47]]}}
LIMIT = 8  # tokens that are generated


def random_model(name: str, seed: int = 0, longest: int = 0) -> Any:
    """A transformers model of a form whose every weight is drawn at random, but for sinusoids.

    Args:
      name: in FORMS or VARIANTS.
      seed: of the draw.
      longest: positions of models that have vectors of them; 0 = as the form says.
    """
    import torch
    import transformers

    model_type, cls, entries = {**FORMS, **VARIANTS}[name]
    if longest and "max_position_embeddings" in entries:
        entries = {**entries, "max_position_embeddings": longest}
    config = transformers.AutoConfig.for_model(model_type, **entries)
    model = getattr(transformers, cls)(config).float()
    if model_type in ("mt5", "umt5"):  # as in the published checkpoints; transformers 5 ties all the same
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.normal_(0, 0.25, generator=generator)
                if parameter.ndim == 1:
                    parameter.add_(0.5 if path.endswith("weight") else 0.1)
        if hasattr(model, "final_logits_bias"):
            model.final_logits_bias.normal_(0, 1, generator=generator)
    for key, value in GENERATION.get(name, {}).items():
        setattr(model.generation_config, key, value)
    return model.eval()


def their_tokens(model: Any, pair: dict[str, np.ndarray], limit: int = LIMIT) -> list[list[int]]:
    """What a transformers model writes greedily for every source, up to its end token."""
    import torch

    source, mask = torch.tensor(pair["source"]), torch.tensor(pair["mask"])
    found = model.generate(
        input_ids=source, attention_mask=mask, max_new_tokens=limit, num_beams=1, do_sample=False
    )
    eos = model.generation_config.eos_token_id
    rows = [row[1:] for row in found.tolist()]
    return [row[: row.index(eos) + 1] if eos in row else row for row in rows]


def main() -> None:
    """Writes one folder per form, and prints its size."""
    for name in FORMS:
        model, pair = random_model(name), random_pair()
        tokens = np.full((len(pair["source"]), LIMIT), -1)
        for i, row in enumerate(their_tokens(model, pair)):
            tokens[i, : len(row)] = row
        model.save_pretrained(FOLDER / name)
        expected = {**pair, "logits": their_logits(model, pair), "written": tokens}
        np.savez_compressed(FOLDER / name / "expected.npz", **expected)
        print(name, sum(file.stat().st_size for file in (FOLDER / name).iterdir()), "bytes")


if __name__ == "__main__":
    main()
