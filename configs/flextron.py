"""Elastic training (Flextron's first stage): one model whose narrower sub-networks are models too.

COMMAND   elastic-lm train --config flextron --workdir runs/elastic
          another model: --config flextron:mlp --config.train.init_from=HF_DIR; with heads to choose, too:
          --config.method.menu.heads="(0.5,1.0)", or --config flextron:mha where heads share no key/value
          groups, like those of GPT-2
HARDWARE  one accelerator, or a CPU for models of a few million parameters
DURATION  each sampled sub-network adds two forward passes and a backward one of its width: see
          experiments/train_step and experiments/flextron
EXPECTED  lower `eval_loss/smallest` and `eval_loss/<width>`; with `--config.train.lr=5e-5
          --config.method.distil=1.0` the whole model keeps its loss: see experiments/flextron

Neurons and heads of a pretrained model are first sorted by importance; the model that is saved slices.
Variants (`--config flextron:NAME`):

  flextron    the whole model and random widths for every layer, often the smallest (default)
  uniform     the same with one width for all layers
  live        flextron, half of the sub-networks' loss is KL to the whole model of the same step
  frozen      flextron, half of it is KL to the model that training began with
  matformer   one width of the MLPs per step for all layers, the whole one among them
  scratch     matformer on a new model
  mlp         for a model of yours: widths of the MLPs alone, which every model can divide; sub-networks learn
              from the whole model alone, at a learning rate that leaves it what it was
  mha         flextron with whole key/value groups to choose from, instead of heads inside them: the way to
              choose heads where every head has keys and values of its own
"""

from ml_collections import ConfigDict

import elastic_lm as el


def get_config(arg: str = "flextron") -> ConfigDict:
    """The recipe; `arg` = one of the variants above, "" = flextron."""
    matformer = {"draw": "one_per_step", "menu": {"mlp": (0.125, 0.25, 0.5, 1.0), "heads": (1.0,)}}
    variants = {
        "flextron": {},
        "uniform": {"draw": "uniform"},
        "live": {"distil": 0.5},
        "frozen": {"distil": 0.5, "teacher": "frozen"},
        "matformer": matformer,
        "mlp": {"menu": {"heads": (1.0,)}, "distil": 1.0},
        "mha": {"menu": {"heads": (1.0,), "groups": (0.5, 1.0)}},
        "scratch": matformer,
    }
    variant = arg or "flextron"
    if variant not in variants:
        raise ValueError(f"--config flextron:{arg}: choose from {', '.join(variants)}")
    config = ConfigDict()
    config.data = {"source": "stdlib", "seq_len": 256, "batch_size": 8}
    config.method = {"name": "flextron", "menu": {"heads": (1 / 3, 2 / 3, 1.0)}, **variants[variant]}
    config.train = {
        "init_from": str(el.embedded_model()),
        "steps": 1000,
        "lr": 3e-4,
        "warmup": 50,
        "log_every": 20,
        "eval_every": 250,
        "save_every": 250,
    }
    if variant == "mlp":
        config.train.lr = 5e-5
    if variant == "scratch":
        config.train.update({"init_from": "", "lr": 3e-3, "steps": 2000})
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
    return config
