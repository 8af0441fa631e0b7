"""The file that llama.cpp reads holds the same model."""

import dataclasses
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from elastic_lm.bench import llama_cpp
from elastic_lm.config.model import ModelConfig
from elastic_lm.config.rope import RopeConfig
from elastic_lm.decode.sampler import Sampler
from elastic_lm.models.decoder import Decoder
from elastic_lm.models.registry import init_params

CONFIG = ModelConfig(
    vocab_size=64, d_model=32, n_layers=2, n_heads=4, n_kv_heads=2, d_mlp=48, max_len=64, tied=True
)


def rms(x, scale):
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + CONFIG.norm_eps) * scale


def as_llama_cpp(weights, tokens):
    """llama.cpp's graph of a Llama in NumPy: neighbouring dimensions of a head are rotated."""
    t, h, groups = len(tokens), CONFIG.head_dim, CONFIG.group_size
    angle = np.arange(t)[:, None] * CONFIG.rope.theta ** (-np.arange(0, h, 2) / h)
    cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]

    def rotate(x):
        even, odd = x[..., 0::2], x[..., 1::2]
        return np.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1).reshape(x.shape)

    x = weights["token_embd.weight"][tokens]
    for i in range(CONFIG.n_layers):
        w = {name.split(".")[2]: array for name, array in weights.items() if name.startswith(f"blk.{i}.")}
        y = rms(x, w["attn_norm"])
        q = rotate((y @ w["attn_q"].T).reshape(t, -1, h))
        k = rotate((y @ w["attn_k"].T).reshape(t, -1, h)).repeat(groups, axis=1)
        v = (y @ w["attn_v"].T).reshape(t, -1, h).repeat(groups, axis=1)
        logits = np.einsum("tnh,snh->nts", q, k) / np.sqrt(h)
        logits[:, ~np.tri(t, dtype=bool)] = -np.inf
        p = np.exp(logits - logits.max(-1, keepdims=True))
        out = np.einsum("nts,snh->tnh", p / p.sum(-1, keepdims=True), v).reshape(t, -1)
        x = x + out @ w["attn_output"].T
        y = rms(x, w["ffn_norm"])
        gate = y @ w["ffn_gate"].T
        x = x + (gate / (1 + np.exp(-gate)) * (y @ w["ffn_up"].T)) @ w["ffn_down"].T
    return rms(x, weights["output_norm.weight"]) @ weights["token_embd.weight"].T


def test_tensors_give_the_same_logits():
    # Larger than at the start of training, so that attention is far from uniform.
    params = jax.tree.map(lambda p: p * 6 if p.ndim > 1 else p, init_params(CONFIG, jax.random.key(0)))
    tokens = np.random.default_rng(0).integers(0, CONFIG.vocab_size, 12)
    ours = Decoder(CONFIG).apply({"params": params}, jnp.asarray(tokens)[None]).logits[0]
    theirs = as_llama_cpp(dict(llama_cpp.tensors(CONFIG, params)), tokens)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-4 * float(jnp.max(jnp.abs(ours))))


@pytest.mark.parametrize(
    "fields", [{"qkv_bias": True}, {"rope": RopeConfig(scaling="linear", factor=2.0)}, {"qk_norm": True}]
)
def test_only_plain_llamas_are_compared(fields, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(llama_cpp, "_missing", lambda: "")
    config = dataclasses.replace(CONFIG, **fields)
    assert llama_cpp.generator(config, {}, tmp_path / "model.gguf", 1) is None
    assert "no plain Llama: real/full_vs_llamacpp is left out" in capsys.readouterr().err


def test_missing_packages_are_named(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "gguf" else object())
    assert llama_cpp.generator(CONFIG, {}, tmp_path / "model.gguf", 1) is None
    assert "gguf not installed" in capsys.readouterr().err


@pytest.mark.long
def test_llama_cpp_continues_as_full_depth_does(tmp_path):
    pytest.importorskip("xllamacpp")
    pytest.importorskip("gguf")
    params = jax.tree.map(lambda p: p * 6 if p.ndim > 1 else p, init_params(CONFIG, jax.random.key(0)))
    prompt = np.random.default_rng(1).integers(0, CONFIG.vocab_size, 9).tolist()

    theirs = llama_cpp.generator(CONFIG, params, tmp_path / "model.gguf", threads=1)
    assert theirs is not None
    ours = Sampler(Decoder(CONFIG), params).sample(prompt, 12, ignore_eos=True)
    assert theirs(prompt, 12) == list(ours.tokens)
