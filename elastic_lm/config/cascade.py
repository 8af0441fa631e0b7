"""What a cascade can be told, by name: scores, how they are computed, services, and the unit of costs.

The classes that read the names import JAX or NumPy. The names stand here so that the command line can show
them without either.
"""

import re
from typing import Literal
from urllib.parse import parse_qsl, urlencode, urlsplit, urlunsplit

KINDS = ("energy", "max_prob", "entropy", "margin")  # of scores that read logits
PLACES = ("", "prompt_", "encoder_")  # where the logits are from; see `cascade.scores`
POOLED = tuple(f"{place}{kind}{end}" for place in PLACES[:2] for end in ("", "_min") for kind in KINDS)
SCORES = (*POOLED, *(f"{PLACES[2]}{kind}" for kind in KINDS), "random")  # all that models of ours give
DEFAULT_SCORE = KINDS[0]
FITTED_SCORE = "max_prob"  # that the command takes of our models: never far behind the best in our study

TEMPERATURE = 1.0  # of an energy
Centre = Literal["none", "mean"]  # what the logits of an energy are measured from
Normalise = Literal["tokens", "bytes", "none"]  # what the log-likelihood of a choice is divided by
SOURCE_TOKENS = 512  # that an encoder-decoder reads of a record
ANSWER_TOKENS = 32  # that an encoder-decoder writes at most; on the command line, any model
CostUnit = Literal["flops", "seconds"]  # what a cascade saves
BATCH_SIZE = 16  # records that a model answers at once

Style = Literal["rows", "openai", "chat"]  # what a service is sent, and what it answers
COMPLETIONS = ("openai", "chat")  # styles of the OpenAI API: of texts, of chats
AskedChoices = Literal["ignored", "letters", "texts"]  # how such a service is asked about choices
TOP_LOGPROBS = (
    5  # likeliest tokens that a service is asked for where it scores; more than 5 are refused by some
)
TIMEOUT = 30.0  # seconds that a service may take for a record
RETRIES = 2  # further tries per record

SWIFT, SUPER = "swift", "super"  # names of the first member of a cascade and of the last

ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
SECRET = re.compile(r"(?i)key|token|secret|password|passwd|signature|^sig$|^auth$|credential")


def member_names(count: int) -> tuple[str, ...]:
    """What the members of a cascade are called.

    Args:
      count: of members, at least 2.

    Returns:
      ("swift", "super"), ("swift", "middle", "super"), ("swift", "middle_1", "middle_2", "super") and so on.
    """
    middle = ("middle",) if count == 3 else tuple(f"middle_{i}" for i in range(1, count - 1))
    return (SWIFT, *middle, SUPER)


def without_secrets(place: str) -> str:
    """An address as it may stand in files and messages: without user, password, and keys in its query.

    Args:
      place: an address, or anything else, which is returned as it is.

    Example:
      ```python
      from elastic_lm.config.cascade import without_secrets

      assert without_secrets("http://me:secret@host/x?key=1&n=2") == "http://host/x?key=***&n=2"
      ```
    """
    if not ADDRESS.match(place):
        return place
    try:
        parts = urlsplit(place)
    except ValueError:  # such as half an IPv6 address
        return f"{place.partition('://')[0]}://***"
    query = parts.query
    if any(SECRET.search(name) for name, _ in parse_qsl(query, keep_blank_values=True)):
        pairs = parse_qsl(query, keep_blank_values=True)
        query = urlencode([(k, "***" if SECRET.search(k) else v) for k, v in pairs], safe="*")
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2], query=query))
