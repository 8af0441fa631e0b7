"""Fills pages with tables that are made from the code, so that they cannot be out of date.

<!-- flags: cascade fit -->          flags of a command
<!-- fields: el.TrainConfig -->      fields of a dataclass, with their defaults and comments
"""

import argparse
import dataclasses
import inspect
import re
import sys
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

from field_comments import comment_of  # noqa: E402

MARK = re.compile(r"<!-- (flags|fields): (.+?) -->")


def on_page_markdown(markdown: str, **kwargs: Any) -> str:
    """Called by mkdocs for every page."""
    del kwargs
    tables = {"flags": flags_table, "fields": fields_table}
    return MARK.sub(lambda mark: tables[mark[1]](mark[2]), markdown)


def flags_table(command: str) -> str:
    """The flags of a command, like "cascade fit"."""
    from elastic_lm.cli.main import build_parsers

    name, *actions = command.split()
    parser: Any = build_parsers()[1][name]
    for action in actions:
        choices = next(a for a in parser._actions if isinstance(a, argparse._SubParsersAction)).choices
        parser = choices[action]
    rows = ["| flag | what it says |", "|---|---|"]
    for action in parser._actions:
        if "--help" not in action.option_strings and action.help != argparse.SUPPRESS:
            rows.append(f"| {_written(action)} | {_cell(action.help or '')} |")
    return "\n".join(rows)


def _written(action: argparse.Action) -> str:
    names = ", ".join(action.option_strings) or action.dest
    if action.nargs == 0:
        return f"`{names}`"
    values = action.metavar or ("|".join(map(str, action.choices)) if action.choices else action.dest.upper())
    more = " ..." if action.nargs == "+" else ""
    required = " (required)" if action.required and action.option_strings else ""
    written = f"{names} {values}{more}" if action.option_strings else str(values)
    return f"`{_cell(written)}`{required}"


def fields_table(name: str) -> str:
    """The fields of a dataclass, like el.TrainConfig."""
    import elastic_lm

    found: Any = elastic_lm
    for part in name.split(".")[1:]:
        found = getattr(found, part)
    comments = {}
    for owner in found.__mro__:
        if dataclasses.is_dataclass(owner):
            for line in inspect.getsource(owner).splitlines():
                if field := re.match(r" {4}(\w+):", line):
                    comments.setdefault(field[1], comment_of(line))
    rows = ["| option | default | |", "|---|---|---|"]
    for field in dataclasses.fields(found):
        rows.append(f"| `{field.name}` | {_default(field)} | {_cell(comments.get(field.name, ''))} |")
    return "\n".join(rows)


def _default(field: dataclasses.Field) -> str:
    if field.default is dataclasses.MISSING:
        return "(required)"
    return f"`{_cell(repr(field.default))}`" if not dataclasses.is_dataclass(field.default) else "see there"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
