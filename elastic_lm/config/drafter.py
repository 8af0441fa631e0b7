"""What drafts for a model in lossless decoding: a sub-network, whose layers may lack one of their halves."""

import dataclasses

from elastic_lm.config.checks import require, require_type
from elastic_lm.config.model import ModelConfig
from elastic_lm.config.subnet import Ints, Subnet


@dataclasses.dataclass(frozen=True)
class Drafter:
    """A sub-network that drafts, and the attention and MLP blocks that it leaves out beside whole layers.

    Frozen, hashable and static under jit. Layers are counted from 0 in the whole model.

    Attributes:
      subnet: layers and sizes.
      no_attention: layers of the sub-network whose attention is left out, in increasing order.
      no_mlp: layers of the sub-network whose MLP is left out, in increasing order.

    Raises:
      ValueError: a layer is not one of the sub-network, or has neither attention nor MLP.

    Example:
      ```python
      import elastic_lm as el
      from elastic_lm.testing import random_params, tiny_config

      config = tiny_config()
      drafter = el.Drafter(el.Subnet.uniform(config, layers=(0, 1, 3)), no_attention=(1,))
      sampler = el.Sampler(el.Decoder(config), random_params(config), lossless=True, drafter=drafter)
      sample = sampler.sample([1, 2, 3], max_new_tokens=8)
      print(sample.tokens, sample.stats.drafted, sample.stats.accepted)
      ```
    """

    subnet: Subnet
    no_attention: Ints = ()
    no_mlp: Ints = ()

    def __post_init__(self) -> None:
        require_type("drafter.subnet", self.subnet, Subnet)
        for name in ("no_attention", "no_mlp"):
            layers = getattr(self, name)
            field = f"drafter.{name}"
            require_type(field, layers, tuple)
            right = list(layers) == sorted(set(layers)) and set(layers) <= set(self.subnet.layers)
            fix = f"must be some of the sub-network's layers {self.subnet.layers}, in increasing order"
            require(right, field, layers, fix)
        nothing = sorted(set(self.no_attention) & set(self.no_mlp))
        fix = f"layers {nothing} have no attention either; leave them out of subnet.layers"
        require(not nothing, "drafter.no_mlp", self.no_mlp, fix)

    @classmethod
    def of(cls, found: "Drafter | Subnet") -> "Drafter":
        """A drafter as it is, or one whose layers are those of a sub-network."""
        return found if isinstance(found, Drafter) else cls(found)

    def check(self, config: ModelConfig) -> None:
        """Checks that this drafts for a model.

        Args:
          config: the whole model.

        Raises:
          ValueError: the sub-network is none of the model; names what does not fit.
        """
        try:
            self.subnet.check(config)
        except ValueError as error:
            raise ValueError(f"drafter: {error}") from None
