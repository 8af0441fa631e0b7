"""Messages of libraries that users can do nothing about: which ones are not shown, and why.

A room that imports such a library imports this module first.
"""

import logging

import absl.logging

NEEDLESS = (
    # orbax 0.12.0 says so of every sound folder, and raises an error where arrays are missing.
    ("orbax", "TensorStore data files not found in checkpoint path"),
    # grain 0.2.17 says so when it is imported beside jaxlib 0.7.2; we start no worker processes.
    ("grain", "Grain multiprocess worker profiling requires"),
)


def is_news(record: logging.LogRecord) -> bool:
    """False for what is not shown.

    Besides `NEEDLESS` those are tracebacks that orbax logs in each of its threads: what it raises then says
    the same once.
    """
    if record.exc_info and "orbax" in record.pathname:
        return False
    text = str(record.msg)
    return not any(name in record.pathname and text.startswith(start) for name, start in NEEDLESS)


absl.logging.get_absl_logger().addFilter(is_news)
