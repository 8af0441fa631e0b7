"""Calibration: thresholds for exits, fitted on one half of held-out text and measured on the other.

A token leaves at the first exit j with confidence c_j >= t_j, else at full depth. Thresholds t are
chosen on one half of the held-out sequences,

    minimise mean layers    subject to    share of tokens equal to the full model's >= target

and measured on the other half, so that the reported numbers are not in-sample. They are averages over those
tokens, and a target is met on average over texts: about every second text measures a little less. A `margin`
asks for more of the half that chooses. What is measured is called too low only where chance does not explain
it: where a one-sided Clopper-Pearson bound is below the target. Its trials are as many independent tokens as
would say the same (`bounds.effective_trials`), and half of these, since the half that chooses errs as much as
the half that measures. With a `RiskControl`, the other half tests what is stated about new text instead, and
the thresholds file says what was stated (`depth.guarantee`).
"""

import dataclasses
import datetime
import hashlib
import json
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import numpy as np

from elastic_lm.bounds import clopper_pearson, effective_trials
from elastic_lm.config.checks import require
from elastic_lm.config.exit_policy import DEFAULT_METRIC, DEFAULT_TARGET, LOGIT_METRICS, Strategy
from elastic_lm.config.model import ModelConfig
from elastic_lm.config.parse import to_dict
from elastic_lm.data.batch import Arrays, Batch
from elastic_lm.depth.confidence import NEVER_EXITS
from elastic_lm.depth.guarantee import RiskControl, control, token_losses
from elastic_lm.depth.observations import Observations, observe
from elastic_lm.depth.per_exit import exit_thresholds
from elastic_lm.depth.policies import MODEL_SHAPE, SLICES, CalibrationPoint, ConfidenceExit
from elastic_lm.depth.slices import exit_slices
from elastic_lm.depth.threshold_search import choose_thresholds, emitting_exit, exit_outcome
from elastic_lm.files.fingerprints import weights_fingerprint
from elastic_lm.models.decoder import Params
from elastic_lm.report.machine import recorded_versions

TARGETS = (0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.999)
NO_GUARANTEE = (
    "none: averages over the measured tokens, without a finite-sample guarantee for new text, about half of "
    "which agrees a little less"
)
EPSILON = 0.01  # probability that chance alone calls a measured agreement too low


def calibrate(
    config: ModelConfig,
    params: Params,
    batches: Iterable[Batch | Arrays],
    *,
    target: float = DEFAULT_TARGET,
    margin: float = 0.0,
    risk: RiskControl | None = None,
    metric: str = DEFAULT_METRIC,
    strategy: Strategy | Literal["joint"] = "joint",
    targets: Sequence[float] = TARGETS,
    active: Sequence[int] | None = None,
    model: str = "",
    data: str = "",
    tokenizer: str = "",
    kinds: Sequence[str] = (),
    files: Sequence[str] = (),
    seed: int = 0,
    chunk: int = 128,
) -> ConfidenceExit:
    """Fits one threshold per exit so that a target share of all tokens equals the full model's.

    Args:
      config: the model with its exits; static.
      params: its parameters, canonical or stacked.
      batches: packed held-out batches that the exits were not trained on, or dicts of their fields; the first
        batch is the largest.
      target: wanted share of emitted tokens that equal the full model's greedy choice, on average over
        texts like these, of which about half agree a little less; not read where `risk` states a target.
      margin: agreement beyond the target that the half that chooses thresholds must have, so that text which
        agrees a little less still meets the target; in [0, 1).
      risk: what is to be guaranteed for new text; None = averages only.
      metric: confidence metric; traced.
      strategy: "joint" chooses the thresholds of all exits together, as above; the others choose each exit's
        thresholds by its own tokens, for comparison (`depth.per_exit`). Not read where `risk` is given.
      targets: further targets that the curve shows.
      active: layers of the exits that may be used; the others get a threshold above 1. None = all.
      model: path or name, recorded.
      data: description of the held-out text, recorded.
      tokenizer: fingerprint of the model's tokenizer (`Tokenizer.fingerprint`), recorded beside that of its
        weights; "" = unknown.
      kinds: kind of every token of the vocabulary (`data.token_kinds`), for the policy's `slices`; () = its
        tokens are not told apart by kind.
      files: names of the files that `Batch.sources` numbers, for the policy's `slices`; () = not by file.
      seed: decides which sequences choose thresholds and which measure them.
      chunk: columns of logits alive at once; static.

    Returns:
      ConfidenceExit with the measured curve, and with the slices of the measured tokens on which its
      thresholds agree least. Where no exit can be used within a target's budget of
      disagreements, its thresholds are above 1 (never exit) and the curve's note says so. Where `risk` is
      not achievable, thresholds are above 1, too, and the guarantee says how many more sequences are needed.

    Raises:
      ValueError: the model has no exits, or none with the gate that the metric reads, a target is not in
        (0, 1], a margin is out of range or given beside `risk`, or the text is too short.

    Example:
      ```python
      import jax.numpy as jnp
      import elastic_lm as el
      from elastic_lm.testing import random_params, random_tokens, tiny_config

      config = tiny_config(exits=(2,))
      tokens = random_tokens(config, batch=8, length=17)  # in earnest: `el.data.eval_batches`
      ones = jnp.ones((8, 16), jnp.int32)
      batch = el.data.Batch(tokens[:, :-1], tokens[:, 1:], 1.0 * ones, jnp.cumsum(ones, 1) - 1, ones)

      policy = el.depth.calibrate(config, random_params(config), [batch], target=0.9)
      print(policy.thresholds, policy.measured)
      ```
    """
    if not config.exits:
        raise ValueError("config.exits=(): attach and tune exits first")

    observations = observe(config, params, batches, metric=metric, chunk=chunk)
    policy = fit_thresholds(
        observations,
        target=target,
        margin=margin,
        risk=risk,
        metric=metric,
        strategy=strategy,
        targets=targets,
        active=active,
        seed=seed,
    )
    provenance = _provenance(config, params, policy, model, data, tokenizer)
    if min(policy.thresholds) < NEVER_EXITS:
        scoring = observations.halves(seed)[1]
        scoring = scoring.gated(policy.gates) if policy.gates else scoring
        sliced = exit_slices(scoring, policy.thresholds, kinds=kinds, files=files)
        provenance[SLICES] = sliced.to_json()
    return dataclasses.replace(policy, provenance=provenance)


