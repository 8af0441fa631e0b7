"""What a user names as a model becomes a place on this machine: a path, or a model of the Hugging Face Hub.

Downloads are those of `huggingface_hub`, so that its cache, its tokens and its environment variables
(HF_HOME, HF_TOKEN, HF_HUB_OFFLINE, HF_ENDPOINT) count as its users know them.
"""

import contextlib
import errno
import functools
import json
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from elastic_lm.config.cascade import without_secrets
from elastic_lm.config.checks import require
from elastic_lm.files.atomic import moved_away
from elastic_lm.files.local import local_path
from elastic_lm.files.remote import is_remote

# ORG/NAME, with the path of a .gguf file in it, and with @REVISION. DIR/FILE.gguf is a file of this machine.
NAME = re.compile(
    r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)"
    r"(?:/(?P<file>(?:(?!\.\.?/)[\w.-]+/)*[\w.-]+\.gguf)|(?<!(?i:\.gguf)))"
    r"(?:@(?P<revision>[^@\s]+))?"
)
LOGIN = re.compile(r"://[^/\s]*@")  # user and password of an address
CONFIG, NATIVE, INDEX = "config.json", "elastic_config.json", "model.safetensors.index.json"
WEIGHTS, EXITS = "model.safetensors", "elastic_exits.safetensors"
NATIVE_WEIGHTS = ("params/*",)
# What says how a model is built and how it reads text: small files, which a tokenizer and a config need.
DESCRIBING = (
    *(CONFIG, NATIVE, INDEX, "generation_config.json", "source_config.json", "checksums.json", "menu.json"),
    *("subnets.json", "routers.json", "routers.safetensors", "tokenizer.json", "tokenizer_config.json"),
    *("special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "chat_template.json"),
    "additional_chat_templates/*.jinja",
)
OR_NAME = "A model of the Hub is named ORG/NAME"
LOG_IN = "log in with `hf auth login`, or set HF_TOKEN"


def local_model(name: Any, *, revision: str | None = None, weights: bool = True) -> Path:
    """The place on this machine of a model that a user names.

    Whatever exists here under the name is meant. Of a remote one, like gs://bucket/model, a copy is; arrays
    that are read where they lie are not copied. Any other name of the form ORG/NAME, ORG/NAME@REVISION or
    ORG/NAME/FILE.gguf is a model of the Hub, of which only the files that are needed are downloaded. A
    process keeps to the commit that it saw first.

    Args:
      name: a path, local or remote, or a name on the Hub.
      revision: branch, tag or commit on the Hub; None = the one after the @ of the name, or the main branch.
      weights: fetch these too, not only what describes the model and its tokenizer.

    Returns:
      The path; where the name is none of the Hub, there may be nothing there.

    Raises:
      FileNotFoundError: the Hub has no such model, revision or file, or it is not in the cache.
      PermissionError: the Hub does not let this user have it.
      OSError: the Hub cannot be reached, or fails.
      ValueError: `name` is no path, or a revision is given for a path or given twice.
    """
    if is_remote(name):
        from elastic_lm.files.remote_models import remote_model

        require(revision is None, "revision", revision, f"{name} is no model of the Hub, and has none")
        return remote_model(name, weights)
    path = local_path(name)
    found = NAME.fullmatch(str(name))
    # A file that is missing in a folder of this machine is not looked for in a model of the same name.
    if found is None or path.exists() or (found["file"] and Path(found["repo"]).is_dir()):
        require(revision is None, "revision", revision, f"{name} is a path on this machine, which has none")
        return path
    wanted = found["revision"]
    require(None in (revision, wanted), "revision", revision, f"{name} names another; give one of them")

    revision = revision or wanted
    if found["file"]:
        return _one_file(str(name), found["repo"], revision, found["file"])
    folder = _described(str(name), found["repo"], revision)
    if weights and folder not in _complete:
        _fetch_weights(str(name), found["repo"], folder)
        _complete.add(folder)
    return folder


def is_on_hub(name: str) -> bool:
    """Whether `local_model` would look for a name on the Hub."""
    return NAME.fullmatch(name) is not None and not is_remote(name) and not Path(name).exists()


_complete: set[Path] = set()  # folders of the cache whose weights this process has found there


@functools.cache
def _described(name: str, repo: str, revision: str | None) -> Path:
    """The folder in the cache with what describes a model."""
    folder = _download(name, repo, revision, DESCRIBING, quiet=True)
    if not (folder / CONFIG).is_file() and not (folder / NATIVE).is_file():
        raise FileNotFoundError(f"{name}: has no {CONFIG} on the Hub{_instead(repo, folder.name)}")
    return folder


@functools.cache
def _one_file(name: str, repo: str, revision: str | None, file: str) -> Path:
    folder = _download(name, repo, revision, [file])
    if not (folder / file).is_file():
        raise FileNotFoundError(f"{name}: there is no {file}{_instead(repo, folder.name)}")
    return folder / file


def _fetch_weights(name: str, repo: str, folder: Path) -> None:
    """Downloads the weights of a model into its folder, unless they are there."""
    if (folder / NATIVE).is_file():
        _download(name, repo, folder.name, NATIVE_WEIGHTS)
        return
    shards = shard_names(folder / INDEX) if (folder / INDEX).is_file() else {WEIGHTS}
    exits = {EXITS} if '"elastic"' in (folder / CONFIG).read_text(errors="replace") else set()
    due = sorted(file for file in shards | exits if not (folder / file).is_file())
    if due:
        _download(name, repo, folder.name, due)
    missing = [file for file in sorted(shards) if not (folder / file).is_file()]
    if missing:
        raise FileNotFoundError(f"{name}: there is no {missing[0]}{_instead(repo, folder.name)}")


def shard_names(index: Path) -> set[str]:
    """The files that an index of weights names, as far as they are text; the loader complains of others."""
    try:
        values = json.loads(index.read_text())["weight_map"].values()
    except (ValueError, LookupError, TypeError, AttributeError):
        return {WEIGHTS}
    return {value for value in values if isinstance(value, str)}


def _instead(repo: str, commit: str) -> str:
    """What a model on the Hub has in place of files that are missing, with what to do."""
    from huggingface_hub import HfApi

    try:
        files = HfApi().list_repo_files(repo, revision=commit)
    except Exception:  # offline, say: the message goes without
        return "; with HF_HUB_OFFLINE only what was downloaded before is read"
    ggufs = [file for file in files if file.endswith(".gguf")]
    if ggufs:
        return f"; name one of its files as {repo}/{ggufs[0]}"
    pickled = [file for file in files if file.endswith((".bin", ".pt", ".pth"))]
    if pickled:
        fix = "convert it with transformers: AutoModelForCausalLM.from_pretrained(...).save_pretrained(DIR)"
        return f" (found: {', '.join(pickled[:3])}). Pickled weights are never read; {fix}"
    return f" (found: {', '.join(files[:6]) or 'nothing'}); name another model or revision"


def _download(name: str, repo: str, revision: str | None, files: Sequence[str], quiet: bool = False) -> Path:
    """The folder in the cache with the files of a model, as far as the Hub has them."""
    from huggingface_hub import snapshot_download

    with one_line_errors(name, repo, revision), progress_bars(not quiet), _without_warnings():
        return Path(snapshot_download(repo, revision=revision, allow_patterns=list(files)))


@contextlib.contextmanager
def progress_bars(wanted: bool = True) -> Iterator[None]:
    """Progress bars of `huggingface_hub` where somebody sees them, unless the environment decides.

    Args:
      wanted: the files are large enough.
    """
    from huggingface_hub import constants, utils

    seen = wanted and (sys.stderr.isatty() or "ipykernel" in sys.modules)
    if seen or constants.HF_HUB_DISABLE_PROGRESS_BARS is not None or utils.are_progress_bars_disabled():
        yield
        return
    utils.disable_progress_bars()
    try:
        yield
    finally:
        utils.enable_progress_bars()


@contextlib.contextmanager
def _without_warnings() -> Iterator[None]:
    """No log line of `huggingface_hub` about files that a model need not have."""
    from huggingface_hub.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


@contextlib.contextmanager
def one_line_errors(
    name: str, repo: str, revision: str | None = None, *, pushing: bool = False
) -> Iterator[None]:
    """Gives what goes wrong with the Hub one line that names the model and says what to do.

    Args:
      name: the model as it was typed.
      repo: its name on the Hub.
      revision: that was asked for; None = the main branch.
      pushing: the model is sent, not fetched.

    Raises:
      OSError: see `local_model`; of the disk's errors nothing is changed.
      ValueError: the Hub does not take the name.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, OSError) and error.errno in errno.errorcode and _status(error) is None:
            raise  # the disk is full, say
        told = _pushing(error, name) if pushing else None
        raise told or _explained(error, name, repo, revision) from error


def _pushing(error: Exception, name: str) -> Exception | None:
    """The same error in one line, where it says something else for a model that is sent."""
    from huggingface_hub import errors

    hub, status = endpoint(), _status(error) or _status(error.__cause__)
    if status in (401, 403, 404) and not isinstance(error, errors.RevisionNotFoundError):
        fix = f"check the name, and {LOG_IN} of a user who may write there"
        return PermissionError(f"{name}: {hub} refuses it ({status}: {_first_line(error)}); {fix}")
    if status is not None or isinstance(error, ValueError | errors.RevisionNotFoundError):
        return None
    if isinstance(error, errors.OfflineModeIsEnabled):
        return ConnectionError(f"{name}: HF_HUB_OFFLINE is set: unset it to push")
    what = f"{type(error).__name__}: {_first_line(error)}"
    return ConnectionError(f"{name}: {hub} cannot be reached ({what}); check the network and HF_ENDPOINT")


def _explained(error: BaseException, name: str, repo: str, revision: str | None) -> Exception:
    """The same error in one line."""
    from huggingface_hub import constants, errors

    hub, status = endpoint(), _status(error) or _status(error.__cause__)
    if isinstance(error, errors.LocalEntryNotFoundError) and _status(error.__cause__) is not None:
        return _explained(error.__cause__ or error, name, repo, revision)
    if isinstance(error, errors.GatedRepoError):
        return PermissionError(f"{name}: is gated: ask for access at {hub}/{repo}, then {LOG_IN}")
    if isinstance(error, errors.RevisionNotFoundError):
        fix = f"name a branch, a tag or a commit of {hub}/{repo}"
        return FileNotFoundError(f"{name}: has no revision {revision or 'main'!r} on the Hub; {fix}")
    if isinstance(error, errors.RepositoryNotFoundError):
        lost = moved_away(name)
        fix = f"correct the name; for a model that is private, {LOG_IN}{lost}"
        return FileNotFoundError(f"{name}: no such folder here, and no such model on {hub} ({status}); {fix}")
    if status is not None:
        return _refusal(status, error, name, hub)
    if isinstance(error, errors.HFValidationError):
        return ValueError(f"{name}: is no folder here and no name on the Hub ({_first_line(error)})")

    cache = f"the cache of the Hub, {constants.HF_HUB_CACHE}"
    if constants.HF_HUB_OFFLINE and isinstance(error, FileNotFoundError | errors.OfflineModeIsEnabled):
        what = f"no such folder here, and not all of it in {cache}"
        fix = f"HF_HUB_OFFLINE is set: unset it to download{moved_away(name)}"
        return FileNotFoundError(f"{name}: {what}; {fix}")
    cause = error.__cause__ or error
    what = f"no such folder here, not all of it in {cache}, and {hub} cannot be reached"
    fix = f"check the name and the network{moved_away(name)}"
    return ConnectionError(f"{name}: {what} ({type(cause).__name__}: {_first_line(cause)}); {fix}")


def _refusal(status: int, error: BaseException, name: str, hub: str) -> OSError:
    """An answer of the Hub that says no more than its number."""
    if status in (401, 403):
        return PermissionError(f"{name}: {hub} refuses access ({status}: {_first_line(error)}); {LOG_IN}")
    if status == 429:
        return OSError(f"{name}: {hub} answers 429, too many requests; wait a while, or {LOG_IN}")
    if status >= 500:
        fix = "try again later; HF_HUB_OFFLINE=1 reads what was downloaded before"
        return OSError(f"{name}: {hub} fails with {status}; {fix}")
    return OSError(f"{name}: {hub} answers {status} ({_first_line(error)}); check the name and HF_ENDPOINT")


def _status(error: BaseException | None) -> int | None:
    """The status of the answer that an error of `huggingface_hub` is about."""
    return getattr(getattr(error, "response", None), "status_code", None)


def endpoint() -> str:
    """The address of the Hub, without the user and the password that HF_ENDPOINT may hold."""
    from huggingface_hub import constants

    return without_secrets(constants.ENDPOINT)


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in LOGIN.sub("://", str(error)).splitlines() if line.strip()]
    return " ".join(lines)[:200] if lines else type(error).__name__
