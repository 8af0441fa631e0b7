"""Writes tests/golden: tiny random checkpoints and what transformers computes with them.

    python tests/hf/make_golden.py [FAMILY OF DECODERS ...]

Decoders go to hf/<family>, encoders to encoders/<family>. Run once per change of the models in
`hf_models.GOLDEN` or `encoder_models.GOLDEN`; needs torch and transformers (the committed files were made
with transformers 5.23 and torch 2.13). The tests that read them need neither.
"""

import sys
from pathlib import Path

import encoder_models
import numpy as np
from hf_models import GOLDEN, SHAPE, TOKENS, random_ids, random_model, their_logits

FOLDER = Path(__file__).parents[1] / "golden"


def main() -> None:
    """Writes one folder per family, and prints its size."""
    for model_type in sys.argv[1:] or GOLDEN:
        model = random_model(model_type, {})
        tokens = random_ids(model.config.vocab_size, TOKENS.get(model_type, SHAPE))
        write(model, FOLDER / "hf" / model_type, tokens=tokens, logits=their_logits(model, tokens))
    for model_type, head in () if sys.argv[1:] else encoder_models.GOLDEN.items():
        model = encoder_models.random_encoder(model_type, head)
        batch = encoder_models.random_batch(model_type)
        expected = encoder_models.theirs(model, batch, head)
        write(model, FOLDER / "encoders" / model_type, **batch, **expected)


def write(model, folder: Path, **expected: np.ndarray) -> None:
    """Writes a checkpoint, and beside it what it takes and gives."""
    model.save_pretrained(folder)
    np.savez(folder / "expected.npz", **expected)
    print(folder.name, sum(file.stat().st_size for file in folder.iterdir()), "bytes")


if __name__ == "__main__":
    main()
