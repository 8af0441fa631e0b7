"""Exit policies: fitted on one half, measured on the other, kept in a file."""

import json
from pathlib import Path

import numpy as np
import pytest

from elastic_lm.bounds import effective_trials
from elastic_lm.depth.calibration import fit_thresholds
from elastic_lm.depth.confidence import NEVER_EXITS
from elastic_lm.depth.guarantee import RiskControl
from elastic_lm.depth.observations import Observations
from elastic_lm.depth.per_exit import exit_threshold
from elastic_lm.depth.policies import ConfidenceExit
from elastic_lm.testing import tiny_config


def observations(n: int = 4000, rows: int = 40, seed: int = 0) -> Observations:
    """Two exits whose confidence is the probability that they agree."""
    random = np.random.default_rng(seed)
    ease = random.normal(size=(n, 1))
    scores = 2 * (ease + np.array([0.5, 1.5]) + 0.3 * random.normal(size=(n, 2)))
    confidence = (1 / (1 + np.exp(-scores))).astype(np.float32)
    agrees = random.uniform(size=(n, 2)) < confidence
    return Observations(
        layers=(1, 3),
        n_layers=4,
        confidence=confidence,
        agrees=agrees,
        correct=np.zeros((n, 3), bool),
        nats=np.zeros((n, 3), np.float32),
        weights=np.ones(n, np.float32),
        targets=np.zeros(n, np.int32),
        sequence=np.arange(n) * rows // n,
    )


def policy() -> ConfidenceExit:
    return fit_thresholds(observations(), target=0.95, metric="max_prob")


def test_held_out_agreement_is_close_to_its_target() -> None:
    fitted = policy()
    assert [p.target for p in fitted.curve] == [0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.999]
    for point in fitted.curve:
        assert point.agreement == pytest.approx(point.target, abs=0.02)
        assert sum(point.shares) == pytest.approx(1)
    assert fitted.measured is fitted.curve[2]
    assert fitted.thresholds == fitted.curve[2].thresholds
    layers = [point.mean_layers for point in fitted.curve]
    assert layers == sorted(layers)


def test_scoring_tokens_do_not_choose_thresholds() -> None:
    clean = observations()
    selection, scoring = clean.halves(seed=0)
    spoiled = Observations(**{**vars(clean), "agrees": clean.agrees.copy()})
    spoiled.agrees[np.isin(clean.sequence, scoring.sequence)] = False
    before, after = (fit_thresholds(o, target=0.95, metric="margin") for o in (clean, spoiled))
    assert [p.thresholds for p in before.curve] == [p.thresholds for p in after.curve]
    assert after.curve[0].agreement < 0.5
    assert "below the target" in after.curve[0].note
    assert not set(selection.sequence) & set(scoring.sequence)
    assert selection.tokens + scoring.tokens == clean.tokens


def test_only_more_than_chance_is_called_too_low() -> None:
    seen = observations(n=2000)
    points = [point for seed in range(12) for point in fit_thresholds(seen, metric="margin", seed=seed).curve]
    low = [point for point in points if point.agreement < point.target]
    assert len(low) > len(points) / 4
    warned = [point for point in points if "below" in point.note]
    assert len(warned) <= len(low) / 8
    assert all(point.agreement < point.target - 0.003 for point in warned)
    assert len({point.target for point in points}) == 7


def test_a_margin_asks_more_of_the_half_that_chooses() -> None:
    seen = observations()
    plain, careful = (fit_thresholds(seen, target=0.9, margin=m, metric="margin") for m in (0.0, 0.05))
    assert careful.target == 0.9
    assert careful.thresholds == plain.at(0.95).thresholds
    assert careful.provenance["margin"] == 0.05
    assert [p.target for p in careful.curve] == [p.target for p in plain.curve]
    for margin in (-0.1, 1.0, float("nan")):
        with pytest.raises(ValueError, match=r"margin=.*: must be a share of tokens"):
            fit_thresholds(seen, margin=margin, metric="margin")
    with pytest.raises(ValueError, match=r"margin=0\.1: is not part of a guarantee"):
        fit_thresholds(seen, margin=0.1, risk=RiskControl(0.9), metric="margin")


def test_trials_that_come_in_groups_count_for_less() -> None:
    groups = np.repeat(np.arange(100), 10)
    alike = np.repeat(np.random.default_rng(0).uniform(size=100) < 0.7, 10)
    assert effective_trials(alike, groups) == pytest.approx(100, rel=0.02)
    mixed = np.random.default_rng(0).uniform(size=1000) < 0.7
    assert effective_trials(mixed, groups) > 700
    assert effective_trials(np.ones(1000, bool), groups) == 1000
    assert effective_trials(mixed, np.zeros(1000)) == 1000


def test_strategies_choose_every_exit_on_its_own() -> None:
    seen = observations()
    selection, _ = seen.halves(seed=0)
    options = {"target": 0.95, "metric": "margin"}
    joint, own = (fit_thresholds(seen, strategy=s, **options) for s in ("joint", "max_coverage"))
    for j, threshold in enumerate(own.thresholds):
        alone = exit_threshold(selection.confidence[:, j], selection.agrees[:, j], 0.95, "max_coverage")
        assert threshold == alone.threshold
    assert own.thresholds != joint.thresholds
    assert own.measured.agreement >= 0.93


def test_unreachable_target_says_never() -> None:
    hopeless = observations()
    hopeless.agrees[:] = False
    fitted = fit_thresholds(hopeless, target=1.0, metric="max_prob", targets=())
    assert fitted.thresholds == (NEVER_EXITS, NEVER_EXITS)
    assert fitted.curve[0].agreement == 1.0
    assert fitted.curve[0].mean_layers == 4
    assert "full depth" in fitted.curve[0].note


