"""A cascade that answers the multiple-choice questions of the lm-evaluation-harness.

The harness asks for one continuation at a time and compares those of a question itself. So a rule is applied
to a question: the Swift scores all its choices, their log-likelihoods per token are the logits of the rule's
score, as in `cascade.MultipleChoice`, and where the score is below the threshold, all choices get the Super's
log-likelihoods instead.
"""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from elastic_lm.cascade.rule import CascadeRule
from elastic_lm.cascade.scores import logit_scores, score_of
from elastic_lm.config.checks import require
from elastic_lm.harness.scoring import Continuation


def passed_on(
    rule: CascadeRule,
    requests: Sequence[Any],
    asked: Sequence[Continuation],
    answers: Sequence[tuple[float, bool]],
) -> list[int]:
    """Which requests the Super answers: those of questions that the Swift is not sure of.

    Args:
      rule: decides by one of the scores of a distribution over choices.
      requests: of the harness, with the names of their tasks and the numbers of their questions.
      asked: their tokens.
      answers: the Swift's log-likelihoods.

    Returns:
      Positions in `requests`, in order.

    Raises:
      ValueError: a question has one continuation only, or the rule's score is none of several choices.
    """
    questions: dict[tuple[Any, Any], list[int]] = {}
    for i, request in enumerate(requests):
        questions.setdefault((request.task_name, request.doc_id), []).append(i)

    found = []
    for (task, number), places in questions.items():
        fix = "has one continuation per question, and a rule compares several choices; leave cascade out"
        require(len(places) > 1, "cascade", task, fix)
        logits = np.asarray([answers[i][0] / len(asked[i].tokens) for i in places], np.float32)
        scores = {k: float(v) for k, v in logit_scores(jnp.asarray(logits), rule.scoring).items()}
        if score_of(scores, rule.score, rule.seed, int(number)) < rule.threshold:
            found += places
    return sorted(found)
