"""Which files of a model go to the Hub, and that nothing in them names a folder of the machine."""

import json
import re
from collections.abc import Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from elastic_lm.files import checksums
from elastic_lm.files.atomic import read_json
from elastic_lm.files.hub import CONFIG, NATIVE

THRESHOLDS = "thresholds.json"
SHAPE = ("n_layers", "d_model", "vocab_size")  # of the model that thresholds were fitted on
# JSON that is read for paths. In files of `transformers` these have keys of their own.
READ = (CONFIG, NATIVE, "source_config.json", "tokenizer_config.json", "special_tokens_map.json")
PATH_KEYS = ("_name_or_path", "name_or_path", "tokenizer_file", "special_tokens_map_file", "vocab_file")
SEPARATORS = re.compile(r"[/\\]")


def pushed_files(folder: Path, thresholds: Path | None) -> dict[str, Path | bytes]:
    """What is uploaded: every file of a folder that is not hidden, and thresholds.

    Args:
      folder: of the model.
      thresholds: file of them; None = there are none, also where some lie in the folder.

    Returns:
      Files by their names on the Hub; contents where they differ from the file.

    Raises:
      ValueError: a file is damaged; names it.
    """
    paths = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("[!.]*"))}
    shown = {name: path for name, path in paths.items() if path.is_file() and "/." not in f"/{name}"}
    shown.pop(THRESHOLDS, None)

    changed = {name: text for name in READ if name in shown and (text := _without_paths(shown[name]))}
    files: dict[str, Path | bytes] = {**shown, **changed}
    if thresholds:
        changed[THRESHOLDS] = files[THRESHOLDS] = _public_thresholds(thresholds)
    if checksums.FILE in shown and changed:
        files[checksums.FILE] = checksums.replaced_entries(shown[checksums.FILE], changed)
    return files


def misfit(thresholds: Mapping[str, Any], layers: list[int], config: Mapping[str, Any], weights: str) -> str:
    """Why thresholds are those of another model; "" = nothing that they record differs.

    Args:
      thresholds: contents of their file.
      layers: after which the model has exits.
      config: fields of the model's config.
      weights: its fingerprint; "" = is not known.
    """
    if thresholds.get("layers") != layers:
        return f"they are for exits after layers {thresholds.get('layers')}, and the model's are {layers}"
    recorded = calibrated_on(thresholds)
    for field in SHAPE:
        if field in recorded and recorded[field] != config.get(field):
            return f"they were fitted with {field}={recorded[field]}, and the model has {config.get(field)}"
    if weights and recorded.get("weights") and recorded["weights"] != weights:
        return "they were fitted on other weights"
    return ""


def calibrated_on(thresholds: Mapping[str, Any]) -> Mapping[str, Any]:
    """What a file of thresholds records of its model; {} = nothing."""
    origin = thresholds.get("provenance")
    model = origin.get("model") if isinstance(origin, Mapping) else None
    return model if isinstance(model, Mapping) else {}


def without_folders(text: str) -> str:
    """Text in which paths, with a comma and a space between them, are given without their folders."""
    return ", ".join(SEPARATORS.split(part.rstrip("/\\"))[-1] for part in text.split(", "))


def _public_thresholds(file: Path) -> bytes:
    """The contents of a file of thresholds without folders of the machine."""
    content = read_json(file)
    origin = dict(content.get("provenance") or {})
    for part, key in (("model", "path"), ("data", "description")):
        own = origin.get(part)
        if isinstance(own, Mapping) and isinstance(own.get(key), str):
            origin[part] = {**own, key: without_folders(own[key])}
    return (json.dumps({**content, "provenance": origin}, indent=2) + "\n").encode()


def _without_paths(file: Path) -> bytes | None:
    """The contents of a file of JSON in which places of this machine have no folders; None = it has none."""
    content = read_json(file)
    found = {key: content[key] for key in PATH_KEYS if isinstance(content.get(key), str)}
    found = {key: without_folders(text) for key, text in found.items() if _is_local(text)}
    return (json.dumps({**content, **found}, indent=2) + "\n").encode() if found else None


def _is_local(text: str) -> bool:
    """Whether a text is a path of a machine, and no name on the Hub."""
    rooted = PurePosixPath(text).is_absolute() or PureWindowsPath(text).is_absolute()
    return rooted or text.startswith(("~", ".")) or text.count("/") > 1 or Path(text).exists()
