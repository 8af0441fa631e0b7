"""The OpenAI API as an answerer speaks it: what is asked, and what the log-probabilities of a reply say.

With l_1 >= l_2 >= ... the log-probabilities of the K likeliest tokens at a position that a server returns,
p = exp(l) and r = max(1 - sum p, 0) the probability of all other tokens:

    logprob = l of the token that was written       energy = ln sum p        max_prob = p_1
    margin = p_1 - p_2                              entropy = 1 - H(p_1 .. p_K, r) / ln(K + 1)

Higher is surer, as in `scores`. The bare name is the mean over the answer's tokens, `_min` is the least sure
of them, and `first_` is the first token alone. Log-probabilities have lost the constant of the logits, so
that the energy of a whole vocabulary would be 0: over K tokens it tells how much of the probability they
share.

Where a record has choices, p are the probabilities that the first token begins each of the C choices, and

    energy = ln sum p,   and max_prob, margin and entropy (over ln C) of p / sum p
"""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, cast

from elastic_lm.cascade.answerer import Record, choice_texts, text_in
from elastic_lm.config.cascade import AskedChoices
from elastic_lm.config.checks import require

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
LETTER = re.compile(r"[*_(\[\"']*([A-Za-z])[*_\"']*(?:[.):\],]|\s*$|\s*\n)")  # alone, or closed off
LEAST = -9999.0  # what servers write for a probability of 0
PUNCTUATION = (
    " \t\n.,:;)]}\"'Ġ▁"  # around a token that begins a choice; the last two are spaces of tokenizers
)

Token = tuple[str, float]  # its text, its log-probability


@dataclasses.dataclass(frozen=True)
class WrittenToken:
    """A token of a reply."""

    log_prob: float  # nats
    likeliest: tuple[Token, ...]  # tokens that the server considered there, the likeliest first; () = unknown


class NoLogProbabilities(ValueError):
    """A server returned none although they were asked for."""


def asked_choices(record: Record, how: AskedChoices, field: str) -> list[str]:
    """The choices of a record that are asked about; [] = none.

    Args:
      record: of the cascade.
      how: whether and how choices are asked about.
      field: of the record with its choices.

    Raises:
      ValueError: they are no list of texts, or more than there are letters.
    """
    if how == "ignored" or field not in record:
        return []
    choices = choice_texts(field, record[field])
    fits = how == "texts" or len(choices) <= len(LETTERS)
    require(fits, f"{field}: count", len(choices), f"there are {len(LETTERS)} letters; ask by texts")
    return choices


def lettered(text: str, choices: Sequence[str], end: str) -> str:
    """A question with its choices, a letter and a line each."""
    lines = [f"{letter}. {choice}" for letter, choice in zip(LETTERS, choices, strict=False)]
    return "\n".join([text, *lines, end])


def messages_of(record: Record, field: str, text_field: str) -> list[dict[str, Any]]:
    """The conversation of a record: its messages where it has some, else its text as one message of a user.

    Raises:
      ValueError: the messages are no list of objects with a role, or there is no text.
    """
    if field not in record:
        return [{"role": "user", "content": text_in(record, text_field)}]
    messages = record[field]
    right = isinstance(messages, Sequence) and not isinstance(messages, str) and len(messages) > 0
    right = right and all(isinstance(one, Mapping) and isinstance(one.get("role"), str) for one in messages)
    require(right, field, messages, 'must be a list like [{"role": "user", "content": "Is it?"}]')
    return [dict(one) for one in cast("Sequence[Mapping[str, Any]]", messages)]


def with_choices(messages: Sequence[Mapping[str, Any]], choices: Sequence[str]) -> list[dict[str, Any]]:
    """Messages whose last one ends with lettered choices.

    Raises:
      ValueError: the last message has no text.
    """
    last = messages[-1].get("content")
    require(isinstance(last, str), "messages[-1].content", last, "must be a text that choices can follow")
    content = lettered(str(last), choices, "Answer with the letter alone.")
    return [*map(dict, messages[:-1]), {**messages[-1], "content": content}]


def written_tokens(choice: Mapping[str, Any]) -> list[WrittenToken]:
    """The tokens of a reply with what the server says of their log-probabilities.

    Args:
      choice: `choices[0]` of a reply, of chat completions or of text completions. (Some servers use the form
        of chats for both.)

    Returns:
      One per token; [] where the reply has no log-probabilities.

    Raises:
      ValueError: they cannot be read.
    """
    found = choice.get("logprobs")
    if not isinstance(found, Mapping):
        return []
    try:
        if isinstance(content := found.get("content"), Sequence):
            return [_of_chat(one) for one in content]
        columns = found.get("token_logprobs") or [], found.get("top_logprobs") or []
        return _of_completion(*columns)
    except (TypeError, LookupError, AttributeError) as error:
        raise ValueError(f"the log-probabilities cannot be read: {str(found)[:80]}") from error


