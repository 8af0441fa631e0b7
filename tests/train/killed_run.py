"""A training process for `test_kill.py`: a file that says when a save begins, then the real run.

Arguments: workdir, text file, directory of compiled programs.
"""

import sys
from pathlib import Path

import jax

from elastic_lm.checkpoints.native import Checkpoints
from elastic_lm.config.data import DataConfig
from elastic_lm.config.model import ModelConfig
from elastic_lm.train.config import RunConfig, TrainConfig
from elastic_lm.train.run import fit

STEPS = 36


def main(workdir: Path, text: str, cache: str) -> None:
    """Runs or resumes 36 steps with a checkpoint after every third."""
    jax.config.update("jax_compilation_cache_dir", cache)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    save = Checkpoints.save

    def announced(self, step, state, batches):
        (workdir / "saving").write_text(str(step))
        save(self, step, state, batches)
        (workdir / "saving").unlink()

    Checkpoints.save = announced
    model = ModelConfig(vocab_size=300, d_model=64, n_layers=2, n_heads=4, d_mlp=128, max_len=64, tied=True)
    data = DataConfig(source="text", paths=(text,), seq_len=32, batch_size=4, span=200)
    train = TrainConfig(steps=STEPS, lr=1e-2, warmup=2, log_every=3, eval_every=0, save_every=3)
    fit(RunConfig(model=model, data=data, train=train), workdir)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3])
