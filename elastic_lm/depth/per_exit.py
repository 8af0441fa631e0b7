"""Thresholds of single exits, each on its own, by what its most confident tokens agree on.

With the tokens of one exit sorted by uncertainty u = 1 - confidence, c_i = 1 where token i equals the
full model's, and A_i = (c_1 + ... + c_i) / i,

    max_coverage   u_i of the last i with A_i >= target
    min_coverage   u_i of the first i with A_i >= target
    midpoint       (u_i + u_{i+1}) / 2 of the last one
    platt          (logit(target) - b) / w of a fit P(c = 1) = sigmoid(w u + b)

and the threshold is 1 - u. Tokens of equal uncertainty exit together, so A_i counts only where
u_i < u_{i+1}. The agreements are averages over the tokens that the thresholds were chosen on, and shallower
exits may have taken some of these tokens already: `depth.calibrate` chooses all exits together, and a
`RiskControl` gives guarantees.

Paper: self-supervised early exits, arXiv 2407.21082; Platt's targets: Platt 1999, sec. 2.2.
"""

import dataclasses
import math
from typing import get_args

import numpy as np
import scipy

from elastic_lm.config.checks import require
from elastic_lm.config.exit_policy import Strategy
from elastic_lm.depth.confidence import NEVER_EXITS


@dataclasses.dataclass(frozen=True)
class ExitChoice:
    """What a strategy gives for one exit."""

    threshold: float  # the exit fires when its confidence is at least this; `NEVER_EXITS` = it never does
    coverage: float  # share of the tokens that reach the threshold
    agreement: float  # share of these equal to the full model's; 1 where there are none


def exit_threshold(
    confidence: np.ndarray, agrees: np.ndarray, target: float, strategy: Strategy = "max_coverage"
) -> ExitChoice:
    """Threshold of one exit.

    Args:
      confidence: [N] in [0, 1]; negative where a gate silenced the exit, which then does not fire.
      agrees: [N] bool, the exit's token is the full model's.
      target: wanted agreement among the tokens that exit, in (0, 1].
      strategy: which of the valid thresholds is taken.

    Returns:
      ExitChoice; its threshold is `NEVER_EXITS` where none is valid.

    Raises:
      ValueError: there are no tokens, or the target or the strategy does not exist.
    """
    require(len(confidence) > 0, "confidence", list(confidence), "needs at least one token")
    require(0 < target <= 1, "target", target, "must be a share in (0, 1]")
    require(strategy in get_args(Strategy), "strategy", strategy, f"one of {', '.join(get_args(Strategy))}")

    if strategy == "platt":
        threshold = _platt_threshold(confidence, agrees, target)
    else:
        threshold = _cumulative_threshold(confidence, agrees, target, strategy)

    exits = confidence >= threshold
    return ExitChoice(threshold, float(exits.mean()), float(agrees[exits].mean()) if exits.any() else 1.0)


def exit_thresholds(
    confidence: np.ndarray, agrees: np.ndarray, target: float, strategy: Strategy = "max_coverage"
) -> tuple[float, ...]:
    """Thresholds of all exits, each chosen as if it were the only one.

    Args:
      confidence: [N, E] in [0, 1] of N tokens at E exits; negative where a gate silenced the exit, which then
        does not fire.
      agrees: [N, E] bool, the exit's token is the full model's.
      target: wanted agreement among the tokens that exit, in (0, 1].
      strategy: "max_coverage", "min_coverage", "midpoint" or "platt", see the top of this file.

    Returns:
      E thresholds; `NEVER_EXITS`, which no confidence reaches, where no threshold is valid.

    Raises:
      ValueError: there are no tokens, or the target or the strategy does not exist.

    Example:
      ```python
      import numpy as np
      import elastic_lm as el

      confidence = np.array([[0.9, 0.2], [0.8, 0.9], [0.7, 0.6], [0.3, 0.4]])
      agrees = np.array([[True, False], [True, True], [False, True], [False, True]])
      el.depth.exit_thresholds(confidence, agrees, target=0.9)  # (0.8, 0.4)
      ```

    Paper: self-supervised early exits, arXiv 2407.21082.
    """
    columns = range(confidence.shape[1])
    return tuple(exit_threshold(confidence[:, j], agrees[:, j], target, strategy).threshold for j in columns)


def _cumulative_threshold(
    confidence: np.ndarray, agrees: np.ndarray, target: float, strategy: Strategy
) -> float:
    order = np.argsort(-confidence, kind="stable")
    ranked = confidence[order]
    cumulative = np.cumsum(agrees[order]) / np.arange(1, len(order) + 1)

    # Tokens of equal confidence exit together, so that only the last of them can be the last that exits.
    last_of_equals = np.append(ranked[:-1] > ranked[1:], True)
    valid = np.flatnonzero((cumulative >= target - 1e-12) & last_of_equals & (ranked >= 0))
    if not len(valid):
        return NEVER_EXITS
    if strategy == "min_coverage":
        return float(ranked[valid[0]])

    last = valid[-1]
    after = max(ranked[min(last + 1, len(ranked) - 1)], 0.0)
    return float(ranked[last] + after) / 2 if strategy == "midpoint" else float(ranked[last])


def _platt_threshold(confidence: np.ndarray, agrees: np.ndarray, target: float) -> float:
    open_gate = confidence >= 0
    confidence, agrees = confidence[open_gate], agrees[open_gate]
    if not len(confidence):
        return NEVER_EXITS

    uncertainty = 1.0 - confidence.astype(np.float64)
    w, b = platt(uncertainty, agrees)
    wanted = math.log(target / (1.0 - target)) if target < 1 else math.inf
    if w * uncertainty.min() + b < wanted:
        return NEVER_EXITS
    if w >= 0:
        return float(confidence.min())

    # The fit says nothing about tokens that are less confident than all that were seen.
    return max(float(confidence.min()), 1.0 - (wanted - b) / w)


def platt(scores: np.ndarray, labels: np.ndarray) -> tuple[float, float]:
    """Maximum-likelihood fit of P(label = 1) = sigmoid(w score + b).

    Args:
      scores: [N].
      labels: [N] bool; (N+ + 1) / (N+ + 2) and 1 / (N- + 2) stand for 1 and 0, which keeps w finite
        where the scores separate the labels.

    Returns:
      (w, b).
    """
    positive = int(labels.sum())
    wanted = np.where(labels, (positive + 1) / (positive + 2), 1 / (len(labels) - positive + 2))
    design = np.column_stack([scores, np.ones(len(scores))]).astype(np.float64)

    def loss_and_gradient(weights: np.ndarray) -> tuple[float, np.ndarray]:
        z = design @ weights
        loss = float(np.sum(np.logaddexp(0.0, z) - wanted * z))
        return loss, design.T @ (scipy.special.expit(z) - wanted)

    def curvature(weights: np.ndarray) -> np.ndarray:
        p = scipy.special.expit(design @ weights)
        return design.T @ ((p * (1 - p))[:, None] * design)

    # Newton's steps: those of BFGS end where sums over many tokens still have a slope, in some of scipy.
    w, b = scipy.optimize.minimize(
        loss_and_gradient, np.zeros(2), method="trust-exact", jac=True, hess=curvature, tol=1e-9
    ).x
    return float(w), float(b)
