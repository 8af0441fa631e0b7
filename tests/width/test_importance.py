"""Scores are what their formulas say; sorting by them changes nothing that the model computes."""

import dataclasses
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ranked_process import inputs

from elastic_lm import hf
from elastic_lm.config.model import ExitConfig
from elastic_lm.config.subnet import Subnet
from elastic_lm.data.batch import Batch
from elastic_lm.models.decoder import Decoder, stack_layers
from elastic_lm.models.exits import attach_exits
from elastic_lm.models.sharding import batch_sharding, make_mesh, param_shardings
from elastic_lm.nn.attention import AttentionContext
from elastic_lm.testing import all_logits, random_params, tiny_config
from elastic_lm.width.importance import Importance, layer_scores, permute, rank, storage_order
from elastic_lm.width.slicing import slice_params

GOLDEN = Path(__file__).parents[1] / "golden" / "hf"
KINDS = ("bloom", "gemma3_text", "gpt2", "llama")  # the others are long tests


def make_batch(vocab_size: int, seed: int = 0, rows: int = 2, length: int = 7) -> Batch:
    """Random tokens, padded at the end of every second row."""
    tokens = jax.random.randint(jax.random.key(seed), (rows, length), 0, vocab_size)
    segments = jnp.ones((rows, length), jnp.int32).at[::2, -2:].set(0)
    positions = jnp.tile(jnp.arange(length), (rows, 1))
    return Batch(tokens, tokens, jnp.ones((rows, length)), positions, segments)


