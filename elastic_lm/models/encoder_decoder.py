"""The encoder-decoder language model (T5, arXiv 1910.10683; BART, 1910.13461; Marian), read top-down.

    source = encoder(embed(source tokens))              once
    state  = decoder(embed(target tokens), source)      all at once, or token by token (`step`)
    logits = W_vocab state

T5's stacks end with a norm, and their layers share the biases of distance that the first layer holds; in UMT5
every layer has its own. BART's and Marian's stacks begin with vectors of positions that are added. These
models have few layers and train in their canonical form, layer by layer, so that no second form of their
parameters is needed.
"""

import dataclasses
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from elastic_lm.config.checks import require, require_at_least_1
from elastic_lm.config.encoder_decoder import EncoderDecoderConfig
from elastic_lm.models.decoder import Embedding, Params
from elastic_lm.models.encoder import default_mask, mean_state
from elastic_lm.nn.attention import AttentionContext, KeyValues, NewKeyValues, seen_by_all
from elastic_lm.nn.block import make_norm
from elastic_lm.nn.encoder_decoder import Layer
from elastic_lm.nn.linear import Linear
from elastic_lm.nn.partition import partitioned
from elastic_lm.nn.placement import by_rows, whole_width
from elastic_lm.nn.relative_position import sinusoids
from elastic_lm.nn.vocab_head import Head, VocabHead


class EncoderDecoder(nn.Module):
    """An encoder-decoder transformer.

    Attributes:
      config: architecture; static.

    Example:
      ```python
      import elastic_lm as el
      import jax

      config = el.EncoderDecoderConfig(vocab_size=64, d_model=32, n_layers=2, n_heads=4, d_mlp=64)
      params = el.init_params(config, jax.random.key(0))
      source = jax.numpy.asarray([[2, 7, 5, 1]])
      target = jax.numpy.asarray([[config.decoder_start_id, 9, 4]])
      logits = jax.jit(el.EncoderDecoder(config).apply)({"params": params}, source, target)
      assert logits.shape == (1, 3, 64)
      ```
    """

    config: EncoderDecoderConfig

    def setup(self) -> None:
        c = self.config
        self.embedding = Embedding(c.vocab_size, c.d_model, ("vocab", "embed"), c.param_dtype, name="embed")
        self.encoder = Stack(c, decodes=False, name="encoder")
        self.decoder = Stack(c, decodes=True, name="decoder")
        if not c.tied:
            self.head = VocabHead(c.layer, name="head")
        if c.logits_bias:
            self.logits_bias = LogitsBias(c, name="logits_bias")
        if c.n_labels:
            self.encoder_head = Linear((c.n_labels,), (None, "embed"), True, c.param_dtype)

    def __call__(
        self, source_BS: jax.Array, target_BT: jax.Array, source_mask_BS: jax.Array | None = None
    ) -> jax.Array:
        """Logits of every target position, given the source and the target before it.

        Args:
          source_BS: int32 token ids.
          target_BT: int32 token ids, shifted right: the first one is `decoder_start_id`.
          source_mask_BS: bool (or 0 and 1), true for tokens that count; None = all.

        Returns:
          [B, T, V] float32.
        """
        hidden = self.encode(source_BS, source_mask_BS)
        if self.is_initializing() and self.config.n_labels:  # Linen creates the parameters of what runs
            self.encoder_logits(hidden, source_mask_BS)
        return self.logits(self.decode(target_BT, self.source(hidden, source_mask_BS)))

    def encode(self, source_BS: jax.Array, mask_BS: jax.Array | None = None) -> jax.Array:
        """The encoder's output [B, S, D], meaningless at padding.

        Args:
          source_BS: as in `__call__`.
          mask_BS: as in `__call__`.
        """
        mask_BS = default_mask(source_BS, mask_BS)
        place_S = jnp.arange(source_BS.shape[1], dtype=jnp.int32)
        # At equal positions all tokens see each other; padding is at the hidden position, which none sees.
        return self.encoder(self.embed(source_BS), seen_by_all(mask_BS), place_S)[0]

    def source(self, hidden_BSD: jax.Array, mask_BS: jax.Array | None = None) -> list[KeyValues]:
        """What the decoder's layers see of a source, computed once for all its steps.

        Args:
          hidden_BSD: from `encode`.
          mask_BS: as in `__call__`.

        Returns:
          Keys and values [B, N, S, H] per decoder layer.
        """
        return self.decoder.source(hidden_BSD, default_mask(hidden_BSD, mask_BS))

    def decode(self, target_BT: jax.Array, source: Sequence[KeyValues]) -> jax.Array:
        """The decoder's output [B, T, D] for whole targets.

        Args:
          target_BT: as in `__call__`.
          source: from `source`.
        """
        place_T = jnp.arange(target_BT.shape[1], dtype=jnp.int32)
        positions_BT = jnp.broadcast_to(place_T, target_BT.shape)
        return self.decoder(self.embed(target_BT), positions_BT, place_T, source=source)[0]

    def step(
        self, token_B: jax.Array, place: jax.Array, past: Sequence[KeyValues], source: Sequence[KeyValues]
    ) -> tuple[jax.Array, list[NewKeyValues]]:
        """Predicts what follows the newest token of every row.

        Args:
          token_B: int32 newest tokens.
          place: int32 scalar, where they stand in their targets; 0 = the start.
          past: cached keys and values per decoder layer; entry s is of place s.
          source: from `source`.

        Returns:
          (logits [B, V] float32, keys and values of these tokens [B, N, 1, H] per decoder layer).
        """
        positions_B1 = jnp.broadcast_to(place, (*token_B.shape, 1))
        hidden = self.embed(token_B[:, None])
        hidden, new_kv = self.decoder(hidden, positions_B1, place[None], past=past, source=source)
        return self.logits(hidden)[:, 0], new_kv

    def embed(self, tokens_BT: jax.Array) -> jax.Array:
        """Token embeddings [B, T, D], of sources and targets alike; without positions."""
        c = self.config
        hidden = by_rows(whole_width(self.embedding())[tokens_BT].astype(c.dtype))
        return hidden * jnp.asarray(c.d_model**0.5, c.dtype) if c.scaled_embedding else hidden

    def logits(self, hidden_BTD: jax.Array) -> jax.Array:
        """[B, T, V] float32 logits of the decoder's output."""
        c = self.config
        if c.scaled_head:
            hidden_BTD = hidden_BTD * jnp.asarray(c.d_model**-0.5, hidden_BTD.dtype)
        head = Head(self.embedding()) if c.tied else self.head()
        logits_BTV = head.logits(hidden_BTD)
        return logits_BTV + self.logits_bias() if c.logits_bias else logits_BTV

    def encoder_logits(self, hidden_BSD: jax.Array, mask_BS: jax.Array | None = None) -> jax.Array:
        """Class logits of a source from the mean of the encoder's output, before anything is decoded.

        The encoder-side head of E-LANG (arXiv 2203.00748), whose energy decides between a small and a large
        model.

        Args:
          hidden_BSD: from `encode`.
          mask_BS: as in `__call__`.

        Returns:
          [B, n_labels] float32.

        Raises:
          ValueError: the model has no such head.
        """
        require(
            self.config.n_labels >= 1,
            "n_labels",
            self.config.n_labels,
            "the model has no head on its encoder: attach one with attach_encoder_head",
        )
        return self.encoder_head(mean_state(hidden_BSD.astype(jnp.float32), mask_BS))


