"""Pushing a model to the Hub, with a model card."""

import dataclasses
import fnmatch
import warnings
from pathlib import Path
from typing import Any

from elastic_lm.config.checks import require
from elastic_lm.files import checksums
from elastic_lm.files.hub import CONFIG, NAME, NATIVE, one_line_errors, progress_bars
from elastic_lm.files.local import local_path
from elastic_lm.hf.model_card import MARK, THRESHOLDS, CardFacts, collect_facts, find_thresholds, write_card

CARD = "README.md"
# Files of an earlier push, which would be read with the new ones.
OURS = (
    *("*.safetensors", "*.safetensors.index.json", "params/*", NATIVE, CONFIG, checksums.FILE),
    *("menu.json", "routers.json", "source_config.json", "generation_config.json", THRESHOLDS),
    *("tokenizer*.json", "special_tokens_map.json", "added_tokens.json", "*chat_template*"),
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
    place, and one on the Hub that somebody else wrote stays. Files of an earlier push leave the branch.

    Args:
      folder: a Hugging Face folder, which `export` writes, or a checkpoint of this package.
      name: ORG/NAME on the Hub; made where it does not exist.
      private: whether a new model is private; None = as the organisation has set it.
      revision: branch, made where it does not exist; None = the main branch.
      token: of a user who may write there; None = HF_TOKEN, or that of `hf auth login`.
      run: folder of the run that trained it, with run.json; None = the one around `folder`.
      thresholds: file of `elastic-lm calibrate`; None = thresholds.json in `folder` or `run`.
      base_model: that the model was made from; None = that of the run.
      license: identifier such as "apache-2.0"; None = that of a base model on the Hub, if it states one.
      dry_run: nothing is sent.

    Returns:
      The address of the commit; for a dry run the text of the card.

    Raises:
      FileNotFoundError: there is no model in `folder`.
      OSError: the Hub cannot be reached, or does not take it; says what to do.
      ValueError: `name` is no name on the Hub, or a file is damaged.

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
    folder = local_path(folder)
    named = NAME.fullmatch(str(name))
    fix = "must be ORG/NAME, as the Hub names models"
    require(named is not None and not named["file"] and not named["revision"], "name", name, fix)
    if not (folder / CONFIG).is_file() and not (folder / NATIVE).is_file():
        raise FileNotFoundError(f"{folder}: holds no model to push; expected {CONFIG} or {NATIVE} in it")
    checksums.check_files(folder)

    around = local_path(run) if run else folder.absolute().parent
    file = local_path(thresholds) if thresholds else find_thresholds(folder, around)
    how: dict[str, Any] = {"run": around, "thresholds": file, "base_model": base_model, "license": license}
    facts = collect_facts(folder, name, **how)
    files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("[!.]*"))}
    files = {name: path for name, path in files.items() if path.is_file() and "/." not in f"/{name}"}
    files |= {THRESHOLDS: file} if file else {}
    if dry_run:
        return files[CARD].read_text() if CARD in files else write_card(facts)
    with one_line_errors(name, name, revision, pushing=True), progress_bars():
        return _upload(files, facts, private=private, revision=revision, token=token)


def _upload(
    files: dict[str, Path], facts: CardFacts, *, private: bool | None, revision: str | None, token: str | None
) -> str:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    api = HfApi(token=token, library_name="elastic_lm")
    api.create_repo(facts.name, private=private, exist_ok=True)
    if revision:
        api.create_branch(facts.name, branch=revision, exist_ok=True)
    there = api.list_repo_files(facts.name, revision=revision)

    added: list[Any] = [CommitOperationAdd(name, str(path)) for name, path in files.items()]
    if CARD not in files and _may_replace_card(api, facts.name, revision, there):
        card = write_card(_with_license(api, facts))
        added.append(CommitOperationAdd(CARD, card.encode()))
    stale = [name for name in there if name not in files and any(fnmatch.fnmatch(name, one) for one in OURS)]
    changes = [*added, *(CommitOperationDelete(name) for name in stale)]
    return api.create_commit(
        facts.name, changes, commit_message="Upload by elastic_lm", revision=revision
    ).commit_url


def _may_replace_card(api: Any, name: str, revision: str | None, there: list[str]) -> bool:
    """Whether the model has no card on the Hub, or one of ours."""
    if CARD not in there:
        return True
    text = Path(api.hf_hub_download(name, CARD, revision=revision)).read_text(errors="replace")
    if MARK not in text:
        what = "its README.md on the Hub was not written by elastic_lm, and stays"
        warnings.warn(f"{name}: {what}", stacklevel=5)
        return False
    return True


def _with_license(api: Any, facts: CardFacts) -> CardFacts:
    """The facts with the license of a base model on the Hub, where none is given."""
    if facts.license or not NAME.fullmatch(facts.base_model):
        return facts
    try:
        stated = api.model_info(facts.base_model).card_data.license
    except Exception:  # the card says that it is not known
        return facts
    return dataclasses.replace(facts, license=stated) if isinstance(stated, str) else facts
