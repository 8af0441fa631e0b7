"""When a token leaves: what a sampler asks of a policy, and policies that depend on the position.

A policy is a confidence metric and thresholds. `ConfidenceExit` (calibrate.thresholds) has one threshold
per exit. Here are

    StaticExit:     every token leaves after layer l                              t_l = 0, the others never
    DecayedExit:    t_j(i) = t_j (0.9 + 0.1 exp(-tau i / N))                  (CALM, arXiv 2207.07061)
    DepthSchedule:  token i leaves at the first exit at or above depth d(i),
                    d(i) = first + (last - first) i / (N - 1)                 (SkipDecode, arXiv 2307.02628)

with i = 0 .. N - 1 the index of an emitted token and N the tokens asked for. A schedule of depths gives all
rows of a batch that run in step the same depth, so that none waits for another.
"""

import dataclasses
from typing import Protocol, runtime_checkable

import numpy as np

from elastic_lm.calibrate.search import NEVER
from elastic_lm.config import ModelConfig
from elastic_lm.elastic import Subnet


class ExitPolicy(Protocol):
    """What the sampler needs to know about when to exit (`calibrate.thresholds.ConfidenceExit`)."""

    @property
    def metric(self) -> str | None:
        """Confidence metric; None = thresholds 0 and never, which mean the same under any."""
        ...

    @property
    def thresholds(self) -> tuple[float, ...]:
        """One threshold per exit, in order of depth."""
        ...

    def check(self, config: ModelConfig) -> None:
        """Raises ValueError where the policy does not fit the model's exits."""
        ...


@runtime_checkable
class PositionPolicy(Protocol):
    """A policy whose thresholds depend on how many tokens have been emitted."""

    def schedule(self, count: int) -> np.ndarray:
        """[J, count] thresholds of each emitted token."""
        ...


@runtime_checkable
class GatedPolicy(Protocol):
    """A policy that says when an exit's head is looked at."""

    @property
    def gates(self) -> tuple[float, ...]:
        """Per exit, the least that its gate must give; () = every head is looked at."""
        ...


def threshold_table(policy: ExitPolicy | None, exits: int, count: int) -> np.ndarray:
    """Thresholds of each emitted token.

    Args:
      policy: None = full depth.
      exits: J, exits of the model; those that the policy does not know never fire.
      count: tokens asked for.

    Returns:
      [J, count] float32.
    """
    table = np.full((exits, count), NEVER, np.float32)
    if isinstance(policy, PositionPolicy):
        given = policy.schedule(count)
        table[: len(given)] = given[:exits]
    elif policy is not None:
        given = policy.thresholds[:exits]
        table[: len(given)] = np.asarray(given, np.float32)[:, None]
    return table


def gate_row(policy: ExitPolicy | None, exits: int) -> np.ndarray:
    """Thresholds of the gates.

    Args:
      policy: None, or without gates = every head is looked at.
      exits: J, exits of the model.

    Returns:
      [J] float32; 0 = the head is always looked at.
    """
    gates = policy.gates[:exits] if isinstance(policy, GatedPolicy) else ()
    return np.asarray([*gates, *[0.0] * (exits - len(gates))], np.float32)


