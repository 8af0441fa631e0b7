"""An encoder-decoder as a model of a cascade: against `TextToText` alone."""

import dataclasses

import jax
import numpy as np
import pytest
from small_models import Letters, drawn

import elastic_lm as el
from elastic_lm.cascade.function import Function
from elastic_lm.cascade.scores import Scoring
from elastic_lm.cascade.text_answerer import TextAnswerer
from elastic_lm.cost.sequences import text_to_text_flops

CONFIG = el.EncoderDecoderConfig(
    vocab_size=64, d_model=16, n_layers=1, n_heads=2, d_mlp=32, relative_buckets=8, relative_max_distance=16
)
RECORDS = [{"q": "A" * n + "BC", "n": n} for n in (1, 5, 9, 40, 3)]


@pytest.fixture(scope="module")
def model() -> el.TextToText:
    return el.TextToText(el.EncoderDecoder(CONFIG), drawn(CONFIG), Letters())


def test_texts_and_scores(model: el.TextToText) -> None:
    answerer = TextAnswerer(model, 5, template="say {q}:", scoring=Scoring(2.0), batch_size=2)
    answers = answerer.answer(RECORDS)
    for record, answer in zip(RECORDS, answers, strict=True):
        (alone,) = model.generate([f"say {record['q']}:"], 5, energy_temperature=2.0)
        assert answer.output == alone.text
        assert answer.scores["energy"] == pytest.approx(-alone.energy.mean(), rel=1e-5)
        assert answer.scores["energy_min"] == pytest.approx(-alone.energy.max(), rel=1e-5)
        assert answer.scores["max_prob_min"] == pytest.approx(alone.max_prob.min(), rel=1e-5)
        surest = 1 - alone.entropy.mean() / np.log(64)
        assert answer.scores["entropy"] == pytest.approx(surest, abs=1e-5)
        assert answer.cost == text_to_text_flops(CONFIG, len(record["q"]) + 6, len(alone.tokens))
    programs = el.TextToText.compilations()
    assert [answerer.answer([record])[0] for record in RECORDS] == answers
    assert el.TextToText.compilations() == programs
    assert [answerer.bucket(record) for record in RECORDS] == [32, 32, 32, 64, 32]


def test_templates_read_values_and_refuse_missing_ones(model: el.TextToText) -> None:
    answerer = TextAnswerer(model, template="{q} {n:.1f} {m[0]}", labels=("YES", "NO"), batch_size=1)
    right = {"q": "a", "n": 2, "m": ["b"]}
    bad = [{**right, "q": None}, {"n": 2}, {**right, "n": float("nan")}, {**right, "q": "\ud83d"}]
    first, *errors = (answer.error for answer in answerer.answer([right, *bad]))
    assert first is None
    messages = (
        "no text under 'q'",
        "no 'q', which the template reads; found: n",
        "nan under 'n'",
        "half of a",
    )
    for error, message in zip(errors, messages, strict=True):
        assert error is not None
        assert error.startswith("ValueError: the record"), error
        assert message in error


def test_labels(model: el.TextToText) -> None:
    answerer = TextAnswerer(model, template="{q}", labels=("YES", "NO"), batch_size=2)
    answers = answerer.answer(RECORDS)
    for record, answer in zip(RECORDS[:2], answers, strict=False):
        alone = model.classify([record["q"]], ("YES", "NO"))
        assert answer.output == alone.labels[0]
        assert answer.scores["energy"] == pytest.approx(-alone.energy[0], rel=1e-5)
        share = np.exp(alone.log_probs[0] - np.logaddexp.reduce(alone.log_probs[0]))
        assert answer.scores["max_prob"] == pytest.approx(share.max(), rel=1e-5)


def test_the_head_on_the_encoder() -> None:
    config = dataclasses.replace(CONFIG, n_labels=3)
    model = el.TextToText(el.EncoderDecoder(config), drawn(config), Letters())
    how = {"template": "{q}", "labels": ("YES", "NO"), "batch_size": 2, "scoring": Scoring(0.5)}
    with_head, without = (
        TextAnswerer(model, encoder_head=h, **how).answer(RECORDS[:3]) for h in (True, False)
    )
    logits = model.encoder_logits([record["q"] for record in RECORDS[:3]])
    for answer, plain, x in zip(with_head, without, logits, strict=True):
        assert answer.output == plain.output
        own = {name: value for name, value in answer.scores.items() if name.startswith("encoder_")}
        assert answer.scores == {**plain.scores, **own}
        assert own["encoder_energy"] == pytest.approx(0.5 * np.log(np.exp(x / 0.5).sum()), rel=1e-5)
        assert answer.cost == plain.cost + 2 * CONFIG.d_model * 3
        assert answer.preview is not None
        assert (answer.preview.scores, answer.preview.output) == (own, None)
    with pytest.raises(ValueError, match="encoder_head=True: the model has none"):
        TextAnswerer(el.TextToText(el.EncoderDecoder(CONFIG), drawn(CONFIG), Letters()), encoder_head=True)


