"""Where the config files of runs are found: paths of users, and names of recipes of the package."""

import difflib
import re
from pathlib import Path

from elastic_lm.files.remote import fetched, is_remote

PACKAGE = Path(__file__).parents[1]
INSTALLED = PACKAGE / "recipes"  # in a wheel
CHECKOUT = PACKAGE.parent / "configs"  # of the repository, beside the package
KINDS = {".py": ("config file", "--config"), ".gin": ("gin file", "--gin_file")}
NAME = re.compile(r"[A-Za-z_]\w*")  # of a recipe: no path


def recipe_folder() -> Path:
    """The folder of the recipes that come with the package: in a checkout its own, which may be edited."""
    return INSTALLED if INSTALLED.is_dir() else CHECKOUT


def recipe_names() -> list[str]:
    """Names of the recipes that come with the package, as `--config` takes them."""
    return sorted(file.stem for file in recipe_folder().glob("*.py"))


def recipe_summaries() -> dict[str, str]:
    """What each recipe trains, by its name: the first line of its file."""
    folder = recipe_folder()
    files = {name: folder / f"{name}.py" for name in recipe_names()}
    return {name: file.open().readline().strip().strip('"') for name, file in files.items()}


def split_argument(text: str, suffix: str = ".py") -> tuple[str, str]:
    """A config file or recipe, and the argument behind its colon, as they are typed.

    Args:
      text: like "ee_tuning", "ee_tuning:6,12", "my/config.py:long" or "my/config".
      suffix: of config files.

    Returns:
      (name or path, argument or "").
    """
    before, _, argument = text.partition(":")
    remote = argument.startswith("//")
    if not remote and (NAME.fullmatch(before) or Path(before + suffix).is_file()):
        return before, argument
    before, colon, argument = text.partition(f"{suffix}:")
    return (before + suffix, argument) if colon else (text, "")


def find_recipe(name: str, suffix: str = ".py") -> Path:
    """The file of a config.

    Args:
      name: a path, which may be remote and may leave out the suffix, or the name of a recipe of the
        package. A file of that name in the working folder goes first.
      suffix: of config files.

    Raises:
      FileNotFoundError: there is neither; says which recipe was probably meant.
    """
    if is_remote(name):
        return fetched(name)
    file = Path(name)
    if file.suffix != suffix and Path(name + suffix).is_file():
        return Path(name + suffix)
    if file.is_file():
        return file
    own = recipe_folder() / (name + suffix)
    if NAME.fullmatch(name) and own.is_file():
        return own
    kind, flag = KINDS[suffix]
    raise FileNotFoundError(f"{kind} {file} does not exist; {_fix(file, flag)}")


def _fix(file: Path, flag: str) -> str:
    """What to give instead of a file that does not exist."""
    names = recipe_names()
    if file.stem in names:
        return f"the recipe of that name in the package is {flag} {file.stem}"
    near = difflib.get_close_matches(file.stem, names, n=1)
    if near:
        return f"did you mean {flag} {near[0]}, a recipe of the package?"
    return f"give a file of yours, or a recipe of the package: {', '.join(names)}"
