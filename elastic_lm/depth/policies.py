"""When a token leaves: what a sampler asks of an exit policy, and the policies of this package.

A policy is a confidence metric and one threshold t_j per exit j:

    ConfidenceExit: token i leaves at the first exit with confidence c_j >= t_j, else at full depth
    StaticExit:     every token leaves after layer l: t = 0 for its exit, never for the others
    DecayedExit:    t_j(i) = t_j (0.9 + 0.1 exp(-tau i / N))                  (CALM, arXiv 2207.07061)
    DepthSchedule:  token i leaves at the first exit at or above depth d(i),
                    d(i) = first + (last - first) i / (N - 1)                 (SkipDecode, arXiv 2307.02628)

with i = 0 .. N - 1 the index of an emitted token and N the tokens asked for. A schedule of depths gives all
rows of a batch that run in step the same depth, so that none waits for another.

A new policy is a class with the members of `ExitPolicy` and, where thresholds depend on the position or exits
have gates, those of `PositionPolicy` or `GatedPolicy`. A policy of your own needs no change of the package.
"""

import dataclasses
import json
import math
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from elastic_lm.config.checks import require, require_types
from elastic_lm.config.model import ModelConfig
from elastic_lm.config.parse import from_dict, parse_json
from elastic_lm.config.subnet import Subnet
from elastic_lm.depth.confidence import NEVER_EXITS, metric_index
from elastic_lm.depth.guarantee import Guarantee
from elastic_lm.depth.observations import check_gates
from elastic_lm.files.atomic import write_text_whole
from elastic_lm.files.fingerprints import differing_parts
from elastic_lm.files.remote import fetched
from elastic_lm.report.slices import FailureSlices

FORMAT = "elastic_lm thresholds 1"
SLICES = "slices"  # of `ConfidenceExit.provenance`: where the thresholds agree least
MODEL_SHAPE = ("n_layers", "d_model", "vocab_size")  # what has to match between a file and a model


class ExitPolicy(Protocol):
    """What a sampler asks of a policy: a metric, and one threshold per exit.

    Example:
      ```python
      import elastic_lm as el
      from elastic_lm.testing import random_params, tiny_config


      class FirstExit:
          metric = None  # thresholds are 0 or never reached, so that no confidence is needed
          thresholds = (0.0, 2.0)

          def check(self, config):
              if len(config.exits) != 2:
                  raise ValueError(f"config.exits={config.exits}: this policy is for two exits")


      policy: el.depth.ExitPolicy = FirstExit()
      config = tiny_config(exits=(1, 3))
      sampler = el.Sampler(el.Decoder(config), random_params(config), exit=policy)
      ```
    """

    @property
    def metric(self) -> str | None:
        """The confidence metric; None = all thresholds are 0 or never reached, whatever the metric."""
        ...

    @property
    def thresholds(self) -> tuple[float, ...]:
        """One threshold per exit, in order of depth; 0 always exits, above 1 never does."""
        ...

    def check(self, config: ModelConfig) -> None:
        """Raises ValueError if the policy does not fit the model's exits."""
        ...


def require_policy(field: str, value: object) -> None:
    """`require` that a value is an exit policy, or None for full depth."""
    asked = ("metric", "thresholds", "check")
    right = value is None or (not isinstance(value, type) and all(hasattr(value, name) for name in asked))
    require(right, field, value, "must be a policy such as el.ConfidenceExit, or None for full depth")


@runtime_checkable
class PositionPolicy(Protocol):
    """A policy whose thresholds depend on how many tokens have been emitted."""

    def schedule(self, count: int) -> np.ndarray:
        """[J, count] thresholds of each emitted token."""
        ...


@runtime_checkable
class GatedPolicy(Protocol):
    """A policy that reads an exit's vocabulary head only if the exit's gate is sure enough."""

    @property
    def gates(self) -> tuple[float, ...]:
        """Per exit, the lowest probability of its gate at which the head is read; () = always."""
        ...


@runtime_checkable
class SubnetPolicy(Protocol):
    """A policy that knows itself what it is on each sub-network (`depth.subnet_exits`)."""

    def on_subnet(self, config: ModelConfig, subnet: Subnet) -> ExitPolicy | None:
        """What it is on a sub-network of the whole model, `config`; None = full depth."""
        ...


