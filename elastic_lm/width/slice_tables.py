"""Tables of sub-networks that other projects publish, read as `Subnet`s.

Gemma 3n is a MatFormer (arXiv 2310.07707). Its table, configs.csv of google/gemma3n-slicing-configs on the
Hugging Face Hub, has a row for each sub-network, with the columns (as published, looked up on 2026-11-30)

    name                     such as "Config for E2.54B (layer-level)"
    # Layers                 that are kept
    # Effective Params (B)   of Gemma 3n
    MMLU PT accuracy         of Gemma 3n
    FFN Hidden Dims          a list with the MLP neurons of every kept layer; 16384 is written 2_048 * 8
    Layers Skipped           a list of layers, counted from 0; empty or null = none

Other tables of this form, such as those of mistral.rs, are read alike. A sub-network takes the first neurons
of every MLP, which are those that MatFormer trains nested. Heads, key/value groups and channels stay whole.
"""

import csv
import io
import re
from pathlib import Path

from elastic_lm.config.checks import require
from elastic_lm.config.model import ModelConfig
from elastic_lm.config.subnet import Subnet
from elastic_lm.config.subnet_table import NamedSubnet
from elastic_lm.cost.named_subnets import named_subnet
from elastic_lm.files.remote import fetched

NAME, NEURONS, SKIPPED = "name", "FFN Hidden Dims", "Layers Skipped"
ACCURACY = "MMLU PT accuracy"
NONE = ("", "null", "none", "nan", "[]")
PRODUCT = re.compile(r"\s*([0-9][0-9_]*)\s*(?:\*\s*([0-9][0-9_]*)\s*)?")
GEMMA = (
    "the published table is Gemma 3n E4B's, 35 layers of 16384 neurons, a family that this package does not "
    "load; tables of this form serve other models that were trained nested"
)


def read_slice_table(file: str | Path, config: ModelConfig) -> list[NamedSubnet]:
    """The sub-networks that a table of MatFormer slices describes.

    Args:
      file: CSV of the form above.
      config: the model that they are parts of.

    Returns:
      One named sub-network per row, in their order. Names hold letters, digits, dots and dashes: "Config for
      E2.54B (layer-level)" becomes `E2.54B-layer-level`.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: a column is missing, a row cannot be read, or it is no part of this model; names the row.

    Example:
      ```python
      import pathlib
      import tempfile

      import elastic_lm as el

      config = el.testing.tiny_config()  # 4 layers of 64 neurons
      rows = 'name,FFN Hidden Dims,Layers Skipped\\nConfig for small,"[32, 8 * 4, 64]",[2]\\n'
      with tempfile.TemporaryDirectory() as folder:
          file = pathlib.Path(folder) / "configs.csv"
          file.write_text(rows)
          (small,) = el.width.read_slice_table(file, config)
      assert (small.name, small.subnet.layers, small.subnet.mlp) == ("small", (0, 1, 3), (32, 32, 64))
      ```
    """
    path = Path(fetched(file))
    if not path.is_file():
        raise FileNotFoundError(f"{file}: no such table of sub-networks")
    reader = csv.DictReader(io.StringIO(path.read_text(encoding="utf-8-sig")))
    found = [name.strip() for name in reader.fieldnames or ()]
    missing = [name for name in (NAME, NEURONS, SKIPPED) if name not in found]
    require(not missing, f"{file}: columns", found, f"there is no {' and no '.join(missing)}")

    subnets, names = [], set()
    for number, row in enumerate(reader, 1):
        cells = {str(key).strip(): str(value or "").strip() for key, value in row.items()}
        where = f"{file} row {number} ({cells[NAME]})"
        one = _named(where, cells, config, Path(file).name)
        require(one.name not in names, f"{where}: name", one.name, "stands twice; rename one")
        names.add(one.name)
        subnets.append(one)
    require(bool(subnets), str(file), "no rows", "needs one for each sub-network")
    return subnets


def _named(where: str, cells: dict[str, str], config: ModelConfig, table: str) -> NamedSubnet:
    """The sub-network of a row."""
    skipped = _numbers(f"{where}: {SKIPPED}", cells[SKIPPED])
    neurons = _numbers(f"{where}: {NEURONS}", cells[NEURONS])
    total = len(neurons) + len(skipped)
    require(
        total == config.n_layers and len({*skipped} & {*range(total)}) == len(skipped),
        f"{where}: layers",
        total,
        f"the model has {config.n_layers}; {GEMMA}",
    )

    kept = [i for i in range(total) if i not in skipped]
    full = Subnet.uniform(config, layers=kept)
    for i, (asked, most) in enumerate(zip(neurons, full.mlp, strict=True)):
        fix = f"layer {kept[i]} of the model has {most}; {GEMMA}"
        require(1 <= asked <= most, f"{where}: {NEURONS}[{i}]", asked, fix)
    subnet = Subnet(full.layers, neurons, full.heads, full.groups, full.d_model)
    accuracy = f", MMLU {cells[ACCURACY]} there" if cells.get(ACCURACY) else ""
    try:
        return named_subnet(config, subnet, _short(cells[NAME]), f"{table}: {cells[NAME]}{accuracy}")
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def _numbers(where: str, text: str) -> tuple[int, ...]:
    """The whole numbers of a list, some of which are written as products."""
    if text.lower() in NONE:
        return ()
    inside = text.removeprefix("[").removesuffix("]").rstrip(", ")
    numbers = []
    for part in inside.split(","):
        match = PRODUCT.fullmatch(part)
        if match is None:
            raise ValueError(f"{where}={part.strip()!r}: must be a whole number or a product like 2_048 * 8")
        numbers.append(int(match[1]) * int(match[2] or 1))
    return tuple(numbers)


def _short(name: str) -> str:
    """A name of a table as a name for --subnet."""
    words = re.sub(r"[^A-Za-z0-9._]+", "-", name.removeprefix("Config for ")).strip("-._")
    return words[:64] or "unnamed"
