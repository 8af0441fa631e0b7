"""Which messages of libraries are shown."""

import logging
import subprocess
import sys

from elastic_lm.files import library_messages


def test_other_messages_of_libraries_are_kept() -> None:
    def record(path: str, error: bool, message: str = "message") -> logging.LogRecord:
        info = (ValueError, ValueError("x"), None) if error else None
        return logging.LogRecord("absl", logging.ERROR, path, 1, message, (), info)

    assert library_messages.is_news(record("/lib/orbax/checkpoint/saving.py", False))
    assert library_messages.is_news(record("/lib/other.py", True))
    assert not library_messages.is_news(record("/lib/orbax/checkpoint/saving.py", True))
    no_data = "TensorStore data files not found in checkpoint path %s. This may be a sign"
    assert not library_messages.is_news(record("/lib/orbax/checkpoint/layout.py", False, no_data))
    assert library_messages.is_news(record("/lib/other.py", False, no_data))


def test_importing_what_trains_says_nothing() -> None:
    script = (
        "from elastic_lm.checkpoints import native; from elastic_lm import data, train; train.fit, data.Batch"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "")
