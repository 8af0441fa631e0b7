"""What a training run reads: the model it starts from and its data, which must be the same when it goes on.

`inputs.json` beside `run.json` records fingerprints of the weights and the tokenizer at step 0, and of every
data file its size, time of change, a digest (of samples, where it is large) and a checksum of all of it,
which is only compared where the time alone differs, as in a copy. A run that goes on compares
them before its first step: exits that were tuned on one model are never saved over another, and the position
in the data stays the position in the same data.
"""

import datetime
import hashlib
import json
from pathlib import Path
from typing import Any

from elastic_lm.config.data import RECORD_SUFFIXES, TEXT_SUFFIXES
from elastic_lm.config.parse import to_dict
from elastic_lm.data.records import TABLE_SUFFIXES
from elastic_lm.data.sources import find_files
from elastic_lm.data.stdlib import stdlib_files
from elastic_lm.files.atomic import read_json, write_text_whole
from elastic_lm.files.checksums import file_entry
from elastic_lm.files.fingerprints import differing_parts, file_digest, weights_fingerprint
from elastic_lm.files.hub import is_on_hub
from elastic_lm.files.remote import fetched, named
from elastic_lm.train.config import RunConfig, TaskRun
from elastic_lm.train.method import TEACHER
from elastic_lm.train.prepared import Prepared

FILE = "inputs.json"
FORMAT = "elastic_lm inputs 1"
DTYPE_FIELDS = ("dtype", "param_dtype")  # of a model, that may differ between devices
AGAIN = "begin again in another workdir"


def run_inputs(config: RunConfig | TaskRun, run: Prepared) -> dict[str, Any]:
    """What a run reads, as JSON values.

    Args:
      config: the whole run.
      run: at step 0, with all of its parameters.
    """
    # What a run draws by itself is settled by its seed, and all of it is in its checkpoints.
    loaded = bool(config.train.init_from)
    teacher = {name: tree for name, tree in run.params.items() if name == TEACHER}
    model = {name: value for name, value in to_dict(run.method.config).items() if name not in DTYPE_FIELDS}
    return {
        "format": FORMAT,
        "weights": run.weights,
        "from_hub": is_on_hub(config.train.init_from),
        "teacher": weights_fingerprint(teacher) if teacher else "",
        "tokenizer": run.tokenizer.fingerprint,
        "model": json.loads(json.dumps(model)) if loaded else {},
        "files": _data_files(config),
    }


def check_inputs(config: RunConfig | TaskRun, found: dict[str, Any], workdir: Path) -> None:
    """Refuses to go on where the model that a run began with, or its data, have changed.

    Args:
      config: the whole run.
      found: from `run_inputs`, now.
      workdir: of the run; where it has no record, as in runs of earlier releases, everything passes.

    Raises:
      ValueError: something changed; names the file, or the field of the config, and what to do.
    """
    if not (workdir / FILE).is_file():
        return
    stored = read_json(workdir / FILE)
    if stored.get("format") != FORMAT or not all(isinstance(stored.get(k), dict) for k in ("model", "files")):
        raise ValueError(f"{workdir / FILE}: does not say what the run there reads; {AGAIN}")

    section, tokenizer = _tokenizer_of(config)
    began = f"since the run in {workdir} began; put back what it began with, or {AGAIN}"
    if differing_parts(stored, {"weights": found["weights"]}):
        raise ValueError(f"train.init_from={config.train.init_from!r}: its weights changed {began}")
    if differing_parts(stored, {"teacher": found["teacher"]}):
        source = getattr(config.method, "teacher_from", "")
        raise ValueError(f"method.teacher_from={source!r}: its weights changed {began}")
    for field in sorted(stored["model"].keys() & found["model"].keys()):
        if stored["model"][field] != found["model"][field]:
            raise ValueError(
                f"train.init_from={config.train.init_from!r}: its {field} changed from "
                f"{stored['model'][field]!r} to {found['model'][field]!r} {began}"
            )
    if differing_parts(stored, {"tokenizer": found["tokenizer"]}):
        raise ValueError(f"{section}={tokenizer or str(workdir)!r}: its tokenizer changed {began}")
    _check_data(stored["files"], found["files"], workdir)


