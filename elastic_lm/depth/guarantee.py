"""Thresholds with a finite-sample guarantee: Learn-then-Test along a fixed sequence.

The loss L_i(t) in [0, 1] of held-out sequence i under thresholds t is the share of its tokens that
differ from the full model's. For n sequences with mean loss r and an allowed loss a, the hypothesis
E L > a has the Hoeffding-Bentkus p-value

    p = min( exp(-n h(min(r, a), a)),  e P(Bin(n, a) <= ceil(n r)) )
    h(x, a) = x ln(x / a) + (1 - x) ln((1 - x) / (1 - a))

and "more than a share d of all sequences has L > a", with k such sequences among n, has

    q = P(Bin(n, d) <= k)

Thresholds t_1, t_2, ... from the most to the least cautious, chosen on other sequences, are tested in
this order and accepted while p <= epsilon (where d is stated: max(p, q) <= epsilon, the hypothesis
that either statement fails). With probability at least 1 - epsilon over the testing sequences, what is
stated holds for every accepted t.

What is independent is a sequence, never a token: tokens of a sequence share their context, so a
binomial bound over all tokens would be far too narrow. Rows that are cut from one document are not
independent either; a row should be a document, or documents be many. Losses are teacher-forced: they
compare the choices that both policies make after the same text, with the full model's keys and values.

Papers: Learn then Test, arXiv 2110.01052; Confident adaptive language modeling, arXiv 2207.07061.
"""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from elastic_lm.bounds import (
    RUNGS,
    binomial_tail,
    clopper_pearson,
    fixed_sequence,
    hoeffding_bentkus,
    risk_bound,
    sequences_needed,
)
from elastic_lm.config.checks import require
from elastic_lm.depth.confidence import NEVER_EXITS
from elastic_lm.depth.observations import Observations
from elastic_lm.depth.threshold_search import choose, emitting_exit


@dataclasses.dataclass(frozen=True)
class RiskControl:
    """What is to be guaranteed."""

    target: float  # agreement with the full model
    epsilon: float = 0.05  # probability, over the held-out sequences, that the guarantee fails
    delta: float | None = None  # share of sequences whose agreement may be below target; None = not stated

    def __post_init__(self) -> None:
        require(0 < self.target < 1, "target", self.target, "a guarantee needs a share between 0 and 1")
        require(0 < self.epsilon < 1, "epsilon", self.epsilon, "must be a probability like 0.05")
        fix = "must be a share of sequences like 0.1, or None"
        require(self.delta is None or 0 < self.delta < 1, "delta", self.delta, fix)

    @property
    def allowed(self) -> float:
        """Loss that is still allowed, 1 - target."""
        return 1.0 - self.target


@dataclasses.dataclass(frozen=True)
class Guarantee:
    """What was stated and what the testing sequences say about the thresholds it holds for."""

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


def token_losses(observations: Observations, thresholds: Sequence[float]) -> np.ndarray:
    """[N] bool, the token under `thresholds` (one per exit) differs from the full model's."""
    chosen = emitting_exit(observations.confidence, thresholds)
    full = np.column_stack([observations.agrees, np.ones(observations.tokens, bool)])
    return ~full[np.arange(observations.tokens), chosen]


def sequence_losses(observations: Observations, thresholds: Sequence[float]) -> np.ndarray:
    """[n] float64 share of each sequence's tokens that differ from the full model's under thresholds."""
    wrong = token_losses(observations, thresholds)
    _, sequence, tokens = np.unique(observations.sequence, return_inverse=True, return_counts=True)
    return np.bincount(sequence, wrong, len(tokens)) / tokens


def p_value(losses: np.ndarray, stated: RiskControl) -> float:
    """p-value of "what is stated is false" from the losses [n] of independent sequences."""
    marginal = hoeffding_bentkus(float(losses.mean()), len(losses), stated.allowed)
    if stated.delta is None:
        return marginal
    return max(marginal, binomial_tail(_above(losses, stated), len(losses), stated.delta))


def _above(losses: np.ndarray, stated: RiskControl) -> int:
    """Number of sequences whose agreement is below the target."""
    return int((losses > stated.allowed + 1e-9).sum())