@dataclasses.dataclass(frozen=True)
class StaticExit:
    """Every token leaves after the same layer."""

    layer: int  # an exit of the model, or its last layer
    layers: tuple[int, ...]  # the model's exits

    @property
    def metric(self) -> None:
        """None: no confidence is looked at."""
        return None

    @property
    def thresholds(self) -> tuple[float, ...]:
        """0 for the chosen exit, never for the others."""
        return tuple(0.0 if layer == self.layer else NEVER for layer in self.layers)

    def check(self, config: ModelConfig) -> None:
        """Raises ValueError where the model has no such exit."""
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
    """

    base: ExitPolicy  # thresholds at the first token
    tau: float = 4.0  # how fast they fall towards 0.9 of that

    def __post_init__(self) -> None:
        if not 0 <= self.tau < np.inf:
            raise ValueError(f"tau={self.tau}: must be at least 0 and finite")

    @property
    def metric(self) -> str | None:
        """Metric of the base."""
        return self.base.metric

    @property
    def gates(self) -> tuple[float, ...]:
        """Gates of the base, which do not fall."""
        return self.base.gates if isinstance(self.base, GatedPolicy) else ()

    @property
    def thresholds(self) -> tuple[float, ...]:
        """Thresholds of the first token."""
        return self.base.thresholds

    def check(self, config: ModelConfig) -> None:
        """As the base."""
        self.base.check(config)

    def schedule(self, count: int) -> np.ndarray:
        """[J, count] thresholds; what never fires at first never does."""
        first = np.asarray(self.base.thresholds, np.float64)[:, None]
        fallen = first * (0.9 + 0.1 * np.exp(-self.tau * np.arange(count) / count))
        return np.where(first > 1, NEVER, fallen)


@dataclasses.dataclass(frozen=True)
class DepthSchedule:
    """One depth per emitted token, the same for every text, from `first` to `last` (SkipDecode)."""

    first: float  # layers of the first emitted token
    last: float  # layers of the last one, at most `first`
    layers: tuple[int, ...]  # the model's exits

    def __post_init__(self) -> None:
        if not 1 <= self.last <= self.first:
            raise ValueError(f"first={self.first}, last={self.last}: depths fall, and are at least 1")

    @property
    def metric(self) -> None:
        """None: no confidence is looked at."""
        return None

    @property
    def thresholds(self) -> tuple[float, ...]:
        """Thresholds of the first token."""
        return tuple(self.schedule(1)[:, 0].tolist())

    def check(self, config: ModelConfig) -> None:
        """Raises ValueError where the model's exits are others, or it is not that deep."""
        check_layers(self.layers, config)
        if self.first > config.n_layers:
            raise ValueError(f"first={self.first}: the model has {config.n_layers} layers")

    def schedule(self, count: int) -> np.ndarray:
        """[J, count] thresholds: 0 for the exits at or above the depth, never for those below."""
        depth = self.first + (self.last - self.first) * np.arange(count) / max(count - 1, 1)
        return np.where(np.asarray(self.layers)[:, None] >= depth, 0.0, NEVER)


@dataclasses.dataclass(frozen=True)
class KeptExits:
    """A policy of a model on a sub-network that lacks some of its exits; the others keep their thresholds."""

    base: ExitPolicy  # of the whole model
    kept: tuple[int, ...]  # which of the whole model's exits are left, counted from 0

    @property
    def metric(self) -> str | None:
        """Metric of the base."""
        return self.base.metric

    @property
    def gates(self) -> tuple[float, ...]:
        """The base's gates of the exits that are left."""
        row = gate_row(self.base, 1 + max(self.kept, default=-1))
        return tuple(float(row[i]) for i in self.kept)

    @property
    def thresholds(self) -> tuple[float, ...]:
        """Thresholds of the first token."""
        return tuple(self.schedule(1)[:, 0].tolist())

    def check(self, config: ModelConfig) -> None:
        """As the base, of the whole model."""
        self.base.check(config)

    def schedule(self, count: int) -> np.ndarray:
        """[J, count] thresholds of the exits that are left."""
        table = threshold_table(self.base, 1 + max(self.kept, default=-1), count)
        return table[np.asarray(self.kept, int)]


def on_subnet(policy: ExitPolicy | None, config: ModelConfig, subnet: Subnet) -> ExitPolicy | None:
    """What a policy is on a sub-network.

    Thresholds of exits whose layer is kept stay as they are: what was measured or guaranteed for them is
    about the whole model.

    Args:
      policy: of the whole model, checked; None = full depth.
      config: the whole model.
      subnet: of it.

    Raises:
      ValueError: every token is to leave at an exit that is gone.
    """
    if policy is None:
        return None
    exits = subnet.exits(config)
    layers = tuple(old.layer for old, _ in exits)
    if isinstance(policy, StaticExit) and policy.layer not in (*layers, config.n_layers):
        raise ValueError(
            f"exit.layer={policy.layer}: the sub-network leaves that layer and its exit out; of the model's "
            f"exits it has those after layers {layers or 'none'}"
        )
    cutting = [old for old, new in exits if new.layer < len(subnet.layers)]
    return KeptExits(policy, tuple(config.exits.index(e) for e in cutting))


def check_layers(layers: tuple[int, ...], config: ModelConfig) -> None:
    """Raises ValueError where these are not the model's exits."""
    own = tuple(e.layer for e in config.exits)
    if own != layers:
        raise ValueError(f"layers={layers}: the model has exits after layers {own or 'none'}")