def test_names_of_the_head_are_no_answers() -> None:
    """A head may tell 0 from 1 where the model writes words."""
    config = dataclasses.replace(CONFIG, n_labels=2, labels=("YES", "NO"))
    model = el.TextToText(el.EncoderDecoder(config), drawn(config), Letters())
    how = {"template": "{q}", "batch_size": 2}
    headed = TextAnswerer(model, encoder_head=True, **how)
    assert not headed.names
    outputs = [[a.output for a in each.answer(RECORDS[:2])] for each in (headed, TextAnswerer(model, **how))]
    assert outputs[0] == outputs[1]
    with pytest.raises(ValueError, match=r"labels=\('YES',\): needs one name for each of n_labels=2"):
        dataclasses.replace(config, labels=("YES",))


def test_long_sources_are_cut_as_in_training(model: el.TextToText) -> None:
    records = [{"q": "A" * 60_000}, RECORDS[0], {"q": "A" * 7}]
    answerer = TextAnswerer(model, 5, template="{q}", max_len=8, batch_size=2)
    answers = answerer.answer(records)
    assert answers[0] == answers[2]
    assert answerer.bucket(records[0]) == 32
    assert TextAnswerer(model, template="{q}").bucket(records[0]) == 512
    for longest in (1, 5000):
        with pytest.raises(ValueError, match=rf"max_len={longest}: must be above the 1 .* at most .* 4096"):
            TextAnswerer(model, max_len=longest)


def test_a_batch_whose_program_fails_fails_alone(model, monkeypatch: pytest.MonkeyPatch) -> None:
    def generate(sources, *how, **also):
        if len(sources[0]) > 40:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")
        return real(sources, *how, **also)

    real = model.generate
    monkeypatch.setattr(model, "generate", generate)
    answers = TextAnswerer(model, 5, template="{q}", batch_size=2).answer(RECORDS)
    assert [answer.error is None for answer in answers] == [True, True, True, False, True]
    name = jax.errors.JaxRuntimeError.__name__  # another one in earlier versions
    assert answers[3].error == f"{name}: RESOURCE_EXHAUSTED: Out of memory"


@pytest.mark.parametrize("labels", [("YES", "NO"), None])
def test_records_for_the_super_are_not_decoded(labels: tuple[str, ...] | None, monkeypatch) -> None:
    config = dataclasses.replace(CONFIG, n_labels=2)
    model = el.TextToText(el.EncoderDecoder(config), drawn(config), Letters())
    swift = TextAnswerer(model, 4, template="{q}", labels=labels, encoder_head=True, batch_size=2)
    alone = swift.answer(RECORDS)
    energies = [answer.scores["encoder_energy"] for answer in alone]
    threshold, decoded = float(np.median(energies)), []
    monkeypatch.setattr(swift, "_decode", lambda given: decoded.append(given) or whole(given))
    whole = TextAnswerer._decode.__get__(swift)
    super_ = Function(lambda record: "super", cost=7.0)
    run = el.Cascade(swift, super_, threshold, score="encoder_energy", batch_size=2).run([*RECORDS, {}])
    results = list(run)
    for result, answer, record in zip(results[:5], alone, RECORDS, strict=True):
        known = text_to_text_flops(CONFIG, len(record["q"]) + 1, 0) + 2 * 2 * CONFIG.d_model
        if answer.scores["encoder_energy"] >= threshold:
            assert (result.answer, result.cost) == (answer, answer.cost)
        else:
            assert (result.output, result.cost) == ("super", known + 7.0)
            assert known < answer.cost
    kept = sum(energy >= threshold for energy in energies)
    assert sum(map(len, decoded)) == kept == run.statistics().records - run.statistics().to_super
    assert run.statistics().swift_failed == 1


def test_records_that_cannot_be_read_fail_alone(model: el.TextToText) -> None:
    answers = TextAnswerer(model, 5, template="{q}", batch_size=2).answer([{}, {"q": ""}, RECORDS[0]])
    assert [answer.error is None for answer in answers] == [False, False, True]
    assert "'q'" in str(answers[0].error)
    (answer,) = TextAnswerer(model, 5, template="{q.x}").answer(RECORDS[:1])
    assert answer.error == "AttributeError: 'str' object has no attribute 'x'"
    with pytest.raises(ValueError, match="centre='mean'"):
        TextAnswerer(model, scoring=Scoring(centre="mean"))
    with pytest.raises(ValueError, match="max_new_tokens=0"):
        TextAnswerer(model, 0)
