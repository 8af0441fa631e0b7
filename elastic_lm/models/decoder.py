"""The decoder-only language model: embed -> layers -> exits -> logits, read top-down.

    h_0 = embed(tokens)
    h_l = layer_l(h_{l-1})                                       l = 1 .. L
    logits   = softcap(s head(norm(h_L)))                           s: the model's `logit_scale`
    logits_l = softcap(s head_l(features_l(h_l))) / temperature_l  for every exit after a layer l

Parameters have one canonical form, with one sub-tree per layer (`layers_0`, `layers_1`, ...). Decoding runs
its layers one after another, since every segment between two exits has a condition of its own, and since a
loop over stacked weights copies each layer before it uses it. Training may stack the layers
(`stack_layers`): the same methods then run them with `lax.scan`, which keeps programs small and quick to
compile.
"""

import re
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from elastic_lm.config.checks import require
from elastic_lm.config.model import ModelConfig
from elastic_lm.nn.attention import AttentionContext, KeyValues, NewKeyValues, text_lengths
from elastic_lm.nn.block import Block, Tap, make_norm
from elastic_lm.nn.exit_head import Exit
from elastic_lm.nn.partition import partitioned
from elastic_lm.nn.placement import by_rows, whole_width
from elastic_lm.nn.remat import Remat, recomputed, recomputed_method
from elastic_lm.nn.rope import scanned_rotations, shared_rotations
from elastic_lm.nn.sequence import divided
from elastic_lm.nn.vocab_head import Head, VocabHead

Params = dict[str, Any]


@flax.struct.dataclass
class Output:
    """Logits of one forward pass.

    Attributes:
      logits: [B, T, V] float32 of the full model.
      exit_logits: one [B, T, V] float32 array per exit, in order of depth.
    """

    logits: jax.Array
    exit_logits: tuple[jax.Array, ...]


