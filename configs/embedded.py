"""The small model that ships with the package: Llama architecture, Python's standard library.

COMMAND   elastic-lm train --config configs/embedded.py --workdir runs/embedded
HARDWARE  one CPU core
DURATION  about 95 minutes (650-800 tokens/s)
EXPECTED  held-out loss 1.98 nats per token, 1.94 over the whole test split (1.27 bits per byte)
"""

from ml_collections import ConfigDict


def get_config(arg: str = "") -> ConfigDict:
    """The recipe; `arg` = "tiny" shrinks it to a check that runs in seconds."""
    config = ConfigDict()
    config.model = {
        "vocab_size": 512,
        "d_model": 192,
        "n_layers": 12,
        "n_heads": 6,
        "n_kv_heads": 2,
        "d_mlp": 512,
        "max_len": 1024,
        "tied": True,
    }
    config.exits = _exits(3, 6)
    config.data = {"source": "stdlib", "seq_len": 256, "batch_size": 8}
    config.train = {
        "method": "joint",
        "exit_weights": (0.4, 0.4),
        "optimizer": "muon",
        "steps": 2000,
        "lr": 5e-3,
        "schedule": "wsd",
        "decay_share": 0.4,
        "min_lr": 0.02,
        "warmup": 50,
        "weight_decay": 0.1,
        "log_every": 20,
        "eval_every": 300,
        "save_every": 100,
    }
    if arg == "tiny":
        config.exits = (
            {"layer": 1, "kind": "norm", "tied": True},
            {"layer": 2, "kind": "norm", "tied": True},
        )
        config.model.update(d_model=32, n_layers=4, n_heads=4, n_kv_heads=2, d_mlp=64, vocab_size=512)
        config.data.update(seq_len=64, batch_size=4)
        config.train.update(steps=20, warmup=5, log_every=5, eval_every=10, eval_batches=2, save_every=10)
    return config


def _exits(*layers: int) -> tuple[dict, ...]:
    return tuple({"layer": layer, "kind": "norm", "tied": True} for layer in layers)
