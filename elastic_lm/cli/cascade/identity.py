"""Which run of `elastic-lm route` an output belongs to, and which models a rule was fitted on."""

import argparse
import hashlib
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from elastic_lm.cascade.rule import CascadeRule
from elastic_lm.cascade.scores import PLACES, Scoring
from elastic_lm.cli.cascade.models import is_url
from elastic_lm.files.fingerprints import checkpoint_fingerprint, file_sha256

# Flags that change answers; others change how long they take, or are of no concern to a model.
FLAGS = (
    *("text_field", "pair_field", "choices_field", "template", "labels", "max_new_tokens", "max_len"),
    *("normalise", "style", "service_model"),
)


def swift_name(args: argparse.Namespace) -> str:
    """What the Swift is called in files and messages."""
    return args.swift if args.swift_exit is None else f"{args.super_} exit {args.swift_exit}"


def fingerprints(args: argparse.Namespace) -> dict[str, str | None]:
    """Of the checkpoints of "swift" and "super"; None = a service.

    Raises:
      FileNotFoundError: a folder is not there.
    """
    places = {"swift": args.super_ if args.swift_exit is not None else args.swift, "super": args.super_}
    return {name: None if is_url(at) else checkpoint_fingerprint(at) for name, at in places.items()}


def identity(args: argparse.Namespace, found: Mapping[str, str | None], scoring: Scoring) -> dict[str, Any]:
    """All that both models' answers to the rows depend on.

    Args:
      args: flags of `routing.flags`.
      found: from `fingerprints`.
      scoring: of the Swift's energy.
    """
    return {
        "swift": swift_name(args),
        "swift_checkpoint": found["swift"],
        "super": args.super_,
        "super_checkpoint": found["super"],
        "data": args.data,
        "data_bytes": Path(args.data).stat().st_size,
        "data_sha256": file_sha256(args.data),
        **{flag: getattr(args, flag) for flag in FLAGS},
        "temperature": scoring.temperature,
        "centre": scoring.centre,
    }


def fit_identity(
    args: argparse.Namespace, found: Mapping[str, str | None], scoring: Scoring
) -> dict[str, Any]:
    """`identity` of the answers that a rule is fitted on; goals, labels and prices are read afterwards."""
    head = (args.score or "").startswith(PLACES[2])
    return {"holds": "answers of both models", **identity(args, found, scoring), "encoder_head": head}


def answers_path(out: str | Path, settings: Mapping[str, Any]) -> Path:
    """Where answers are kept beside a rule: other models, rows or flags have another file.

    Args:
      out: the rule's file.
      settings: from `fit_identity`.
    """
    digest = hashlib.sha256(json.dumps(dict(settings), sort_keys=True).encode()).hexdigest()[:8]
    return Path(out).with_suffix(f".answers-{digest}.jsonl")


def run_identity(
    args: argparse.Namespace, found: Mapping[str, str | None], rule: CascadeRule
) -> dict[str, Any]:
    """`identity` of an output."""
    own = {"score": rule.score, "threshold": rule.threshold, "seed": rule.seed, "super_cost": args.super_cost}
    return {**identity(args, found, rule.scoring), **own}


def warn_other_models(rule: CascadeRule, args: argparse.Namespace, found: Mapping[str, str | None]) -> None:
    """Says where a rule was fitted on other models: an energy is about one checkpoint."""
    places = {"swift": swift_name(args), "super": args.super_}
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
        elif isinstance(place, str) and not is_url(now) and Path(now).absolute() != Path(place).absolute():
            print(f"the rule was fitted with {name} {place}, this is {now}: fit it again", file=sys.stderr)


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