class Decoder(nn.Module):
    """A decoder-only transformer with early exits.

    Attributes:
      config: architecture and exits; static.
      remat: what the backward pass computes again instead of storing it (`nn.remat`); static.

    Example:
      ```python
      import elastic_lm as el
      import jax

      config = el.testing.tiny_config(exits=(2,))
      params = el.testing.random_params(config)
      tokens = el.testing.random_tokens(config, batch=1, length=5)
      output = jax.jit(el.Decoder(config).apply)({"params": params}, tokens)
      assert output.logits.shape == output.exit_logits[0].shape == (1, 5, config.vocab_size)
      ```
    """

    config: ModelConfig
    remat: Remat = False

    def setup(self) -> None:
        c = self.config
        self.embedding = Embedding(c.vocab_size, c.d_model, ("vocab", "embed"), c.param_dtype, name="embed")
        if c.position == "learned":
            rows = c.position_offset + c.max_len
            self.positions = Embedding(rows, c.d_model, (None, "embed"), c.param_dtype, name="positions")
        if c.embed_norm:
            self.embed_norm = make_norm(c, "embed_norm")
        self.layers = [Block(c.layer(i), name=f"layers_{i}") for i in range(c.n_layers)]
        self.exits = [Exit(c, e, name=e.name) for e in c.exits]
        self.final_norm = make_norm(c, "final_norm")
        if not c.tied:
            self.head = VocabHead(c, name="head")

    def __call__(
        self,
        tokens_BT: jax.Array,
        positions_BT: jax.Array | None = None,
        segments_BT: jax.Array | None = None,
    ) -> Output:
        """Logits of the full model and of every exit.

        Args:
          tokens_BT: int32 token ids.
          positions_BT: int32 positions; None = 0 .. T-1.
          segments_BT: int32 document ids of a packed batch; None = one document per row.

        Raises:
          ValueError: the rows are longer than `max_len`, where positions do not go on beyond it.
        """
        depths = (*(e.layer for e in self.config.exits), self.config.n_layers)
        taps = self.taps(tokens_BT, depths, positions_BT, segments_BT)

        features = [
            self.exit_features(i, taps[e.layer], positions_BT, segments_BT)
            for i, e in enumerate(self.config.exits)
        ]
        exit_logits = tuple(self.exit_logits(i, x) for i, x in enumerate(features))

        # Linen creates the parameters of what runs, and no logits need a gate.
        if self.is_initializing():
            for i, e in enumerate(self.config.exits):
                if e.gate:
                    self.exit_gate(i, features[i])

        hidden = taps[self.config.n_layers].hidden
        return Output(self.final_logits(self.final_features(hidden)), exit_logits)

    def taps(
        self,
        tokens_BT: jax.Array,
        depths: Sequence[int],
        positions_BT: jax.Array | None = None,
        segments_BT: jax.Array | None = None,
        keep_LB: jax.Array | None = None,
    ) -> dict[int, Tap]:
        """Runs up to the deepest of `depths` and returns what each of these layers offers its exit.

        Args:
          tokens_BT: int32 token ids.
          depths: layer counts (1 .. n_layers), static; nothing above the deepest is computed.
          positions_BT: int32 positions; None = 0 .. T-1.
          segments_BT: int32 document ids of a packed batch; None = one document per row.
          keep_LB: bool, False where a layer passes a row on unchanged (layer dropout); None = all True.

        Returns:
          {depth: Tap}.

        Raises:
          ValueError: the rows are longer than the model's positions reach.
        """
        _check_length(self.config, tokens_BT.shape[-1])
        positions_BT = default_positions(tokens_BT, positions_BT)
        hidden = by_rows(self.embed(tokens_BT, positions_BT))

        taps: dict[int, Tap] = {}
        start = 0
        for depth in sorted(set(depths)):
            keep = None if keep_LB is None else keep_LB[start:depth]
            taps[depth], _ = self.run_layers(
                hidden, positions_BT, start, depth, segments_BT=segments_BT, keep_LB=keep
            )
            hidden, start = taps[depth].hidden, depth
        return taps

    def embed(self, tokens_BT: jax.Array, positions_BT: jax.Array) -> jax.Array:
        """Token embeddings [B, T, D], scaled, plus learned positions, normalised, if the model does that."""
        c = self.config
        hidden = whole_width(self.embedding())[tokens_BT].astype(c.dtype)
        if c.embed_scale != 1.0:
            hidden = hidden * jnp.asarray(c.embed_scale, c.dtype)
        if c.position == "learned":
            hidden = hidden + self.positions()[positions_BT + c.position_offset].astype(c.dtype)
        return divided(self.embed_norm(hidden) if c.embed_norm else hidden)

    def run_layers(
        self,
        hidden_BTD: jax.Array,
        positions_BT: jax.Array,
        start: int,
        stop: int,
        *,
        segments_BT: jax.Array | None = None,
        past: Sequence[KeyValues] | None = None,
        keep_LB: jax.Array | None = None,
        lengths_BT: jax.Array | None = None,
    ) -> tuple[Tap, list[NewKeyValues]]:
        """Runs layers start .. stop-1 (static).

        Args:
          hidden_BTD: state that enters layer `start`.
          positions_BT: int32 positions.
          start: first layer, counted from 0.
          stop: one past the last layer; stop > start.
          segments_BT: document ids, or None.
          past: cached keys and values, one entry per layer that is run, or None.
          keep_LB: as in `taps`, of the layers that are run.
          lengths_BT: int32 lengths of the texts, [B, T or 1], where rows are padded (`nn.rope.rotation_at`).

        Returns:
          (Tap of the last layer, new keys and values per layer). Stacked parameters, which serve training
          only, give no keys and values.
        """
        if self._stacked() is not None:
            return self._scan_layers(hidden_BTD, positions_BT, start, stop, segments_BT, keep_LB), []

        block = recomputed_method(Block.__call__, self.remat)
        lengths_BT = text_lengths(positions_BT, lengths_BT, cached=bool(past))
        rotations = shared_rotations(self.config, positions_BT, range(start, stop), lengths_BT)
        new_kv = []
        tap = Tap(hidden_BTD, hidden_BTD, hidden_BTD, hidden_BTD)
        for i in range(start, stop):
            context = AttentionContext(
                positions_BT,
                segments_BT,
                self.config.window(i),
                past[i - start] if past else None,
                rotation=rotations[i - start],
            )
            tap, kv = block(self.layers[i], tap.hidden, context)
            tap = tap.skipped(None if keep_LB is None else keep_LB[i - start])
            new_kv.append(kv)
        return tap, new_kv

    def _scan_layers(
        self,
        hidden_BTD: jax.Array,
        positions_BT: jax.Array,
        start: int,
        stop: int,
        segments_BT: jax.Array | None,
        keep_LB: jax.Array | None,
    ) -> Tap:
        """`run_layers` over stacked parameters."""
        stacked = self._stacked()
        windows = jnp.asarray([self.config.window(i) for i in range(start, stop)], jnp.int32)
        windowed = bool(self.config.windows)
        kinds, rotation_of = scanned_rotations(self.config, positions_BT)
        block = Block(self.config, parent=None)

        def layer(hidden: jax.Array, params: Params, window: int | jax.Array, kind: jax.Array) -> Tap:
            context = AttentionContext(positions_BT, segments_BT, window, rotation=rotation_of(kind))
            tap, _ = block.apply({"params": params}, hidden, context)
            return tap

        run = recomputed(layer, self.remat)

        def step(hidden: jax.Array, xs: Any) -> tuple[jax.Array, None]:
            params, window, kind, keep_B = xs
            return run(hidden, params, window if windowed else 0, kind).skipped(keep_B).hidden, None

        # The scan carries states alone; the last layer stands apart, since its whole Tap is wanted.
        inner = jax.tree.map(lambda p: p[start : stop - 1], stacked)
        if stop - 1 > start:
            keep = None if keep_LB is None else keep_LB[:-1]
            xs = (inner, windows[:-1], kinds[start : stop - 1], keep)
            hidden_BTD, _ = jax.lax.scan(step, hidden_BTD, xs)
        last = jax.tree.map(lambda p: p[stop - 1], stacked)
        tap = run(hidden_BTD, last, windows[-1] if windowed else 0, kinds[stop - 1])
        return tap.skipped(None if keep_LB is None else keep_LB[-1])

    def _stacked(self) -> Params | None:
        """The stacked layers; None if the parameters are canonical."""
        return self.variables.get("params", {}).get("layers")

    def exit_features(
        self,
        index: int,
        tap: Tap,
        positions_BT: jax.Array | None = None,
        segments_BT: jax.Array | None = None,
        lengths_BT: jax.Array | None = None,
    ) -> jax.Array:
        """Features [B, T, D] of exit `index` (static) for its vocabulary head, without a cache."""
        positions_BT = default_positions(tap.hidden, positions_BT)
        hidden, _ = self.exit_state(index, tap, positions_BT, segments_BT=segments_BT, lengths_BT=lengths_BT)
        return self.exit_head_input(index, hidden, tap)

    def exit_state(
        self,
        index: int,
        tap: Tap,
        positions_BT: jax.Array,
        *,
        segments_BT: jax.Array | None = None,
        past: KeyValues | None = None,
        lengths_BT: jax.Array | None = None,
    ) -> tuple[jax.Array, NewKeyValues | None]:
        """State [B, T, D] of exit `index` (static) and, for `block` exits, its new keys and values."""
        context = AttentionContext(positions_BT, segments_BT, past=past, lengths=lengths_BT)
        return self.exits[index].state(tap, context)

    def exit_head_input(self, index: int, hidden_BTD: jax.Array, tap: Tap) -> jax.Array:
        """Features [B, T, D] of exit `index` (static) from its state and the tap of its layer."""
        layer, stacked = self.config.exits[index].layer - 1, self._stacked()
        if stacked is None:
            return self.exits[index].features(hidden_BTD, tap, self.layers[layer].add_mlp)

        # Stacked layers are no modules of this one, so the layer's `add_mlp` is applied to its own slice.
        params = jax.tree.map(lambda p: p[layer], stacked)
        block = Block(self.config, parent=None)

        def add_mlp(residual: jax.Array, mlp: jax.Array) -> jax.Array:
            return jnp.asarray(block.apply({"params": params}, residual, mlp, method="add_mlp"))

        return self.exits[index].features(hidden_BTD, tap, add_mlp)

    def exit_gate(self, index: int, features_BTD: jax.Array) -> jax.Array:
        """[B, T] float32 probability, by the gate of exit `index`, that the exit agrees with the full model.

        Args:
          index: exit, static; its config has a gate.
          features_BTD: input of the exit's vocabulary head.
        """
        return self.exits[index].gate(features_BTD)

    def exit_logits(self, index: int, features_BTD: jax.Array) -> jax.Array:
        """[B, T, V] float32 logits of exit `index` (static), divided by its temperature."""
        temperature = self.config.exits[index].temperature
        return vocab_logits(self.config, features_BTD, self.exit_head(index), temperature)

    def exit_head(self, index: int) -> Head:
        """Vocabulary head that exit `index` (static) reads."""
        return self.final_head() if self.config.exits[index].tied else self.exits[index].head()

    def final_features(self, hidden_BTD: jax.Array) -> jax.Array:
        """Features [B, T, D] of the full model from the last layer's output."""
        return self.final_norm(hidden_BTD)

    def final_logits(self, features_BTD: jax.Array) -> jax.Array:
        """[B, T, V] float32 logits of the full model."""
        return vocab_logits(self.config, features_BTD, self.final_head())

    def final_head(self) -> Head:
        """Vocabulary head of the full model."""
        return Head(self.embedding()) if self.config.tied else self.head()

    def key_values(
        self, hidden_BTD: jax.Array, positions_BT: jax.Array, start: int, stop: int
    ) -> list[NewKeyValues]:
        """Keys and values that layers start .. stop-1 (static) would have if this state entered each of them.

        State propagation of CALM (arXiv 2207.07061, sec. 3.3): tokens that left early give deeper layers
        the state they left with. Canonical parameters only.
        """
        return [self.layers[i].key_values(hidden_BTD, positions_BT) for i in range(start, stop)]

    def exit_key_values(
        self, index: int, hidden_BTD: jax.Array, positions_BT: jax.Array
    ) -> NewKeyValues | None:
        """The same for the own block of exit `index` (static); None if it has no block."""
        return self.exits[index].key_values(hidden_BTD, positions_BT)


