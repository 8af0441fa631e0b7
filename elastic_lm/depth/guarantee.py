"""Thresholds with a finite-sample guarantee: Learn-then-Test along a fixed sequence.

The loss L_i(t) in [0, 1] of held-out sequence i under thresholds t is the share of its tokens that differ
from the full model's. What is stated is a bound on its expectation, E L <= a, and, if wanted, that at most a
share d of all sequences has L > a. `elastic_lm.bounds` has the p-values of both.

Thresholds t_1, t_2, ... from the most to the least cautious are chosen on one half of the sequences and
tested on the other in this order, until the first that fails. With probability at least 1 - epsilon over the
testing sequences, what is stated holds for every accepted t.

Sequences are independent, tokens are not: tokens of a sequence share their context, so a binomial bound over
all tokens would be far too narrow. Rows that are cut from one document are not independent either: make every
row a document, or take rows from many documents. Losses are teacher-forced: they compare the choices that
both policies make after the same text, with the full model's keys and values.

Papers: Learn then Test, arXiv 2110.01052; Confident adaptive language modeling, arXiv 2207.07061.
"""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from elastic_lm.bounds import RUNGS, Verdict, clopper_pearson, count_above, fixed_sequence_test, risk_bound
from elastic_lm.config.checks import require, require_types
from elastic_lm.config.guarantee import DEFAULT_EPSILON
from elastic_lm.depth.confidence import NEVER_EXITS
from elastic_lm.depth.observations import Observations
from elastic_lm.depth.threshold_search import choose_thresholds, emitting_exit


@dataclasses.dataclass(frozen=True)
class RiskControl:
    """What is to be guaranteed about calibrated thresholds.

    Raises:
      ValueError: a number is out of its range.

    Example:
      ```python
      import jax
      import jax.numpy as jnp
      import elastic_lm as el
      from elastic_lm.testing import random_params, random_tokens, tiny_config

      config = tiny_config()
      exits = [el.ExitConfig(3, tied=True)]  # untuned: copies of the final norm
      config, params = el.attach_exits(
          config, random_params(config, scale=0.1), exits, jax.random.key(0)
      )
      tokens = random_tokens(config, batch=400, length=9)  # in earnest: `el.data.eval_batches`
      ones = jnp.ones((400, 8), jnp.int32)
      batch = el.data.Batch(tokens[:, :-1], tokens[:, 1:], 1.0 * ones, jnp.cumsum(ones, 1) - 1, ones)

      policy = el.depth.calibrate(config, params, [batch], risk=el.RiskControl(target=0.9))
      print(policy.guarantee.statement)  # with probability at least 0.95 over the 200 sequences ...
      ```

    Paper: Learn then Test, arXiv 2110.01052.
    """

    target: float  # agreement with the full model, in (0, 1)
    epsilon: float = DEFAULT_EPSILON  # probability, over the held-out sequences, that the guarantee fails
    delta: float | None = None  # share of sequences whose agreement may be below target; None = not stated

    def __post_init__(self) -> None:
        require_types(self)
        require(0 < self.target < 1, "target", self.target, "a guarantee needs a share between 0 and 1")
        require(0 < self.epsilon < 1, "epsilon", self.epsilon, "must be a probability like 0.05")
        is_share = self.delta is None or 0 < self.delta < 1
        require(is_share, "delta", self.delta, "must be a share of sequences like 0.1, or None")

    @property
    def allowed(self) -> float:
        """Loss that is still allowed, 1 - target."""
        return 1.0 - self.target


@dataclasses.dataclass(frozen=True)
class Guarantee:
    """What was stated, and what the testing sequences say about the thresholds it holds for.

    Example:
      ```python
      import elastic_lm as el

      # A policy that `el.depth.calibrate(..., risk=...)` has saved has one as its `guarantee`.
      stated = el.depth.Guarantee(
          target=0.9,
          epsilon=0.05,
          delta=None,
          achieved=True,
          statement="with probability at least 0.95 over the 200 sequences ...",
          sequences=200,
          accepted=3,
          tested=4,
          p_value=0.01,
          agreement=0.93,
          agreement_bound=0.91,
          below=0.2,
          below_bound=0.25,
          worst_decile=0.8,
      )
      assert stated.achieved and stated.agreement_bound >= stated.target
      ```
    """

    target: float  # stated agreement with the full model
    epsilon: float  # stated probability of failure
    delta: float | None  # stated share of sequences below the target; None = not stated
    achieved: bool  # False: no exit is used, which satisfies every statement
    statement: str  # the guarantee, or why there is none, in words
    sequences: int  # that tested; as many others chose what was tested
    accepted: int  # thresholds that passed, one after the other, of those tested
    tested: int  # thresholds that were tested
    p_value: float  # of "the statement is false" for the reported thresholds
    agreement: float  # mean over testing sequences of the share of tokens equal to the full model's
    agreement_bound: float  # lower bound of its expectation, 1 - epsilon, for these thresholds alone
    below: float  # share of testing sequences whose agreement is below the target
    below_bound: float  # Clopper-Pearson upper bound of that share, 1 - epsilon, for these alone
    worst_decile: float  # mean agreement of the worst tenth of the testing sequences
    token_bound: float | None = None  # of the same expectation: Clopper-Pearson, one token per sequence
    more_sequences: int | None = None  # about how many more are needed; None = enough, or no number helps


