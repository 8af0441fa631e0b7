"""Sub-networks as models: cut out of the parameters, or masked inside them.

With a_j heads per group, f_j neurons and d_j channels of a subnet (Flextron, arXiv 2406.10260;
MatFormer, arXiv 2310.07707), W[:n] being the n leading entries of a ranked dimension:

    MLP_j(x)  = W_down[:, :f_j] (act(W_gate[:f_j] x) * W_up[:f_j] x)
    attn_j(x) = sum over groups and their first a_j heads of W_out,h head_h(x)
    d_j:        the first d_j channels of every table, norm and kernel

A slice holds the small tensors and is an ordinary smaller model; a mask holds zeros in the large ones and
computes the same. Only norms need care: over d channels of which d_j live, a norm must average over d_j
(`nn.norm.rms_norm`; Nemotron Elastic, arXiv 2511.16664), which `ModelConfig.norm_width` says.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from elastic_lm.config.checks import require
from elastic_lm.config.model import ModelConfig
from elastic_lm.config.subnet import Subnet
from elastic_lm.models.decoder import Params
from elastic_lm.width.axes import Edit, dimensions, edit_params, grouped_lives, mask_edit, slice_edit


def slice_params(config: ModelConfig, params: Params, subnet: Subnet) -> tuple[ModelConfig, Params]:
    """Cuts a sub-network out of a model: an ordinary smaller one.

    Of a model that is not ranked (`methods.importance`) it keeps the first neurons and heads, whatever
    they do.

    Exits stay where their layer does, with their own modules sliced like it; the others go. Heads keep
    their width, the attention scale and the embedding scale do not change.

    Args:
      config: the whole model; static.
      params: its canonical parameters, on any devices; works under jit too. What is not cut is not copied.
      subnet: what stays; static.

    Returns:
      (config, canonical parameters) of the smaller model.

    Raises:
      ValueError: the subnet does not fit the model, or the parameters are stacked.
    """
    edits = _edits(config, params, subnet, slice_edit)
    channels = edits[subnet.layers[0]]
    small = {name: edit_params(params[name], channels, (name,)) for name in _roots(params)}
    for j, i in enumerate(subnet.layers):
        small[f"layers_{j}"] = edit_params(params[f"layers_{i}"], edits[i])
    for old, new in subnet.exits(config):
        if old.name in params:
            small[new.name] = edit_params(params[old.name], edits[old.layer - 1], (old.name,))
    return subnet.sliced(config), small


def slice_layer(config: ModelConfig, params: Params, subnet: Subnet, index: int) -> Params:
    """One layer of what `slice_params` gives, for programs that hold no more of it at once.

    Args:
      config: the whole model; static.
      params: its canonical parameters.
      subnet: what stays; static.
      index: the layer's number in the slice; static.

    Returns:
      {its name in the slice: its parameters}.

    Raises:
      ValueError: see `slice_params`.
    """
    layer = subnet.layers[index]
    edit = _edits(config, params, subnet, slice_edit)[layer]
    return {f"layers_{index}": edit_params(params[f"layers_{layer}"], edit)}


def mask_params(config: ModelConfig, params: Params, subnet: Subnet) -> tuple[ModelConfig, Params]:
    """A model of the old shapes that computes what the sliced one does, with zeros for what is cut.

    Args:
      config: the whole model; static.
      params: its canonical parameters.
      subnet: what stays; static.

    Returns:
      (config with `norm_width` where channels are masked, canonical parameters). Layers that are left out
      add nothing to the residual stream; an exit after one of them has no counterpart in the slice.

    Raises:
      ValueError: the subnet does not fit the model, or the parameters are stacked.
    """
    edits = _edits(config, params, subnet, mask_edit)
    channels = dataclasses.replace(Edit(), channels=edits[subnet.layers[0]].channels)
    by_name = {f"layers_{i}": edit for i, edit in edits.items()}
    by_name |= {old.name: edits[old.layer - 1] for old, _ in subnet.exits(config)}
    masked = {name: edit_params(tree, by_name.get(name, channels), (name,)) for name, tree in params.items()}
    masked = _with_dead_scales(config, masked, subnet)
    for i in set(range(config.n_layers)) - set(subnet.layers):
        masked[f"layers_{i}"] = _silenced(config, masked[f"layers_{i}"])
    width = subnet.d_model if subnet.d_model < config.d_model else config.norm_width
    return dataclasses.replace(config, norm_width=width), masked


def _edits(config: ModelConfig, params: Params, subnet: Subnet, make: Callable[..., Edit]) -> dict[int, Edit]:
    """The edit of every kept layer; all of them treat channels alike."""
    subnet.check(config)
    require("layers" not in params, "params", "stacked", "pass them through models.decoder.unstack_layers")
    sizes = zip(subnet.layers, subnet.mlp, subnet.heads, subnet.groups, strict=True)
    return {i: make(config.layer(i), mlp, heads, groups, subnet.d_model) for i, mlp, heads, groups in sizes}


def _roots(params: Params) -> list[str]:
    return [name for name in ("embed", "positions", "final_norm", "head") if name in params]


def _with_dead_scales(config: ModelConfig, params: Params, subnet: Subnet) -> Params:
    """Norms give 0 in masked channels also where the model adds an offset to the stored scale."""
    lives = grouped_lives(config.d_model, subnet.d_model, config.elastic_groups)

    def one(path: Any, leaf: jax.Array) -> jax.Array:
        keys = tuple(key.key for key in path)
        if keys[-1] != "scale" or not dimensions(keys):
            return leaf
        return jnp.where(lives, leaf, jnp.asarray(-config.norm_offset, leaf.dtype))

    return jax.tree_util.tree_map_with_path(one, params) if config.norm_offset else params


def _silenced(config: ModelConfig, layer: Params) -> Params:
    """A layer whose attention and MLP add 0."""
    zero = {name: jax.tree.map(jnp.zeros_like, layer[name[0]][name[1]]) for name in OUTPUTS}
    quiet = dict(layer)
    for (outer, inner), tree in zero.items():
        quiet[outer] = {**quiet[outer], inner: tree}
    for name in ("post_attn_norm", "post_mlp_norm"):
        if name in layer:
            scale = jnp.full_like(layer[name]["scale"], -config.norm_offset)
            quiet[name] = {**jax.tree.map(jnp.zeros_like, layer[name]), "scale": scale}
    return quiet


OUTPUTS = (("attn", "out"), ("mlp", "down"))
