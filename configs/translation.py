"""A new encoder-decoder model on pairs of texts, like captions in two languages.

COMMAND   elastic-lm train --config translation:DATA --workdir runs/translation
          a small one: --config translation:DATA,swift
          a pretrained T5 instead: --config translation:DATA,HF_DIR
          other files: --config.task.paths="('my.csv',)" --config.task.text_field=source
HARDWARE  one accelerator, or a CPU
DURATION  see experiments/elang
EXPECTED  see experiments/elang

`DATA` holds multi30k_train.jsonl and multi30k_val.jsonl with the fields `en` and `de`
(experiments/elang/prepare.py makes them). A new model learns a byte-level BPE of both languages.
"""

from ml_collections import ConfigDict

SIZES = {
    "super": {"d_model": 256, "n_layers": 3, "n_heads": 4, "d_mlp": 1024},
    "swift": {"d_model": 128, "n_layers": 1, "n_heads": 4, "d_mlp": 512},
}


def get_config(arg: str = "data/elang") -> ConfigDict:
    """The recipe; `arg` = the folder with the files, then a comma and a size or the folder of a model."""
    folder, _, model = (arg or "data/elang").partition(",")
    config = ConfigDict()
    config.task = {
        "problem": "text_to_text",
        "paths": (f"{folder}/multi30k_train.jsonl",),
        "eval_paths": (f"{folder}/multi30k_val.jsonl",),
        "text_field": "en",
        "label_field": "de",
        "max_len": 64,
        "max_target": 64,
        "batch_size": 96,
    }
    config.method = {"name": "task_tuning", "z_loss": 1e-4}
    config.train = {
        "optimizer": "muon",
        "steps": 1500,
        "lr": 2e-3,
        "schedule": "wsd",
        "decay_share": 0.4,
        "min_lr": 0.02,
        "warmup": 20,
        "weight_decay": 0.01,
        "log_every": 20,
        "eval_every": 500,
        "eval_batches": 0,
        "save_every": 250,
    }
    size = model or "super"
    if size in SIZES:
        own_head = {"tied": False, "scaled_head": False}  # learns in half the steps of a tied one
        config.encoder_decoder = {"vocab_size": 4096, **SIZES[size], **own_head, "eos_ids": (0,)}
    else:
        config.task.prefix = "translate English to German: "
        config.train.update({"init_from": size, "optimizer": "adamw", "lr": 1e-4})
    return config