def _of_chat(token: Mapping[str, Any]) -> WrittenToken:
    likeliest = [(one["token"], _log_prob(one["logprob"])) for one in token.get("top_logprobs") or []]
    return WrittenToken(_log_prob(token["logprob"]), _sorted(likeliest))


def _of_completion(
    log_probs: Sequence[float | None], likeliest: Sequence[Mapping[str, float] | None]
) -> list[WrittenToken]:
    """The tokens of a text completion; the first of an echoed prompt has no log-probability."""
    tables = [*likeliest, *[None] * (len(log_probs) - len(likeliest))]
    tokens = []
    for log_prob, table in zip(log_probs, tables, strict=False):
        if log_prob is not None:
            known = [(text, _log_prob(value)) for text, value in (table or {}).items()]
            tokens.append(WrittenToken(_log_prob(log_prob), _sorted(known)))
    return tokens


def _sorted(tokens: Sequence[Token]) -> tuple[Token, ...]:
    return tuple(sorted(tokens, key=lambda token: -token[1]))


def _log_prob(value: Any) -> float:
    number = float(value)
    # Half-precision servers return log-probabilities that are a little above 0.
    require(not math.isnan(number) and number < 0.1, "logprob", value, "must be a log-probability")
    return min(max(number, LEAST), 0.0)


def text_scores(tokens: Sequence[WrittenToken]) -> dict[str, float]:
    """Scores of a text: the mean over its tokens, the least of them, and the first one's.

    Args:
      tokens: at least one.

    Returns:
      By name. What needs more tokens of a position than the server returned is left out.
    """
    every = [_token_scores(token) for token in tokens]
    shared = [name for name in every[0] if all(name in one for one in every)]
    columns = {name: [one[name] for one in every] for name in shared}
    scores = {name: sum(column) / len(column) for name, column in columns.items()}
    scores |= {f"{name}_min": min(column) for name, column in columns.items()}
    return scores | {f"first_{name}": column[0] for name, column in columns.items()}


def _token_scores(token: WrittenToken) -> dict[str, float]:
    scores = {"logprob": token.log_prob}
    if not token.likeliest:
        return scores
    p = [math.exp(value) for _, value in token.likeliest]
    total = min(sum(p), 1.0)
    scores |= {"energy": math.log(total) if total else LEAST, "max_prob": p[0]}
    if len(p) > 1:
        scores["margin"] = p[0] - p[1]
    return scores | {"entropy": 1.0 - _entropy([*p, 1.0 - total]) / math.log(len(p) + 1)}


def _entropy(p: Sequence[float]) -> float:
    return -sum(one * math.log(one) for one in p if one > 0)


def choose(token: WrittenToken, choices: Sequence[str], how: AskedChoices) -> tuple[int, dict[str, float]]:
    """The choice that the first token of a reply is likeliest to begin, and how sure that is.

    Args:
      token: the first one.
      choices: of the record.
      how: "letters" or "texts": what the reply begins with.

    Returns:
      (index, scores by name).

    Raises:
      ValueError: none of the tokens that the server returned begins a choice, or the likeliest begin several.
    """
    labels = LETTERS[: len(choices)] if how == "letters" else [choice.strip() for choice in choices]
    p, unclear = [0.0] * len(choices), 0.0
    for text, log_prob in token.likeliest:
        begun = text.strip(PUNCTUATION)
        found = [i for i, label in enumerate(labels) if begun and label.startswith(begun)]
        if len(found) == 1:
            p[found[0]] += math.exp(log_prob)
        elif found:
            unclear += math.exp(log_prob)

    total, shown = sum(p), ", ".join(repr(text) for text, _ in token.likeliest[:5]) or "none"
    if not total:
        fix = "none of them begins a choice; raise top_logprobs, or ask about choices in another way"
        raise ValueError(f"the likeliest first tokens are {shown}: {fix}")
    if unclear >= max(p):
        fix = "the likeliest ones begin several choices; ask about choices by letters"
        raise ValueError(f"the likeliest first tokens are {shown}: {fix}")
    shares = sorted((one / total for one in p), reverse=True)
    scores = {"energy": math.log(min(total, 1.0)), "max_prob": shares[0]}
    scores["margin"] = shares[0] - (shares[1] if len(shares) > 1 else 0.0)
    scores["entropy"] = 1.0 - (_entropy(shares) / math.log(len(shares)) if len(shares) > 1 else 0.0)
    return p.index(max(p)), scores


def choice_named(text: str, choices: Sequence[str]) -> int | str:
    """The index of the choice that a reply names, else the reply.

    A choice is named by its text, or by its letter where the letter is all of the reply or of its first line,
    or is closed off, as in "(B)", "B. the sun" and "**b**: the sun". A sentence that begins with the word "A"
    or "I" names none.
    """
    bare = text.strip()
    texts = [choice.strip() for choice in choices]
    if bare in texts:
        return texts.index(bare)
    named = LETTER.match(bare)
    letter = named.group(1).upper() if named else ""
    return LETTERS.index(letter) if letter and letter in LETTERS[: len(choices)] else text