def _tokenizer_of(config: RunConfig | TaskRun) -> tuple[str, str]:
    """(field of the config, value) that say where the tokenizer comes from; the run's own without any."""
    own, section = (config.task, "task") if isinstance(config, TaskRun) else (config.data, "data")
    if own.tokenizer:
        return f"{section}.tokenizer", own.tokenizer
    return ("train.init_from", config.train.init_from) if config.train.init_from else ("workdir", "")


def _check_data(old: dict[str, Any], new: dict[str, Any], workdir: Path) -> None:
    for path in {**old, **new}:
        if path not in new or path not in old:
            what = "is gone" if path in old else "is new"
        elif difference := _difference(path, old[path], new[path]):
            what = difference
        else:
            continue
        raise ValueError(
            f"{path}: {what} since the run in {workdir} began, whose position in the data would mean other "
            f"text; put the data back as they were, or {AGAIN}"
        )


def _difference(path: str, old: Any, new: dict[str, Any]) -> str:
    """How the data file at `path` changed; "" = it did not, as far as can be told."""
    if not isinstance(old, dict) or old.get("bytes") != new["bytes"] or old.get("digest") != new["digest"]:
        return "has changed"
    # A digest of the whole file decides. Beside one of samples, the time says whether the rest may differ,
    # and then all of it is read.
    if new["whole"] or old.get("changed") == new["changed"]:
        return ""
    if "crc32" in old:
        return "" if file_entry(fetched(path))["crc32"] == old["crc32"] else "has changed"
    return f"was written again (first {old.get('changed')}, now {new['changed']})"


def save_inputs(inputs: dict[str, Any], workdir: Path) -> None:
    """Writes inputs.json, complete or not at all, with checksums of the data, which are read for it.

    Files of which the run that began has a checksum of the same time are not read again.

    Args:
      inputs: from `run_inputs`.
      workdir: of the run; made where it is missing.
    """
    before = read_json(workdir / FILE)["files"] if (workdir / FILE).is_file() else {}
    files = {path: _with_checksum(path, entry, before.get(path)) for path, entry in inputs["files"].items()}
    write_text_whole(workdir / FILE, json.dumps({**inputs, "files": files}, indent=1) + "\n")


def _with_checksum(path: str, entry: dict[str, Any], before: Any) -> dict[str, Any]:
    """The entry of a data file, with a checksum of all of it where the digest is one of samples."""
    if entry["whole"]:
        return entry
    if isinstance(before, dict) and before.get("changed") == entry["changed"] and "crc32" in before:
        return {**entry, "crc32": before["crc32"]}
    return {**entry, "crc32": file_entry(fetched(path))["crc32"]}


def _data_files(config: RunConfig | TaskRun) -> dict[str, dict[str, Any]]:
    """Data files of a run, for training and for evaluation; the standard library counts as one."""
    if isinstance(config, TaskRun):
        paths = (*config.task.paths, *config.task.eval_paths)
        return {named(path): _entry(path) for path in find_files(paths, (*RECORD_SUFFIXES, *TABLE_SUFFIXES))}

    data = config.data
    if data.source != "stdlib":
        suffixes = TEXT_SUFFIXES if data.source == "text" else RECORD_SUFFIXES
        paths = (*data.paths, *data.eval_paths)
        return {named(path): _entry(path) for path in find_files(paths, suffixes)}

    digest, size = hashlib.sha256(), 0
    for path in (*stdlib_files("train"), *stdlib_files("test")):
        digest.update(file_digest(path)[0].encode())
        size += path.stat().st_size
    library = {"bytes": size, "changed": "", "digest": digest.hexdigest()[:16], "whole": True}
    return {"the Python standard library": library}


def _entry(path: Path) -> dict[str, Any]:
    digest, whole = file_digest(path)
    status = path.stat()
    changed = datetime.datetime.fromtimestamp(status.st_mtime_ns / 1e9, datetime.UTC).isoformat()
    return {"bytes": status.st_size, "changed": changed, "digest": digest, "whole": whole}