def scrambled(config, params, seed: int = 0) -> Importance:
    """Scores without meaning, in the shapes of a model's."""
    rng = np.random.default_rng(seed)
    found = jax.eval_shape(lambda: params)
    neurons, heads = {}, {}
    for name in found:
        owner = f"{name}/block" if "block" in found[name] else name
        tree = found[name].get("block", found[name])
        if "mlp" in tree:
            layer = int(name.split("_")[1]) - name.startswith("exit")
            mlp, n, k = config.sizes(layer)
            neurons[owner] = rng.random(mlp)
            if "attn" in tree:
                heads[owner] = rng.random((k, n // k))
    return Importance(neurons, heads, rng.random(config.d_model))


@pytest.mark.parametrize(
    "family",
    [
        folder.name if folder.name in KINDS else pytest.param(folder.name, marks=pytest.mark.long)
        for folder in sorted(GOLDEN.iterdir())
    ],
)
def test_sorting_leaves_every_family_as_it_was(family: str) -> None:
    config, params = hf.load(GOLDEN / family)
    exits = (ExitConfig(1, "mlp", gate=3), ExitConfig(2, "block"))
    config, params = attach_exits(config, params, exits, jax.random.key(0))
    sorted_config, sorted_params = permute(config, params, scrambled(config, params), groups=8, channels=True)
    assert sorted_config == dataclasses.replace(config, elastic_groups=8)
    kernel = params["layers_0"]["mlp"]["down"]["kernel"]
    assert not np.array_equal(kernel, sorted_params["layers_0"]["mlp"]["down"]["kernel"])
    tokens = np.random.default_rng(1).integers(0, config.vocab_size, (2, 9))
    forward = jax.jit(lambda params: Decoder(config).apply({"params": params}, tokens))
    for x, y in zip(*map(jax.tree.leaves, (forward(params), forward(sorted_params))), strict=True):
        np.testing.assert_allclose(y, x, rtol=1e-5, atol=1e-5 * np.max(np.abs(x)))


def test_layers_of_many_sizes_are_sorted_too() -> None:
    sizes = {"layer_mlp": (64, 16), "layer_heads": (4, 8), "layer_kv_heads": (1, 2), "n_heads": 8}
    config = tiny_config(n_layers=2, head_dim=4, **sizes)
    params = random_params(config)
    tokens = np.arange(8)[None]
    _, found = permute(config, params, scrambled(config, params), channels=True)
    expected = all_logits(config, params, tokens)[2]
    np.testing.assert_allclose(all_logits(config, found, tokens)[2], expected, rtol=1e-5, atol=1e-5)


def test_an_exit_with_an_affine_map_is_sorted_by_channels_alone() -> None:
    config = tiny_config(n_layers=2).with_exits((ExitConfig(1, "linear", hidden=12),))
    params = random_params(config)
    batch = make_batch(config.vocab_size)
    importance = rank(config, params, [batch])
    assert importance.neurons["exit_1"].shape == (12,)
    sorted_config, found = permute(config, params, importance, groups=16, channels=True)
    gates = (tree["exit_1"]["mlp"]["up"]["kernel"].sum(axis=-1) for tree in (found, params))
    np.testing.assert_allclose(*gates, rtol=1e-4, atol=1e-5)
    expected = all_logits(config, params, batch.tokens)
    for depth, logits in all_logits(sorted_config, found, batch.tokens).items():
        np.testing.assert_allclose(logits, expected[depth], rtol=1e-5, atol=1e-5)
    wrong = dataclasses.replace(importance, neurons={**importance.neurons, "exit_1": np.ones(64)})
    with pytest.raises(ValueError, match=r"importance.neurons\['exit_1'\]=\(64,\): scores are of another"):
        permute(config, params, wrong)


def test_storage_deals_ranks_out_to_groups() -> None:
    scores = np.array([0.1, 0.9, 0.3, 0.7, 0.5, 0.2, 0.8, 0.4])
    order = storage_order(scores, 2)
    assert order.tolist() == [1, 3, 7, 5, 6, 4, 2, 0]  # ranks 0 2 4 6 and 1 3 5 7
    assert storage_order(scores, 0).tolist() == np.argsort(-scores).tolist()
    assert storage_order(np.ones(4), 2).tolist() == [0, 2, 1, 3]


@pytest.mark.parametrize("gated", [True, False])
def test_scores_are_what_the_formulas_say(gated: bool) -> None:
    config = tiny_config(n_layers=2, gated=gated).with_exits((ExitConfig(1, "norm"),))
    params = random_params(config)
    batches = [make_batch(config.vocab_size, seed) for seed in (0, 1)]
    found = rank(config, params, batches)
    neurons, channels, heads = np.zeros(64), np.zeros(32), np.zeros((2, 2))
    for batch in batches:
        counted = np.asarray(batch.segments) > 0
        decoder = Decoder(config).bind({"params": params})
        taps = decoder.taps(batch.tokens, (1, 2), batch.positions, batch.segments)
        for depth, tap in taps.items():
            block = decoder.layers[depth - 1]
            entering = block.attn_norm(tap.entering)
            channels += np.abs(np.concatenate([entering[counted], tap.mlp_input[counted]])).sum(0)
            if depth == 2:
                h = np.tensordot(tap.mlp_input, params["layers_1"]["mlp"]["up"]["kernel"], ((2,), (-1,)))
                h = jax.nn.silu(h[:, :, 0]) * h[:, :, 1] if gated else jax.nn.silu(h)
                neurons += np.abs(np.asarray(h)[counted]).sum(0)
                # A head's output, by its part of the output projection alone being the identity.
                for k in range(2):
                    for g in range(2):
                        index = (k * 2 + g) * 8
                        attention = params["layers_1"]["attn"]
                        only = np.zeros((32, 32), np.float32)
                        only[np.arange(8), index + np.arange(8)] = 1
                        out, _ = block.attn.apply(
                            {"params": {**attention, "out": {"kernel": only}}},
                            entering,
                            AttentionContext(batch.positions, batch.segments),
                        )
                        heads[k, g] += np.linalg.norm(np.asarray(out)[counted], axis=-1).sum()
        channels += np.abs(decoder.final_features(taps[2].hidden)[counted]).sum(0)
        channels += np.abs(decoder.exit_features(0, taps[1])[counted]).sum(0)
    np.testing.assert_allclose(found.neurons["layers_1"], neurons, rtol=1e-4)
    np.testing.assert_allclose(found.heads["layers_1"], heads, rtol=1e-4)
    np.testing.assert_allclose(found.groups["layers_1"], heads.sum(1), rtol=1e-4)
    np.testing.assert_allclose(found.channels, channels, rtol=1e-4)
    assert sorted(found.neurons) == sorted(found.heads) == ["layers_0", "layers_1"]


def test_the_least_important_go_first() -> None:
    """Neurons and heads that do nothing are ranked last, and cutting them changes nothing."""
    config = tiny_config(n_layers=2, n_heads=8, head_dim=4)
    params = random_params(config)
    dead_F, dead_G = np.arange(64) % 2 == 0, np.array([0, 2])
    for layer in ("layers_0", "layers_1"):
        up = params[layer]["mlp"]["up"]
        up["kernel"] = up["kernel"].at[1, dead_F].set(0)
        out = params[layer]["attn"]["out"]
        kernel = out["kernel"].reshape(32, 2, 4, 4).at[:, :, dead_G].set(0)
        out["kernel"] = kernel.reshape(32, 32)
    batch = make_batch(config.vocab_size)
    importance = rank(config, params, [batch])
    for layer in ("layers_0", "layers_1"):
        importance.heads[layer][:, dead_G] = 0.0  # dead behind W_out, which the score does not see
    ranked = permute(config, params, importance, groups=4)
    subnet = Subnet.uniform(ranked[0], mlp=0.5, heads=0.5)
    small, expected = (
        all_logits(c, p, batch.tokens)[2] for c, p in (slice_params(*ranked, subnet), (config, params))
    )
    np.testing.assert_allclose(small, expected, rtol=1e-5, atol=1e-5)
    assert importance.neurons["layers_0"][dead_F].max() == 0.0


def test_layer_scores_are_the_change_of_the_logits() -> None:
    config = tiny_config(n_layers=3)
    params = random_params(config)
    params["layers_1"]["mlp"]["down"]["kernel"] *= 0
    params["layers_1"]["attn"]["out"]["kernel"] *= 0
    batch = make_batch(config.vocab_size)
    scores = layer_scores(config, params, [batch])
    assert scores[1] == 0.0
    counted = np.asarray(batch.segments) > 0
    decoder = Decoder(config).bind({"params": params})
    whole = np.asarray(decoder(batch.tokens, batch.positions, batch.segments).logits)[counted]
    small, rest = slice_params(config, params, Subnet.uniform(config, layers=(1, 2)))
    without = Decoder(small).bind({"params": rest})(batch.tokens, batch.positions, batch.segments).logits
    change = np.square(whole - np.asarray(without)[counted]).sum() / np.square(whole).sum()
    np.testing.assert_allclose(scores[0], change, rtol=1e-4)
    again = layer_scores(config, params, [batch], removed=(1,))
    assert again[1] == np.inf
    np.testing.assert_allclose(again[[0, 2]], scores[[0, 2]], rtol=1e-5)


@pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 devices")
def test_ranking_on_a_mesh_is_that_of_one_device() -> None:
    config = tiny_config(n_layers=2, exits=(1,))
    params = random_params(config)
    mesh = make_mesh(2, 2, 2)
    shardings = param_shardings(config, mesh)
    batch = make_batch(config.vocab_size, rows=8)
    spread = jax.device_put(batch, batch_sharding(mesh))
    one, many = rank(config, params, [batch]), rank(config, jax.device_put(params, shardings), [spread])
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5),
        dataclasses.asdict(one),
        dataclasses.asdict(many),
    )
    placed = permute(config, jax.device_put(params, shardings), one, channels=True)[1]
    assert jax.tree.map(lambda x: x.sharding, placed) == shardings
    here = permute(config, params, one, channels=True)[1]
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(placed), jax.device_get(here))