def _check_length(config: ModelConfig, length: int) -> None:
    """Refuses rows beyond the context where other positions would be taken for those that are missing.

    A table of learned positions ends there. Rope "dynamic" is plain rope up to there, and beyond it depends
    on how long the text will be, which nothing here computes.
    """
    ropes = (config.rope, config.local_rope or config.rope)
    ends = config.position == "learned" or any(rope.scaling == "dynamic" for rope in ropes)
    kind = "rope.scaling='dynamic'" if config.position == "rope" else "position='learned'"
    require(
        not ends or length <= config.max_len,
        "tokens: length of a row",
        length,
        f"is more than max_len={config.max_len}, beyond which {kind} gives no positions; shorten the rows",
    )


class Embedding(nn.Module):
    """Owns a lookup table [entries, D]."""

    entries: int
    width: int
    axes: tuple[str | None, str | None]
    param_dtype: str

    @nn.compact
    def __call__(self) -> jax.Array:
        init = partitioned(nn.initializers.normal(0.02), self.axes)
        return self.param("table", init, (self.entries, self.width), self.param_dtype)


def default_positions(like_BT: jax.Array, positions_BT: jax.Array | None) -> jax.Array:
    """`positions_BT`, or 0 .. T-1 for every row."""
    if positions_BT is not None:
        return positions_BT
    b, t = like_BT.shape[:2]
    return jnp.broadcast_to(jnp.arange(t, dtype=jnp.int32), (b, t))


