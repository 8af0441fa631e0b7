"""The vocabulary head: from features to a logit for every token."""

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from elastic_lm.config.model import ModelConfig
from elastic_lm.nn.linear import linear
from elastic_lm.nn.partition import partitioned


@flax.struct.dataclass
class Head:
    """The parameters of a vocabulary head, which may be those of the embedding.

    Attributes:
      kernel: [V, D].
      bias: [V], or None.
    """

    kernel: jax.Array
    bias: jax.Array | None = None

    def logits(self, features: jax.Array) -> jax.Array:
        """Float32 logits [..., V] of features [..., D], before softcap and temperature."""
        return linear(features, self.kernel, self.bias, dtype=jnp.float32)

    def rows(self, ids: jax.Array) -> "Head":
        """The head of these tokens alone, [n] int32."""
        return Head(self.kernel[ids], None if self.bias is None else self.bias[ids])


class VocabHead(nn.Module):
    """Owns a `Head` of its own."""

    config: ModelConfig

    @nn.compact
    def __call__(self) -> Head:
        c = self.config
        init = partitioned(nn.initializers.normal(0.02), ("vocab", "embed"))
        kernel = self.param("kernel", init, (c.vocab_size, c.d_model), c.param_dtype)
        bias = None
        if c.head_bias:
            zeros = partitioned(nn.initializers.zeros, ("vocab",))
            bias = self.param("bias", zeros, (c.vocab_size,), c.param_dtype)
        return Head(kernel, bias)