def ladder(
    selection: Observations, used: Sequence[int], stated: RiskControl, rungs: int = RUNGS
) -> list[tuple[float, ...]]:
    """Thresholds to test, from the most to the least cautious.

    Args:
      selection: tokens of sequences that do not test.
      used: indices of the exits that may fire.
      stated: what is to be guaranteed.
      rungs: agreements on these tokens, evenly spaced from the target to 1, that are searched for.

    Returns:
      Distinct thresholds, one per exit each, without those that use no exit.
    """
    depths = [*(selection.layers[i] for i in used), selection.n_layers]
    targets = [1.0 - stated.allowed * (i + 1) / rungs for i in range(rungs)]
    chosen = choose(selection.confidence[:, used], selection.agrees[:, used], depths, targets)
    spread = [[NEVER_EXITS] * len(selection.layers) for _ in targets]
    for row, target in zip(spread, targets, strict=True):
        for i, threshold in zip(used, chosen[target], strict=True):
            row[i] = threshold
    distinct = dict.fromkeys(map(tuple, spread))
    return [thresholds for thresholds in distinct if min(thresholds) < NEVER_EXITS]


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
    rows = ladder(selection, range(len(never)) if used is None else used, stated, rungs)
    if not rows:
        losses = sequence_losses(testing, never)
        return never, _describe(losses, stated, accepted=0, tested=0)
    guarantee = climb([sequence_losses(testing, thresholds) for thresholds in rows], stated)
    described = rows[max(guarantee.accepted - 1, 0)]
    bound = token_bound(testing, described, stated.epsilon)
    return described if guarantee.accepted else never, dataclasses.replace(guarantee, token_bound=bound)


def token_bound(
    observations: Observations, thresholds: Sequence[float], epsilon: float, seed: int = 0
) -> float:
    """Clopper-Pearson lower bound of the agreement of a random token of a random sequence.

    One token of every sequence is drawn, because tokens of one sequence are not independent.

    Args:
      observations: tokens of n sequences that did not choose the thresholds.
      thresholds: one per exit.
      epsilon: probability with which the bound may fail.
      seed: of the draw.

    Returns:
      A number in [0, 1].
    """
    wrong = token_losses(observations, thresholds)
    order = np.random.default_rng(seed).permutation(observations.tokens)
    _, first = np.unique(observations.sequence[order], return_index=True)
    drawn = wrong[order[first]]
    return 1.0 - clopper_pearson(int(drawn.sum()), len(drawn), epsilon)


def climb(losses: Sequence[np.ndarray], stated: RiskControl) -> Guarantee:
    """Tests thresholds that were chosen before.

    Args:
      losses: one [n] array of the testing sequences' losses per thresholds, the most cautious first.
      stated: what is to be guaranteed.

    Returns:
      The guarantee for the last thresholds that pass, which are number `accepted`; where none do, a
      refusal that describes the first.
    """
    accepted = fixed_sequence((p_value(column, stated) for column in losses), stated.epsilon)
    return _describe(losses[max(accepted - 1, 0)], stated, accepted, min(accepted + 1, len(losses)))


def _describe(losses: np.ndarray, stated: RiskControl, accepted: int, tested: int) -> Guarantee:
    n, risk, above = len(losses), float(losses.mean()), _above(losses, stated)
    more = None if accepted or not tested else _more(risk, above / n, n, stated)
    worst = np.sort(losses)[-math.ceil(n / 10) :]
    return Guarantee(
        **dataclasses.asdict(stated),
        achieved=accepted > 0,
        statement=_statement(stated, n) if accepted else _refusal(tested, more),
        sequences=n,
        accepted=accepted,
        tested=tested,
        p_value=p_value(losses, stated),
        agreement=1.0 - risk,
        agreement_bound=1.0 - risk_bound(risk, n, stated.epsilon),
        below=above / n,
        below_bound=clopper_pearson(above, n, stated.epsilon),
        worst_decile=1.0 - float(worst.mean()),
        more_sequences=more,
    )


def _more(risk: float, below: float, n: int, stated: RiskControl) -> int | None:
    """Held-out sequences to add, of which half would test; None where no number helps."""
    needed = [sequences_needed(risk, stated.allowed, stated.epsilon)]
    if stated.delta is not None:
        needed.append(sequences_needed(below, stated.delta, stated.epsilon))
    counts = [count for count in needed if count is not None]
    return 2 * max(1, max(counts) - n) if len(counts) == len(needed) else None


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