@dataclasses.dataclass(frozen=True)
class CalibrationPoint:
    """The result of one target on held-out tokens that were not used to choose the thresholds."""

    target: float  # wanted share of tokens equal to the full model's
    thresholds: tuple[float, ...]  # one per exit
    agreement: float  # measured share of tokens equal to the full model's
    mean_layers: float  # mean depth at which tokens were emitted
    shares: tuple[float, ...]  # share of tokens emitted at each exit, then at full depth
    note: str = ""  # what a reader should know about this point
    looked: tuple[float, ...] = ()  # share of tokens for which each exit's head is read; () = not measured


@dataclasses.dataclass(frozen=True)
class ConfidenceExit:
    """A token leaves at the first exit whose confidence is at least the exit's threshold.

    Raises:
      ValueError: the metric does not exist, a number is out of its range, or there is not one per exit.

    Example:
      ```python
      import elastic_lm as el
      from elastic_lm.testing import tiny_config

      policy = el.ConfidenceExit("margin", thresholds=(0.9, 0.7), layers=(1, 3))
      policy.check(tiny_config(exits=(1, 3)))
      ```
    """

    metric: str  # one of `METRICS`
    thresholds: tuple[float, ...]  # one per exit; 0 always exits, above 1 never does
    layers: tuple[int, ...]  # the exits' layers, in increasing order
    target: float | None = None  # agreement with the full model that the thresholds were chosen for
    curve: tuple[CalibrationPoint, ...] = ()  # measured targets, in increasing order
    gates: tuple[float, ...] = ()  # least that each exit's gate must give for its head to be read; () = 0
    guarantee: Guarantee | None = None  # what holds for `thresholds` on new text; None = averages only
    provenance: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # model, data, date, versions

    def __post_init__(self) -> None:
        require_types(self)
        metric_index(self.metric)
        shape = self.provenance.get("model", {})
        fix = "must be a mapping like {'n_layers': 12}"
        require(isinstance(shape, Mapping), "provenance.model", shape, fix)
        if len(self.thresholds) != len(self.layers):
            raise ValueError(f"thresholds={self.thresholds}: needs one per exit, after layers {self.layers}")
        if not all(math.isfinite(t) and t >= 0 for t in self.thresholds):
            raise ValueError(f"thresholds={self.thresholds}: must be finite and at least 0 (above 1 = never)")

        if len(self.gates) not in (0, len(self.layers)):
            raise ValueError(f"gates={self.gates}: needs one per exit, after layers {self.layers}, or none")
        if not all(math.isfinite(g) and g >= 0 for g in self.gates):
            raise ValueError(f"gates={self.gates}: must be finite and at least 0 (0 = always open)")

    def check(self, config: ModelConfig) -> None:
        """Checks that this policy fits a model's exits.

        Args:
          config: the model with its exits.

        Raises:
          ValueError: names what differs: the exits' layers, their gates where the policy reads them, or
            the shape of the model that the thresholds were fitted on.
        """
        layers = tuple(e.layer for e in config.exits)
        if layers != self.layers:
            raise ValueError(
                f"thresholds are for exits after layers {self.layers}, the model has {layers or 'none'}: "
                "calibrate on this model"
            )

        check_gates(config, self.metric)
        gateless = [e.layer for e, gate in zip(config.exits, self.gates, strict=False) if gate and not e.gate]
        if gateless:
            raise ValueError(
                f"gates={self.gates}: the exits after layers {gateless} have none; calibrate on this model"
            )

        recorded = self.calibrated_on
        for field in MODEL_SHAPE:
            if field in recorded and recorded[field] != getattr(config, field):
                raise ValueError(
                    f"thresholds were fitted on a model with {field}={recorded[field]}, this one has "
                    f"{field}={getattr(config, field)}: calibrate on this model"
                )

    @property
    def calibrated_on(self) -> Mapping[str, Any]:
        """What is recorded of the model that the thresholds were fitted on: its path and fingerprints."""
        return self.provenance.get("model", {})

    def warn_other_model(self, weights: str, tokenizer: str = "") -> None:
        """Warns where the thresholds were fitted on other weights or another tokenizer of the same shape.

        Args:
          weights: fingerprint of the model that the policy is used with (`weights_fingerprint`).
          tokenizer: fingerprint of its tokenizer; "" = is not compared.
        """
        recorded = self.calibrated_on
        if not recorded.get("weights"):
            return
        other = differing_parts(recorded, {"weights": weights, "tokenizer": tokenizer})
        if other:
            warnings.warn(
                f"exit: the thresholds were fitted on {recorded.get('path') or 'another model'}, whose "
                f"{other} differ from this model's: calibrate on this model, or use policy.for_any_weights()",
                stacklevel=4,
            )

    def for_any_weights(self) -> "ConfidenceExit":
        """The same policy, which no longer says on which weights and tokenizer it was fitted."""
        if not self.calibrated_on:
            return self
        model = {k: v for k, v in self.calibrated_on.items() if k not in ("weights", "tokenizer")}
        return dataclasses.replace(self, provenance={**self.provenance, "model": model})

    def at(self, target: float) -> "ConfidenceExit":
        """The same policy for another target of its curve; guarantee and slices stay with their thresholds.

        Args:
          target: wanted share of tokens equal to the full model's, one of those in `curve`.

        Returns:
          The policy with the thresholds of that point.

        Raises:
          ValueError: the curve does not have this target.
        """
        for point in self.curve:
            if math.isclose(point.target, target):
                if point.thresholds == self.thresholds:
                    return dataclasses.replace(self, target=point.target)
                provenance = {k: v for k, v in self.provenance.items() if k != SLICES}
                return dataclasses.replace(
                    self,
                    target=point.target,
                    thresholds=point.thresholds,
                    guarantee=None,
                    provenance=provenance,
                )

        known = ", ".join(f"{p.target:g}" for p in self.curve) or "none"
        raise ValueError(f"target={target}: the curve has {known}; calibrate with this target")

    @property
    def slices(self) -> FailureSlices | None:
        """Where the thresholds agree least, on the text that measured them; None = it was not recorded."""
        content = self.provenance.get(SLICES)
        return None if content is None else FailureSlices.from_json(content)

    @property
    def measured(self) -> CalibrationPoint | None:
        """The curve's point of this policy's own target; None = the thresholds were not calibrated."""
        return next((p for p in self.curve if p.target == self.target), None)

    def save(self, path: str | Path) -> None:
        """Writes the policy as JSON; a crash never leaves half a file."""
        content = {"format": FORMAT, **dataclasses.asdict(self)}
        write_text_whole(path, json.dumps(content, indent=2) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> "ConfidenceExit":
        """Reads a policy from a thresholds file.

        Args:
          path: a file that `save` or `elastic-lm calibrate` wrote.

        Returns:
          The policy; `check` says whether it fits a model.

        Raises:
          FileNotFoundError: there is no such file.
          ValueError: the file is not JSON, not a thresholds file, or holds values out of range.
        """
        path = fetched(path)
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such thresholds file; `elastic-lm calibrate` writes one")

        try:
            content = parse_json(path.read_text(encoding="utf-8"))
            if not isinstance(content, dict) or content.pop("format", None) != FORMAT:
                raise ValueError(f'"format" is not "{FORMAT}"')
            curve = content.get("curve", [])
            require(isinstance(curve, list), "curve", curve, "must be a list of calibrated targets")
            points = tuple(from_dict(CalibrationPoint, p, "curve.") for p in content.pop("curve", []))
            return from_dict(cls, {**content, "curve": points})
        except (ValueError, TypeError, AttributeError) as error:
            raise ValueError(f"{path}: not a usable thresholds file ({error}); calibrate again") from error


@dataclasses.dataclass(frozen=True)
class StaticExit:
    """Every token leaves after the same layer.

    Example:
      ```python
      import elastic_lm as el

      policy = el.StaticExit(layer=3, layers=(1, 3))
      assert policy.thresholds == (2.0, 0.0)  # never at the first exit, always at the second
      ```
    """

    layer: int  # an exit of the model, or its last layer
    layers: tuple[int, ...]  # the model's exits

    def __post_init__(self) -> None:
        require_types(self)

    @property
    def metric(self) -> None:
        """None: no confidence is needed."""
        return None

    @property
    def thresholds(self) -> tuple[float, ...]:
        """0 for the chosen exit, never for the others."""
        return tuple(0.0 if layer == self.layer else NEVER_EXITS for layer in self.layers)

    def check(self, config: ModelConfig) -> None:
        """Raises ValueError if the model has other exits, or none after this layer."""
        check_layers(self.layers, config)
        if self.layer not in (*self.layers, config.n_layers):
            raise ValueError(
                f"layer={self.layer}: the model has exits after layers {self.layers}, and "
                f"{config.n_layers} layers"
            )


@dataclasses.dataclass(frozen=True)
class DecayedExit:
    """Thresholds that fall as text is emitted, because early errors spoil more of it (CALM).

    What the base was calibrated for, or guarantees, holds for its own thresholds and not for lower ones.
    Paper: arXiv 2207.07061.

    Raises:
      ValueError: `tau` is negative or infinite.

    Example:
      ```python
      import elastic_lm as el

      base = el.ConfidenceExit("margin", thresholds=(0.8,), layers=(2,))
      policy = el.DecayedExit(base, tau=4.0)
      policy.schedule(3)  # [[0.8, 0.741, 0.726]]: one row per exit, one column per token
      ```
    """

    base: ExitPolicy  # thresholds at the first token
    tau: float = 4.0  # how fast they fall towards 0.9 of that

    def __post_init__(self) -> None:
        require_types(self)
        require_policy("base", self.base)
        require(self.base is not None, "base", None, "name the policy whose thresholds fall")
        if not 0 <= self.tau < np.inf:
            raise ValueError(f"tau={self.tau}: must be at least 0 and finite")

    @property
    def metric(self) -> str | None:
        """The metric of the base."""
        return self.base.metric

    @property
    def gates(self) -> tuple[float, ...]:
        """The gates of the base, which do not fall."""
        return self.base.gates if isinstance(self.base, GatedPolicy) else ()

    @property
    def thresholds(self) -> tuple[float, ...]:
        """The thresholds of the first token."""
        return self.base.thresholds

    def check(self, config: ModelConfig) -> None:
        """Raises ValueError if the base does not fit the model's exits."""
        self.base.check(config)

    def schedule(self, count: int) -> np.ndarray:
        """[J, count] thresholds; an exit that never fires at first never fires later."""
        first = np.asarray(self.base.thresholds, np.float64)[:, None]
        fallen = first * (0.9 + 0.1 * np.exp(-self.tau * np.arange(count) / count))
        return np.where(first > 1, NEVER_EXITS, fallen)


@dataclasses.dataclass(frozen=True)
class DepthSchedule:
    """One depth per emitted token, the same for every text, from `first` down to `last` (SkipDecode).

    Paper: SkipDecode, arXiv 2307.02628.

    Raises:
      ValueError: the depths rise, or are below 1.

    Example:
      ```python
      import elastic_lm as el

      policy = el.DepthSchedule(first=4, last=1, layers=(1, 3))
      policy.schedule(3)  # full depth, then the exit after layer 3, then the exit after layer 1
      ```
    """

    first: float  # layers of the first emitted token
    last: float  # layers of the last one, at most `first`
    layers: tuple[int, ...]  # the model's exits

    def __post_init__(self) -> None:
        require_types(self)
        if not 1 <= self.last <= self.first < math.inf:
            raise ValueError(f"first={self.first}, last={self.last}: depths fall, and are at least 1")

    @property
    def metric(self) -> None:
        """None: no confidence is needed."""
        return None

    @property
    def thresholds(self) -> tuple[float, ...]:
        """The thresholds of the first token."""
        return tuple(self.schedule(1)[:, 0].tolist())

    def check(self, config: ModelConfig) -> None:
        """Raises ValueError if the model has other exits, or fewer layers than `first`."""
        check_layers(self.layers, config)
        if self.first > config.n_layers:
            raise ValueError(f"first={self.first}: the model has {config.n_layers} layers")

    def schedule(self, count: int) -> np.ndarray:
        """[J, count] thresholds: 0 for the exits at or above the depth, never for those below."""
        depth = self.first + (self.last - self.first) * np.arange(count) / max(count - 1, 1)
        return np.where(np.asarray(self.layers)[:, None] >= depth, 0.0, NEVER_EXITS)


def on_subnet(policy: ExitPolicy | None, config: ModelConfig, subnet: Subnet) -> ExitPolicy | None:
    """What a policy is on a sub-network.

    Exits whose layer is kept keep their thresholds, although what was measured or guaranteed for these is
    about the whole model.

    Args:
      policy: of the whole model, checked; None = full depth.
      config: the whole model.
      subnet: of it.

    Returns:
      The policy of the exits that are left below the sub-network's last layer; None = full depth.

    Raises:
      ValueError: every token is to leave at an exit that is gone.
    """
    if policy is None:
        return None
    if isinstance(policy, SubnetPolicy):
        return policy.on_subnet(config, subnet)

    exits = subnet.exits(config)
    layers = tuple(old.layer for old, _ in exits)
    if isinstance(policy, StaticExit) and policy.layer not in (*layers, config.n_layers):
        raise ValueError(
            f"exit.layer={policy.layer}: the sub-network leaves that layer and its exit out; of the model's "
            f"exits it has those after layers {layers or 'none'}"
        )

    # An exit right after the sub-network's last layer is never asked: the model's own head follows there.
    cutting = [old for old, new in exits if new.layer < len(subnet.layers)]
    return KeptExits(policy, tuple(config.exits.index(e) for e in cutting))


@dataclasses.dataclass(frozen=True)
class KeptExits:
    """A policy of a model on a sub-network that lacks some of its exits; the others keep their thresholds."""

    base: ExitPolicy  # of the whole model
    kept: tuple[int, ...]  # which of the whole model's exits are left, counted from 0

    @property
    def metric(self) -> str | None:
        """The metric of the base."""
        return self.base.metric

    @property
    def gates(self) -> tuple[float, ...]:
        """The base's gates of the exits that are left."""
        row = gate_row(self.base, 1 + max(self.kept, default=-1))
        return tuple(float(row[i]) for i in self.kept)

    @property
    def thresholds(self) -> tuple[float, ...]:
        """The thresholds of the first token."""
        return tuple(self.schedule(1)[:, 0].tolist())

    def check(self, config: ModelConfig) -> None:
        """Raises ValueError if the base does not fit the exits of the whole model, `config`."""
        self.base.check(config)

    def schedule(self, count: int) -> np.ndarray:
        """[J, count] thresholds of the exits that are left."""
        table = threshold_table(self.base, 1 + max(self.kept, default=-1), count)
        return table[np.asarray(self.kept, int)]


def threshold_table(policy: ExitPolicy | None, exits: int, count: int) -> np.ndarray:
    """The thresholds of each emitted token.

    Args:
      policy: None = full depth.
      exits: J, exits of the model; those that the policy does not know never fire.
      count: tokens asked for.

    Returns:
      [J, count] float32.
    """
    table = np.full((exits, count), NEVER_EXITS, np.float32)
    if isinstance(policy, PositionPolicy):
        known = policy.schedule(count)[:exits]
        table[: len(known)] = known
    elif policy is not None:
        known = policy.thresholds[:exits]
        table[: len(known)] = np.asarray(known, np.float32)[:, None]
    return table


def gate_row(policy: ExitPolicy | None, exits: int) -> np.ndarray:
    """The thresholds of the gates.

    Args:
      policy: None, or without gates = every head is read.
      exits: J, exits of the model.

    Returns:
      [J] float32; 0 = the head is always read.
    """
    gates = policy.gates[:exits] if isinstance(policy, GatedPolicy) else ()
    return np.asarray([*gates, *[0.0] * (exits - len(gates))], np.float32)


def check_layers(layers: tuple[int, ...], config: ModelConfig) -> None:
    """Raises ValueError if these are not the layers of the model's exits."""
    found = tuple(e.layer for e in config.exits)
    if found != layers:
        raise ValueError(f"layers={layers}: the model has exits after layers {found or 'none'}")
