"""Checkpoints of this package, and one way in for every kind of model folder."""

from elastic_lm.files import library_messages as _messages  # noqa: F401 - before grain and orbax are imported
