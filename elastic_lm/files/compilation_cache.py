"""Compiled programs that a later process reads from disk instead of compiling them again.

Most of a short command's time is compilation, and the same model asks for the same programs every time.
jax keeps them in a folder if it is told which; this module chooses the folder, keeps it small, and does
without one where it cannot be written.
"""

import contextlib
import errno
import hashlib
import os
import platform
import sys
from pathlib import Path
from typing import Any

from elastic_lm.files.local import local_path

VARIABLE = "ELASTIC_LM_CACHE"  # a folder, or "off"
OFF = ("off", "0", "no", "false")
JAX_VARIABLE = "JAX_COMPILATION_CACHE_DIR"  # jax's own, which goes first
# Programs that compile in less than a second, jax's own limit, take most of the time together.
SETTINGS: dict[str, float] = {"jax_persistent_cache_min_compile_time_secs": 0.0}
MOST = 2 * 2**30  # bytes; the oldest programs go first


def use_compilation_cache(folder: str | Path | None = None) -> Path | None:
    """Keeps compiled programs on disk, for this process and later ones; the commands do it by themselves.

    The variable ELASTIC_LM_CACHE names another folder than the default, or is "off". jax's own
    JAX_COMPILATION_CACHE_DIR, or a folder that its config names, stays in use unless `folder` is given. The
    folder may be removed at any time.

    Args:
      folder: where programs are kept, or "off"; None = as the variable says, or "elastic_lm" in the user's
        folder for caches.

    Returns:
      The folder that is in use; None where it is off, or the user's folder cannot be written.

    Raises:
      OSError: `folder` cannot be written.
      ValueError: `folder` is remote.

    Example:
      ```python
      import elastic_lm as el

      folder = el.use_compilation_cache()
      print("compiled programs are kept in", folder)
      ```
    """
    import jax  # late: the command line imports this module for its help
    from jax.experimental.compilation_cache import compilation_cache

    config: Any = jax.config
    if folder is None and config.jax_compilation_cache_dir:
        return Path(config.jax_compilation_cache_dir)
    programs = _default() if folder is None else _prepared(str(folder))
    compilation_cache.reset_cache()  # jax looks for a folder once, before it compiles first
    config.update("jax_compilation_cache_dir", str(programs) if programs else None)
    if programs:
        for name, value in SETTINGS.items():
            config.update(name, value)
    return programs


def set_environment() -> None:
    """`use_compilation_cache` for a process that has not imported jax yet, by jax's variables."""
    if JAX_VARIABLE in os.environ or "jax" in sys.modules:
        return
    programs = _default()
    if programs:
        os.environ[JAX_VARIABLE] = str(programs)
        for name, value in SETTINGS.items():
            os.environ.setdefault(name.upper(), str(value))


def _default() -> Path | None:
    """The folder that the variable or else the system names, made; None where it is off or cannot be used."""
    chosen = os.environ.get(VARIABLE, "")
    try:
        return _prepared(chosen or str(user_folder()))
    except (OSError, RuntimeError, ValueError) as error:  # no room, no permission, no home
        if chosen:
            print(f"{VARIABLE}={chosen}: compiled programs are not kept: {error}", file=sys.stderr)
        return None


def _prepared(folder: str) -> Path | None:
    """A folder for this machine's programs in another one, made and writable; None = off."""
    if folder.lower() in OFF:
        return None
    programs = local_path(folder).expanduser().absolute() / _machine()
    programs.mkdir(parents=True, exist_ok=True)
    if not os.access(programs, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(programs))
    _trim(programs)
    return programs


def user_folder() -> Path:
    """The folder of this package among the user's caches."""
    home = os.environ.get("XDG_CACHE_HOME")
    if not home:
        home = Path.home() / ("Library/Caches" if sys.platform == "darwin" else ".cache")
    return Path(home) / "elastic_lm"


def _machine() -> str:
    """A name for equal processors: a home folder may be shared, and programs use all that a processor can."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(errors="replace").splitlines() if info.is_file() else []
    known = sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))})
    words = [platform.machine(), platform.processor(), *known]
    return f"programs-{hashlib.sha256(chr(10).join(words).encode()).hexdigest()[:12]}"


def _trim(folder: Path) -> None:
    """Removes the oldest programs beyond `MOST` bytes; another process may do so at the same time."""
    with os.scandir(folder) as entries:
        files = [(entry.stat(follow_symlinks=False), entry.path) for entry in entries if entry.is_file()]
    size = sum(stat.st_size for stat, _ in files)
    for stat, path in sorted(files, key=lambda file: file[0].st_mtime):
        if size <= MOST:
            return
        with contextlib.suppress(OSError):
            os.unlink(path)
        size -= stat.st_size