class LogitsBias(nn.Module):
    """Owns the bias [V] of the logits."""

    config: EncoderDecoderConfig

    @nn.compact
    def __call__(self) -> jax.Array:
        zeros = partitioned(nn.initializers.zeros, ("vocab",))
        return self.param("bias", zeros, (self.config.vocab_size,), self.config.param_dtype).astype(
            jnp.float32
        )


class Stack(nn.Module):
    """The layers of an encoder or a decoder, and what stands before and after them.

    Attributes:
      config: the model; static.
      decodes: whether it is the decoder; static.
    """

    config: EncoderDecoderConfig
    decodes: bool

    def setup(self) -> None:
        c = self.config
        count = c.n_decoder_layers if self.decodes else c.n_layers
        relative, every = c.positions == "relative", c.bias_per_layer
        if c.positions == "learned":
            rows = c.max_len + c.position_offset
            self.positions = Embedding(rows, c.d_model, (None, "embed"), c.param_dtype, name="positions")
        if c.embed_norm:
            self.embed_norm = make_norm(c.layer, "embed_norm")
        self.layers = [
            Layer(c, self.decodes, relative and (every or i == 0), name=f"layers_{i}") for i in range(count)
        ]
        if c.pre_norm:
            self.final_norm = make_norm(c.layer, "final_norm")

    def __call__(
        self,
        hidden_BTD: jax.Array,
        positions_BT: jax.Array,
        place_T: jax.Array,
        *,
        past: Sequence[KeyValues] | None = None,
        source: Sequence[KeyValues] | None = None,
    ) -> tuple[jax.Array, list[NewKeyValues]]:
        """Runs every layer.

        Args:
          hidden_BTD: embedded tokens.
          positions_BT: int32; a token sees those at its own position and below it.
          place_T: int32 places in the text, which have vectors, or between which distances are measured. They
            are not the positions, which are equal in an encoder, where all tokens see each other.
          past: cached keys and values per layer, entry s of place s; None = no cache.
          source: keys and values of the source per layer; a decoder needs them.

        Returns:
          (normalised state [B, T, D], new keys and values per layer).
        """
        hidden_BTD = self.enter(hidden_BTD, place_T)
        new_kv, biases = [], None
        for i, layer in enumerate(self.layers):
            if layer.has_bias:
                biases = [layer.bias(place_T, place_T)]
                if past:
                    before = jnp.arange(past[0].k.shape[2], dtype=jnp.int32)
                    biases.insert(0, layer.bias(place_T, before))
            context = AttentionContext(positions_BT, past=past[i] if past else None, biases=biases)
            hidden_BTD, kv = layer(by_rows(hidden_BTD), context, source[i] if source else None)
            new_kv.append(kv)
        return self.final_norm(hidden_BTD) if self.config.pre_norm else hidden_BTD, new_kv

    def enter(self, hidden_BTD: jax.Array, place_T: jax.Array) -> jax.Array:
        """What enters the first layer: embeddings, with vectors of their places where the model has them."""
        c, length = self.config, place_T.shape[0]
        fix = f"the model reads at most max_len={c.max_len} tokens; truncate"
        require(not c.max_len or length <= c.max_len, "tokens.shape[1]", length, fix)
        if c.positions == "learned":
            hidden_BTD = hidden_BTD + self.positions()[place_T + c.position_offset].astype(hidden_BTD.dtype)
        if c.positions == "sinusoidal":
            vectors = jnp.asarray(sinusoids(c.max_len, c.d_model))
            hidden_BTD = hidden_BTD + vectors[place_T].astype(hidden_BTD.dtype)
        return self.embed_norm(hidden_BTD) if c.embed_norm else hidden_BTD

    def source(self, hidden_BSD: jax.Array, mask_BS: jax.Array) -> list[KeyValues]:
        """Keys and values of the encoder's output for every layer of a decoder.

        Args:
          hidden_BSD: the encoder's output.
          mask_BS: bool, False at padding.
        """
        positions_BS = seen_by_all(mask_BS)
        return [KeyValues(*layer.cross.key_values(hidden_BSD), positions_BS) for layer in self.layers]


