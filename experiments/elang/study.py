"""What the parts of run.py share: columns of measured rows, costs, and what is kept on disk.

Columns of one pair of models: {"splits": {"fit", "test": rows}, "relative_time": the Swift's measured time
per row, the Super's being 1}, where rows are {"scores": {kind: numbers}, "swift", "super": qualities in
[0, 1], "cost_swift", "cost_super": FLOPs, "cost_on": FLOPs of the Super for a row that the Swift began}.
"""

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from elastic_lm.bench.timing import interleave
from elastic_lm.cascade.answerer import Answer, Answerer, Record, ResumingAnswerer
from elastic_lm.cascade.scores import logit_scores

Columns = dict[str, Any]
ROUNDS = 7


def scored(
    logits_NC: np.ndarray, right: Mapping[str, np.ndarray], costs: Mapping[str, np.ndarray], seed: int
) -> Columns:
    """Rows of a split, every kind of score read from the Swift's logits.

    Args:
      logits_NC: of the Swift.
      right: {"swift", "super": N qualities}.
      costs: {"swift", "super": N numbers of FLOPs}.
      seed: of the random score.
    """
    kinds = {kind: np.asarray(s).tolist() for kind, s in logit_scores(jnp.asarray(logits_NC)).items()}
    kinds["random"] = np.random.default_rng(seed).uniform(size=len(logits_NC)).tolist()
    return {
        "scores": kinds,
        **{name: np.asarray(values, float).tolist() for name, values in right.items()},
        **{f"cost_{name}": np.asarray(values, float).tolist() for name, values in costs.items()},
    }


def answered(
    models: Mapping[str, Answerer],
    splits: Mapping[str, Sequence[Record]],
    quality: Callable[[Record, Any], float],
    seed: int,
) -> Columns:
    """Columns of any two models of a cascade.

    Args:
      models: {"swift", "super"}. A Super that resumes is asked to, and must then say the same.
      splits: {"fit", "test": rows}.
      quality: of an output to a row, in [0, 1].
      seed: of the random score.
    """
    found: Columns = {"splits": {}}
    for name, rows in splits.items():
        answers = {side: model.answer(rows) for side, model in models.items()}
        failed = [a.error for each in answers.values() for a in each if a.error]
        if failed:
            raise ValueError(f"{name}: {len(failed)} rows failed; the first: {failed[0]}")
        part = {k: [float(a.scores[k]) for a in answers["swift"]] for k in answers["swift"][0].scores}
        part["random"] = np.random.default_rng(seed).uniform(size=len(rows)).tolist()
        columns: Columns = {"scores": part}
        for side, each in answers.items():
            columns[side] = [quality(row, a.output) for row, a in zip(rows, each, strict=True)]
            columns[f"cost_{side}"] = [a.cost for a in each]
        if answers["swift"][0].handover is not None:
            columns["cost_on"] = [a.cost for a in resumed(models["super"], rows, answers)]
        found["splits"][name] = columns
    few = list(splits["test"])[:64]
    sides = {side: (lambda m=model: m.answer(few)) for side, model in models.items()}
    found["relative_time"] = relative_times(sides)["swift"]
    return found


def resumed(model: Answerer, rows: Sequence[Record], answers: Mapping[str, list[Answer]]) -> list[Answer]:
    """The Super's answers from where the Swift stopped.

    Raises:
      ValueError: one is not what the Super says from scratch.
    """
    assert isinstance(model, ResumingAnswerer)
    found = model.resume(rows, answers["swift"])
    other = sum(a.output != b.output for a, b in zip(found, answers["super"], strict=True))
    if other:
        raise ValueError(f"{other} of {len(rows)} resumed answers differ from those from scratch")
    return found


def relative_times(sides: Mapping[str, Callable[[], Any]], base: str = "super") -> dict[str, float]:
    """Median time of every side relative to that of `base` in the same round."""
    times = interleave(sides, ROUNDS)
    return {
        name: statistics.median(own / whole for own, whole in zip(each, times[base], strict=True))
        for name, each in times.items()
    }


def settled(file: Path, make: Callable[[], Columns]) -> Columns:
    """The columns in `file`; made and written where it is missing, numbers to six digits."""
    if not file.is_file():
        file.write_text(json.dumps(rounded(make())) + "\n")
    return json.loads(file.read_text())


def rounded(tree: Any) -> Any:
    """A tree of dictionaries, lists and numbers with six digits of each."""
    if isinstance(tree, dict):
        return {name: rounded(value) for name, value in tree.items()}
    if isinstance(tree, list):
        return [rounded(value) for value in tree]
    return float(f"{tree:.6g}") if isinstance(tree, float) else tree
