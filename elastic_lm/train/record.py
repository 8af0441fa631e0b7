"""What is saved with a run so that it can be repeated.

run_config.json  every option; `elastic-lm train --config DIR/run_config.json` repeats the run
starts.jsonl     one line per start: command, versions, devices, mesh, commit of the config
operative.gin    every value that was read, where the config was gin's
"""

import dataclasses
import datetime
import json
import shlex
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from elastic_lm.config.parse import to_dict
from elastic_lm.files.atomic import append_whole, naming, write_text_whole
from elastic_lm.models.decoder import Params
from elastic_lm.report.machine import hardware, versions
from elastic_lm.train.config import RunConfig, TaskRun

CONFIG_FILE = "run_config.json"
STARTS_FILE = "starts.jsonl"
GIN_FILE = "operative.gin"
GIT_SECONDS = 10


@dataclasses.dataclass(frozen=True)
class Origin:
    """Where the config of a run comes from.

    Attributes:
      files: config files; the commit of the first one's folder is recorded.
      operative_gin: text of gin's operative config; "" = the config is no gin file.
    """

    files: tuple[str, ...] = ()
    operative_gin: str = ""


UNKNOWN = Origin()


def save_record(config: RunConfig | TaskRun, origin: Origin, mesh: Mesh, start: int, workdir: Path) -> None:
    """Writes the config of a run, complete or not at all, and adds this start to those before.

    Args:
      config: as it was given: seeds that follow another one stay None.
      origin: where it comes from.
      mesh: of the run.
      start: steps that were done before.
      workdir: of the run; it exists.
    """
    write_text_whole(workdir / CONFIG_FILE, json.dumps(to_dict(config), indent=2) + "\n")
    if origin.operative_gin:
        write_text_whole(workdir / GIN_FILE, origin.operative_gin)

    path = workdir / STARTS_FILE
    with naming(path), path.open("ab", buffering=0) as file:
        append_whole(file, (json.dumps(_start(origin, mesh, start)) + "\n").encode())


def opening(mesh: Mesh, trainable: Params, frozen: Params, mean_gradient: str = "", squares: str = "") -> str:
    """The first line of a run: how many parameters train, on what and in which dtypes.

    Args:
      mesh: of the run.
      trainable: parameters that train.
      frozen: those that do not.
      mean_gradient: dtype of the optimizer's; "" = that of the rest of it.
      squares: likewise, of its mean squared gradient.
    """
    train, stay = _sizes(trainable), _sizes(frozen)
    moments = f"mean gradient in {mean_gradient}, " if mean_gradient else ""
    moments += f"squared gradient in {squares}, " if squares else ""
    others = f"; the others stay in {' and '.join(stay)}" if stay else ""
    axes = ", ".join(f"{axis} {size}" for axis, size in mesh.shape.items())

    count = sum(train.values())
    what = f"{count:,} of {count + sum(stay.values()):,} parameters train on {devices(mesh)}"
    how = f"in {' and '.join(train)}, {moments}optimizer in float32{others}"
    return f"{what} {how}; mesh: {axes}; jax {jax.__version__}"


def _sizes(params: Params) -> dict[str, int]:
    """Parameters by dtype, the commonest first."""
    sizes = Counter[str]()
    for leaf in jax.tree.leaves(params):
        sizes[leaf.dtype.name] += leaf.size
    return dict(sizes.most_common())


def devices(mesh: Mesh) -> str:
    """The devices of a mesh, like "8 x TPU v5"."""
    flat = list(mesh.devices.flat)
    return f"{len(flat)} x {flat[0].device_kind}"


def _start(origin: Origin, mesh: Mesh, start: int) -> dict[str, Any]:
    return {
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "step": start,
        "command": command(),
        "elastic_lm": vars(sys.modules["elastic_lm"])["__version__"],
        "versions": versions(),
        "hardware": hardware(),
        "processes": jax.process_count(),
        "mesh": dict(mesh.shape),
        "config_files": list(origin.files),
        "git": commit(Path(origin.files[0]).parent) if origin.files else None,
    }


def command() -> str:
    """The command of this process, as it can be typed again."""
    program, *arguments = sys.argv
    ours = Path(program).parent.name == "elastic_lm"  # python -m elastic_lm
    return shlex.join(["elastic-lm" if ours else program, *arguments])


def commit(folder: Path) -> dict[str, Any] | None:
    """The commit that a folder is at, and whether its files differ from it; None outside git."""
    git = ["git", "-c", "core.fsmonitor=false", "-C", str(folder)]
    try:
        head, changes = (
            subprocess.run(
                [*git, *what], capture_output=True, text=True, timeout=GIT_SECONDS, check=True
            ).stdout
            for what in (("rev-parse", "HEAD"), ("status", "--porcelain", "--", "."))
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return {"commit": head.strip(), "changed": bool(changes.strip())}
