"""Pushing a model to the Hub, with a model card."""

import dataclasses
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from elastic_lm.config.checks import require
from elastic_lm.files import checksums
from elastic_lm.files.fingerprints import weights_fingerprint
from elastic_lm.files.hub import CONFIG, LOGIN, NAME, NATIVE, one_line_errors, progress_bars
from elastic_lm.files.local import local_path
from elastic_lm.hf.loading import load
from elastic_lm.hf.model_card import MARK, CardFacts, collect_facts, exit_layers, write_card
from elastic_lm.hf.pushed_files import THRESHOLDS, calibrated_on, misfit, pushed_files

CARD = "README.md"
RUN_MODEL = "model"  # the folder of the checkpoint in a run
# Files of an earlier push, which would be read with the new ones.
OURS = re.compile(
    r"model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json|params/.*"
    r"|(elastic_exits|routers)\.safetensors|(elastic_config|config|checksums|menu|routers|thresholds)\.json"
    r"|(source_config|generation_config|tokenizer|tokenizer_config|special_tokens_map|added_tokens)\.json"
    r"|chat_template\.(jinja|json)|additional_chat_templates/[^/]+\.jinja"
)


def push(
    folder: str | Path,
    name: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    token: str | None = None,
    run: str | Path | None = None,
    thresholds: str | Path | None = None,
    base_model: str | None = None,
    license: str | None = None,
    dry_run: bool = False,
) -> str:
    """Uploads a model to the Hugging Face Hub in one commit, with a model card.

    The card says what the model was made from, how and on which data, which exits and widths it has, what
    was measured, and how to load it, as far as the files tell. A README.md in the folder is uploaded in its
    place, and one on the Hub that somebody else wrote stays. All files of the folder that are not hidden go;
    paths in them lose their folders. Files of an earlier push leave a branch whose card is ours.

    Args:
      folder: a Hugging Face folder, which `export` writes, or a checkpoint of this package.
      name: ORG/NAME on the Hub; made where it does not exist.
      private: whether a new model is private; None = as the organisation has set it.
      revision: branch, made where it does not exist; None = the main branch.
      token: of a user who may write there; None = HF_TOKEN, or that of `hf auth login`.
      run: folder of the run that trained it, with run.json; None = the one around a folder called "model".
      thresholds: file of `elastic-lm calibrate`; None = thresholds.json in `folder`, in `run` or beside
        `folder`, which is left out with a warning where it was fitted on another model.
      base_model: that the model was made from; None = that of the run.
      license: identifier such as "apache-2.0"; None = that of a base model on the Hub, if it states one.
      dry_run: nothing is sent.

    Returns:
      The address of the commit; for a dry run the text of the card.

    Raises:
      FileNotFoundError: there is no model in `folder`.
      OSError: the Hub cannot be reached, or does not take it; says what to do.
      ValueError: `name` is no name on the Hub, a file is damaged, or `thresholds` are another model's.

    Example:
      ```python
      import tempfile

      import elastic_lm as el

      config = el.testing.tiny_config(exits=(2,))
      with tempfile.TemporaryDirectory() as folder:
          el.hf.export(config, el.testing.random_params(config), f"{folder}/model")
          card = el.hf.push(f"{folder}/model", "my-org/my-model", license="apache-2.0", dry_run=True)
      assert 'el.load("my-org/my-model")' in card
      ```
    """
    given: dict[str, Any] = {
        "private": private,
        "revision": revision,
        "token": token,
        "run": run,
        "thresholds": thresholds,
    }
    given |= {"base_model": base_model, "license": license, "dry_run": dry_run}
    return push_from(local_path(folder), local_path(folder), name, **given)


