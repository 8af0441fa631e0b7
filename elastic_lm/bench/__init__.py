"""Measurements a user can repeat: `elastic-lm bench NAME --json FILE`.

`NAME` is a module of this package with `rows(options) -> list[Row]`.
"""
