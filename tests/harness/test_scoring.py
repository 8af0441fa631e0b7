"""Log-probabilities at every depth in one pass, without the harness."""

import importlib.metadata
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import elastic_lm as el
from elastic_lm.cascade.rule import CascadeRule
from elastic_lm.depth.policies import ConfidenceExit
from elastic_lm.harness import scoring
from elastic_lm.harness.library import harness
from elastic_lm.harness.model import HarnessModel, generation
from elastic_lm.harness.scoring import Continuation, Scorer, row_width
from elastic_lm.models.decoder import Params
from elastic_lm.testing import random_params, tiny_config, truncated
from elastic_lm.width.slicing import slice_params

CONFIG = tiny_config(exits=(1, 3), vocab_size=60)
# Lengths of several widths, a shared context, and one continuation that is longer than its context.
ASKED = [
    Continuation((1, 2, 3), (4,)),
    Continuation((1, 2, 3), (5,)),
    Continuation(tuple(range(1, 41)), (7, 8)),
    Continuation((9,), tuple(range(20, 30))),
    Continuation((3, 1), (2, 2, 2)),
]


@pytest.fixture(scope="module")
def params() -> Params:
    return random_params(CONFIG)


@pytest.fixture(scope="module")
def scores(params: Params) -> list[scoring.DepthScores]:
    return Scorer(CONFIG, params, batch_size=4).score(ASKED)


def by_hand(config: el.ModelConfig, params: Params, one: Continuation) -> np.ndarray:
    """[M] nats at full depth, from all logits of an unpadded row."""
    ids = [*one.before, *one.tokens]
    logits = el.Decoder(config).apply({"params": params}, jnp.asarray([ids[:-1]])).logits[0]
    log_p = jax.nn.log_softmax(logits, axis=-1)
    start = len(one.before) - 1
    return -np.asarray([log_p[start + m, token] for m, token in enumerate(one.tokens)])


