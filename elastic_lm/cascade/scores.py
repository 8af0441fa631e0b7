"""How sure a Swift is of a record: the energy, and the scores that it is compared with, behind one interface.

With z the logits of one distribution over C outcomes, p = softmax(z) and p1 >= p2 the two largest
probabilities:

    energy = T ln sum exp(z / T)        max_prob = p1        margin = p1 - p2        entropy = 1 - H(p) / ln C
    random = uniform in [0, 1), from a seed and the record's number

Higher is surer in all of them, and the Swift keeps a record when its score is at least the threshold. The
energy is not squashed here, unlike as the confidence of an exit (`depth.confidence`), so that thresholds
compare with published ones.

A classifier has one distribution per record. A sequence has one per token, and their scores are pooled: the
bare name is the mean over the generated tokens, and `_min` is the score of the least sure of them. `prompt_`
is over the prompt's positions instead, which is known before anything is generated. `encoder_` is the score
of a classifier on the encoder of an encoder-decoder, which is one distribution again.

Paper: E-LANG, arXiv 2203.00748 (energy, against softmax, entropy and random).
"""

import dataclasses
from collections.abc import Mapping

import jax
import numpy as np

from elastic_lm.cascade.energy import POOLS, energy_score, pool
from elastic_lm.config.cascade import KINDS, TEMPERATURE, Centre
from elastic_lm.config.checks import require_choice, require_positive, require_types
from elastic_lm.decode.token_scores import CENTRES
from elastic_lm.depth import confidence


@dataclasses.dataclass(frozen=True)
class Scoring:
    """How a Swift's energy is computed from its logits; static under jit.

    A threshold holds for the scoring that it was fitted with: `CascadeRule` records it, and `Cascade` checks
    it against the Swift's.

    Raises:
      ValueError: the temperature is not positive and finite, or the centring is unknown.

    Example:
      ```python
      from elastic_lm.cascade import Scoring

      plain = Scoring()  # as in the paper
      # A constant that is added to all logits of a record does not move this energy.
      centred = Scoring(temperature=2.0, centre="mean")
      assert (plain.temperature, centred.centre) == (1.0, "mean")
      ```
    """

    temperature: float = TEMPERATURE  # T of the energy
    centre: Centre = "none"  # "mean" = logits are measured from their own mean

    def __post_init__(self) -> None:
        require_types(self)
        require_positive("temperature", self.temperature)
        require_choice("centre", self.centre, CENTRES)


PLAIN = Scoring()  # the paper's


def logit_scores(logits: jax.Array, scoring: Scoring = PLAIN) -> dict[str, jax.Array]:
    """Every kind of score of one or more distributions.

    Args:
      logits: [..., C] of any float dtype, finite.
      scoring: of the energy; static.

    Returns:
      {kind: [...] float32} for each of `KINDS`.
    """
    return {
        "energy": energy_score(logits, scoring.temperature, scoring.centre),
        **{kind: confidence.confidence(kind, logits) for kind in KINDS if kind != "energy"},
    }


def pooled_scores(
    scores: Mapping[str, jax.Array], counted_BT: jax.Array, place: str = ""
) -> dict[str, jax.Array]:
    """Scores of sequences from the scores of their tokens.

    Args:
      scores: {kind: [B, T] float32}.
      counted_BT: bool, the tokens that count.
      place: "" where they were generated, "prompt_" where they are the prompt's.

    Returns:
      {name: [B] float32}; NaN where no token counts.
    """
    ends = zip(POOLS, ("", "_min"), strict=True)
    return {
        f"{place}{kind}{end}": pool(values, counted_BT, how)
        for how, end in ends
        for kind, values in scores.items()
    }


def random_score(seed: int, index: int) -> float:
    """Uniform in [0, 1): the same for a seed and a record, in whatever order records are asked for.

    Args:
      seed: of all records.
      index: number of the record.
    """
    return float(np.random.Generator(np.random.Philox(key=seed, counter=[0, 0, 0, index])).random())


def score_of(scores: Mapping[str, float], name: str, seed: int, index: int, model: str = "swift") -> float:
    """The score that a rule compares with its threshold.

    Args:
      scores: of a member's answer.
      name: one of `SCORES`, or another that the member gives.
      seed: of "random".
      index: number of the record.
      model: name of the member whose answer it is, for messages.

    Raises:
      ValueError: the answer has no such score.
    """
    if name in scores:
        return float(scores[name])
    if name == "random":
        return random_score(seed, index)
    known = ", ".join(scores) or "none"
    who = "the Swift" if model == "swift" else model
    raise ValueError(f"score={name!r}: {who}'s answer to record {index} has {known}; choose one of them")