def attach_encoder_head(
    config: EncoderDecoderConfig,
    params: Params,
    n_labels: int,
    key: jax.Array,
    labels: Sequence[str] = (),
) -> tuple[EncoderDecoderConfig, Params]:
    """Adds a linear classification head on the encoder's mean state (E-LANG, arXiv 2203.00748).

    Args:
      config: a model without such a head.
      params: its parameters, which are not copied.
      n_labels: classes.
      key: typed PRNG key of the draw.
      labels: names of the classes; () = they have none.

    Returns:
      (config, parameters) with the head, whose kernel is drawn with deviation D^-1/2 and whose bias is 0.

    Raises:
      ValueError: the model has a head, `n_labels` is below 1, or there are labels, but not as many.
    """
    require(not config.n_labels, "n_labels", config.n_labels, "the model has a head on its encoder already")
    require_at_least_1("n_labels", n_labels)
    new = dataclasses.replace(config, n_labels=n_labels, labels=tuple(labels))
    kernel = config.d_model**-0.5 * jax.random.normal(key, (n_labels, config.d_model))
    head = {
        "kernel": kernel.astype(config.param_dtype),
        "bias": jnp.zeros((n_labels,), config.param_dtype),
    }
    return new, {**params, "encoder_head": head}


def draw_param(
    config: EncoderDecoderConfig, key: jax.Array, path: list[str], leaf: jax.ShapeDtypeStruct
) -> jax.Array:
    """A parameter of a new model, from a normal distribution with T5's deviation; norms the identity.

    Where positions are vectors, the deviation is BART's, 0.02. T5's are: embedding 1; query (D H)^-1/2, so
    that logits need no scale; every other kernel its inputs^-1/2; biases of distance D^-1/2.

    Args:
      config: the model; static.
      key: typed PRNG key of this parameter.
      path: where the parameter lies.
      leaf: its shape and dtype.
    """
    if path[-1] in ("scale", "bias"):
        return jnp.full(leaf.shape, float(path[-1] == "scale"), leaf.dtype)

    if config.positions != "relative":
        return (0.02 * jax.random.normal(key, leaf.shape)).astype(leaf.dtype)

    deviation = {"embed": 1.0, "relative_bias": config.d_model**-0.5}.get(path[-2], leaf.shape[-1] ** -0.5)
    noise = deviation * jax.random.normal(key, leaf.shape)
    if path[-2] == "qkv":  # [N, query key value, H, D]
        noise = noise.at[:, 0].multiply(config.head_dim**-0.5)
    if path[-2] == "q":
        noise = noise * config.head_dim**-0.5
    return noise.astype(leaf.dtype)
