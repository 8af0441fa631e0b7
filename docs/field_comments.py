"""The API reference shows the comment beside a field of a dataclass as the field's documentation."""

import re

import griffe

COMMENT = re.compile(r"^[^#]*[^#\s][^#]*#\s*(?!noqa|pyright|type:)(.+)$")


def comment_of(line: str) -> str:
    """The comment at the end of a line of code; "" = there is none, or it is for a tool."""
    found = COMMENT.match(line)
    return found[1].strip().replace("[", "\\[") if found else ""  # brackets are no links


class FieldComments(griffe.Extension):
    """Gives attributes that have no docstring the comment of their line."""

    def on_attribute_instance(self, *, attr: griffe.Attribute, **kwargs: object) -> None:
        """Called for every attribute that is found in the sources."""
        del kwargs
        if attr.docstring is None and attr.lineno and attr.endlineno == attr.lineno:
            comment = comment_of(attr.lines_collection[attr.filepath][attr.lineno - 1])
            if comment:
                attr.docstring = griffe.Docstring(comment, lineno=attr.lineno, parent=attr)
