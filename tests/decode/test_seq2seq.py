"""Encoder-decoder models: decoding against full recomputation and transformers, scores, labels, refusals."""

import functools
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from elastic_lm import hf
from elastic_lm.config.encoder_decoder import EncoderDecoderConfig
from elastic_lm.decode import seq2seq_loop
from elastic_lm.decode.seq2seq import TextToText
from elastic_lm.models.decoder import Decoder
from elastic_lm.models.encoder_decoder import EncoderDecoder, attach_encoder_head
from elastic_lm.models.registry import init_params
from elastic_lm.testing import tiny_config

FOLDER = Path(__file__).parents[1] / "golden" / "encoder_decoders"
NEW = 12


class Letters:
    """One character per token, from id 2 on."""

    def encode(self, text, *, bos=False):
        return [ord(c) - 95 for c in text]  # a = 2

    def decode(self, ids):
        return "".join(chr(95 + i) for i in ids if i > 1)


class Reference:
    """A model decoded the slow and obvious way: one full pass over source and target per token."""

    def __init__(self):
        self.config = EncoderDecoderConfig(
            48, 32, 2, 4, 40, n_decoder_layers=3, head_dim=12, gated=True, activation="gelu_tanh",
            relative_buckets=8, relative_max_distance=20,
        )  # fmt: skip
        self.params = jax.tree.map(lambda x: 1.5 * x, init_params(self.config, jax.random.key(3)))

    @functools.cached_property
    def forward(self):
        model = EncoderDecoder(self.config)
        return jax.jit(lambda *arrays: model.apply({"params": self.params}, *arrays))

    def logits(self, source, target):
        """[T, V] logits, where each target token is predicted."""
        ids, mask, before = np.zeros((1, 32), np.int32), np.zeros((1, 32), bool), np.zeros((1, 32), np.int32)
        ids[0, : len(source)], mask[0, : len(source)] = source, True
        before[0, 1 : len(target) + 1] = target
        return np.asarray(self.forward(ids, before, mask))[0, : len(target) + 1]

    def greedy(self, source, count):
        target = []
        while len(target) < count and self.config.eos_ids[0] not in target:
            target.append(int(np.argmax(self.logits(source, target)[-1])))
        return target


@pytest.fixture(scope="module")
def reference():
    return Reference()


@pytest.fixture(scope="module")
def model(reference):
    return TextToText(EncoderDecoder(reference.config), reference.params, Letters())


@pytest.fixture(scope="module")
def sources():
    rng = np.random.default_rng(0)
    return [rng.integers(2, 48, size).tolist() for size in (5, 17, 30, 1)]


def test_one_batch_gives_what_full_recomputation_gives(model, reference, sources):
    results = model.generate(sources, NEW)
    assert [r.tokens for r in results] == [reference.greedy(source, NEW) for source in sources]
    assert len({tuple(r.tokens) for r in results}) == len(sources)


