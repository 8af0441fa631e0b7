"""Plain next-token training of all parameters.

L = (1/N) sum_t CE(logits_t, x_{t+1}),  N = number of counted tokens.
"""

import dataclasses

import jax
import jax.numpy as jnp

from elastic_lm.config.model import ModelConfig
from elastic_lm.data.batch import Batch
from elastic_lm.models.decoder import Decoder, Params
from elastic_lm.nn.remat import Remat
from elastic_lm.train.losses import LOSS_CHUNK, Metrics, chunked_cross_entropy
from elastic_lm.train.method import Method, MethodConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class PretrainingConfig(MethodConfig):
    """Plain next-token training has no options of its own.

    Example:
      ```python
      import elastic_lm as el

      run = el.RunConfig(model=el.testing.tiny_config(), method=el.train.PretrainingConfig())
      assert run.method.name == "pretraining"
      ```
    """

    name: str = "pretraining"


@dataclasses.dataclass(frozen=True)
class Pretraining(PretrainingConfig, Method[Batch]):
    """Trains every parameter of a decoder without exits.

    Example:
      ```python
      import jax.numpy as jnp

      import elastic_lm as el

      config = el.testing.tiny_config()
      tokens, ones = el.testing.random_tokens(config, batch=2, length=17), jnp.ones((2, 16), jnp.int32)
      batch = el.data.Batch(tokens[:, :-1], tokens[:, 1:], 1.0 * ones, jnp.cumsum(ones, 1) - 1, ones)
      loss, metrics = el.train.Pretraining(config).loss(el.testing.random_params(config), {}, batch, 0)
      ```
    """

    section = PretrainingConfig

    config: ModelConfig  # the model; static
    remat: Remat = False  # recompute layers in the backward pass
    loss_chunk: int = LOSS_CHUNK  # columns of logits alive at once

    def loss(
        self, trainable: Params, frozen: Params, batch: Batch, step: jax.Array
    ) -> tuple[jax.Array, Metrics]:
        """Mean cross-entropy L in nats per counted token (see the top of this file).

        Args:
          trainable: first result of `split`, all parameters.
          frozen: second result of `split`, empty.
          batch: packed tokens, targets and weights.
          step: not used.

        Returns:
          (scalar float32, metrics `loss` and `accuracy`).
        """
        decoder = Decoder(self.config, self.remat).bind({"params": {**trainable, **frozen}})
        depth = self.config.n_layers
        hidden = decoder.taps(batch.tokens, (depth,), batch.positions, batch.segments)[depth].hidden

        features, head = decoder.final_features(hidden), decoder.final_head()
        sums = chunked_cross_entropy(self.config, features, head, batch, chunk=self.loss_chunk)
        count = jnp.maximum(sums.weight, 1.0)
        return sums.loss / count, {"loss": sums.loss / count, "accuracy": sums.correct / count}
