"""A decoder that chooses the widths of its layers while it decodes, for every token or for every row.

    per token   layer l asks its router, with the budget's code and the state that enters the layer
    per row     the choices are given, one per layer and row; `prompt_choices` asks the routers for them, by
                the mean of their logits over the row's prompt

Layers are kept in nested blocks (`width.nested`), so that what is not chosen is not read. Budgets and choices
are traced: one program serves them all.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from elastic_lm.config.checks import require
from elastic_lm.config.model import ModelConfig
from elastic_lm.config.subnet import Menu
from elastic_lm.models.decoder import Decoder, Params, default_positions
from elastic_lm.nn.attention import AttentionContext, KeyValues, NewKeyValues, text_lengths
from elastic_lm.nn.block import Tap
from elastic_lm.nn.rope import shared_rotations
from elastic_lm.width.nested import nest, nested_block
from elastic_lm.width.router import layer_router, router_input

# Key of what decides a call's widths: the budget's {"code", "tilt"}, or choices {"heads", "mlp": [B, L]}.
WIDTH_INPUTS = "width_inputs"


@dataclasses.dataclass(frozen=True)
class NestedConfig(ModelConfig):
    """A model whose layers choose from a menu while it decodes."""

    menu: Menu = dataclasses.field(default=Menu())  # what may be chosen: heads and neurons
    per_token: bool = True  # routers choose for every token; False = choices of every row are given
    router_width: int = 0  # per_token: width of the routers' hidden layers; 0 = there are no routers

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            not self.per_token or self.router_width >= 1,
            "router_width",
            self.router_width,
            "set the width of the routers, or per_token=False",
        )

    @classmethod
    def of(cls, config: ModelConfig, menu: Menu, **fields: Any) -> "NestedConfig":
        """The nested form of a model.

        Args:
          config: the model.
          menu: what its layers choose from.
          **fields: the other fields above.
        """
        whole = {f.name: getattr(config, f.name) for f in dataclasses.fields(ModelConfig)}
        return cls(**whole, menu=menu, **fields)


class NestedDecoder(Decoder):
    """`Decoder` over nested layers; parameters are from `nested_params`."""

    config: NestedConfig

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
        """As `Decoder.run_layers`, without packed documents and layer dropout, which belong to training."""
        assert segments_BT is None
        assert keep_LB is None

        c, params = self.config, self.variables["params"]
        sizes = c.menu.sizes(c)
        lengths_BT = text_lengths(positions_BT, lengths_BT, cached=bool(past))
        rotations = shared_rotations(c, positions_BT, range(start, stop), lengths_BT)
        new_kv = []
        tap = Tap(hidden_BTD, hidden_BTD, hidden_BTD, hidden_BTD)
        for i in range(start, stop):
            layer = params[f"layers_{i}"]
            heads_BT, mlp_BT = self._choices(i, layer, tap.hidden)
            own_past = past[i - start] if past else None
            rotation = rotations[i - start]
            context = AttentionContext(positions_BT, window=c.window(i), past=own_past, rotation=rotation)
            tap, kv = nested_block(c.layer(i), layer, tap.hidden, context, heads_BT, mlp_BT, mlp=sizes.mlp[i])
            new_kv.append(kv)
        return tap, new_kv

    def _choices(self, i: int, layer: Params, hidden_BTD: jax.Array) -> tuple[jax.Array, jax.Array]:
        """int32 indices into the choices of heads and of neurons, [B, T or 1] each."""
        inputs = self.variables["params"][WIDTH_INPUTS]
        if not self.config.per_token:
            return inputs["heads"][:, i, None], inputs["mlp"][:, i, None]
        logits = layer_logits(self.config, layer, inputs, hidden_BTD)
        return jnp.argmax(logits["heads"], axis=-1), jnp.argmax(logits["mlp"], axis=-1)


def decoder_of(config: ModelConfig) -> Decoder:
    """The decoder that a config (static) describes, nested or not."""
    return NestedDecoder(config) if isinstance(config, NestedConfig) else Decoder(config)


def layer_logits(
    config: NestedConfig, layer: Params, inputs: Params, hidden_BTD: jax.Array
) -> dict[str, jax.Array]:
    """Logits of a layer's choices for every token, tilted towards the budget.

    Args:
      config: the nested model; static.
      layer: the layer's parameters, its `router` and the `costs` of its choices among them.
      inputs: `code` [A] of the budget and `tilt`.
      hidden_BTD: state that enters the layer.

    Returns:
      {"heads", "mlp": [B, T, choices] float32}.
    """
    router, code = layer_router(config.menu, config.router_width), inputs["code"]
    logits: Any = router.apply({"params": layer["router"]}, router_input(code, hidden_BTD))
    return {name: r + inputs["tilt"] * layer["costs"][name] for name, r in logits.items()}


def prompt_choices(
    config: NestedConfig, params: Params, tokens_BP: jax.Array, length_B: jax.Array
) -> dict[str, jax.Array]:
    """What the routers choose for whole rows, by the mean of their logits over the prompt.

    Args:
      config: the nested model, with per_token=True; static.
      params: from `nested_params`, with `WIDTH_INPUTS`.
      tokens_BP: int32 prompts, padded on the right.
      length_B: int32 prompt lengths.

    Returns:
      {"heads", "mlp": [B, L] int32}, the `WIDTH_INPUTS` of the same model with per_token=False.
    """
    decoder, sizes = NestedDecoder(config).bind({"params": params}), config.menu.sizes(config)
    positions = default_positions(tokens_BP, None)
    share_BP1 = ((positions < length_B[:, None]) / length_B[:, None])[..., None]
    hidden = decoder.embed(tokens_BP, positions)

    # A layer chooses before it runs, and what it then gives is what the next layer's router reads.
    chosen: list[tuple[jax.Array, jax.Array]] = []
    for i in range(config.n_layers):
        layer = params[f"layers_{i}"]
        logits = layer_logits(config, layer, params[WIDTH_INPUTS], hidden)
        mean = {name: jnp.sum(r * share_BP1, axis=1) for name, r in logits.items()}
        heads_B, mlp_B = jnp.argmax(mean["heads"], axis=-1), jnp.argmax(mean["mlp"], axis=-1)
        chosen.append((heads_B, mlp_B))

        context = AttentionContext(positions, window=config.window(i), lengths=length_B[:, None])
        tap, _ = nested_block(
            config.layer(i), layer, hidden, context, heads_B[:, None], mlp_B[:, None], mlp=sizes.mlp[i]
        )
        hidden = tap.hidden

    heads, mlp = (jnp.stack(each, axis=1) for each in zip(*chosen, strict=True))
    return {"heads": heads, "mlp": mlp}


def nested_params(
    config: NestedConfig, params: Params, routers: Params | None = None, costs: Any = None
) -> Params:
    """Canonical parameters with their layers in nested blocks, and with the routers that choose them.

    Nested layers are copies: the whole model's own arrays stay what they are.

    Args:
      config: the nested model; static.
      params: canonical parameters of the whole model.
      routers: {"hidden", "heads", "mlp"} stacked over layers; per_token only.
      costs: {"heads", "mlp": [L, choices]} shares of the whole model's cost; per_token only.

    Returns:
      Parameters without `WIDTH_INPUTS`, which changes from call to call.
    """
    sizes = config.menu.sizes(config)
    nested = dict(params)
    for i in range(config.n_layers):
        layer = nest(config.layer(i), sizes.heads[i], sizes.mlp[i], params[f"layers_{i}"])
        if config.per_token:
            router = {"router": routers, "costs": costs}
            layer |= {name: jax.tree.map(lambda leaf, i=i: leaf[i], tree) for name, tree in router.items()}
        nested[f"layers_{i}"] = layer
    return nested
