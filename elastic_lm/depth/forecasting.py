"""What exits will gain, before anything is timed: bytes of weights read per token at batch size 1.

Exits j = 0 .. J-1 cut the layers into segments j = 0 .. J. With s_j the share of tokens that exit j
emits (s_J: full depth) and r_j = s_j + ... + s_J the share that gets as far as exit j; S_j bytes of
segment j, with what its exit adds to every position; V_j bytes of exit j's vocabulary head and V of the
model's; G_j bytes of exit j's gate:

    full   = sum_j L_j + V                                L_j: the layers of segment j alone
    policy = S_0 + sum_{j >= 1} S_j (1 + x (m_j - 1)) / m_j + sum_{j < J} a_j + r_J V
    m_j    = (1 - (1 - r_j)^W) / r_j                      m_j -> W where r_j -> 0
    a_j    = u_j V_j,  with a gate  r_j G_j + u_j V_j     0 where the exit never fires
             u_j: share of tokens for which the head is read, at most r_j, at least s_j
    speed-up = full / policy

The deep layers of every token still run, so that the cache is the full model's, but m_j positions at a time:
a segment waits until a token needs it, which each does with probability r_j, or until W positions are
pending. A further position of such a tick costs x times the first: 0 where reading weights is all that
counts (accelerators), about a third on CPU for up to four positions. The forecast leaves out keys and values,
sampling, the fixed costs of a step, and that tokens which exit come in runs, so that windows fill more often
than for independent tokens. Exits that are verified, or never recomputed, cost something else.
"""

import dataclasses
import itertools
import math
from collections.abc import Sequence

import flax.linen as nn
import jax

from elastic_lm.config.decoding import WINDOW
from elastic_lm.config.model import ModelConfig
from elastic_lm.depth.policies import CalibrationPoint
from elastic_lm.depth.threshold_search import ExitOutcome
from elastic_lm.models.decoder import Params
from elastic_lm.models.registry import abstract_params

NO_GAIN = 1.02  # forecast speed-ups up to this are within what the model leaves out
GATE_WIDTH = 64  # of the gate that exits without one are compared with
CPU_FURTHER_POSITION = 0.33  # cost of a further position relative to the first on CPU


@dataclasses.dataclass(frozen=True)
class WeightBytes:
    """Bytes of weights; J exits below the last layer, J + 1 segments."""

    segments: tuple[int, ...]  # the layers of each segment, J + 1 of them
    modules: tuple[int, ...]  # block, MLP and norm of each exit, J of them
    heads: tuple[int, ...]  # vocabulary head that each exit reads
    gates: tuple[int, ...]  # gate of each exit; of width GATE_WIDTH where it has none
    final_head: int  # vocabulary head of the full model

    @property
    def full(self) -> int:
        """What the model without exits reads per token."""
        return sum(self.segments) + self.final_head


@dataclasses.dataclass(frozen=True)
class Forecast:
    """Predicted cost of a token, relative to the model without exits.

    Example:
      ```python
      import elastic_lm as el
      from elastic_lm.testing import tiny_config

      weights = el.depth.weight_bytes(tiny_config(exits=(2,)))
      found = el.depth.forecast(weights, shares=(0.7, 0.3), thresholds=(0.9,))
      print(found.verdict, found.segments, found.heads)
      ```
    """

    speedup: float  # full / policy
    segments: float  # share of the full model's bytes that layers and exit modules cost
    heads: float  # the same for vocabulary heads and gates
    check: tuple[float, ...]  # per exit: looking at the vocabulary head once
    gated_check: tuple[float, ...]  # per exit: looking at its gate once (or at one of width GATE_WIDTH)
    pending: tuple[float, ...]  # m_j of each segment but the first: positions per deep tick

    @property
    def verdict(self) -> str:
        """The forecast in words."""
        if self.speedup <= NO_GAIN:
            return "no gain expected"
        return f"about {self.speedup:.2f}x expected"


def forecast(
    weights: WeightBytes,
    shares: Sequence[float],
    thresholds: Sequence[float],
    *,
    looked: Sequence[float] = (),
    gated: bool = False,
    window: int = WINDOW,
    further: float = 0.0,
) -> Forecast:
    """Cost of a token under thresholds, by the equations of this module.

    Args:
      weights: from `weight_bytes`, J exits.
      shares: share of tokens emitted at each exit, then at full depth: J + 1 of them, as in `ExitOutcome`.
      thresholds: J of them; the heads and gates of exits above 1 are never read.
      looked: share of tokens for which each exit's head is read, u_j: J of them; () = all that get there.
      gated: gates are evaluated.
      window: tokens that may wait for their deep layers, W.
      further: cost of a further position of a deep tick relative to the first, x, in [0, 1].

    Returns:
      The forecast; its numbers are relative to the model without exits.

    Raises:
      ValueError: the numbers of exits differ, or window or further is out of range.

    Example:
      ```python
      import elastic_lm as el
      from elastic_lm.testing import tiny_config

      weights = el.depth.weight_bytes(tiny_config(exits=(2,)))
      found = el.depth.forecast(weights, shares=(0.7, 0.3), thresholds=(0.9,), window=8)
      assert found.speedup > 1
      ```
    """
    exits = len(weights.heads)
    if len(shares) != exits + 1 or len(thresholds) != exits:
        raise ValueError(
            f"shares={tuple(shares)}, thresholds={tuple(thresholds)}: the model has {exits} exits below its "
            f"last layer, give {exits + 1} shares and {exits} thresholds"
        )
    if len(looked) not in (0, exits):
        raise ValueError(f"looked={tuple(looked)}: give one share per exit ({exits}), or none")
    if window < 1 or not 0 <= further <= 1:
        raise ValueError(f"window={window}, further={further}: need at least 1, and a share in [0, 1]")

    # Layers: the first segment runs for one token at a time, the others for m_j positions at a time.
    reach = [sum(shares[j:]) for j in range(exits + 1)]
    pending = tuple(positions_per_tick(r, window) for r in reach[1:])
    per_position = [1.0, *((1 + further * (m - 1)) / m for m in pending)]
    modules = (*weights.modules, 0)
    segments = sum((weights.segments[j] + modules[j]) * per_position[j] for j in range(exits + 1))

    # Vocabulary heads and gates: the full model's, and those of the exits that may fire.
    heads = reach[-1] * weights.final_head
    for j in range(exits):
        if thresholds[j] <= 1:
            heads += (looked[j] if looked else reach[j]) * weights.heads[j]
            heads += reach[j] * weights.gates[j] if gated else 0.0

    full = weights.full
    return Forecast(
        speedup=full / (segments + heads),
        segments=segments / full,
        heads=heads / full,
        check=tuple(head / full for head in weights.heads),
        gated_check=tuple(gate / full for gate in weights.gates),
        pending=pending,
    )