@pytest.mark.long
def test_processes_that_see_parts_of_a_model_rank_it_alike(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    environment = {**os.environ, "JAX_NUM_CPU_DEVICES": "2", "JAX_PLATFORMS": "cpu"}
    script = str(Path(__file__).with_name("ranked_process.py"))
    runs = []
    for i in range(2):
        command = [sys.executable, script, port, str(i), str(tmp_path / f"{i}.npz")]
        runs.append(subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True))
    try:
        for run in runs:
            _, errors = run.communicate(timeout=240)
            assert run.returncode == 0, errors[-3000:]
    finally:
        for run in runs:
            run.kill()
    config, params, batch = inputs()
    alone = rank(config, params, [batch])
    sorted_up = np.asarray(permute(config, params, alone, groups=8)[1]["layers_0"]["mlp"]["up"]["kernel"])
    expected = {
        "neurons": alone.neurons["layers_0"],
        "heads": alone.heads["layers_1"],
        "channels": alone.channels,
        "layers": layer_scores(config, params, [batch]),
    }
    for process in range(2):
        found = np.load(tmp_path / f"{process}.npz")
        for name, scores in expected.items():
            np.testing.assert_allclose(found[name], scores, rtol=1e-4)
        quarters = [sorted_up[:, f : f + 32, d : d + 16] for f in (0, 32) for d in (0, 16)]
        for shard in (found["shard_0"], found["shard_1"]):
            assert any(np.array_equal(shard, quarter) for quarter in quarters)


def test_what_does_not_fit_is_refused() -> None:
    config = tiny_config(n_layers=2)
    params = random_params(config)
    scores = scrambled(config, params)
    with pytest.raises(ValueError, match="elastic_groups=24: must divide d_mlp=64; choose 8"):
        permute(config, params, scores, groups=24)
    with pytest.raises(ValueError, match="groups=64: must divide d_model=32; choose 32"):
        permute(config, params, scores, groups=64, channels=True)
    with pytest.raises(ValueError, match="unstack_layers"):
        permute(config, stack_layers(params), scores)
    with pytest.raises(ValueError, match=r"importance.neurons=.*: scores are of another model"):
        permute(config, params, dataclasses.replace(scores, neurons={}))
    other = tiny_config(n_layers=2, n_kv_heads=4)
    with pytest.raises(ValueError, match=r"importance.heads\['layers_0'\]=\(2, 2\): scores are of another"):
        permute(other, random_params(other), scores)
    with pytest.raises(ValueError, match="batches=0: hold no tokens"):
        rank(config, params, [])