def push_from(
    folder: Path,
    named_folder: Path,
    name: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    token: str | None = None,
    run: str | Path | None = None,
    thresholds: str | Path | None = None,
    base_model: str | None = None,
    license: str | None = None,
    dry_run: bool = False,
    weights: Callable[[], str] | None = None,
) -> str:
    """Uploads a folder in place of the one that a user named; see `push`.

    Args:
      folder: is uploaded.
      named_folder: in and beside which README.md, thresholds and the run lie.
      name: see `push`, as the others.
      private: see `push`.
      revision: see `push`.
      token: see `push`.
      run: see `push`.
      thresholds: see `push`.
      base_model: see `push`.
      license: see `push`.
      dry_run: see `push`.
      weights: gives the fingerprint of the weights; None = they are read from `folder`, if it is of
        Hugging Face's form.
    """
    named = NAME.fullmatch(str(name))
    fix = "must be ORG/NAME, as the Hub names models"
    require(named is not None and not named["file"] and not named["revision"], "name", name, fix)
    if not (folder / CONFIG).is_file() and not (folder / NATIVE).is_file():
        fix = f"push sends a folder of this machine with {CONFIG} or {NATIVE} in it"
        raise FileNotFoundError(f"{named_folder}: holds no model to push; {fix}")
    checksums.check_files(folder)

    around = local_path(run) if run else _run_of(named_folder)
    places = (named_folder, around or named_folder.absolute().parent)
    lying = (place / THRESHOLDS for place in places)
    given = thresholds or next((path for path in lying if path.is_file()), None)
    file = local_path(given) if given else None
    how: dict[str, Any] = {"run": around, "base_model": base_model, "license": license}
    facts = collect_facts(folder, name, thresholds=file, **how)
    if file and (why := _misfit(facts, weights or (lambda: _weights(folder)))):
        fix = f"calibrate this model: elastic-lm calibrate --model {named_folder} --data TEXT"
        if thresholds:
            raise ValueError(f"{file}: are thresholds of another model: {why}; {fix}")
        warnings.warn(
            f"{file}: is left out, as its thresholds are another model's: {why}; {fix}", stacklevel=3
        )
        file, facts = None, dataclasses.replace(facts, thresholds={})

    files = pushed_files(folder, file)
    if CARD not in files and (named_folder / CARD).is_file():
        files[CARD] = named_folder / CARD
    if dry_run:
        own = files.get(CARD)
        return own.read_text() if isinstance(own, Path) else write_card(facts)
    with one_line_errors(name, name, revision, pushing=True), progress_bars():
        return _upload(files, facts, private=private, revision=revision, token=token)


def _run_of(folder: Path) -> Path | None:
    """The run that wrote a checkpoint: it names its folder so, and another's lies beside other models too."""
    return folder.absolute().parent if folder.name == RUN_MODEL else None


def _weights(folder: Path) -> str:
    """The fingerprint of a Hugging Face folder; "" for a checkpoint, which is read elsewhere."""
    return weights_fingerprint(load(folder)[1]) if (folder / CONFIG).is_file() else ""


def _misfit(facts: CardFacts, weights: Callable[[], str]) -> str:
    """Why the thresholds are of another model; weights are only read where thresholds say on which."""
    layers, known = exit_layers(facts), bool(calibrated_on(facts.thresholds).get("weights"))
    why = misfit(facts.thresholds, layers, facts.config, "")
    if why or not known:
        return why
    found = weights()
    if not found:
        what = "the weights that its thresholds were fitted on are not compared; `elastic-lm push` does"
        warnings.warn(f"{facts.name}: {what}", stacklevel=4)
    return misfit(facts.thresholds, layers, facts.config, found)


def _upload(
    files: dict[str, Path | bytes],
    facts: CardFacts,
    *,
    private: bool | None,
    revision: str | None,
    token: str | None,
) -> str:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    api = HfApi(token=token, library_name="elastic_lm")
    api.create_repo(facts.name, private=private, exist_ok=True)
    if revision:
        api.create_branch(facts.name, branch=revision, exist_ok=True)
    there = api.list_repo_files(facts.name, revision=revision)

    added: list[Any] = [
        CommitOperationAdd(name, content if isinstance(content, bytes) else str(content))
        for name, content in files.items()
    ]
    ours = _card_is_ours(api, facts.name, revision, there)
    if CARD not in files and (ours or CARD not in there):
        card = write_card(_with_license(api, facts))
        added.append(CommitOperationAdd(CARD, card.encode()))
    elif CARD not in files:
        what = "its README.md on the Hub was not written by elastic_lm, and stays, with all other files"
        warnings.warn(f"{facts.name}: {what}", stacklevel=5)
    stale = [name for name in there if name not in files and OURS.fullmatch(name)] if ours else []
    if stale:
        warnings.warn(f"{facts.name}: of an earlier push leave {', '.join(stale)}", stacklevel=5)
    changes = [*added, *(CommitOperationDelete(name) for name in stale)]
    done = api.create_commit(facts.name, changes, commit_message="Upload by elastic_lm", revision=revision)
    return LOGIN.sub("://", done.commit_url)


def _card_is_ours(api: Any, name: str, revision: str | None, there: list[str]) -> bool:
    """Whether the model has a card on the Hub that an earlier push wrote."""
    if CARD not in there:
        return False
    return MARK in Path(api.hf_hub_download(name, CARD, revision=revision)).read_text(errors="replace")


def _with_license(api: Any, facts: CardFacts) -> CardFacts:
    """The facts with the license of a base model on the Hub, where none is given."""
    if facts.license or not NAME.fullmatch(facts.base_model):
        return facts
    try:
        stated = api.model_info(facts.base_model).card_data.license
    except Exception:  # the card says that it is not known
        return facts
    return dataclasses.replace(facts, license=stated) if isinstance(stated, str) else facts
