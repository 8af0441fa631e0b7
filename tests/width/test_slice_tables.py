"""Tables of MatFormer slices, in the form that Gemma 3n's is published in."""

from pathlib import Path

import pytest

from elastic_lm.config.subnet import Subnet
from elastic_lm.testing import tiny_config
from elastic_lm.width.slice_tables import read_slice_table

# The columns of configs.csv of google/gemma3n-slicing-configs on the Hub, and rows of its form.
COLUMNS = "name,# Layers,# Effective Params (B),MMLU PT accuracy,FFN Hidden Dims,Layers Skipped"
CONFIG = tiny_config(n_layers=5, d_mlp=64)


def table(folder: Path, *rows: str, columns: str = COLUMNS) -> Path:
    file = folder / "configs.csv"
    file.write_text("\n".join((columns, *rows)) + "\n")
    return file


def published(layers: int, skipped: tuple[int, ...], wide: int, narrow: int) -> str:
    """A row as Gemma 3n's: products with underscores, one for every layer that is kept."""
    dims = ", ".join(f"2_048 * {wide if i % 5 == 4 else narrow}" for i in range(layers - len(skipped)))
    left = f'"{list(skipped)}"' if skipped else ""
    return f'Config for E1.96B (layer-level),{layers - len(skipped)},1.96,53.40%,"[{dims}]",{left}'


def test_rows_become_sub_networks(tmp_path: Path) -> None:
    file = table(
        tmp_path,
        'Main model,5,3.98,62.30%,"[16 * 4, 16 * 4, 16 * 4, 16 * 4, 16 * 4]",',
        'Config for official E2B Model,4,1.91,50.90%,"[1_6 * 2, 32, 32, 16 * 2]",[3]',
        'Config for E2.5B (block-level),5,2.5,55.10%,"[32, 32, 64, 32, 48]",null',
    )
    whole, official, block = read_slice_table(file, CONFIG)
    assert [one.name for one in (whole, official, block)] == [
        "Main-model",
        "official-E2B-Model",
        "E2.5B-block-level",
    ]
    assert whole.subnet == Subnet.full(CONFIG)
    assert official.subnet == Subnet.uniform(CONFIG, mlp=0.5, layers=(0, 1, 2, 4))
    assert block.subnet.mlp == (32, 32, 64, 32, 48)
    assert block.origin == "configs.csv: Config for E2.5B (block-level), MMLU 55.10% there"
    assert block.loss is block.time is None


def test_gemmas_own_sizes_are_read_for_a_model_of_its_sizes(tmp_path: Path) -> None:
    large = tiny_config(n_layers=35, d_mlp=16384)
    skipped = (20, 21, 22, 23, 24)
    file = table(tmp_path, published(35, skipped, 8, 4))
    (found,) = read_slice_table(file, large)
    assert found.name == "E1.96B-layer-level"
    assert found.subnet.layers == tuple(i for i in range(35) if i not in skipped)
    assert found.subnet.mlp[:5] == (8192, 8192, 8192, 8192, 16384)

    said = r"row 1 \(Config for E1.96B \(layer-level\)\): layers=35: the model has 5; the published table is"
    with pytest.raises(ValueError, match=f"{said} Gemma 3n E4B's, 35 layers .* does not load"):
        read_slice_table(file, CONFIG)
    with pytest.raises(ValueError, match=r"FFN Hidden Dims\[0\]=8192: layer 0 of the model has 64"):
        read_slice_table(file, tiny_config(n_layers=35, d_mlp=64))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('a,5,1,1%,"[64, 64, 64, 64, sixty]",', r"FFN Hidden Dims='sixty': must be a whole number or a prod"),
        ('a,5,1,1%,"[64, 64, 64, 64, 0]",', r"FFN Hidden Dims\[4\]=0: layer 4 of the model has 64"),
        ('a,4,1,1%,"[64, 64, 64, 64]",[7]', "layers=5: the model has 5"),
        ('a,3,1,1%,"[64, 64, 64]","[1, 1]"', "layers=5: the model has 5"),
        ('a,5,1,1%,"[64] * 5",', r"FFN Hidden Dims='64\] \* 5'"),
    ],
)
def test_rows_that_are_none_are_named(tmp_path: Path, row: str, message: str) -> None:
    with pytest.raises(ValueError, match=rf"row 1 \(a\).*{message}"):
        read_slice_table(table(tmp_path, row), CONFIG)


def test_tables_that_are_none_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no Layers Skipped"):
        read_slice_table(table(tmp_path, "a,1", columns="name,FFN Hidden Dims"), CONFIG)
    with pytest.raises(ValueError, match="needs one for each sub-network"):
        read_slice_table(table(tmp_path), CONFIG)
    row = 'a,5,1,1%,"[64, 64, 64, 64, 64]",'
    with pytest.raises(ValueError, match=r"row 2 \(a\): name='a': stands twice"):
        read_slice_table(table(tmp_path, row, row), CONFIG)
    with pytest.raises(FileNotFoundError, match="no such table"):
        read_slice_table(tmp_path / "none.csv", CONFIG)
