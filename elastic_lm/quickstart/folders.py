"""What a quickstart writes anew every time: folders of its own, and files beside them."""

from pathlib import Path

from elastic_lm.checkpoints.native import QUICKSTART_MARK as MARK
from elastic_lm.files.atomic import real_place, remove_folder, remove_leftovers, replace_folder

MODEL = "model"  # with tuned exits
PREVIEW = "preview_"  # then the target in percent
TUNING = "tuning"  # made before any file is written, so where it is ours the files are
FILES = ("thresholds.json", "report.json", "curve.png", "text.html")


def check_files(out: Path) -> None:
    """Refuses a folder with files of ours by name that no quickstart wrote.

    Raises:
      ValueError: they may not be overwritten; names the folder and the files.
    """
    found = [name for name in FILES if (out / name).exists()]
    if found and not (out / TUNING / MARK).exists():
        raise ValueError(
            f"{out} was not written by an earlier quickstart (it has no {TUNING}/{MARK}) and its "
            f"{', '.join(found)} would be overwritten: move what is there away, or choose another --out"
        )


def begin(out: Path, source: Path | None) -> None:
    """Marks a folder as a quickstart's, and removes what an earlier one left that this one may not write.

    Args:
      out: folder of the results.
      source: folder of the model that is read; None = there is none.

    Raises:
      ValueError: a folder may not be replaced; see `check_replaceable`.
    """
    for name in (TUNING, MODEL, *FILES):
        remove_leftovers(real_place(out / name))
    for name in (TUNING, MODEL):
        check_replaceable(out / name, source)
    for file in (*(out / name for name in FILES), *out.glob(f"{PREVIEW}*.safetensors")):
        file.unlink(missing_ok=True)
    if (out / MODEL).exists():
        remove_folder(out / MODEL)
    # The last, because its mark says that the files are ours, should this run be killed meanwhile.
    renew(out / TUNING, source)


def check_replaceable(folder: Path, source: Path | None) -> None:
    """Refuses a folder that a quickstart did not write, or that holds the model it starts from.

    Args:
      folder: what is to be replaced; it need not exist.
      source: folder of the model that is read; None = there is none.

    Raises:
      ValueError: it may not be replaced; names it.
    """
    if source is not None and source.resolve().is_relative_to(folder.resolve()):
        raise ValueError(
            f"{folder} is replaced by this run, but the model is read from it: choose another --out"
        )
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    if not (folder / MARK).exists():
        raise ValueError(
            f"{folder} was not written by an earlier quickstart (it has no {MARK}) and is not replaced: move "
            "it away, or choose another --out"
        )


def renew(folder: Path, source: Path | None) -> None:
    """Makes an empty folder of our own.

    Args:
      folder: what is replaced or made.
      source: folder of the model that is read; None = there is none.

    Raises:
      ValueError: it may not be replaced; see `check_replaceable`.
    """
    check_replaceable(folder, source)
    if folder.exists():
        remove_folder(folder)  # at once, or what is left of it by a kill would not look like ours any more
    folder.mkdir(parents=True)
    (folder / MARK).touch()


def move(folder: Path, target: Path, source: Path | None) -> None:
    """Moves a folder of ours to where an earlier one may be.

    Args:
      folder: becomes `target`.
      target: what is replaced; it need not exist.
      source: folder of the model that is read; None = there is none.

    Raises:
      ValueError: it may not be replaced; see `check_replaceable`.
    """
    check_replaceable(target, source)
    (folder / MARK).touch()
    replace_folder(folder, real_place(target))
