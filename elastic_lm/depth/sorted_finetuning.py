"""Sorted fine-tuning: one model whose first n layers are a model too, for several n.

With h_n the state after layer n, depths B (the full depth L among them) and N counted tokens:

    logits_n = head(norm(h_n))       the model's own final norm and head, shared by all, no new parameters
    minimise over all parameters:    sum_{n in B} w_n(t) L_n,    L_n = (1/N) sum CE(logits_n, x_next)
    w_n(t) = C_n(t) e_n / sum_m C_m(t) e_m

- SoFT (Sorted LLaMA) and LITE: e_n = 1, C = 1, the mean of the sub-models' losses.
- CALM: e_n = n ("linear").
- SortedNet: one sub-model per step, drawn with probability e_n / sum_m e_m ("sampled"), so that the
  expected gradient is that of the line above with C = 1.
- LayerSkip: e_n = s n (n - 1) / 2 below L and e_L = L - 1 + s (L - 1)(L - 2) / 2 ("layerskip"). Its
  curricula C let only part of the sub-models into a step, always with the full one:
    rotational   C_i(t) = 1 where (i - t) mod R = 0, for the i-th sub-model counted from 0
    gradual      the deepest first, then one more below it every P steps; P = T / (2 |B|) unless set
  and its layer dropout lets a row of the batch skip layer l (counted from 0) at step t:
    h_{l+1} = h_l + m (layer_l(h_l) - h_l),   m ~ Bernoulli(1 - p(l, t)) for every row and layer
    p(l, t) = S(t) D(l) p_max,   D(l) = 2^(l / (L - 1)) - 1,   S(t) = 1, or 2^(t / (T' - 1)) - 1 up to step T'
  Rows that are kept are not scaled up: with all layers in place the model is the one that is evaluated.
  Rows keep their place in the batch, so dropping layers regularises and saves no time.

For every e but LayerSkip's, s ("depth_scale") multiplies the weights of all sub-models below L.

Papers: SortedNet, arXiv 2309.00255; Sorted LLaMA, arXiv 2309.08968; LITE, arXiv 2310.18581; CALM,
arXiv 2207.07061; LayerSkip, arXiv 2404.16710.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Literal, get_args

import jax
import jax.numpy as jnp

from elastic_lm.config.checks import NOT_NEGATIVE, POSITIVE, require, require_choice, require_each
from elastic_lm.config.model import ModelConfig
from elastic_lm.data.batch import Batch
from elastic_lm.models.decoder import Decoder, Params
from elastic_lm.nn.remat import Remat
from elastic_lm.train.losses import LOSS_CHUNK, Metrics, TokenSums, chunked_cross_entropy
from elastic_lm.train.method import Method, MethodConfig

DepthWeights = Literal["uniform", "linear", "sum", "sqrt", "inverse", "inverse_sqrt", "layerskip"]
Curriculum = Literal["all", "sampled", "rotational", "gradual"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SortedFineTuningConfig(MethodConfig):
    """Options of `SortedFineTuning`, the `method` section of a run's config.

    Raises:
      ValueError: an option is out of its range, or not read with the others; names field, value and fix.

    Example:
      ```python
      import elastic_lm as el

      soft = el.depth.SortedFineTuningConfig(depths=(8, 16, 24))
      layerskip = el.depth.SortedFineTuningConfig(
          depth_weights="layerskip", depth_scale=0.2, curriculum="rotational", curriculum_period=4
      )
      ```
    """

    name: str = "sorted_finetuning"
    depths: tuple[int, ...] = ()  # layers of the sub-models, the full depth is added; () = every layer
    depth_weights: DepthWeights = "uniform"  # e_n
    depth_scale: float = 1.0  # s, factor of the weights below the full depth
    curriculum: Curriculum = "all"  # C, or one sub-model sampled per step
    curriculum_period: int = 0  # rotational: R; gradual: P, 0 = steps / (2 |B|)
    layer_dropout: float = 0.0  # p_max; 0 = none
    dropout_ramp: int = 0  # T', steps over which layer dropout rises; 0 = from the start

    def __post_init__(self) -> None:
        require_choice("method.depth_weights", self.depth_weights, get_args(DepthWeights))
        require_choice("method.curriculum", self.curriculum, get_args(Curriculum))
        increasing = list(self.depths) == sorted(set(self.depths)) and all(d >= 1 for d in self.depths)
        require(
            increasing,
            "method.depths",
            self.depths,
            "must be distinct layers, counted from 1, in increasing order",
        )
        require_each(self, "method.", ("curriculum_period", "dropout_ramp"), *NOT_NEGATIVE)
        require_each(self, "method.", ("depth_scale",), *POSITIVE)
        require(0 <= self.layer_dropout <= 1, "method.layer_dropout", self.layer_dropout, "must be in [0, 1]")

        require(
            self.curriculum != "rotational" or self.curriculum_period >= 1,
            "method.curriculum_period",
            self.curriculum_period,
            "rotational trains one in so many sub-models a step: must be at least 1",
        )
        require(
            self.curriculum in ("rotational", "gradual") or not self.curriculum_period,
            "method.curriculum_period",
            self.curriculum_period,
            f"not read with method.curriculum={self.curriculum!r}, only with rotational or gradual; set 0",
        )
        require(
            not self.dropout_ramp or self.layer_dropout > 0,
            "method.dropout_ramp",
            self.dropout_ramp,
            "not read with method.layer_dropout=0.0; raise that, or set 0",
        )


@dataclasses.dataclass(frozen=True)
class SortedFineTuning(SortedFineTuningConfig, Method[Batch]):
    """Trains every parameter on the losses of sub-models of several depths (SoFT, arXiv 2309.08968).

    Static under `jit`; parameters, batches and the step are traced.

    Raises:
      ValueError: `depths` names a layer that the model lacks.

    Example:
      ```python
      import jax.numpy as jnp
      import elastic_lm as el
      from elastic_lm.testing import random_params, random_tokens, tiny_config

      config = tiny_config()
      tokens = random_tokens(config, batch=2, length=17)
      ones = jnp.ones((2, 16), jnp.int32)
      batch = el.data.Batch(tokens[:, :-1], tokens[:, 1:], 1.0 * ones, jnp.cumsum(ones, 1) - 1, ones)

      method = el.depth.SortedFineTuning(config, depths=(2, 3))  # and 4, the full depth
      trainable, frozen = method.split(random_params(config))
      loss, metrics = method.loss(trainable, frozen, batch, jnp.int32(0))
      ```
    """

    section = SortedFineTuningConfig

    config: ModelConfig  # the model; its exits are not used; static
    steps: int = 1  # T, length of the run; read by gradual with curriculum_period 0
    seed: int = 0  # of sampled sub-models and layer dropout
    loss_chunk: int = LOSS_CHUNK  # columns of logits alive at once
    remat: Remat = False  # recompute layers in the backward pass

    def __post_init__(self) -> None:
        super().__post_init__()

        # The full model is always one of the sub-models, the last.
        layers = self.config.n_layers
        depths = tuple(sorted({*(self.depths or range(1, layers)), layers}))
        if not 1 <= depths[0] <= depths[-1] <= layers:
            raise ValueError(
                f"method.depths={self.depths}: the model has layers 1 .. {layers}; choose among these"
            )
        object.__setattr__(self, "depths", depths)

    def for_evaluation(self) -> "SortedFineTuning":
        """The same method with every sub-model in the loss and no layer dropped."""
        return dataclasses.replace(
            self, curriculum="all", curriculum_period=0, layer_dropout=0.0, dropout_ramp=0
        )

    def loss(
        self, trainable: Params, frozen: Params, batch: Batch, step: jax.Array
    ) -> tuple[jax.Array, Metrics]:
        """Weighted sum of the sub-models' losses from one forward pass, in nats per counted token.

        Args:
          trainable: first result of `split`.
          frozen: second result of `split`.
          batch: packed tokens, targets and weights.
          step: int32 scalar; decides about sub-models and dropped layers. The parts of an accumulated
            batch share both.

        Returns:
          (scalar float32, metrics `loss` and, of the sub-models that train in every step, `loss/depth_<n>`
          and `accuracy/depth_<n>`, for the full model `loss/final` and `accuracy/final`).
        """
        params = {**jax.lax.stop_gradient(frozen), **trainable}

        # One forward pass gives the states of all sub-models.
        decoder = Decoder(self.config, self.remat).bind({"params": params})
        keep_LB = self.kept_layers(step, batch.tokens.shape[0])
        taps = decoder.taps(batch.tokens, self.depths, batch.positions, batch.segments, keep_LB)

        weights = self.weights(step)
        count = jnp.maximum(jnp.sum(batch.weights), 1.0)  # a batch of padding alone has no tokens
        total, metrics = jnp.zeros((), jnp.float32), {}
        for i, depth in enumerate(self.depths):
            always = self._always(i)
            sums = self._token_sums(params, taps[depth].hidden, batch, None if always else weights[i])
            total += weights[i] * sums.loss / count
            if always:
                name = "final" if depth == self.config.n_layers else f"depth_{depth}"
                metrics |= {f"loss/{name}": sums.loss / count, f"accuracy/{name}": sums.correct / count}
        return total, {"loss": total, **metrics}

    def weights(self, step: jax.Array | int) -> jax.Array:
        """w_n(t) of every sub-model, by the curriculum: [|B|] float32 that sum to 1."""
        base = depth_weights(self.depths, self.config.n_layers, self.depth_weights, self.depth_scale)
        weights = jnp.asarray(base, jnp.float32)
        index, last = jnp.arange(len(base)), len(base) - 1

        if self.curriculum == "sampled":
            key = jax.random.fold_in(jax.random.key(self.seed), step)
            return (index == jax.random.categorical(key, jnp.log(weights))).astype(jnp.float32)
        if self.curriculum == "rotational":
            turn = (index - step) % self.curriculum_period == 0
            weights = jnp.where(turn | (index == last), weights, 0.0)
        if self.curriculum == "gradual":
            period = self.curriculum_period or max(self.steps // (2 * len(base)), 1)
            weights = jnp.where(index >= last - step // period, weights, 0.0)
        return weights / jnp.sum(weights)

    def kept_layers(self, step: jax.Array | int, rows: int) -> jax.Array | None:
        """m of every layer and row of a step.

        Args:
          step: t; traced.
          rows: B; static.

        Returns:
          [L, B] bool, False where a row skips a layer; None without layer dropout.
        """
        if not self.layer_dropout:
            return None

        # Folded in twice: `weights` draws a sub-model with the key of the step itself.
        layers = self.config.n_layers
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(self.seed), step), 1)
        drop_L = drop_probabilities(layers, self.layer_dropout, self.dropout_ramp, step)
        return jax.random.uniform(key, (layers, rows)) >= drop_L[:, None]

    def _always(self, index: int) -> bool:
        """Whether a sub-model trains in every step, which is known when the step is compiled."""
        last = index == len(self.depths) - 1
        return self.curriculum == "all" or (last and self.curriculum != "sampled")

    def _token_sums(
        self, params: Params, hidden_BTD: jax.Array, batch: Batch, weight: jax.Array | None
    ) -> TokenSums:
        """Sums over the tokens of one sub-model.

        Args:
          params: of the model.
          hidden_BTD: state after the sub-model's last layer.
          batch: packed tokens, targets and weights.
          weight: where it is 0 the vocabulary head is not computed; None = it always is.
        """

        def sums(params: Params, hidden_BTD: jax.Array) -> TokenSums:
            decoder = Decoder(self.config).bind({"params": params})
            features, head = decoder.final_features(hidden_BTD), decoder.final_head()
            return chunked_cross_entropy(self.config, features, head, batch, chunk=self.loss_chunk)

        def nothing(params: Params, hidden_BTD: jax.Array) -> TokenSums:
            return TokenSums(*(jnp.zeros((), jnp.float32) for _ in range(4)))

        # The branches are given no other parameters: one that is not taken writes zeros for the gradients of
        # all that it is given.
        head = "embed" if self.config.tied else "head"
        read = {"final_norm": params["final_norm"], head: params[head]}
        if weight is None:
            return sums(read, hidden_BTD)
        return jax.lax.cond(weight > 0, sums, nothing, read, hidden_BTD)


def depth_weights(
    depths: tuple[int, ...], n_layers: int, kind: DepthWeights = "uniform", scale: float = 1.0
) -> tuple[float, ...]:
    """e_n of every sub-model, normalised to sum 1 (equations at the top of this file).

    Args:
      depths: layers of the sub-models.
      n_layers: layers of the full model.
      kind: how the weight grows with depth.
      scale: s, factor of the weights below the full depth.

    Returns:
      One weight per depth.
    """
    if len(depths) == 1:
        return (1.0,)

    def raw(n: int) -> float:
        if kind == "layerskip":
            below = scale * sum(range(min(n, n_layers - 1)))
            return below if n < n_layers else n_layers - 1 + below
        return GROWTH[kind](n) * (1.0 if n == n_layers else scale)

    total = sum(map(raw, depths))
    return tuple(raw(n) / total for n in depths)


GROWTH: dict[DepthWeights, Callable[[int], float]] = {  # e_n, but for LayerSkip's
    "uniform": lambda n: 1.0,
    "linear": lambda n: n,
    "sum": lambda n: n * (n + 1) / 2,
    "sqrt": math.sqrt,
    "inverse": lambda n: 1 / n,
    "inverse_sqrt": lambda n: 1 / math.sqrt(n),
}


def drop_probabilities(n_layers: int, highest: float, ramp: int, step: jax.Array | int) -> jax.Array:
    """LayerSkip's p(l, t) of every layer (arXiv 2404.16710; equations at the top of this file).

    Args:
      n_layers: L.
      highest: p_max, that of the last layer.
      ramp: T', steps until S reaches 1; 0 = S is 1 from the start; static.
      step: t; traced.

    Returns:
      [L] float32 probabilities.
    """
    depth = jnp.exp2(jnp.arange(n_layers, dtype=jnp.float32) / max(n_layers - 1, 1)) - 1.0
    progress = jnp.minimum(jnp.asarray(step, jnp.float32) / max(ramp - 1, 1), 1.0) if ramp else 1.0
    return highest * (jnp.exp2(progress) - 1.0) * depth
