"""The model that a run left in a store: the same run, started again after its end, leaves it as it is.

In a store an earlier model goes before a new one is written. A cluster that starts a finished run again would
remove a good model in order to write the same one.
"""

import json
from pathlib import Path
from typing import Any

from elastic_lm.files.atomic import read_json, write_text_whole
from elastic_lm.files.hub import NATIVE
from elastic_lm.files.remote import address_of, entry_of, is_remote
from elastic_lm.files.remote_models import UNFINISHED
from elastic_lm.files.remote_workdirs import flush
from elastic_lm.processes import bytes_of_first, is_first

FILE = "left.json"


def is_left(workdir: Path, target: Any, step: int) -> bool:
    """Whether the model at `target` is whole, and the one that this run left after `step` steps.

    All processes call this, and process 0 looks. On this machine's disks a model is replaced in one step, so
    that nothing is asked there.

    Args:
      workdir: of the run, on this machine.
      target: folder of the model.
      step: optimizer steps done.

    Raises:
      OSError: see `files.remote.explained`.
    """
    if not is_remote(target):
        return False

    def look() -> bytes:
        try:
            noted = read_json(workdir / FILE)
        except (FileNotFoundError, ValueError):
            return b"no"
        same = bool(noted) and noted == _note(target, step)
        whole = same and entry_of(f"{address_of(target)}/{UNFINISHED}") is None
        return b"yes" if whole else b"no"

    return bytes_of_first(look) == b"yes"


def note_left(workdir: Path, target: Any, step: int) -> None:
    """Notes which model the run has left; process 0 does, and nothing is noted of one on this machine.

    Args:
      workdir: of the run, on this machine.
      target: folder of the model, which is finished.
      step: optimizer steps done.

    Raises:
      OSError: see `files.remote.explained`.
    """
    if is_remote(target) and is_first():
        write_text_whole(workdir / FILE, json.dumps(_note(target, step)) + "\n")
        flush(workdir)


def _note(target: Any, step: int) -> dict[str, Any]:
    """The steps, and the version of the model's config, which is written last; {} = there is none."""
    entry = entry_of(f"{address_of(target)}/{NATIVE}")
    return {} if entry is None else {"step": step, "version": entry.version}
