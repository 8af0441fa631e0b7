"""An exit policy for every width: each sub-network leaves by the thresholds that were calibrated on it."""

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path

from elastic_lm.config.checks import require, require_type
from elastic_lm.config.model import ModelConfig
from elastic_lm.config.parse import from_dict
from elastic_lm.config.subnet import Subnet
from elastic_lm.depth.confidence import NEVER_EXITS
from elastic_lm.depth.policies import ConfidenceExit, ExitPolicy, on_subnet


@dataclasses.dataclass(frozen=True)
class SubnetExits:
    """Thresholds per sub-network, for a sampler that serves several of them.

    A sub-network that none was calibrated on runs at full depth: thresholds of another width promise nothing
    about it. What a guarantee says holds for its own sub-network, compared with itself at full depth.

    Attributes:
      policies: one per sub-network, in terms of the whole model, as `calibrate --subnet` writes them.
      whole: the policy of the whole model; None = full depth.

    Raises:
      ValueError: there is no policy, they are of different metrics, or one was calibrated on another part.

    Example:
      ```python
      import elastic_lm as el
      from elastic_lm.testing import random_params, tiny_config

      config = tiny_config(exits=(1, 3))
      half, quarter = (el.Subnet.uniform(config, mlp=share) for share in (0.5, 0.25))
      exits = el.depth.SubnetExits(
          {half: el.ConfidenceExit("max_prob", (0.5, 0.4), layers=(1, 3))},
          whole=el.ConfidenceExit("max_prob", (0.9, 0.8), layers=(1, 3)),
      )
      sampler = el.Sampler(el.Decoder(config), random_params(config), exit=exits)
      early = sampler.sample([1, 2, 3], max_new_tokens=4, subnet=half)
      full = sampler.sample([1, 2, 3], max_new_tokens=4, subnet=quarter)
      assert full.exit_layers == [4] * 4
      ```
    """

    policies: Mapping[Subnet, ConfidenceExit]
    whole: ConfidenceExit | None = None

    def __post_init__(self) -> None:
        require_type("policies", self.policies, Mapping)
        require(bool(self.policies), "policies", self.policies, "give one policy per sub-network")
        all_of_them = [*self.policies.values(), *([self.whole] if self.whole else [])]
        metrics = sorted({policy.metric for policy in all_of_them})
        require(len(metrics) == 1, "policies", metrics, "must have one metric; calibrate them alike")
        for subnet, policy in self.policies.items():
            theirs = calibrated_part(policy)
            fix = f"was calibrated on {theirs}; calibrate on this one"
            require(theirs is None or theirs == subnet, "policies", subnet, fix)

    @classmethod
    def load(cls, files: Iterable[str | Path], *, whole: str | Path | None = None) -> "SubnetExits":
        """Reads what `calibrate --subnet` and `calibrate --budget` have written, one file per sub-network.

        Args:
          files: of thresholds, each of another sub-network.
          whole: file of the whole model's thresholds; None = it runs at full depth.

        Raises:
          ValueError: a file is not about a sub-network, two are about the same, or one is no policy.
        """
        policies: dict[Subnet, ConfidenceExit] = {}
        for file in files:
            policy = ConfidenceExit.load(file)
            subnet = calibrated_part(policy)
            fix = "is not about a sub-network; calibrate one with --subnet or --budget, or give it as whole"
            if subnet is None:
                raise ValueError(f"{file}: {fix}")
            require(subnet not in policies, str(file), subnet, "is that of another file; leave one out")
            policies[subnet] = policy
        return cls(policies, None if whole is None else ConfidenceExit.load(whole))

    @property
    def metric(self) -> str:
        """That of all policies."""
        return next(iter(self.policies.values())).metric

    @property
    def thresholds(self) -> tuple[float, ...]:
        """Those of the whole model."""
        if self.whole is not None:
            return self.whole.thresholds
        return (NEVER_EXITS,) * len(next(iter(self.policies.values())).layers)

    @property
    def gates(self) -> tuple[float, ...]:
        """Those of the whole model."""
        return () if self.whole is None else self.whole.gates

    def check(self, config: ModelConfig) -> None:
        """Checks that all policies and sub-networks are those of a model.

        Args:
          config: the whole model with its exits.

        Raises:
          ValueError: names what differs.
        """
        for subnet, policy in self.policies.items():
            subnet.check(config)
            policy.check(config)
        if self.whole is not None:
            self.whole.check(config)

    def on_subnet(self, config: ModelConfig, subnet: Subnet) -> ExitPolicy | None:
        """The policy of a sub-network; None = full depth.

        Args:
          config: the whole model.
          subnet: of it.
        """
        return on_subnet(self.policies.get(subnet), config, subnet)


def calibrated_part(policy: ConfidenceExit) -> Subnet | None:
    """The sub-network that a policy was calibrated on; None = the whole model, or it is not known."""
    written = policy.calibrated_on.get("subnet")
    return from_dict(Subnet, written, "subnet.") if isinstance(written, Mapping) else None