def test_a_row_depends_on_itself_alone(model, sources):
    together = model.generate([*sources, sources[2] * 2], NEW)  # other buckets of rows and lengths
    for source, row in zip(sources, together, strict=False):
        (alone,) = model.generate(source, NEW)
        assert alone.tokens == row.tokens
        np.testing.assert_allclose(alone.energy, row.energy, rtol=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_scores_are_those_of_the_logits(model, reference, sources, temperature):
    for source, result in zip(
        sources, model.generate(sources, NEW, energy_temperature=temperature), strict=True
    ):
        logits = reference.logits(source, result.tokens)[:-1].astype(np.float64)
        top = np.sort(np.exp(logits - np.log(np.exp(logits).sum(-1, keepdims=True))))
        energy = -temperature * np.log(np.exp(logits / temperature).sum(-1))
        expected = {
            "energy": energy,
            "max_prob": top[:, -1],
            "entropy": -(top * np.log(top)).sum(-1),
            "margin": top[:, -1] - top[:, -2],
        }
        for name, values in expected.items():
            score = getattr(result, name)
            assert score.dtype == np.float32
            assert score.shape == (len(result.tokens),)
            np.testing.assert_allclose(score, values, rtol=2e-4, atol=2e-5, err_msg=name)
        assert result.mean_energy == pytest.approx(energy.mean(), rel=1e-4)


def test_energy_is_float32_where_activations_are_not(reference, sources):
    config, params = hf.load(FOLDER / "t5", dtype="bfloat16")
    (result,) = TextToText(EncoderDecoder(config), params).generate(sources[0], 3)
    assert result.energy.dtype == np.float32
    assert result.text == ""


def test_rows_end_on_their_own(model, sources):
    free = [r.tokens for r in model.generate(sources, NEW)]
    stop = free[1][2]
    results = model.generate(sources, NEW, stop_tokens=(stop,))
    for tokens, result in zip(free, results, strict=True):
        end = tokens.index(stop) + 1 if stop in tokens else len(tokens)
        assert result.tokens == tokens[:end]
    assert len(results[1].tokens) <= 3 < max(len(r.tokens) for r in results)


def test_text_stops_before_end_tokens_and_stop_strings(model, reference):
    (whole,) = model.generate(["hello"], NEW)
    assert whole.tokens == reference.greedy([*Letters().encode("hello"), 1], NEW)
    assert whole.text == Letters().decode(whole.tokens)
    stop = whole.text[2:4]
    (cut,) = model.generate("hello", NEW, stop=stop)
    assert cut.text == whole.text[: whole.text.index(stop)]
    assert len(cut.energy) == len(cut.tokens) == len(cut.text) + 2


def test_draws_follow_their_seed(model, sources):
    rows = [sources[0]] * 3
    drawn = model.generate(rows, NEW, temperature=1.0, top_k=20, seed=7)
    assert len({tuple(r.tokens) for r in drawn}) == 3
    assert model.generate(rows[:1], NEW, temperature=1.0, top_k=20, seed=8)[0].tokens == drawn[1].tokens


def test_nothing_is_compiled_within_a_bucket(model, sources):
    model.generate(sources[:3], NEW)
    before = model.compilations()
    for n in (3, 4):
        model.generate(sources[:n], n, temperature=0.5, top_p=0.9, repetition_penalty=1.2, seed=n)
        model.generate(sources[-n:], 2 * NEW, stop_tokens=(4, 5), energy_temperature=2.0)
    assert model.compilations() == before


def test_labels_have_the_probability_of_their_texts(model, reference, sources):
    labels = [[4, 1], [4, 5, 6, 1], [9, 1]]
    found = model.classify(sources[:3], labels)
    assert found.log_probs.shape == (3, 3)
    assert found.log_probs.dtype == found.energy.dtype == np.float32
    for i, source in enumerate(sources[:3]):
        for j, label in enumerate(labels):
            logits = reference.logits(source, label)[:-1]
            log_p = np.take_along_axis(jax.nn.log_softmax(logits), np.asarray(label)[:, None], axis=1)
            assert found.log_probs[i, j] == pytest.approx(float(log_p.sum()), rel=1e-4)
        first = reference.logits(source, [])[0]
        assert found.energy[i] == pytest.approx(-math.log(np.exp(first.astype(np.float64)).sum()), rel=1e-4)
    assert found.labels == np.argmax(found.log_probs, axis=1).tolist()
    texts = model.classify(["ab", "c", "d"], ["b", "cde", "e"])
    ids = model.classify([[2, 3, 1], [4, 1], [5, 1]], [[3, 1], [4, 5, 6, 1], [6, 1]])
    np.testing.assert_array_equal(texts.log_probs, ids.log_probs)


def test_the_head_on_the_encoder_reads_the_mean_of_what_counts(reference, sources):
    config, params = attach_encoder_head(reference.config, reference.params, 3, jax.random.key(1))
    params["encoder_head"]["bias"] = jnp.asarray([0.5, -1.0, 2.0])
    logits = TextToText(EncoderDecoder(config), params).encoder_logits(sources)
    assert logits.shape == (len(sources), 3)
    encode = jax.jit(functools.partial(EncoderDecoder(config).apply, method="encode"))
    hidden = encode({"params": params}, np.asarray([sources[0]]))
    head = params["encoder_head"]
    expected = np.asarray(hidden)[0].mean(0) @ np.asarray(head["kernel"]).T + np.asarray(head["bias"])
    np.testing.assert_allclose(logits[0], expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="n_labels=3: the model has a head"):
        attach_encoder_head(config, params, 2, jax.random.key(0))


@pytest.mark.parametrize(
    ("sources", "new", "settings", "message"),
    [
        ("", 5, {}, "source 0='': is empty"),
        ([], 5, {}, "give at least one"),
        ([[3], []], 5, {}, r"source 1=\[\]: is empty"),
        ([3, 48], 5, {}, "source 0 holds token id 48, outside the vocabulary of 48"),
        ([3], 0, {}, "max_new_tokens=0"),
        ([3], 5, {"topk": 3}, "unknown setting topk=3"),
        ([3], 5, {"temperature": -1}, "temperature=-1"),
        ([3], 5, {"energy_temperature": 0}, "energy_temperature=0: must be positive"),
        ([3], 5, {"stop": ""}, "at least one character"),
    ],
)
def test_bad_input_is_named(model, sources, new, settings, message):
    with pytest.raises(ValueError, match=message):
        model.generate(sources, new, **settings)


def test_bad_labels_heads_and_tokenizers_are_named(model, reference):
    with pytest.raises(ValueError, match="two have the same tokens"):
        model.classify([[3]], ["a", "a"])
    with pytest.raises(ValueError, match="labels='yes': must be a list"):
        model.classify([[3]], "yes")
    with pytest.raises(ValueError, match="label 1=''"):
        model.classify([[3]], ["a", ""])
    short = TextToText(EncoderDecoder(reference.config), reference.params, max_len=8)
    with pytest.raises(ValueError, match=r"source 0: tokens=9: is more than max_len=8: shorten it, or give"):
        short.generate([3] * 9)
    with pytest.raises(ValueError, match=r"n_labels=0: .* attach_encoder_head"):
        model.encoder_logits([[3]])
    with pytest.raises(ValueError, match="model=Decoder: must be an EncoderDecoder"):
        TextToText(Decoder(tiny_config()), {})
    bare = TextToText(EncoderDecoder(reference.config), reference.params)
    for call in (lambda: bare.generate("a"), lambda: bare.generate([3], stop="a")):
        with pytest.raises(ValueError, match="tokenizer"):
            call()


@pytest.mark.parametrize("name", ["t5", "t5_1_1"])
def test_greedy_tokens_are_those_of_transformers(name, sources):
    torch = pytest.importorskip("torch")
    from transformers import T5ForConditionalGeneration

    theirs = T5ForConditionalGeneration.from_pretrained(FOLDER / name).eval()
    config, params = hf.load(FOLDER / name)
    width = max(map(len, sources))
    ids, mask = np.zeros((2, len(sources), width), np.int64)
    for i, source in enumerate(sources):
        ids[i, : len(source)], mask[i, : len(source)] = source, 1
    with torch.no_grad():
        expected = theirs.generate(
            input_ids=torch.tensor(ids), attention_mask=torch.tensor(mask), do_sample=False, max_new_tokens=25
        )
    results = TextToText(EncoderDecoder(config), params).generate(sources, 25)
    for row, result in zip(expected[:, 1:].tolist(), results, strict=True):
        assert result.tokens == row[: row.index(1) + 1 if 1 in row else None]


def test_tokens_that_are_never_emitted_have_no_part_in_the_scores() -> None:
    """Marian's pad token, whose logit may be the largest, as though the model had no such column."""
    sizes = {"vocab_size": 32, "d_model": 16, "n_layers": 1, "n_decoder_layers": 1, "n_heads": 2, "d_mlp": 16}
    config = EncoderDecoderConfig(logits_bias=True, suppressed_ids=(5,), pad_id=5, **sizes)
    params = init_params(config, jax.random.key(0))
    results, labels = [], []
    for bias in (20.0, -1e9):
        params["logits_bias"] = {"bias": jnp.zeros(32).at[5].set(bias)}
        model = TextToText(EncoderDecoder(config), params)
        results.append(model.generate([[3, 4, 1]], 4)[0])
        labels.append(label_scores_of(config, params))
    assert results[0].tokens == results[1].tokens
    for score in ("energy", "max_prob", "entropy", "margin"):
        np.testing.assert_allclose(*(getattr(result, score) for result in results), rtol=1e-6)
    np.testing.assert_allclose(*labels, rtol=1e-6)


def label_scores_of(config, params) -> np.ndarray:
    """Log-probabilities of two targets and the energy, of one source."""
    source, length = jnp.asarray([[3, 4, 1]]), jnp.asarray([3])
    targets, lengths = jnp.asarray([[7, 1], [8, 1]]), jnp.asarray([2, 2])
    totals, energy = seq2seq_loop.label_scores(
        config, params, source, length, targets, lengths, jnp.float32(1.0)
    )
    return np.concatenate([np.ravel(totals), np.ravel(energy)])
