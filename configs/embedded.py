"""The small model that ships with the package: Llama architecture, Python's standard library.

COMMAND   elastic-lm train --config configs/embedded.py --workdir runs/embedded
HARDWARE  one CPU core
DURATION  about 40 minutes (1900-2100 tokens/s)
EXPECTED  held-out loss 2.86 nats per token, 2.74 over the whole test split (1.41 bits per byte)
"""

from ml_collections import ConfigDict


def get_config(arg: str = "") -> ConfigDict:
    """The recipe; `arg` = "tiny" shrinks it to a check that runs in seconds."""
    config = ConfigDict()
    config.model = {
        "vocab_size": 1024,
        "d_model": 96,
        "n_layers": 12,
        "n_heads": 3,
        "n_kv_heads": 1,
        "d_mlp": 256,
        "max_len": 1024,
        "tied": True,
    }
    config.data = {"source": "stdlib", "seq_len": 256, "batch_size": 4}
    config.train = {
        "steps": 4200,
        "lr": 4e-3,
        "schedule": "wsd",
        "decay_share": 0.3,
        "min_lr": 0.05,
        "warmup": 200,
        "weight_decay": 0.1,
        "log_every": 50,
        "eval_every": 500,
        "save_every": 200,
    }
    if arg == "tiny":
        config.model.update(d_model=32, n_layers=4, n_heads=4, n_kv_heads=2, d_mlp=64, vocab_size=512)
        config.data.update(seq_len=64, batch_size=4)
        config.train.update(steps=20, warmup=5, log_every=5, eval_every=10, eval_batches=2, save_every=10)
    return config