def test_full_depth_is_the_plain_forward_pass(params: Params, scores: list[scoring.DepthScores]) -> None:
    plain = CONFIG.with_exits(())
    own = {name: tree for name, tree in params.items() if not name.startswith("exit")}
    for one, found in zip(ASKED, scores, strict=True):
        np.testing.assert_allclose(found.nats[:, -1], by_hand(plain, own, one), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("column", [0, 1])
def test_an_exit_is_the_model_that_ends_there(
    params: Params, scores: list[scoring.DepthScores], column: int
) -> None:
    shallow, own = truncated(CONFIG, params, CONFIG.exits[column].layer)
    alone = Scorer(shallow, own, batch_size=4).score(ASKED)
    for found, expected in zip(scores, alone, strict=True):
        np.testing.assert_allclose(found.nats[:, column], expected.nats[:, -1], rtol=1e-4, atol=1e-4)
        assert (found.greedy[:, column] == expected.greedy[:, -1]).all()


def test_a_batch_is_its_rows_alone(params: Params, scores: list[scoring.DepthScores]) -> None:
    alone = Scorer(CONFIG, params, batch_size=1)
    for one, found in zip(ASKED, scores, strict=True):
        (expected,) = alone.score([one])
        np.testing.assert_allclose(found.nats, expected.nats, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(found.confidence, expected.confidence, rtol=1e-4, atol=1e-4)


def test_what_ends_in_one_token_shares_a_row_and_nothing_is_read_twice(
    params: Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows: list[int] = []
    read = scoring.read_depths

    def counted(config, params, tokens, lengths, metric):
        rows.append(int((np.asarray(lengths) > 1).sum()))
        return read(config, params, tokens, lengths, metric)

    monkeypatch.setattr(scoring, "read_depths", counted)
    scorer = Scorer(CONFIG, params, batch_size=4, remember=True)
    letters = [Continuation((1, 2, 3), (letter,)) for letter in (10, 11, 12, 13)]
    first = scorer.score(letters)
    assert rows == [1]
    assert [a is b for a, b in zip(scorer.score(letters), first, strict=True)] == [True] * 4
    assert rows == [1]
    scorer.forget()
    scorer.score(letters[:1])
    assert rows == [1, 1]


def test_long_contexts_lose_their_beginning(params: Params) -> None:
    short = Scorer(CONFIG, params, batch_size=1, max_length=8)
    (found,) = short.score([Continuation(tuple(range(1, 20)), (3, 4))])
    (expected,) = short.score([Continuation(tuple(range(13, 20)), (3, 4))])
    np.testing.assert_allclose(found.nats, expected.nats, rtol=1e-5)
    assert found.length == 8
    with pytest.raises(ValueError, match="tokens=9: a continuation has at most max_length=8"):
        short.score([Continuation((1,), tuple(range(1, 10)))])
    with pytest.raises(ValueError, match=r"before=\(\): a continuation needs a token before it"):
        short.score([Continuation((), (1,))])


def test_few_widths_are_compiled_and_none_wastes_much() -> None:
    config = tiny_config(max_len=1000)
    widths = [row_width(config, tokens) for tokens in range(1, 1001)]
    assert all(tokens <= width for tokens, width in enumerate(widths, 1))
    assert len(set(widths)) == 20
    assert max(width / tokens for tokens, width in enumerate(widths, 1) if tokens > 64) < 1.26


class Words:
    """A tokenizer with a token per character."""

    bos_id, eos_ids = None, (0,)
    chat_template = None
    fingerprint = "words"

    def encode(self, text: str, bos: bool = False) -> list[int]:
        return [1 + ord(c) % 59 for c in text]

    def decode(self, ids, special: bool = False) -> str:
        return "".join(chr(64 + i) for i in ids)

    def named_token(self, key: str) -> int | None:
        return 2 if key == "bos_token" else None


def scored(params: Params, **options) -> HarnessModel:
    return HarnessModel(el.Decoder(CONFIG), params, Words(), **options)  # pyright: ignore[reportArgumentType]


def test_a_reading_chooses_the_depth_of_every_token(params: Params) -> None:
    one = Continuation((1, 2, 3), (4, 5, 6, 7))
    model = scored(params, remember=True)
    whole, early = model.score([one])[0][0], model.at(0).score([one])[0][0]
    assert scored(params, exit=1).score([one])[0][0] == pytest.approx(early)
    assert scored(params, exit=4).score([one])[0][0] == pytest.approx(whole)

    def with_thresholds(*thresholds: float) -> float:
        policy = ConfidenceExit("max_prob", thresholds, (1, 3))
        return scored(params, thresholds=policy).score([one])[0][0]

    assert with_thresholds(2.0, 2.0) == pytest.approx(whole)
    assert with_thresholds(0.0, 2.0) == pytest.approx(early)

    # A threshold between the confidences of the first exit lets some tokens leave there.
    policy = ConfidenceExit("max_prob", (2.0, 2.0), (1, 3))
    (found,) = scored(params, thresholds=policy)._scorer.score([one])
    middle = float(np.sort(found.confidence[:, 0])[1:3].mean())
    leaves = found.confidence[:, 0] >= middle
    assert leaves.sum() == 2
    expected = -np.where(leaves, found.nats[:, 0], found.nats[:, -1]).sum()
    assert with_thresholds(middle, 2.0) == pytest.approx(float(expected), rel=1e-5)


def test_a_subnet_is_its_slice(params: Params) -> None:
    one = Continuation((1, 2, 3), (4, 5))
    half = el.Subnet.uniform(CONFIG, mlp=0.5, heads=0.5)
    config, own = slice_params(CONFIG, params, half)
    (expected,) = Scorer(config, own).score([one])
    model = scored(params, subnet=half)
    assert model.score([one])[0][0] == pytest.approx(-float(expected.nats[:, -1].sum()), rel=1e-5)
    assert model.layers == (1, 3, 4)
    with pytest.raises(ValueError, match=r"exit=2: the model that runs has exits after layers \(1, 3\)"):
        scored(params, exit=2)


def test_a_rule_passes_whole_questions_on(params: Params) -> None:
    def request(question: int, text: str) -> SimpleNamespace:
        return SimpleNamespace(args=("ab", text), task_name="task", doc_id=question)

    requests = [request(i, text) for i in range(3) for text in ("cd", "x" * (i + 1), "efg")]

    def values(model: HarnessModel) -> list[float]:
        return [value for value, _ in model.loglikelihood(requests)]

    def cascaded(threshold: float) -> list[float]:
        return values(scored(params, exit=1, cascade=CascadeRule(threshold, "max_prob")))

    early, whole = values(scored(params, exit=1)), values(scored(params))

    assert cascaded(0.0) == pytest.approx(early)
    assert cascaded(1.1) == pytest.approx(whole)

    # The likeliest choice per token decides, question by question.
    sizes = [2, 1, 3, 2, 2, 3, 2, 3, 3]
    logits = np.asarray(early) / sizes
    surest = np.exp(logits.reshape(3, 3)).max(axis=1) / np.exp(logits.reshape(3, 3)).sum(axis=1)
    kept = int(np.argmax(surest))
    expected = [early[i] if i // 3 == kept else whole[i] for i in range(9)]
    assert cascaded(float(np.sort(surest)[1:].mean())) == pytest.approx(expected)

    with pytest.raises(ValueError, match="cascade='task': has one continuation per question"):
        scored(params, exit=1, cascade=CascadeRule(0.5, "max_prob")).loglikelihood(requests[:1])
    with pytest.raises(ValueError, match="needs a Swift"):
        scored(params, cascade=CascadeRule(0.5, "max_prob"))


def test_contexts_and_continuations(params: Params) -> None:
    model = scored(params)
    encode = Words().encode
    assert model.continuation("ab ", "c") == Continuation(tuple(encode("ab")), tuple(encode(" c")))
    assert model.continuation("", "ab") == Continuation((2,), tuple(encode("ab")))
    # Windows score every token once, and the last one has as much before it as fits.
    model = scored(params, max_length=4)
    ids = list(range(10, 20))
    windows = model.windows(ids)
    assert [t for w in windows for t in w.tokens] == ids
    assert windows[-1] == Continuation((15, 16, 17), (18, 19))


def test_what_a_task_says_about_generation() -> None:
    found = generation({"until": "\n", "do_sample": False, "temperature": 0.7, "max_gen_toks": 5}, 256)
    assert (found.until, found.max_new_tokens, found.settings) == (("\n",), 5, {"temperature": 0.0})
    assert generation({"do_sample": True}, 7).settings == {"temperature": 1.0}
    with pytest.raises(ValueError, match=r"generation_kwargs\.num_beams=4: is not known here"):
        generation({"num_beams": 4}, 256)


def test_without_the_extra_one_line_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    with pytest.raises(ValueError, match=r'pip install "elastic-lm\[harness\]"'):
        harness()
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.5.0")
    with pytest.raises(ValueError, match=r"lm-eval='0.5.0': must be 0.4"):
        harness()