def fit_thresholds(
    observations: Observations,
    *,
    target: float = DEFAULT_TARGET,
    margin: float = 0.0,
    risk: RiskControl | None = None,
    metric: str,
    strategy: Strategy | Literal["joint"] = "joint",
    targets: Sequence[float] = TARGETS,
    active: Sequence[int] | None = None,
    seed: int = 0,
) -> ConfidenceExit:
    """`calibrate` from observations that exist already; the arguments mean the same there."""
    require(0 <= margin < 1, "margin", margin, "must be a share of tokens, from 0 to below 1")
    require(not (margin and risk), "margin", margin, "is not part of a guarantee; leave one of them out")
    target = risk.target if risk else target
    targets = sorted({target, *targets})
    for value in targets:
        if not 0 < value <= 1:
            raise ValueError(f"target={value}: must be a share in (0, 1]")
    layers = observations.layers
    if set(active or ()) - set(layers):
        raise ValueError(f"active={tuple(active or ())}: the model has exits after layers {layers}")
    used = [i for i, layer in enumerate(layers) if active is None or layer in active]
    depths = [*(layers[i] for i in used), observations.n_layers]

    # Gates come first: thresholds are chosen on the tokens whose heads are read with these gates.
    gates = choose_gates(observations.halves(seed)[0], used, depths, target)
    selection, scoring = observations.gated(gates).halves(seed)

    confidence, agrees = selection.confidence[:, used], selection.agrees[:, used]
    asked = {value: min(1.0, value + margin) for value in targets}
    if strategy == "joint":
        found = choose_thresholds(confidence, agrees, depths, sorted(set(asked.values())))
    else:
        found = {value: exit_thresholds(confidence, agrees, value, strategy) for value in asked.values()}
    chosen = {value: found[more] for value, more in asked.items()}
    points = {
        value: _measure(scoring, value, _of_all_exits(chosen[value], used, len(layers)), metric)
        for value in targets
    }

    guarantee = None
    if risk:
        thresholds, guarantee = control(selection, scoring, risk, used)
        point = _measure(scoring, target, thresholds, metric)
        points[target] = dataclasses.replace(point, note=guarantee.statement)

    return ConfidenceExit(
        metric=metric,
        thresholds=points[target].thresholds,
        layers=layers,
        target=target,
        curve=tuple(points.values()),
        gates=gates if any(gates) else (),
        guarantee=guarantee,
        provenance={
            "selection_tokens": selection.tokens,
            "scoring_tokens": scoring.tokens,
            "sequences": len(set(observations.sequence.tolist())),
            "seed": seed,
            "margin": margin,
        },
    )