def vocab_logits(config: ModelConfig, features: jax.Array, head: Head, temperature: float = 1.0) -> jax.Array:
    """Float32 logits [..., V] = softcap(s head(features)) / temperature, s the model's scale."""
    return softcapped(config, head.logits(features), temperature)


def softcapped(config: ModelConfig, logits: jax.Array, temperature: float = 1.0) -> jax.Array:
    """Float32 logits [..., V] after the model's scale and softcap, divided by a temperature."""
    logits = logits if config.logit_scale == 1.0 else logits * config.logit_scale
    if config.final_softcap:
        logits = config.final_softcap * jnp.tanh(logits / config.final_softcap)
    return logits if temperature == 1.0 else logits / temperature


LAYER = re.compile(r"layers_(\d+)")  # key of a layer's parameters
BEFORE_LAYERS = ("embed", "positions", "embed_norm")  # keys of what makes the state that enters them
OUTSIDE = (*BEFORE_LAYERS, "final_norm", "head")  # keys of a model's parameters besides layers and exits


def stack_layers(params: Params) -> Params:
    """Puts the per-layer sub-trees into one `layers` tree with a leading layer dimension.

    Args:
      params: canonical parameters (`layers_0`, `layers_1`, ...).

    Returns:
      The same parameters with `layers` of shape [L, ...], the form that training scans over.

    Example:
      ```python
      import jax
      import elastic_lm as el
      from elastic_lm.testing import random_params, tiny_config

      config = tiny_config(n_layers=3)
      stacked = el.train.stack_layers(random_params(config))
      assert all(leaf.shape[0] == 3 for leaf in jax.tree.leaves(stacked["layers"]))
      ```

    Raises:
      ValueError: layers differ in size (`ModelConfig.heterogeneous`).
    """
    layers = alike_layers(params)
    rest = {name: tree for name, tree in params.items() if not LAYER.fullmatch(name)}
    return {**rest, "layers": jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)}


