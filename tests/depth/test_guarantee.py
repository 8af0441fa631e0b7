"""Guarantees hold as often as stated: 200 random calibration sets, drawn where the true risk is known."""

import itertools
import os
from pathlib import Path

import jax
import numpy as np
import pytest

import elastic_lm as el
from elastic_lm.bounds import clopper_pearson, fixed_sequence_test
from elastic_lm.config.data import DataConfig
from elastic_lm.config.model import ExitConfig
from elastic_lm.data import pipeline
from elastic_lm.depth.confidence import NEVER_EXITS
from elastic_lm.depth.guarantee import RiskControl, control, ladder, sequence_losses
from elastic_lm.depth.observations import Observations, observe
from elastic_lm.depth.threshold_search import exit_outcome

SHARED = os.environ.get("ELASTIC_LM_SHARED", "")
needs_weights = pytest.mark.skipif(not SHARED, reason="set ELASTIC_LM_SHARED to the folder with data/weights")

SPLITS = 200
EPSILON = 0.05
MOST = EPSILON + 2 * (EPSILON * (1 - EPSILON) / SPLITS) ** 0.5


def synthetic(rng: np.random.Generator, sequences: int, tokens: int = 8) -> Observations:
    """One exit after layer 1 of 4 with c ~ U(0, 1), right with probability c; a sequence shares its luck.

    A threshold t lets a share 1 - t of the tokens exit and has a risk of (1 - t)^2 / 2.
    """
    confidence = rng.uniform(size=(sequences, tokens)).astype(np.float32)
    agrees = rng.uniform(size=(sequences, 1)) < confidence
    return _observations(confidence.reshape(-1, 1), agrees.reshape(-1, 1), (1,), 4, sequences)


def _observations(
    confidence: np.ndarray, agrees: np.ndarray, layers: tuple[int, ...], n_layers: int, sequences: int
) -> Observations:
    n = len(confidence)
    unused = np.zeros((n, len(layers) + 1), np.float32)
    ones, sequence = np.ones(n, np.float32), np.arange(n) * sequences // n
    return Observations(layers, n_layers, confidence, agrees, unused > 0, unused, ones, sequence, sequence)


def test_guarantee_where_the_risk_is_known() -> None:
    stated = RiskControl(0.9, EPSILON)
    rng = np.random.default_rng(0)
    thresholds = [
        control(synthetic(rng, 40), synthetic(rng, 200), stated, rungs=10)[0][0] for _ in range(SPLITS)
    ]
    exits = 1 - np.minimum(thresholds, 1.0)
    assert np.mean(exits**2 / 2 > stated.allowed) <= MOST
    assert np.mean(exits) > 0.2  # 0.447 would be the most that the risk allows


def test_tokens_of_a_sequence_are_no_independent_trials() -> None:
    rng = np.random.default_rng(1)
    threshold, risk = 0.6, 0.4**2 / 2
    wrong = [sequence_losses(synthetic(rng, 200), (threshold,)) * 8 for _ in range(SPLITS)]
    by_token = [clopper_pearson(round(w.sum()), 1600, EPSILON) for w in wrong]
    one_each = [clopper_pearson(int((w > rng.integers(0, 8, 200)).sum()), 200, EPSILON) for w in wrong]
    assert np.mean(np.asarray(by_token) < risk) > MOST
    assert np.mean(np.asarray(one_each) < risk) <= MOST


def observed(folder: str | Path, data: DataConfig, layers: tuple[int, ...]) -> Observations:
    """512 rows of 32 tokens seen by a pretrained model with copied, untrained exits."""
    model, params = el.load(folder)
    exits = [ExitConfig(layer, "norm") for layer in layers]
    config, params = el.attach_exits(model.config, params, exits, jax.random.key(0))
    batches = pipeline.eval_batches(data, el.Tokenizer.load(folder))
    return observe(config, params, itertools.islice(batches, 8))


@pytest.fixture(scope="module")
def embedded() -> Observations:
    return observed(el.embedded_model(), DataConfig(seq_len=32, batch_size=64), (3, 6, 9))


@pytest.fixture(scope="module")
def stories() -> Observations:
    root = Path(SHARED) / "data"
    text = (str(root / "text" / "tinystories_cased_0.9MB.txt"),)
    data = DataConfig(source="text", paths=text, eval_paths=text, seq_len=32, batch_size=64)
    return observed(root / "weights" / "stories260K", data, (2, 3, 4))


def drawn(pool: Observations, rng: np.random.Generator, count: int) -> Observations:
    """Whole sequences with replacement, so that the pool is all there is and its mean the true risk."""
    rows = np.arange(pool.tokens).reshape(-1, 32)[rng.integers(0, pool.tokens // 32, count)].ravel()
    return _observations(pool.confidence[rows], pool.agrees[rows], pool.layers, pool.n_layers, count)


class Pool:
    """What is true for thresholds when a pool of sequences is all there is."""

    def __init__(self, pool: Observations, stated: RiskControl):
        self.pool, self.stated, self.allowed = pool, stated, stated.allowed
        self.risk, self.below, self.layers = [], [], []

    def add(self, thresholds: tuple[float, ...]) -> None:
        losses = sequence_losses(self.pool, thresholds)
        depths = [*self.pool.layers, self.pool.n_layers]
        self.risk.append(losses.mean())
        self.below.append(np.mean(losses > self.allowed + 1e-9))
        outcome = exit_outcome(self.pool.confidence, self.pool.agrees, depths, thresholds)
        self.layers.append(outcome.mean_layers)

    def violations(self) -> tuple[float, float]:
        """(share of the splits with too much risk, with more than a tenth of the sequences below)."""
        return float(np.mean(np.asarray(self.risk) > self.allowed)), float(
            np.mean(np.asarray(self.below) > 0.1)
        )


@pytest.mark.long
@pytest.mark.parametrize(
    ("name", "target", "most_layers"),
    [("embedded", 0.8, 9.5), pytest.param("stories", 0.8, 4.8, marks=needs_weights)],
)
def test_guarantee_on_pretrained_models(
    request: pytest.FixtureRequest, name: str, target: float, most_layers: float
) -> None:
    pool, rng = request.getfixturevalue(name), np.random.default_rng(0)
    assert pool.tokens == 512 * 32
    marginal, merely_chosen = (Pool(pool, RiskControl(target, EPSILON)) for _ in range(2))
    both = Pool(pool, RiskControl(target, EPSILON, 0.1))
    for _ in range(SPLITS // 10):
        selection = drawn(pool, rng, 64)
        rungs = ladder(selection, range(3), RiskControl(target), rungs=10)
        merely_chosen.add(rungs[-1])
        losses = [sequence_losses(pool, thresholds) for thresholds in rungs]
        for _ in range(10):
            testing = rng.integers(0, len(losses[0]), 200)
            for found in (marginal, both):
                verdict = fixed_sequence_test(
                    range(len(rungs)),
                    [column[testing] for column in losses].__getitem__,
                    found.allowed,
                    EPSILON,
                    otherwise=-1,
                    share=found.stated.delta,
                )
                found.add(rungs[verdict.chosen] if verdict.accepted else (NEVER_EXITS,) * 3)
    for found in (marginal, both, merely_chosen):
        print(name, found.violations(), np.mean(found.risk), np.mean(found.layers))
    assert marginal.violations()[0] <= MOST
    assert max(both.violations()) <= MOST
    assert merely_chosen.violations()[0] > 0.2  # what a guarantee is for
    for found in (marginal, both):
        assert pool.layers[0] < np.mean(found.layers) < most_layers
