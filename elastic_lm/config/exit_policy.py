"""How early exits decide, by name: metrics of confidence, strategies for thresholds, and their defaults.

The functions behind the names import JAX (`depth.confidence`, `depth.per_exit`). The names stand here so that
the command line can show them without it.
"""

from typing import Literal, get_args

LOGIT_METRICS = ("max_prob", "margin", "entropy", "logit_margin", "energy")  # read the exit's logits
STATE_METRICS = ("cosine",)  # read the states before and after the last layer below the exit
GATE_METRIC = "learned"  # reads the exit's gate
METRICS = (*LOGIT_METRICS, *STATE_METRICS, GATE_METRIC)
DEFAULT_METRIC = "margin"  # the best in every study of this package

Strategy = Literal["max_coverage", "min_coverage", "midpoint", "platt"]  # for the thresholds of single exits
STRATEGIES = ("joint", *get_args(Strategy))  # joint: of all exits together, the default
DEFAULT_TARGET = 0.99  # share of tokens that equal the full model's
