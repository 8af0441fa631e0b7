"""The small pretrained model that comes with the package."""

from pathlib import Path

FOLDER = Path(__file__).parent.parent / "assets" / "embedded"


def embedded_model() -> Path:
    """Folder of the embedded model: a Hugging Face folder with its model card.

    Raises:
      FileNotFoundError: the package was installed without it.

    Example:
      ```python
      import elastic_lm as el

      model, params = el.load(el.embedded_model())
      assert model.config.family == "llama"
      ```
    """
    if not (FOLDER / "config.json").is_file():
        raise FileNotFoundError(
            f"no embedded model at {FOLDER}: name a model, or use quickstart --from-scratch"
        )
    return FOLDER
