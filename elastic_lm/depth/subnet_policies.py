"""Exit policies that were calibrated on a sub-network, told in terms of the whole model that it is part of.

A sampler knows the whole model and serves its sub-networks (`policies.on_subnet`), so that a policy's file is
about the whole model: exits that the sub-network lacks get a threshold that no confidence reaches.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from elastic_lm.config.model import ModelConfig
from elastic_lm.config.parse import from_dict, to_dict
from elastic_lm.config.subnet import Subnet
from elastic_lm.depth.calibration import config_digest
from elastic_lm.depth.policies import MODEL_SHAPE, CalibrationPoint, ConfidenceExit
from elastic_lm.depth.threshold_search import NEVER_EXITS

T = TypeVar("T")


def of_whole_model(
    policy: ConfidenceExit, config: ModelConfig, subnet: Subnet, *, weights: str
) -> ConfidenceExit:
    """The same policy for a sampler of the whole model that serves the sub-network.

    Mean layers and agreement stay those of the sub-network, compared with itself at full depth. What is
    recorded of the model is that of the whole one, with the sub-network beside it.

    Args:
      policy: calibrated on the exits of the sub-network that lie below its last layer.
      config: the whole model.
      subnet: of it.
      weights: fingerprint of the whole model's weights.
    """
    kept = [old for old, new in subnet.exits(config) if new.layer < len(subnet.layers)]
    places = [config.exits.index(exit_) for exit_ in kept]

    def spread(values: Sequence[float], missing: float) -> tuple[float, ...]:
        found = [missing] * len(config.exits)
        for place, value in zip(places, values, strict=True):
            found[place] = value
        return tuple(found)

    def point(of: CalibrationPoint) -> CalibrationPoint:
        *shares, full = of.shares
        return dataclasses.replace(
            of,
            thresholds=spread(of.thresholds, NEVER_EXITS),
            shares=(*spread(shares, 0.0), full),
            looked=spread(of.looked, 0.0) if of.looked else (),
        )

    model: dict[str, Any] = dict(policy.calibrated_on)
    model |= {field: getattr(config, field) for field in MODEL_SHAPE}
    model |= {"config_sha256": config_digest(config), "weights": weights, "subnet": to_dict(subnet)}
    return dataclasses.replace(
        policy,
        thresholds=spread(policy.thresholds, NEVER_EXITS),
        layers=tuple(e.layer for e in config.exits),
        curve=tuple(map(point, policy.curve)),
        gates=spread(policy.gates, 0.0) if policy.gates else (),
        provenance={**policy.provenance, "model": model},
    )


def of_slice(
    policy: ConfidenceExit, config: ModelConfig, subnet: Subnet, *, weights: str, path: str
) -> ConfidenceExit:
    """The same policy for the sub-network's slice, which is a model of its own: `of_whole_model` reversed.

    Args:
      policy: of the whole model, calibrated on this sub-network.
      config: the whole model.
      subnet: of it.
      weights: fingerprint of the slice's weights.
      path: of the slice's folder, recorded.

    Raises:
      ValueError: the policy was calibrated on another part of the model.
    """
    written = policy.calibrated_on.get("subnet")
    theirs = from_dict(Subnet, written, "subnet.") if isinstance(written, Mapping) else Subnet.full(config)
    if theirs != subnet:
        what = "a sub-network" if isinstance(written, Mapping) else "the whole model"
        fix = "calibrate with the same --budget or --subnet"
        raise ValueError(f"was calibrated on {what}, not on the part that is written; {fix}")

    small = subnet.sliced(config)
    kept = [config.exits.index(old) for old, _ in subnet.exits(config)]

    def left(values: Sequence[T]) -> tuple[T, ...]:
        return tuple(values[place] for place in kept) if values else ()

    def point(of: CalibrationPoint) -> CalibrationPoint:
        shares = (*left(of.shares[:-1]), of.shares[-1]) if of.shares else ()
        return dataclasses.replace(of, thresholds=left(of.thresholds), shares=shares, looked=left(of.looked))

    model = {key: value for key, value in policy.calibrated_on.items() if key != "subnet"}
    model |= {field: getattr(small, field) for field in MODEL_SHAPE}
    model |= {"path": path, "config_sha256": config_digest(small), "weights": weights}
    return dataclasses.replace(
        policy,
        thresholds=left(policy.thresholds),
        layers=tuple(e.layer for e in small.exits),
        curve=tuple(map(point, policy.curve)),
        gates=left(policy.gates),
        provenance={**policy.provenance, "model": model},
    )


def exits_below_the_end(config: ModelConfig) -> ModelConfig:
    """A sub-network's config without an exit right after its last layer, where its own head follows."""
    return config.with_exits(tuple(e for e in config.exits if e.layer < config.n_layers))
