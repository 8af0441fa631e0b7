"""Training: `fit` runs a `RunConfig`, `load_config` reads one from a file."""

from elastic_lm.train.configs import load_config
from elastic_lm.train.run import fit

__all__ = ["fit", "load_config"]
