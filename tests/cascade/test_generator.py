"""Text and its scores: against the sampler alone and a plain forward pass; Swifts inside the Super."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_models import Letters

from elastic_lm import testing
from elastic_lm.cascade.cascade import Cascade
from elastic_lm.cascade.generator import Generator
from elastic_lm.cascade.scores import Scoring
from elastic_lm.cascade.shared_model import exit_model, shared_generator, shared_members
from elastic_lm.config.cascade import POOLED
from elastic_lm.config.subnet import Subnet
from elastic_lm.cost.sequences import generation_flops, head_flops, layer_flops
from elastic_lm.decode.sampler import ENDLESS, Sampler
from elastic_lm.models.decoder import Decoder
from elastic_lm.width import slicing

CONFIG = testing.tiny_config(exits=(1,), n_layers=2)
NEW = 6


@pytest.fixture(scope="module")
def params():
    return testing.random_params(CONFIG, scale=0.2)


@pytest.fixture(scope="module")
def records() -> list[dict]:
    rng = np.random.default_rng(0)
    return [{"prompt": "".join(rng.choice(list("ABCDEFGHIJKLMNOP"), n))} for n in (3, 9, 1, 40, 12, 30, 5)]


@pytest.fixture(scope="module")
def whole(params) -> Sampler:
    config = CONFIG.with_exits(())
    return Sampler(Decoder(config), {k: v for k, v in params.items() if k != "exit_1"}, Letters(), window=1)


def greedy(config, params, records, depth: int) -> tuple[list[list[int]], np.ndarray]:
    """(prompts with what follows them, logits [B, 64, V]) by a full pass for every token."""
    sequences = [Letters().encode(record["prompt"], bos=True) for record in records]
    logits = np.zeros(0)
    for step in range(NEW + 1):
        padded = jnp.asarray([[*ids, *[0] * (64 - len(ids))] for ids in sequences])
        logits = np.asarray(testing.all_logits(config, params, padded)[depth])
        if step < NEW:
            sequences = [
                [*ids, int(x[len(ids) - 1].argmax())] for ids, x in zip(sequences, logits, strict=True)
            ]
    return sequences, logits


def texts(sequences: list[list[int]]) -> list[str]:
    return [Letters().decode(ids[-NEW:]) for ids in sequences]


@pytest.fixture(scope="module")
def alone(params, records) -> tuple[list[list[int]], np.ndarray]:
    return greedy(CONFIG, params, records, 2)


def test_text_and_scores(whole: Sampler, records, alone) -> None:
    generator = Generator(whole, NEW, batch_size=4, scoring=Scoring(2.0, "mean"))
    answers = generator.answer(records)
    assert [answer.output for answer in answers] == texts(alone[0])
    for tokens, x, answer in zip(*alone, answers, strict=True):
        n = len(tokens)
        assert set(answer.scores) == set(POOLED)
        energy = np.asarray(2 * jax.nn.logsumexp((x - x.mean(-1, keepdims=True)) / 2, -1))
        drawn, read = energy[n - NEW - 1 : n - 1], energy[: n - NEW]
        assert answer.scores["energy"] == pytest.approx(drawn.mean(), rel=1e-5)
        assert answer.scores["energy_min"] == pytest.approx(drawn.min(), rel=1e-5)
        assert answer.scores["prompt_energy"] == pytest.approx(read.mean(), rel=1e-5)
        top = np.asarray(jax.nn.softmax(x).max(-1))[n - NEW - 1 : n - 1]
        assert answer.scores["max_prob_min"] == pytest.approx(top.min(), rel=1e-4)
        cost = generation_flops(CONFIG, n - NEW, NEW) + layer_flops(CONFIG, n) + head_flops(CONFIG, n)
        assert answer.cost == cost
    programs = Sampler.compilations()
    assert [generator.answer([record])[0] for record in records] == answers
    assert Sampler.compilations() == programs
    unscored = Generator(whole, NEW, batch_size=4, scored=False).answer(records)
    assert [(a.output, dict(a.scores)) for a in unscored] == [(a.output, {}) for a in answers]


def test_draws_go_by_the_record_not_the_batch(whole: Sampler, records) -> None:
    hot = Generator(whole, NEW, batch_size=4, scored=False, temperature=1.5, seed=1)
    answers = hot.answer(records)
    assert hot.answer(records[::-1])[::-1] == answers
    assert (
        Generator(whole, NEW, batch_size=4, scored=False, temperature=1.5, seed=2).answer(records) != answers
    )


def test_an_exit_is_a_swift_that_the_super_goes_on_from(params, records, alone) -> None:
    swift, super_ = shared_generator(Decoder(CONFIG), params, Letters(), NEW, exit=1, batch_size=4)
    first, again = swift.answer(records), super_.answer(records)
    assert [a.output for a in first] == texts(greedy(CONFIG, params, records, 1)[0])
    assert [a.output for a in again] == texts(alone[0])
    assert [a.output for a in first] != [a.output for a in again]
    order = [3, 0, 6]
    resumed = super_.resume([records[i] for i in order], [first[i] for i in order])
    for i, answer in zip(order, resumed, strict=True):
        assert answer.output == again[i].output
        assert again[i].cost - answer.cost == layer_flops(CONFIG, len(records[i]["prompt"]) + 1, 0, 1)
    scored = Generator(super_._sampler, NEW, batch_size=4)  # also the prompt's scores go on from there
    own, other = scored.resume(records[:2], first[:2]), scored.answer(records[:2])
    for record, answer, same in zip(records, own, other, strict=False):
        assert answer.scores == pytest.approx(same.scores, rel=1e-4)
        assert same.cost - answer.cost == layer_flops(CONFIG, len(record["prompt"]) + 1, 0, 1)
    cut = float(np.median([a.scores["energy"] for a in first]))
    for result in Cascade(swift, super_, cut, batch_size=3).answer(records):
        kept = first[result.index].scores["energy"] >= cut
        assert result.output == (first if kept else again)[result.index].output


def test_a_preview_reads_the_prompt_alone(records, whole: Sampler) -> None:
    swift = Generator(whole, NEW, batch_size=4)
    assert [swift.previews(name) for name in ("prompt_energy", "energy", "random")] == [True, False, False]
    previews, answers = swift.preview([*records, {}]), swift.answer(records)
    assert "has no text under 'prompt'" in str(previews.pop().error)
    for record, preview, answer in zip(records, previews, answers, strict=True):
        n = len(record["prompt"]) + 1
        assert preview.cost == layer_flops(CONFIG, n) + head_flops(CONFIG, n)
        assert (preview.output, preview) == (None, answer.preview)
        assert preview.scores == {k: v for k, v in answer.scores.items() if k.startswith("prompt_")}
    order = [3, 0, 6]
    finished = swift.finish([records[i] for i in order], [previews[i] for i in order])
    assert finished == [answers[i] for i in order]
    assert not Generator(whole, NEW, scored=False).previews("prompt_energy")


def test_a_sampler_with_exits_reads_a_prompt_twice(params, records, whole: Sampler) -> None:
    sampler = Sampler(Decoder(CONFIG), params, Letters(), window=1)
    early, full = (Generator(s, NEW, batch_size=4).answer(records[:4]) for s in (sampler, whole))
    for record, own, other in zip(records, early, full, strict=False):
        assert own.output == other.output
        assert own.cost - other.cost == layer_flops(CONFIG, len(record["prompt"]) + 1)


@pytest.mark.parametrize("nested", [True, False])
def test_a_cascade_generates_what_the_swift_keeps_alone(params, records, whole, monkeypatch, nested) -> None:
    if nested:  # the Super goes on from the states that the previews left
        swift, super_ = shared_generator(Decoder(CONFIG), params, Letters(), NEW, exit=1, batch_size=4)
    else:  # and here it must not
        swift = Generator(Sampler(*exit_model(CONFIG, params, 1), Letters(), window=1), NEW, batch_size=4)
        super_ = Generator(whole, NEW, batch_size=4, scored=False)
    first, again = swift.answer(records), super_.answer(records)
    cut = float(np.median([a.scores["prompt_energy"] for a in first]))
    how = {"score": "prompt_energy", "batch_size": 3}
    every = Cascade(swift, super_, cut, **how, preview=False).answer(records)
    generated, sample = [], swift._sampler.sample
    monkeypatch.setattr(
        swift._sampler, "sample", lambda p, *a, **k: generated.extend(p) or sample(p, *a, **k)
    )
    results = Cascade(swift, super_, cut, **how).answer(records)
    kept = [r.model == "swift" for r in every]
    assert [(r.model == "swift", r.output, r.score) for r in results] == [
        (k, r.output, r.score) for k, r in zip(kept, every, strict=True)
    ]
    ids = [tuple(Letters().encode(record["prompt"], bos=True)) for record in records]
    assert {tuple(prompt) for prompt in generated} == {one for one, k in zip(ids, kept, strict=True) if k}
    for i, (tokens, result) in enumerate(zip(ids, results, strict=True)):
        begun = layer_flops(CONFIG, len(tokens), 0, 1) if nested else 0
        preview = first[i].preview
        assert preview is not None
        assert result.cost == (first[i].cost if kept[i] else preview.cost + again[i].cost - begun)
        assert (result.swift.prepared, result.swift.handover, result.answer.handover) == (None, None, None)


def test_one_models_weights_lie_in_memory_between_calls(params, records) -> None:
    before, size = held(), sum(x.nbytes for x in jax.tree.leaves(params))
    subnet = Subnet.uniform(CONFIG, mlp=0.5, heads=0.5)
    records = [record for record in records if len(record["prompt"]) < 20]
    swift, _ = shared_generator(Decoder(CONFIG), params, Letters(), NEW, subnet=subnet, batch_size=4)
    answers = swift.answer(records)
    exit_model(CONFIG, params, 1)
    assert held() - before <= 0.02 * size
    small, cut = slicing.slice_params(CONFIG, params, subnet)
    assert [answer.output for answer in answers] == texts(greedy(small, cut, records, 2)[0])
    assert held() - before > 0.2 * size  # what a second model holds
    sampler = swift._sampler
    call, state, controls = sampler._prefill(sampler._call([[1, 2, 3]]), NEW)
    model = call.served
    given = (model.config, model.params, state, controls, ENDLESS, call.mode)
    analysis = model.run.lower(*given).compile().memory_analysis()
    own, arrays = (sum(x.nbytes for x in jax.tree.leaves(tree)) for tree in (cut, state))
    assert analysis.temp_size_in_bytes < 1.1 * own + arrays  # while a batch is decoded, one slice


def held() -> int:
    return sum(x.nbytes for x in jax.live_arrays())


def test_records_that_cannot_be_read_fail_alone(whole: Sampler, records) -> None:
    generator = Generator(whole, NEW, batch_size=4, scored=False)
    answers = generator.answer([{}, {"prompt": None}, {"prompt": "x" * 125}, records[0]])
    assert [a.error is None for a in answers] == [False] * 3 + [True]
    assert "max_len=128" in str(answers[2].error)
    assert generator.bucket({}) is None
    errors = [generator.answer([record])[0].error for record in ({"text": "a"}, {"prompt": ["a"]})]
    assert errors == [
        "ValueError: the record has no text under 'prompt'; found: text",
        "ValueError: the record has no text under 'prompt'; found: prompt",
    ]
    half = str(generator.answer([{"prompt": "a\ud83d"}])[0].error)
    assert half.startswith("ValueError: the record: prompt holds half of a character")
    as_text, as_number = generator.answer([{"prompt": "5"}, {"prompt": 5}])  # written out, as in training
    assert as_text == as_number


def test_refusals(whole: Sampler, params) -> None:
    bare = Sampler(Decoder(CONFIG), params)
    for given, message in (
        ((whole, 0), "max_new_tokens=0"),
        ((bare, 4), "tokenizer"),
    ):
        with pytest.raises(ValueError, match=message):
            Generator(*given)
    with pytest.raises(ValueError, match="unknown setting tempature"):
        Generator(whole, tempature=1.0)
    config = testing.tiny_config(n_layers=2)
    with pytest.raises(ValueError, match="exit=1: the model that reads has exits after layers none"):
        shared_generator(Decoder(config), params, Letters(), exit=1)


@pytest.mark.long
def test_a_chain_decides_from_prompts_and_goes_on_from_its_states(records) -> None:
    config = testing.tiny_config(exits=(1, 2), n_layers=3)
    params = testing.random_params(config, scale=0.2)
    how = {"max_new_tokens": NEW, "batch_size": 4}
    members = shared_members(Decoder(config), params, Letters(), (1, 2, None), **how)
    alone = [member.answer(records) for member in members]
    bars = [float(np.median([a.scores["prompt_margin"] for a in own])) for own in alone[:2]]
    cascade = Cascade(members[0], members[2], bars, between=members[1:2], score="prompt_margin", batch_size=4)
    results = cascade.answer(records)
    assert {result.model for result in results} == {"swift", "middle", "super"}
    for result in results:
        number = len(result.answers) - 1
        own = alone[number][result.index]
        assert result.output == own.output
        for name, value in own.scores.items():
            assert result.answer.scores[name] == pytest.approx(value, rel=1e-4, abs=1e-5)
        n = len(Letters().encode(records[result.index]["prompt"], bos=True))
        # Layers that a member before it has run over the prompt are not run again.
        assert own.cost - result.answer.cost == layer_flops(config, n, 0, number)
        assert all(answer.output is None for answer in result.answers[:-1])  # only previewed