def control(
    selection: Observations,
    testing: Observations,
    stated: RiskControl,
    used: Sequence[int] | None = None,
    rungs: int = RUNGS,
) -> tuple[tuple[float, ...], Guarantee]:
    """The least cautious thresholds that pass.

    Args:
      selection: tokens that choose what is tested.
      testing: tokens of other sequences.
      stated: what is to be guaranteed.
      used: indices of the exits that may fire; None = all.
      rungs: see `ladder`.

    Returns:
      (one threshold per exit, the guarantee). Where nothing passes, no exit is used and the guarantee
      describes the most cautious thresholds instead, with the number of sequences that would be enough.
    """
    never = (NEVER_EXITS,) * len(testing.layers)
    verdict = fixed_sequence_test(
        ladder(selection, range(len(never)) if used is None else used, stated, rungs),
        lambda thresholds: sequence_losses(testing, thresholds),
        stated.allowed,
        stated.epsilon,
        otherwise=never,
        share=stated.delta,
    )

    guarantee = describe(verdict, stated)
    if verdict.tested:
        bound = token_bound(testing, verdict.described, stated.epsilon)
        guarantee = dataclasses.replace(guarantee, token_bound=bound)
    return verdict.chosen, guarantee


def ladder(
    selection: Observations, used: Sequence[int], stated: RiskControl, rungs: int = RUNGS
) -> list[tuple[float, ...]]:
    """Thresholds to test, from the most to the least cautious.

    Args:
      selection: tokens of sequences that do not test.
      used: indices of the exits that may fire.
      stated: what is to be guaranteed.
      rungs: agreements on these tokens, evenly spaced from 1 down to the target, that are searched for.

    Returns:
      Distinct thresholds, one per exit each, without those that use no exit.
    """
    depths = [*(selection.layers[i] for i in used), selection.n_layers]
    targets = [1.0 - stated.allowed * (i + 1) / rungs for i in range(rungs)]
    chosen = choose_thresholds(selection.confidence[:, used], selection.agrees[:, used], depths, targets)

    # Exits that are not used never fire.
    spread = [[NEVER_EXITS] * len(selection.layers) for _ in targets]
    for row, target in zip(spread, targets, strict=True):
        for i, threshold in zip(used, chosen[target], strict=True):
            row[i] = threshold

    distinct = dict.fromkeys(map(tuple, spread))
    return [thresholds for thresholds in distinct if min(thresholds) < NEVER_EXITS]


def describe(verdict: Verdict, stated: RiskControl) -> Guarantee:
    """The guarantee for the last thresholds that passed, or a refusal that describes the first."""
    losses, n = verdict.losses, len(verdict.losses)
    risk, above = float(losses.mean()), count_above(losses, stated.allowed)
    worst = np.sort(losses)[-math.ceil(n / 10) :]

    # One half of the sequences chooses, so that the half that tests grows by every second one.
    more = 2 * verdict.more if verdict.more and verdict.tested else None
    return Guarantee(
        **dataclasses.asdict(stated),
        achieved=verdict.accepted > 0,
        statement=_statement(stated, n) if verdict.accepted else _refusal(verdict.tested, more),
        sequences=n,
        accepted=verdict.accepted,
        tested=verdict.tested,
        p_value=verdict.p_value,
        agreement=1.0 - risk,
        agreement_bound=1.0 - risk_bound(risk, n, stated.epsilon),
        below=above / n,
        below_bound=clopper_pearson(above, n, stated.epsilon),
        worst_decile=1.0 - float(worst.mean()),
        more_sequences=more,
    )


def _statement(stated: RiskControl, n: int) -> str:
    share = f" and at most a share {stated.delta:g} of sequences has less" if stated.delta is not None else ""
    return (
        f"with probability at least {1 - stated.epsilon:g} over the {n} sequences that tested, the expected "
        f"share of a sequence's tokens equal to the full model's is at least {stated.target:g}{share} "
        "(teacher-forced, for independent sequences like these)"
    )


def _refusal(tested: int, more: int | None) -> str:
    start = "not achievable with this data, no exit is used: "
    if not tested:
        return start + "no exit agrees with the full model often enough"
    if more is None:
        return start + "even the most cautious thresholds lose more than is allowed"
    return start + f"about {more} more sequences are needed"


def sequence_losses(observations: Observations, thresholds: Sequence[float]) -> np.ndarray:
    """[n] float64 share of each sequence's tokens that differ from the full model's under `thresholds`."""
    wrong = token_losses(observations, thresholds)
    _, sequence, tokens = np.unique(observations.sequence, return_inverse=True, return_counts=True)
    return np.bincount(sequence, wrong, len(tokens)) / tokens


def token_losses(observations: Observations, thresholds: Sequence[float]) -> np.ndarray:
    """[N] bool, the token under `thresholds` (one per exit) differs from the full model's."""
    chosen = emitting_exit(observations.confidence, thresholds)
    full = np.column_stack([observations.agrees, np.ones(observations.tokens, bool)])
    return ~full[np.arange(observations.tokens), chosen]


def token_bound(
    observations: Observations, thresholds: Sequence[float], epsilon: float, seed: int = 0
) -> float:
    """Clopper-Pearson lower bound of the agreement of a random token of a random sequence.

    Args:
      observations: tokens of n sequences that did not choose the thresholds.
      thresholds: one per exit.
      epsilon: probability with which the bound may fail.
      seed: of the draw.

    Returns:
      A number in [0, 1].
    """
    wrong = token_losses(observations, thresholds)

    # One token of every sequence is drawn, because tokens of one sequence are not independent.
    order = np.random.default_rng(seed).permutation(observations.tokens)
    _, first = np.unique(observations.sequence[order], return_index=True)
    drawn = wrong[order[first]]
    return 1.0 - clopper_pearson(int(drawn.sum()), len(drawn), epsilon)
