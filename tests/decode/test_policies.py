"""Policies by position, per request, gates, and state propagation."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import elastic_lm as el
from elastic_lm.config.model import ExitConfig
from elastic_lm.decode import sampler as sampler_module
from elastic_lm.decode.sampler import ENDLESS
from elastic_lm.decode.served import jit_run
from elastic_lm.decode.settings import Settings
from elastic_lm.depth.confidence import confidence, state_similarity
from elastic_lm.depth.policies import (
    ConfidenceExit,
    DecayedExit,
    DepthSchedule,
    StaticExit,
    gate_row,
    threshold_table,
)
from elastic_lm.models.decoder import Decoder
from elastic_lm.models.exits import attach_exits
from elastic_lm.models.registry import init_params
from elastic_lm.nn.attention import AttentionContext, KeyValues
from elastic_lm.nn.block import Block
from elastic_lm.testing import tiny_config

NEW = 12
LAYERS = (1, 2, 3)


@pytest.fixture(scope="module")
def four(make_model):
    """Four segments; gates that were never trained."""
    exits = tuple(ExitConfig(layer, "norm", gate=4) for layer in LAYERS)
    config = dataclasses.replace(tiny_config(n_layers=4), exits=exits)
    params = init_params(config, jax.random.key(2))
    return make_model(config, jax.tree.map(lambda x: 6.0 * x if x.ndim > 1 else x, params))


def sampler(model, policy, **kwargs):
    made = model.sampler(window=2, **kwargs)
    policy.check(model.config)
    made.options = dataclasses.replace(made.options, exit=policy)
    return made


@pytest.mark.parametrize("layer", [*(pytest.param(i, marks=pytest.mark.long) for i in (1, 3)), 2, 4])
def test_static_exit(four, prompts, layer):
    outputs = sampler(four, StaticExit(layer, LAYERS)).sample(prompts, NEW)
    assert {depth for out in outputs for depth in out.exit_layers} == {layer}


def test_decay_is_calms_formula_and_spares_exits_that_never_fire():
    policy = DecayedExit(ConfidenceExit("max_prob", (0.9, 2.0), (1, 2)), tau=4.0)
    table = threshold_table(policy, 2, 100)
    assert table[0, 0] == pytest.approx(0.9)
    assert table[0, 50] == pytest.approx(0.9 * (0.9 + 0.1 * np.exp(-2.0)))
    assert 0.81 < table[0, -1] < 0.82  # 0.8116 at i = N
    assert (table[1] > 1).all()


def test_decay_keeps_the_gates_of_its_base():
    base = ConfidenceExit("max_prob", (0.9, 0.8), (1, 2), gates=(0.7, 0.0))
    assert gate_row(DecayedExit(base), 2).tolist() == pytest.approx([0.7, 0.0])
    assert gate_row(DecayedExit(StaticExit(1, (1, 2))), 2).tolist() == [0.0, 0.0]


def test_depths_fall_with_the_position_for_all_rows_alike(four, prompts):
    policy = DepthSchedule(first=4, last=1, layers=LAYERS)
    outputs = sampler(four, policy).sample(prompts, NEW)
    depth = 4 - 3 * np.arange(NEW) / (NEW - 1)
    expected = [next(layer for layer in (*LAYERS, 4) if layer >= d) for d in depth]
    assert all(out.exit_layers == expected for out in outputs)
    assert set(expected) == {1, 2, 3, 4}


@pytest.mark.long
def test_rows_of_a_batch_have_their_own_policies(four, prompts):
    margin = ConfidenceExit("margin", (0.05,) * 3, LAYERS)
    policies = [StaticExit(1, LAYERS), None, DepthSchedule(3, 2, LAYERS), margin]
    outputs = four.sampler(window=2).sample(prompts[:4], NEW, exit=policies)
    for prompt, policy, out in zip(prompts[:4], policies, outputs, strict=True):
        single = four.sampler(window=2).sample(prompt, NEW, exit=policy)
        assert (out.tokens, out.exit_layers) == (single.tokens, single.exit_layers)
    assert set(outputs[1].exit_layers) == {4}


def test_policies_of_a_call_are_compared_with_the_weights(four, prompts, monkeypatch):
    read = []
    real = sampler_module.weights_fingerprint
    monkeypatch.setattr(sampler_module, "weights_fingerprint", lambda params: read.append(1) or real(params))
    where = {"model": {"weights": "0" * 16, "path": "other"}}
    policy = el.ConfidenceExit("max_prob", (0.5, 0.5, 0.5), LAYERS, provenance=where)
    made = four.sampler(window=2)
    for exit in (policy, [policy, None, *[None] * (len(prompts) - 2)], el.DecayedExit(policy, tau=1.0)):
        with pytest.warns(UserWarning, match="fitted on other, whose .*weights.* differ"):
            made.sample(prompts, 2, exit=exit)
    assert read == [1]


def test_parameters_may_come_in_boxes():
    config = tiny_config(n_layers=1)
    boxed = Decoder(config).init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    assert el.Sampler(Decoder(config), boxed).sample([1, 2], 2).tokens


@pytest.mark.parametrize("ids", [{5, 3}, np.asarray([5, 3]), [5, 3]])
def test_stop_tokens_may_come_in_any_collection(ids):
    assert set(Settings(stop_tokens=ids).stop_tokens) == {3, 5}
    assert isinstance(Settings(stop_tokens=ids).stop_tokens, tuple)
    with pytest.raises(ValueError, match=r"stop_tokens=.*must be token ids"):
        Settings(stop_tokens=(True,))


def test_policies_that_do_not_fit_are_named(four, prompts):
    with pytest.raises(ValueError, match=r"layer=7: the model has exits after layers"):
        four.sampler(window=2).sample(prompts[0], NEW, exit=StaticExit(7, LAYERS))
    with pytest.raises(ValueError, match="exit has 1 policies: give one, or one per prompt"):
        four.sampler(window=2).sample(prompts[:2], NEW, exit=[None])
    metrics = [ConfidenceExit(m, (0.5,) * 3, LAYERS) for m in ("margin", "entropy")]
    with pytest.raises(ValueError, match="cannot mix the metrics entropy, margin"):
        four.sampler(window=2).sample(prompts[:2], NEW, exit=metrics)
    with pytest.raises(ValueError, match="depths fall"):
        DepthSchedule(first=1, last=3, layers=LAYERS)


@dataclasses.dataclass(frozen=True)
class Gated:
    """Thresholds and gates."""

    thresholds: tuple[float, ...]
    gates: tuple[float, ...]
    metric: str = "max_prob"

    def check(self, config):
        """Every policy fits."""


@pytest.mark.long
def test_gates_decide_which_heads_are_looked_at(four, prompts):
    """An exit fires where its gate gives enough, whatever its head would say."""
    sequence = jnp.asarray([prompts[3]])
    decoder = Decoder(four.config).bind({"params": four.params})
    taps = decoder.taps(sequence, LAYERS)
    scores = [
        float(decoder.exit_gate(i, decoder.exit_features(i, taps[n]))[0, -1]) for i, n in enumerate(LAYERS)
    ]
    look = four.sampler(window=2)
    for i, score in enumerate(scores):
        for gate, fires in ((score - 1e-4, True), (score + 1e-4, False)):
            thresholds = tuple(0.0 if k == i else 2.0 for k in range(3))
            out = look.sample(prompts[3], 1, exit=Gated(thresholds, (gate,) * 3))
            assert out.exit_layers == [LAYERS[i] if fires else 4]


@pytest.mark.parametrize("metric", ["cosine", "learned"])
def test_confidence_that_is_known_before_the_head(four, prompts, metric):
    decoder = Decoder(four.config).bind({"params": four.params})
    taps = decoder.taps(jnp.asarray([prompts[3]]), LAYERS)
    for i, layer in enumerate(LAYERS):
        features = decoder.exit_features(i, taps[layer])
        known = {
            "cosine": state_similarity(taps[layer].hidden, taps[layer].entering),
            "learned": decoder.exit_gate(i, features),
        }[metric]
        for threshold, fires in ((float(known[0, -1]) - 1e-4, True), (float(known[0, -1]) + 1e-4, False)):
            thresholds = tuple(threshold if k == i else 2.0 for k in range(3))
            out = four.sampler(thresholds, metric, window=2).sample(prompts[3], 1)
            assert out.exit_layers == [layer if fires else 4]
            if fires:
                assert out.tokens == [int(jnp.argmax(decoder.exit_logits(i, features)[0, -1]))]


def test_gates_of_zero_change_nothing(four, prompts):
    thresholds = (0.3, 0.3, 0.3)
    gated = four.sampler(window=2).sample(prompts, NEW, exit=Gated(thresholds, (0.0,) * 3))
    plain = four.sampler(thresholds, window=2).sample(prompts, NEW)
    assert [o.tokens for o in gated] == [o.tokens for o in plain]


def test_gates_that_nothing_asks_for_are_not_read(four, prompts):
    """A gate that gives NaN changes nothing where no row has a gate and the metric reads logits."""
    broken = dict(four.params)
    for layer in LAYERS:
        gate = jax.tree.map(lambda x: x * jnp.nan, four.params[f"exit_{layer}"]["gate"])
        broken[f"exit_{layer}"] = {**four.params[f"exit_{layer}"], "gate": gate}
    thresholds = (0.05, 0.05, 0.05)
    outputs = dataclasses.replace(four, params=broken).sampler(thresholds, window=2).sample(prompts, NEW)
    expected = four.sampler(thresholds, window=2).sample(prompts, NEW)
    assert [(o.tokens, o.exit_layers) for o in outputs] == [(o.tokens, o.exit_layers) for o in expected]
    assert {layer for out in outputs for layer in out.exit_layers} > {4}


def test_attaching_gated_exits_keeps_the_model(four):
    config = tiny_config(n_layers=3)
    params = init_params(config, jax.random.key(0))
    new, grown = attach_exits(config, params, [ExitConfig(1, "norm", gate=4)], jax.random.key(1))
    tokens = jnp.asarray([[1, 2, 3]])
    before = Decoder(config).apply({"params": params}, tokens).logits
    assert np.array_equal(before, Decoder(new).apply({"params": grown}, tokens).logits)
    assert set(grown["exit_1"]) == {"norm", "head", "gate"}


class Propagation:
    """State propagation, the obvious way: one token at a time, one cache entry per layer and position."""

    def __init__(self, model, thresholds):
        self.model, self.thresholds = model, thresholds
        self.keys = [[] for _ in range(4)]
        self.values = [[] for _ in range(4)]

    def layer(self, i, hidden, position):
        past = None
        if self.keys[i]:
            k, v = jnp.stack(self.keys[i], axis=2), jnp.stack(self.values[i], axis=2)
            past = KeyValues(k, v, jnp.arange(k.shape[2])[None])
        block, context = Block(self.model.config), AttentionContext(jnp.asarray([[position]]), past=past)
        tap, (k, v) = block.apply({"params": self.model.params[f"layers_{i}"]}, hidden, context)
        self.keys[i].append(k[:, :, 0])
        self.values[i].append(v[:, :, 0])
        return tap

    def step(self, token, position, may_exit):
        decoder = Decoder(self.model.config).bind({"params": self.model.params})
        hidden, left = decoder.embed(jnp.asarray([[token]]), jnp.asarray([[position]])), None
        for i in range(4):
            tap = self.layer(i, hidden, position)
            if left is not None:
                continue  # the same state enters every deeper layer
            hidden = tap.hidden
            if i < 3 and may_exit:
                logits = decoder.exit_logits(i, decoder.exit_features(i, tap))[0, -1]
                if confidence("max_prob", logits) >= self.thresholds[i]:
                    left = int(jnp.argmax(logits)), i + 1
        if left is None:
            left = int(jnp.argmax(decoder.final_logits(decoder.final_features(hidden))[0, -1])), 4
        return left

    def run(self, prompt, count):
        for position, token in enumerate(prompt[:-1]):
            self.step(token, position, False)
        tokens, depths = list(prompt), []
        for _ in range(count):
            token, depth = self.step(tokens[-1], len(tokens) - 1, True)
            tokens.append(token)
            depths.append(depth)
        return tokens[len(prompt) :], depths


@pytest.mark.nightly
@pytest.mark.long
def test_deeper_layers_get_keys_and_values_of_the_state_that_left(four, prompts):
    logits = four.forward(jnp.asarray([prompts[5]])).exit_logits
    sure = [np.asarray(confidence("max_prob", x)) for x in logits]
    thresholds = tuple(float(np.quantile(c, q)) for c, q in zip(sure, (0.7, 0.6, 0.5), strict=True))
    decode = four.sampler(thresholds, window=2, missing="propagate")
    seen = set()
    batch = decode.sample(prompts[:2], NEW)
    for row, prompt in enumerate(prompts[:2]):
        reference = Propagation(four, thresholds)
        tokens, depths = reference.run(prompt, NEW)
        assert (batch[row].tokens, batch[row].exit_layers) == (tokens, depths)
        seen |= set(depths)
        _, state, controls = decode._prefill(decode._call([prompt]), NEW)
        state = jit_run(four.config, four.params, state, controls, ENDLESS, "propagate")
        filled = len(prompt) + NEW - 1
        for i in range(4):
            for ours, theirs in zip(state.cache[i], (reference.keys[i], reference.values[i]), strict=True):
                np.testing.assert_allclose(ours[:, :, :filled], jnp.stack(theirs, axis=2), atol=1e-4)
    assert seen == {1, 2, 3, 4}


@pytest.mark.long
def test_block_of_a_deeper_exit_gets_keys_and_values_of_the_state_that_left(make_model, prompts):
    config = dataclasses.replace(
        tiny_config(n_layers=3), exits=(ExitConfig(1, "norm"), ExitConfig(2, "block"))
    )
    params = jax.tree.map(lambda x: 6.0 * x if x.ndim > 1 else x, init_params(config, jax.random.key(0)))
    model, prompt = make_model(config, params), prompts[4]
    decode = model.sampler((0.0, 2.0), window=2, missing="propagate")
    _, state, controls = decode._prefill(decode._call([prompt]), 6)
    state = jit_run(config, params, state, controls, ENDLESS, "propagate")
    filled = int(state.length[0]) - 1
    decoder = Decoder(config).bind({"params": params})
    positions = jnp.arange(filled)[None]
    taps = decoder.taps(state.tokens[:, :filled], (1, 2))
    expected = decoder.exit_key_values(1, taps[1].hidden, positions)
    own = decoder.exit_key_values(1, taps[2].hidden, positions)
    emitted = slice(len(prompt) - 1, filled)  # positions whose token left after layer 1
    for ours, lent, computed in zip(state.exit_cache[1], expected, own, strict=True):
        np.testing.assert_allclose(ours[:, :, emitted], lent[:, :, emitted], rtol=0, atol=1e-6)
        assert np.abs(lent[:, :, emitted] - computed[:, :, emitted]).max() > 1e-2


@pytest.mark.long
def test_rows_that_leave_together_share_their_depths(four, prompts):
    thresholds = (0.05, 0.05, 0.05)
    outputs = four.sampler(thresholds, window=2, together=True).sample(prompts[:3], NEW)
    alone = four.sampler(thresholds, window=2).sample(prompts[:3], NEW)
    assert len({tuple(out.exit_layers) for out in outputs}) == 1
    assert set(outputs[0].exit_layers) > {4}
    assert outputs[0].stats.mean_layers > alone[0].stats.mean_layers


def test_propagation_without_exits_is_full_depth(four, prompts):
    full = four.sampler(window=2).sample(prompts, NEW)
    outputs = four.sampler((2.0, 2.0, 2.0), window=2, missing="propagate").sample(prompts, NEW)
    assert [o.tokens for o in outputs] == [o.tokens for o in full]
