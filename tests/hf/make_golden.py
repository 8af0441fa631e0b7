"""Writes tests/golden/hf/<family>: a tiny random checkpoint and the logits transformers gives for it.

    python tests/hf/make_golden.py

Run once per change of the models in `hf_models.GOLDEN`; needs torch and transformers (the committed
files were made with transformers 5.23 and torch 2.13). The tests that read them need neither.
"""

from pathlib import Path

import numpy as np
from hf_models import GOLDEN, random_ids, random_model, their_logits

FOLDER = Path(__file__).parents[1] / "golden" / "hf"


def main() -> None:
    """Writes one folder per family, and prints its size."""
    for model_type in GOLDEN:
        model = random_model(model_type, {})
        folder = FOLDER / model_type
        model.save_pretrained(folder)
        tokens = random_ids(model.config.vocab_size)
        np.savez(folder / "expected.npz", tokens=tokens, logits=their_logits(model, tokens))
        print(model_type, sum(file.stat().st_size for file in folder.iterdir()), "bytes")


if __name__ == "__main__":
    main()
