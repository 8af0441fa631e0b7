"""Which run an output of `elastic-lm cascade` belongs to, and which models a rule was fitted on."""

import dataclasses
import hashlib
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from elastic_lm.cascade.joint_rule import JointRule
from elastic_lm.cascade.rule import CascadeRule
from elastic_lm.cascade.scores import Scoring
from elastic_lm.cli.cascade.options import PairOptions, answerer_name, is_url
from elastic_lm.config.cascade import PLACES
from elastic_lm.files.fingerprints import checkpoint_fingerprint, differing_parts, file_sha256
from elastic_lm.files.remote import fetched

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
LATER = ("service_choices", "top_logprobs")


def fingerprints(options: PairOptions) -> dict[str, str | None]:
    """Fingerprints of the checkpoints, or files, of all members; None = a service.

    Raises:
      FileNotFoundError: a folder or file is not there.
    """
    found: dict[str, str | None] = {}  # of a folder that several members are parts of it is taken once
    for place in options.places:
        if place.place not in found:
            found[place.place] = _fingerprint(place.place)
    return {name: found[place.place] for name, place in zip(options.names, options.places, strict=True)}


def _fingerprint(place: str) -> str | None:
    if is_url(place):
        return None
    name, rest = answerer_name(place)
    return file_sha256(rest) if name and not Path(rest).is_dir() else checkpoint_fingerprint(rest)


def identity(options: PairOptions, found: Mapping[str, str | None], scoring: Scoring) -> dict[str, Any]:
    """Everything that the models' answers to the records depend on.

    Args:
      options: of the command.
      found: from `fingerprints`.
      scoring: of the Swift's energy.
    """
    members: dict[str, Any] = {}
    for name, shown in options.names.items():
        members |= {name: shown, f"{name}_checkpoint": found[name]}
    # Options that came later are left out at their defaults, so that outputs begun before them go on.
    later = {field: value for field in LATER if (value := options.chosen(field)) is not None}
    return {
        **members,
        **later,
        "data": options.data,
        "data_bytes": fetched(options.data).stat().st_size,
        "data_sha256": file_sha256(options.data),
        **{field: getattr(options, field) for field in ANSWERING},
        "temperature": scoring.temperature,
        "centre": scoring.centre,
    }


def fit_identity(options: PairOptions, found: Mapping[str, str | None], scoring: Scoring) -> dict[str, Any]:
    """`identity` of the answers that a rule is fitted on; goals, labels and prices are read afterwards."""
    head = (options.score or "").startswith(PLACES[2])
    return {
        "holds": "answers of both models" if len(options.places) == 2 else "answers of all models",
        **identity(options, found, scoring),
        "encoder_head": head,
    }


def answers_path(out: str | Path, settings: Mapping[str, Any]) -> Path:
    """Where answers are kept beside a rule; other models, records or flags have another file.

    Args:
      out: the rule's file.
      settings: from `fit_identity`.
    """
    digest = hashlib.sha256(json.dumps(dict(settings), sort_keys=True).encode()).hexdigest()[:8]
    return Path(out).with_suffix(f".answers-{digest}.jsonl")


def run_identity(
    options: PairOptions, found: Mapping[str, str | None], rule: CascadeRule | JointRule
) -> dict[str, Any]:
    """`identity` of an output, with the rule that decided and the price of the Super."""
    if isinstance(rule, JointRule):
        return {
            **identity(options, found, rule.stages[0].scoring),
            "stages": [dataclasses.asdict(stage) for stage in rule.stages],
            "seed": rule.seed,
            "super_cost": options.super_cost,
        }
    return {
        **identity(options, found, rule.scoring),
        "score": rule.score,
        "threshold": rule.threshold,
        "seed": rule.seed,
        "super_cost": options.super_cost,
    }


def check_models(
    rule: CascadeRule | JointRule,
    options: PairOptions,
    found: Mapping[str, str | None],
    contents: Mapping[str, Mapping[str, str]],
) -> None:
    """Warns on stderr where a rule was fitted on other models: an energy is about one checkpoint.

    Args:
      rule: says what it was fitted on.
      options: of the command.
      found: from `fingerprints`.
      contents: fingerprints of what was loaded, see `models.make_pair`; they stay the same when a model is
        saved again.

    Raises:
      ValueError: the models are others, and the rule's guarantee is about those that it was fitted on.
    """
    keys = ("models", "fingerprints", "contents")
    models, files, parts = (_mapping(_mapping(rule.provenance).get(key)) for key in keys)
    for name, now in options.names.items():
        place = models.get(name)
        if not (files.get(name) and found[name]):
            # Without fingerprints of both, the folders' names are all that can be compared.
            if isinstance(place, str) and not is_url(now) and Path(now).absolute() != Path(place).absolute():
                print(
                    f"the rule was fitted with {name} {place}, this is {now}: fit it again", file=sys.stderr
                )
            continue

        recorded, loaded = _mapping(parts.get(name)), contents.get(name, {})
        if recorded.get("weights") and loaded.get("weights"):
            other = differing_parts(recorded, loaded)
        else:
            other = "" if files[name] == found[name] else "files"
        if not other:
            continue
        line = (
            f"{name} {now} is not the checkpoint that the rule was fitted on ({place}), as their {other} "
            "differ: an energy is about one checkpoint, fit it again (elastic-lm cascade fit) or pass --force"
        )
        if rule.guarantee is not None and rule.guarantee.achieved:
            raise ValueError(f"{line}; the rule's guarantee is about those models alone")
        print(f"warning: {line}", file=sys.stderr)


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
