"""Where calibrated exits agree least: by file, kind of token and context, beside the policy."""

import dataclasses
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from elastic_lm.config.data import DataConfig
from elastic_lm.data.batch import Batch
from elastic_lm.data.pipeline import eval_batches, eval_files
from elastic_lm.data.tokenizer import Tokenizer, train_bpe
from elastic_lm.depth.calibration import calibrate
from elastic_lm.depth.observations import Observations, observe
from elastic_lm.depth.policies import ConfidenceExit
from elastic_lm.depth.slices import exit_slices
from elastic_lm.testing import random_params, random_tokens, tiny_config

CONFIG = tiny_config(exits=(1, 2))


def observations(n: int = 400) -> Observations:
    """One exit that always fires; it is wrong about odd tokens of the second half of the text."""
    targets = np.arange(n, dtype=np.int32) % 2
    wrong = (targets == 1) & (np.arange(n) >= n // 2)
    return Observations(
        layers=(1,),
        n_layers=2,
        confidence=np.ones((n, 1), np.float32),
        agrees=~wrong[:, None],
        correct=np.zeros((n, 2), bool),
        nats=np.zeros((n, 2), np.float32),
        weights=np.ones(n, np.float32),
        targets=targets,
        sequence=np.arange(n, dtype=np.int32) // 4,
        position=np.arange(n, dtype=np.int32) % 64,
        source=np.arange(n, dtype=np.int32) // (n // 2),
    )


def test_the_worst_slice_comes_first() -> None:
    found = exit_slices(observations(), (0.5,), kinds=["even", "odd"], files=["good.txt", "bad.txt"])
    assert found.average.agreement == pytest.approx(0.75)
    rates = {(one.by, one.name): one.agreement for one in found.slices}
    assert rates["file", "good.txt"] == 1.0
    assert rates["file", "bad.txt"] == rates["kind", "odd"] == 0.5
    assert rates["kind", "even"] == 1.0
    assert [one for one in rates if one[0] == "context"]
    assert found.slices[0].agreement == 0.5
    # An exit that never fires agrees with the full model everywhere.
    assert {one.agreement for one in exit_slices(observations(), (2.0,), kinds=["even", "odd"]).slices} == {1}


def test_what_is_not_known_divides_nothing() -> None:
    bare = dataclasses.replace(observations(), position=None, source=None)
    assert exit_slices(bare, (0.5,), files=["a"]).slices == ()
    with pytest.raises(ValueError, match="kinds='1 names': the text has number 1"):
        exit_slices(bare, (0.5,), kinds=["even"])


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    (folder / "digits.txt").write_text("".join(f"{i * 37 % 10007}\n" for i in range(800)))
    (folder / "words.txt").write_text("the word of day\n" * 300)
    return folder


@pytest.fixture(scope="module")
def tokenizer(texts: Path) -> Tokenizer:
    return train_bpe([file.read_text() for file in sorted(texts.iterdir())], 300)


@pytest.mark.parametrize("packing", ["concat", "first_fit"])
def test_batches_say_which_file_each_token_is_from(texts: Path, tokenizer: Tokenizer, packing) -> None:
    paths = (str(texts),)
    data = DataConfig(
        source="text", paths=paths, eval_paths=paths, seq_len=32, batch_size=4, packing=packing, span=200
    )
    assert [Path(file).name for file in eval_files(data)] == ["digits.txt", "words.txt"]
    plain, told = list(eval_batches(data, tokenizer)), list(eval_batches(data, tokenizer, sources=True))

    seen = {0: "", 1: ""}
    for without, batch in zip(plain, told, strict=True):
        sources = batch.pop("sources")
        assert batch.keys() == without.keys()
        assert all(np.array_equal(batch[name], without[name]) for name in without)
        for number in seen:
            own = (sources == number) & (batch["weights"] > 0)
            seen[number] += tokenizer.decode(batch["targets"][own].tolist())
    assert set(seen[0]) == set("0123456789\n")
    assert set(seen[1]) == set("the word of day\n")


def test_a_policy_keeps_its_slices(tmp_path: Path) -> None:
    params = random_params(CONFIG)
    tokens = random_tokens(CONFIG, batch=16, length=65)
    ones = jnp.ones((16, 64), jnp.int32)
    plain = Batch(tokens[:, :-1], tokens[:, 1:], 1.0 * ones, jnp.cumsum(ones, 1) - 1, ones)
    told = plain.replace(sources=ones * (jnp.arange(16) % 2)[:, None])
    kinds = [f"kind {i % 3}" for i in range(CONFIG.vocab_size)]

    given = {"target": 0.3, "kinds": kinds, "files": ["a.txt", "b.txt"]}
    policy = calibrate(CONFIG, params, [told], **given)
    assert policy.slices is not None
    assert {one.by for one in policy.slices.slices} == {"file", "kind", "context"}
    assert policy.measured is not None
    assert policy.slices.average.agreement == pytest.approx(policy.measured.agreement)
    by_file = [one for one in policy.slices.slices if one.by == "file"]
    assert sum(one.items for one in by_file) == policy.slices.average.items == 8 * 64

    # Sources change nothing else, and compile nothing anew.
    before = calibrate(CONFIG, params, [plain], target=0.3)
    assert before.curve == policy.curve
    seen = observe(CONFIG, params, [told])
    assert seen.source is not None
    assert np.array_equal(seen.source, np.repeat(np.arange(16) % 2, 64))
    assert np.array_equal(seen.position, np.tile(np.arange(64), 16))

    policy.save(tmp_path / "thresholds.json")
    loaded = ConfidenceExit.load(tmp_path / "thresholds.json")
    assert loaded.slices == policy.slices
    other = next(p.target for p in policy.curve if p.thresholds != policy.thresholds)
    assert policy.at(other).slices is None
    assert policy.at(policy.target).slices == policy.slices