def choose_gates(
    selection: Observations, used: Sequence[int], depths: Sequence[int], target: float, kept: float = 0.98
) -> tuple[float, ...]:
    """How much each exit's gate must give for its vocabulary head to be read.

    The gates are as high as they can be while a share `kept` of the tokens that would leave at the exit, were
    every head read, still passes. A gate that stays shut by mistake costs depth, never agreement, because
    thresholds are chosen with the gates in place. One target decides for the whole curve, so that its lower
    targets are deeper than they could be.

    Args:
      selection: the sequences that choose.
      used: indices of the exits in use.
      depths: their layers, then those of the full model.
      target: agreement that the tokens that leave are chosen for.
      kept: share of them that the gate must let through.

    Returns:
      One number in [0, 1] per exit; 0 where an exit has no gate, or nothing leaves there.
    """
    gates = [0.0] * len(selection.layers)
    if selection.gate is None or not selection.gate.any():
        return tuple(gates)

    confidence, agrees = selection.confidence[:, used], selection.agrees[:, used]
    thresholds = choose_thresholds(confidence, agrees, depths, [target])[target]
    for i, threshold in zip(used, thresholds, strict=True):
        leaving = selection.gate[selection.confidence[:, i] >= threshold, i]
        if len(leaving):
            gates[i] = float(np.quantile(leaving, 1 - kept))
    return tuple(gates)


def _of_all_exits(thresholds: Sequence[float], used: Sequence[int], exits: int) -> tuple[float, ...]:
    """Thresholds of all exits from those in use; the others never fire."""
    by_exit = dict(zip(used, thresholds, strict=True))
    return tuple(by_exit.get(i, NEVER_EXITS) for i in range(exits))


def _measure(
    scoring: Observations, target: float, thresholds: tuple[float, ...], metric: str
) -> CalibrationPoint:
    """The curve's point of a target."""
    depths = (*scoring.layers, scoring.n_layers)
    outcome = exit_outcome(scoring.confidence, scoring.agrees, depths, thresholds)

    note = ""
    if min(thresholds) >= NEVER_EXITS:
        note = "no exit can be used at this target: every token takes the full depth"
    elif _is_surely_below(scoring, thresholds, target):
        note = (
            "measured agreement is below the target by more than chance explains: use more held-out text, a "
            "margin, or a higher target"
        )

    return CalibrationPoint(
        target=target,
        thresholds=thresholds,
        agreement=outcome.agreement,
        mean_layers=outcome.mean_layers,
        shares=outcome.shares,
        note=note,
        looked=_shares_of_heads_read(scoring, thresholds, metric),
    )


def _is_surely_below(scoring: Observations, thresholds: tuple[float, ...], target: float) -> bool:
    """Whether chance does not explain that these tokens agree less than the target asks for."""
    right = ~token_losses(scoring, thresholds)
    # The half that chose the thresholds errs as much as this one.
    trials = max(1, int(effective_trials(right, scoring.sequence) / 2))
    agreement = float(right.mean())
    return agreement < target and clopper_pearson(round(agreement * trials), trials, EPSILON) < target


def _shares_of_heads_read(
    scoring: Observations, thresholds: tuple[float, ...], metric: str
) -> tuple[float, ...]:
    """Share of tokens for which each exit's vocabulary head is read, as `decode.exit_check` decides."""
    chosen = emitting_exit(scoring.confidence, thresholds)
    shares = []
    for j, threshold in enumerate(thresholds):
        confidence = scoring.confidence[:, j]
        # A metric of logits needs the head of every token whose gate is open (the others are below 0).
        # A metric that reads no logits is compared with the threshold before the head is read.
        passing = confidence >= (0.0 if metric in LOGIT_METRICS else threshold)
        shares.append(float(np.mean((chosen >= j) & passing)) if threshold <= 1 else 0.0)
    return tuple(shares)


def _provenance(
    config: ModelConfig, params: Params, policy: ConfidenceExit, model: str, data: str, tokenizer: str
) -> dict[str, Any]:
    """Where a policy comes from; `policy.provenance` holds its counts of tokens."""
    shape = {field: getattr(config, field) for field in MODEL_SHAPE}
    parts = {"weights": weights_fingerprint(params), "tokenizer": tokenizer}
    return {
        "model": {"path": model, "config_sha256": config_digest(config), **shape, **parts},
        "data": {"description": data, **policy.provenance},
        "guarantee": policy.guarantee.statement if policy.guarantee else NO_GUARANTEE,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": recorded_versions(),
    }


def config_digest(config: ModelConfig) -> str:
    """The SHA-256 digest of a model's config, in hexadecimal."""
    return hashlib.sha256(json.dumps(to_dict(config), sort_keys=True).encode()).hexdigest()