def alike_layers(params: Params) -> list[Params]:
    """The layers of canonical parameters, in order.

    Raises:
      ValueError: layers differ in size.
    """
    count = sum(bool(LAYER.fullmatch(name)) for name in params)
    layers = [params[f"layers_{i}"] for i in range(count)]
    for i, layer in enumerate(layers):
        pairs = zip(*map(jax.tree_util.tree_leaves_with_path, (layer, layers[0])), strict=True)
        for (path, leaf), (_, first) in pairs:
            require(
                leaf.shape == first.shape,
                ".".join([f"layers_{i}", *(key.key for key in path), "shape"]),
                leaf.shape,
                f"is {first.shape} in layers_0, and only layers of one size are stacked for training; "
                "cut a uniform subnet, or train the whole model",
            )
    return layers


def unstack_layers(params: Params) -> Params:
    """Inverse of `stack_layers`."""
    count = jax.tree.leaves(params["layers"])[0].shape[0]
    rest = {name: tree for name, tree in params.items() if name != "layers"}
    layers = {f"layers_{i}": jax.tree.map(lambda leaf, i=i: leaf[i], params["layers"]) for i in range(count)}
    return {**rest, **layers}


def draw_param(config: ModelConfig, key: jax.Array, path: list[str], leaf: jax.ShapeDtypeStruct) -> jax.Array:
    """A parameter of a new model: N(0, 0.02), outputs of attention and MLP / sqrt(2 L); norms the identity.

    The 2 L branches that a token's state is the sum of then have the variance of one (GPT-2).

    Args:
      config: the model; static.
      key: typed PRNG key of this parameter.
      path: where the parameter lies.
      leaf: its shape and dtype.
    """
    if path[-1] == "scale":
        return jnp.full(leaf.shape, 1.0 - config.norm_offset, leaf.dtype)
    if path[-1] == "bias":
        return jnp.zeros(leaf.shape, leaf.dtype)
    deviation = 0.02 / (2 * config.n_layers) ** 0.5 if path[-2] in ("out", "down") else 0.02
    return (deviation * jax.random.normal(key, leaf.shape)).astype(leaf.dtype)
