"""A small English base model: Llama architecture, 8 layers, on text files of your own.

COMMAND   elastic-lm train --config english:data/english --workdir runs/english
HARDWARE  one CPU core
DURATION  about an hour; drafting: 70 minutes
EXPECTED  held-out loss 2.69 nats per token; see experiments/sorted_llama. Drafting: 2.65, at the exit 2.90

`data/english` holds train/*.txt and held_out/*.txt; experiments/sorted_llama/prepare.py makes it.
With `:data/english,drafting` an exit after a quarter of the layers trains along, for lossless decoding; see
experiments/decode.
"""

from ml_collections import ConfigDict


def get_config(arg: str = "data/english") -> ConfigDict:
    """The recipe; `arg` = the folder with train/ and held_out/, then ",drafting" for an exit."""
    arg = arg or "data/english"
    folder = arg.removesuffix(",drafting")
    config = ConfigDict()
    config.model = {
        "vocab_size": 1024,
        "d_model": 192,
        "n_layers": 8,
        "n_heads": 6,
        "n_kv_heads": 2,
        "d_mlp": 512,
        "max_len": 1024,
        "tied": True,
    }
    config.data = {
        "source": "text",
        "paths": (f"{folder}/train",),
        "eval_paths": (f"{folder}/held_out",),
        "seq_len": 256,
        "batch_size": 8,
    }
    config.method = {"name": "pretraining"}
    config.train = {
        "optimizer": "muon",
        "steps": 1600,
        "lr": 5e-3,
        "schedule": "wsd",
        "decay_share": 0.4,
        "min_lr": 0.02,
        "warmup": 50,
        "weight_decay": 0.1,
        "log_every": 20,
        "eval_every": 400,
        "save_every": 100,
    }
    if folder != arg:
        config.exits = ({"layer": 2, "kind": "norm", "tied": True},)
        config.method = {"name": "joint", "weights": (0.7,)}
    return config
