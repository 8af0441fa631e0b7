"""Sub-networks as models: cut out of the parameters, or masked inside them.

With a_j heads per group, f_j neurons and d_j channels of a subnet (Flextron, arXiv 2406.10260;
MatFormer, arXiv 2310.07707), W[:n] being the n leading entries of a ranked dimension:

    MLP_j(x)  = W_down[:, :f_j] (act(W_gate[:f_j] x) * W_up[:f_j] x)
    attn_j(x) = sum over groups and their first a_j heads of W_out,h head_h(x)
    d_j:        the first d_j channels of every table, norm and kernel

Three forms of a sub-network compute the same. A slice holds the small tensors and is an ordinary smaller
model, whose layers may differ in size: serve it. A mask holds zeros in the large tensors and keeps their
shapes. A switch (`width.switched`) runs every sub-network of a menu in one program: train with it.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from elastic_lm.config.checks import require
from elastic_lm.config.model import ModelConfig
from elastic_lm.config.subnet import Subnet
from elastic_lm.models.decoder import OUTSIDE, Params
from elastic_lm.width.axes import (
    Edit,
    dimensions,
    edit_params,
    exit_edit,
    grouped_kept,
    mask_edit,
    slice_edit,
)


def slice_params(config: ModelConfig, params: Params, subnet: Subnet) -> tuple[ModelConfig, Params]:
    """Cuts a sub-network out of a model: an ordinary smaller one.

    Exits stay if their layer does, with their own modules sliced like it, except for the MLP of an exit of
    kind `linear`, whose neurons all stay. Heads keep their width, and the
    scales of attention and embedding do not change. If the model was never sorted by importance
    (`width.importance`), the first neurons and heads stay, whatever they do.

    Args:
      config: the whole model; static.
      params: its canonical parameters, on any devices, concrete or traced. What is not cut is not copied.
      subnet: what stays; static.

    Returns:
      (config, canonical parameters) of the smaller model.

    Raises:
      ValueError: the subnet does not fit the model, or the parameters are stacked.

    Example:
      ```python
      import elastic_lm as el

      config = el.testing.tiny_config()
      params = el.testing.random_params(config)
      half = el.Subnet.uniform(config, mlp=0.5, heads=0.5)
      small_config, small = el.slice_params(config, params, half)
      assert small["layers_0"]["mlp"]["down"]["kernel"].shape == (config.d_model, config.d_mlp // 2)
      ```
    """
    edits = _edits(config, params, subnet, slice_edit)

    # Outside the layers there are only channels, which all layers keep alike.
    channels = edits[subnet.layers[0]]
    outside = [name for name in OUTSIDE if name in params]
    small = {name: edit_params(params[name], channels, (name,)) for name in outside}

    for j, i in enumerate(subnet.layers):
        small[f"layers_{j}"] = edit_params(params[f"layers_{i}"], edits[i])
    for old, new in subnet.exits(config):
        if old.name in params:
            edit = exit_edit(old, edits[old.layer - 1])
            small[new.name] = edit_params(params[old.name], edit, (old.name,))
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
      ValueError: as `slice_params`.
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
      (config with `norm_width` if channels are masked, canonical parameters). Layers that are left out add
      nothing to the residual stream; an exit after one of them has no counterpart in the slice.

    Raises:
      ValueError: the subnet does not fit the model, or the parameters are stacked.

    Example:
      ```python
      import elastic_lm as el
      import numpy as np

      config = el.testing.tiny_config()
      params = el.testing.random_params(config)
      half = el.Subnet.uniform(config, mlp=0.5, heads=0.5)
      tokens = el.testing.random_tokens(config, batch=1, length=5)
      (small, cut), (large, masked) = (
          form(config, params, half) for form in (el.width.slice_params, el.width.mask_params)
      )
      sliced = el.testing.all_logits(small, cut, tokens)[4]  # of all 4 layers
      same = el.testing.all_logits(large, masked, tokens)[4]
      np.testing.assert_allclose(sliced, same, rtol=1e-4, atol=1e-4)
      ```
    """
    edits = _edits(config, params, subnet, mask_edit)
    channels = Edit(channels=edits[subnet.layers[0]].channels)
    by_name = {f"layers_{i}": edit for i, edit in edits.items()}
    by_name |= {old.name: exit_edit(old, edits[old.layer - 1]) for old, _ in subnet.exits(config)}
    masked = {name: edit_params(tree, by_name.get(name, channels), (name,)) for name, tree in params.items()}

    if config.norm_offset:
        masked = _with_zero_scales(config, masked, subnet)
    for i in set(range(config.n_layers)) - set(subnet.layers):
        masked[f"layers_{i}"] = _silenced(config, masked[f"layers_{i}"])

    # Over D channels of which some are 0, a norm must average over the others alone (Nemotron Elastic, arXiv
    # 2511.16664): `nn.norm`.
    width = subnet.d_model if subnet.d_model < config.d_model else config.norm_width
    return dataclasses.replace(config, norm_width=width), masked


def _edits(config: ModelConfig, params: Params, subnet: Subnet, make: Callable[..., Edit]) -> dict[int, Edit]:
    """The edit of every kept layer; all of them treat channels alike."""
    subnet.check(config)
    require("layers" not in params, "params", "stacked", "pass them through models.decoder.unstack_layers")
    sizes = zip(subnet.layers, subnet.mlp, subnet.heads, subnet.groups, strict=True)
    return {
        i: make(config.layer(i), mlp=mlp, heads=heads, kv_groups=kv_groups, d_model=subnet.d_model)
        for i, mlp, heads, kv_groups in sizes
    }


def _with_zero_scales(config: ModelConfig, params: Params, subnet: Subnet) -> Params:
    """Scales of masked channels are 0 once the model has added `norm_offset` to what is stored."""
    keeps_D = grouped_kept(config.d_model, subnet.d_model, config.elastic_groups)

    def rescaled(path: Any, leaf: jax.Array) -> jax.Array:
        keys = tuple(key.key for key in path)
        if keys[-1] != "scale" or not dimensions(keys):
            return leaf
        return jnp.where(keeps_D, leaf, jnp.asarray(-config.norm_offset, leaf.dtype))

    return jax.tree_util.tree_map_with_path(rescaled, params)


def _silenced(config: ModelConfig, layer: Params) -> Params:
    """A layer whose attention and MLP add 0."""
    silent = dict(layer)
    for outer, inner in (("attn", "out"), ("mlp", "down")):
        silent[outer] = {**layer[outer], inner: jax.tree.map(jnp.zeros_like, layer[outer][inner])}

    # A sandwich norm of 0 gives its bias; its scale, 0 too, is what is stored plus `norm_offset`.
    for name in ("post_attn_norm", "post_mlp_norm"):
        if name in layer:
            scale = jnp.full_like(layer[name]["scale"], -config.norm_offset)
            silent[name] = {**jax.tree.map(jnp.zeros_like, layer[name]), "scale": scale}
    return silent
