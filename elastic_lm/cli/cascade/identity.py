"""Which run an output of `elastic-lm cascade` belongs to, and which models a rule was fitted on."""

import hashlib
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from elastic_lm.cascade.rule import CascadeRule
from elastic_lm.cascade.scores import Scoring
from elastic_lm.cli.cascade.options import PairOptions, answerer_name, is_url
from elastic_lm.config.cascade import PLACES
from elastic_lm.files.fingerprints import checkpoint_fingerprint, file_sha256

# The options that change answers. The others change how long answers take, or no model reads them.
ANSWERING = (
    "text_field",
    "pair_field",
    "choices_field",
    "template",
    "labels",
    "max_new_tokens",
    "max_len",
    "normalise",
    "style",
    "service_model",
)


def fingerprints(options: PairOptions) -> dict[str, str | None]:
    """Fingerprints of the checkpoints, or files, of "swift" and "super"; None = a service.

    Raises:
      FileNotFoundError: a folder or file is not there.
    """
    places = {"swift": options.swift or options.super_, "super": options.super_}
    return {name: _fingerprint(at) for name, at in places.items()}


def _fingerprint(place: str) -> str | None:
    if is_url(place):
        return None
    name, rest = answerer_name(place)
    return file_sha256(rest) if name and not Path(rest).is_dir() else checkpoint_fingerprint(rest)


def identity(options: PairOptions, found: Mapping[str, str | None], scoring: Scoring) -> dict[str, Any]:
    """Everything that both models' answers to the records depend on.

    Args:
      options: of the command.
      found: from `fingerprints`.
      scoring: of the Swift's energy.
    """
    return {
        "swift": options.swift_name,
        "swift_checkpoint": found["swift"],
        "super": options.super_name,
        "super_checkpoint": found["super"],
        "data": options.data,
        "data_bytes": Path(options.data).stat().st_size,
        "data_sha256": file_sha256(options.data),
        **{field: getattr(options, field) for field in ANSWERING},
        "temperature": scoring.temperature,
        "centre": scoring.centre,
    }


def fit_identity(options: PairOptions, found: Mapping[str, str | None], scoring: Scoring) -> dict[str, Any]:
    """`identity` of the answers that a rule is fitted on; goals, labels and prices are read afterwards."""
    head = (options.score or "").startswith(PLACES[2])
    return {"holds": "answers of both models", **identity(options, found, scoring), "encoder_head": head}


def answers_path(out: str | Path, settings: Mapping[str, Any]) -> Path:
    """Where answers are kept beside a rule; other models, records or flags have another file.

    Args:
      out: the rule's file.
      settings: from `fit_identity`.
    """
    digest = hashlib.sha256(json.dumps(dict(settings), sort_keys=True).encode()).hexdigest()[:8]
    return Path(out).with_suffix(f".answers-{digest}.jsonl")


def run_identity(options: PairOptions, found: Mapping[str, str | None], rule: CascadeRule) -> dict[str, Any]:
    """`identity` of an output, with the rule that decided and the price of the Super."""
    return {
        **identity(options, found, rule.scoring),
        "score": rule.score,
        "threshold": rule.threshold,
        "seed": rule.seed,
        "super_cost": options.super_cost,
    }


def warn_other_models(rule: CascadeRule, options: PairOptions, found: Mapping[str, str | None]) -> None:
    """Warns on stderr where a rule was fitted on other models: an energy is about one checkpoint."""
    places = {"swift": options.swift_name, "super": options.super_name}
    fitted = {key: _mapping(rule.provenance.get(key)) for key in ("models", "fingerprints")}
    for name, now in places.items():
        place, old, new = fitted["models"].get(name), fitted["fingerprints"].get(name), found[name]
        if old and new:
            if old != new:
                print(
                    f"{name} {now} is not the checkpoint that the rule was fitted on ({place}): an energy "
                    "is about one checkpoint, fit it again",
                    file=sys.stderr,
                )
        # Without fingerprints of both, the folders' names are all that can be compared.
        elif isinstance(place, str) and not is_url(now) and Path(now).absolute() != Path(place).absolute():
            print(f"the rule was fitted with {name} {place}, this is {now}: fit it again", file=sys.stderr)


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
