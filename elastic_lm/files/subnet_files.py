"""subnets.json: the named sub-networks of a model, in its folder."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from elastic_lm.config.model import ModelConfig
from elastic_lm.config.parse import load_dataclass, to_dict
from elastic_lm.config.subnet_table import FORMAT, SubnetTable
from elastic_lm.files import checksums
from elastic_lm.files.atomic import write_text_whole
from elastic_lm.files.fingerprints import weights_fingerprint
from elastic_lm.files.hub import local_model
from elastic_lm.files.remote import fetched

SUBNETS_FILE = "subnets.json"
LIST = "elastic-lm subnets --model DIR --add NAME --subnet mlp=50% makes one"


def load_subnets(folder: str | Path, config: ModelConfig | None = None) -> SubnetTable:
    """Reads the named sub-networks of a model.

    Args:
      folder: of the model, or its name on the Hub.
      config: the model that they have to fit; None = they are not compared with one.

    Returns:
      The table. What was measured is about the weights that it names (`SubnetTable.of_weights`).

    Raises:
      FileNotFoundError: the model has no such table.
      ValueError: the file is damaged, or it is about another model.

    Example:
      ```python
      import tempfile

      import elastic_lm as el

      config = el.testing.tiny_config()
      table = el.width.default_subnets(config, el.Menu(heads=(1.0,)))
      with tempfile.TemporaryDirectory() as folder:
          el.width.save_subnets(folder, table)
          assert el.width.load_subnets(folder, config) == table
      ```
    """
    file = local_model(folder, weights=False) / SUBNETS_FILE
    table = read_subnets(file)
    checksums.check_files(file.parent, (SUBNETS_FILE,))
    if config is not None:
        try:
            table.check(config)
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from error
    return table


def read_subnets(file: str | Path) -> SubnetTable:
    """Reads a file of named sub-networks, wherever it lies.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is damaged.
    """
    return load_dataclass(SubnetTable, fetched(file), form=FORMAT, name="table of sub-networks", fix=LIST)


def has_subnets(folder: str | Path) -> bool:
    """Whether a model, in a folder or on the Hub, has a table of named sub-networks."""
    return (local_model(folder, weights=False) / SUBNETS_FILE).is_file()


def save_subnets(folder: str | Path, table: SubnetTable) -> None:
    """Writes the named sub-networks of a model into its folder; a crash never leaves half a file.

    Args:
      folder: of the model, on this machine.
      table: of its sub-networks.

    Example:
      ```python
      import tempfile

      import elastic_lm as el

      config = el.testing.tiny_config()
      table = el.width.default_subnets(config, el.Menu(mlp=(0.5, 1.0), heads=(1.0,)))
      small = el.width.named_subnet(config, el.Subnet.uniform(config, mlp=0.5, depth=0.5), "small")
      with tempfile.TemporaryDirectory() as folder:
          el.width.save_subnets(folder, table.adding([small]))
          assert list(el.width.load_subnets(folder)) == ["w50", "whole", "small"]
      ```
    """
    # A model whose checksums name another version of a file is not loaded: between the two there is none.
    checksums.forget_checksums(Path(folder), (SUBNETS_FILE,))
    write_text_whole(Path(folder) / SUBNETS_FILE, subnets_text(table))
    checksums.update_checksums(Path(folder), (SUBNETS_FILE,))


def subnets_text(table: SubnetTable) -> str:
    """The contents of the file: a line for the model, and one for each sub-network."""
    content = to_dict(table)
    entries = ",\n".join(f"    {json.dumps(one)}" for one in content.pop("subnets"))
    described = {"format": FORMAT, **content}
    head = ",\n".join(f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in described.items())
    return f'{{\n{head},\n  "subnets": [\n{entries}\n  ]\n}}\n'


def carried_subnets(source: str | Path | None, config: Any, params: Mapping[str, Any]) -> SubnetTable | None:
    """The named sub-networks of the folder that a model comes from.

    Args:
      source: the folder; None = there is none.
      config: the model that is written.
      params: its parameters; what was measured of other weights is left out.

    Returns:
      The table; None where the folder has none, or where what is written is another model than the one in it,
      such as one of the sub-networks.

    Raises:
      ValueError: the table is damaged.
    """
    if source is None or not isinstance(config, ModelConfig) or not has_subnets(source):
        return None
    table = load_subnets(source)
    return table.of_weights(subnet_weights(config, params)) if table.fits(config) else None


def subnet_weights(config: ModelConfig, params: Mapping[str, Any]) -> str:
    """A fingerprint of the weights that sub-networks are cut from: all but those of exits.

    Args:
      config: the model.
      params: its canonical parameters. Where they are spread over several processes, all must call this.

    Returns:
      16 hexadecimal digits.
    """
    exits = {one.name for one in config.exits}
    return weights_fingerprint({name: tree for name, tree in params.items() if name not in exits})