def forecast_outcome(
    config: ModelConfig,
    thresholds: Sequence[float],
    outcome: ExitOutcome | CalibrationPoint,
    *,
    looked: Sequence[float] = (),
    gated: bool = False,
    window: int = WINDOW,
    further: float = 0.0,
) -> Forecast:
    """`forecast` of what thresholds did to held-out tokens.

    Args:
      config: the model with its exits.
      thresholds: one per exit.
      outcome: from `exit_outcome`, or a point of a policy's curve.
      looked: share of tokens for which each exit's head is read, one per exit; () = all that get there.
      gated: gates are evaluated.
      window: tokens that may wait for their deep layers.
      further: cost of a further position of a deep tick relative to the first, in [0, 1].

    Returns:
      The forecast; an exit after the last layer counts as full depth.

    Raises:
      ValueError: there is not one number per exit, or window or further is out of range.

    Example:
      ```python
      import jax.numpy as jnp
      import elastic_lm as el
      from elastic_lm.testing import random_params, random_tokens, tiny_config

      config = tiny_config(exits=(2,))
      tokens = random_tokens(config, batch=8, length=17)
      ones = jnp.ones((8, 16), jnp.int32)
      batch = el.data.Batch(tokens[:, :-1], tokens[:, 1:], 1.0 * ones, jnp.cumsum(ones, 1) - 1, ones)

      policy = el.depth.calibrate(config, random_params(config), [batch], target=0.9)
      print(el.depth.forecast_outcome(config, policy.thresholds, policy.measured).verdict)
      ```
    """
    below = sum(e.layer < config.n_layers for e in config.exits)
    shares = (*outcome.shares[:below], sum(outcome.shares[below:]))
    return forecast(
        weight_bytes(config),
        shares,
        thresholds[:below],
        looked=looked[:below],
        gated=gated,
        window=window,
        further=further,
    )


def positions_per_tick(needed: float, window: int) -> float:
    """Mean number of positions of a deep tick, m, for tokens that need it independently of each other.

    Args:
      needed: share of tokens that cannot go on without the segment, in [0, 1].
      window: most positions that may be pending.
    """
    if needed <= 0:
        return float(window)
    # By the logarithm, because (1 - r)^W loses the digits of a small r.
    return -math.expm1(window * math.log1p(-needed)) / needed if needed < 1 else 1.0


def weight_bytes(config: ModelConfig) -> WeightBytes:
    """Counts the weights that each part of a model reads; exits after the last layer are left out.

    Args:
      config: the model with its exits; `param_dtype` decides about bytes.

    Returns:
      Bytes of every segment, exit module, vocabulary head and gate.

    Example:
      ```python
      import elastic_lm as el
      from elastic_lm.testing import tiny_config

      found = el.depth.weight_bytes(tiny_config(exits=(1, 3)))
      print(found.segments, found.heads)  # of layers 1, 2 - 3 and 4; of the two exits
      ```
    """
    shapes = nn.unbox(abstract_params(config))
    exits = [e for e in config.exits if e.layer < config.n_layers]
    cuts = [0, *(e.layer for e in exits), config.n_layers]

    layers = [_bytes(shapes[f"layers_{i}"]) for i in range(config.n_layers)]
    head = _bytes(shapes["embed"] if config.tied else shapes["head"])
    size = jax.numpy.dtype(config.param_dtype).itemsize
    missing_gate = size * (GATE_WIDTH * (config.d_model + 2) + 1)

    trees = [shapes.get(e.name, {}) for e in exits]
    return WeightBytes(
        segments=tuple(sum(layers[a:b]) for a, b in itertools.pairwise(cuts)),
        modules=tuple(_bytes({k: v for k, v in t.items() if k not in ("head", "gate")}) for t in trees),
        heads=tuple(_bytes(t["head"]) if "head" in t else head for t in trees),
        gates=tuple(_bytes(t["gate"]) if "gate" in t else missing_gate for t in trees),
        final_head=head,
    )


def _bytes(tree: Params) -> int:
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