def test_inactive_exits_never_fire() -> None:
    fitted = fit_thresholds(observations(), target=0.9, metric="max_prob", active=(3,))
    assert fitted.thresholds[0] == NEVER_EXITS
    assert fitted.thresholds[1] < 1
    assert fitted.curve[0].shares[0] == 0
    with pytest.raises(ValueError, match=r"active=\(2,\): the model has exits after layers \(1, 3\)"):
        fit_thresholds(observations(), target=0.9, metric="max_prob", active=(2,))


def test_file_round_trip_and_other_targets(tmp_path: Path) -> None:
    fitted = policy()
    path = tmp_path / "deep" / "thresholds.json"
    fitted.save(path)
    loaded = ConfidenceExit.load(path)
    assert loaded == fitted
    assert np.array_equal(np.float32(loaded.thresholds), np.float32(fitted.thresholds))
    assert loaded.at(0.8).thresholds == fitted.curve[0].thresholds
    assert loaded.at(0.8).target == 0.8
    assert not list(path.parent.glob("*.partial"))
    with pytest.raises(ValueError, match=r"target=0.7: the curve has 0.8, 0.9"):
        loaded.at(0.7)


def test_guarantee_is_kept_in_the_file_and_with_its_own_target(tmp_path: Path) -> None:
    risk = RiskControl(0.8, epsilon=0.1)
    fitted = fit_thresholds(observations(rows=400), risk=risk, metric="max_prob")
    plain = fit_thresholds(observations(rows=400), target=0.8, metric="max_prob")
    assert fitted.target == 0.8
    assert fitted.guarantee is not None
    assert fitted.guarantee.achieved
    assert fitted.guarantee.sequences == 200
    assert fitted.guarantee.p_value <= 0.1
    assert fitted.measured is not None
    assert plain.measured is not None
    assert fitted.measured.thresholds == fitted.thresholds
    assert plain.measured.mean_layers < fitted.measured.mean_layers < 4
    fitted.save(tmp_path / "t.json")
    loaded = ConfidenceExit.load(tmp_path / "t.json")
    assert loaded == fitted
    assert loaded.at(0.8).guarantee == fitted.guarantee
    assert loaded.at(0.99).guarantee is None


def test_guarantee_out_of_reach_exits_never_and_says_what_is_missing() -> None:
    fitted = fit_thresholds(observations(rows=40), risk=RiskControl(0.95, 0.05), metric="max_prob")
    assert fitted.thresholds == (NEVER_EXITS, NEVER_EXITS)
    assert fitted.guarantee is not None
    assert not fitted.guarantee.achieved
    assert fitted.guarantee.more_sequences is not None
    more = fitted.guarantee.more_sequences
    assert f"about {more} more sequences" in fitted.guarantee.statement
    longer = observations(100 * (40 + more), rows=40 + more)
    enough = fit_thresholds(longer, risk=RiskControl(0.95), metric="max_prob")
    assert enough.guarantee is not None
    assert enough.guarantee.achieved


def test_files_without_a_guarantee_still_load(tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    policy().save(path)
    content = json.loads(path.read_text())
    assert content.pop("guarantee") is None
    path.write_text(json.dumps(content))
    assert ConfidenceExit.load(path) == policy()


def test_unusable_files(tmp_path: Path) -> None:
    path = tmp_path / "thresholds.json"
    with pytest.raises(FileNotFoundError, match=r"thresholds.json: no such thresholds file"):
        ConfidenceExit.load(path)
    policy().save(path)
    good = json.loads(path.read_text())
    broken = {
        "Expecting": json.dumps(good)[:100],
        "format": json.dumps({**good, "format": "other"}),
        "is not": json.dumps([1, 2]),
        "metric='surprise'": json.dumps({**good, "metric": "surprise"}),
        "unknown key guarantee.odds": json.dumps({**good, "guarantee": {"odds": 1}}),
        "needs one per exit": json.dumps({**good, "thresholds": [0.5]}),
        "at least 0": json.dumps({**good, "thresholds": [0.5, -1.0]}),
        "finite": json.dumps({**good, "thresholds": [0.5, float("nan")]}),
        "unknown key treshold": json.dumps({**good, "treshold": 1}),
        "curve": json.dumps({**good, "curve": [{"targets": 1}]}),
        "missing": json.dumps({k: v for k, v in good.items() if k != "layers"}),
    }
    for reason, text in broken.items():
        path.write_text(text)
        with pytest.raises(ValueError, match=rf"(?s)thresholds.json.*{reason}.*calibrate again"):
            ConfidenceExit.load(path)


def test_check_names_what_does_not_fit() -> None:
    fitted = policy()
    fitted.check(tiny_config(exits=(1, 3)))
    with pytest.raises(ValueError, match=r"after layers \(1, 3\), the model has \(2,\)"):
        fitted.check(tiny_config(exits=(2,)))
    with pytest.raises(ValueError, match=r"the model has none"):
        fitted.check(tiny_config())
    recorded = ConfidenceExit("margin", (0.5, 0.5), (1, 3), provenance={"model": {"n_layers": 12}})
    with pytest.raises(ValueError, match=r"n_layers=12, this one has n_layers=4"):
        recorded.check(tiny_config(exits=(1, 3)))


@pytest.mark.parametrize("target", [0.0, 1.5])
def test_target_out_of_range(target: float) -> None:
    with pytest.raises(ValueError, match=r"must be a share in \(0, 1\]"):
        fit_thresholds(observations(), target=target, metric="max_prob")
