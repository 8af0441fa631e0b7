"""Models that the disk has no room for: the target is named, and nothing of it stays."""

import sys
from pathlib import Path

import chex
import pytest

import elastic_lm as el
from elastic_lm import hf
from elastic_lm.checkpoints import native
from elastic_lm.data.tokenizer import Tokenizer, train_bpe
from elastic_lm.models.decoder import Params

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="there are no limits")
if sys.platform != "win32":
    from limits import files_of_at_most

CONFIG = el.testing.tiny_config(vocab_size=300, d_model=64)


def save_model(path: Path, params: Params, tokenizer: Tokenizer) -> None:
    native.save_model(path, CONFIG, params, tokenizer, overwrite=True)


def export(path: Path, params: Params, tokenizer: Tokenizer) -> None:
    hf.export(CONFIG, params, path, tokenizer, overwrite=True)


@pytest.mark.parametrize("save", [save_model, export])
@pytest.mark.parametrize("size", [20, 3000, 50_000])
def test_what_does_not_fit_leaves_the_old_model(
    tmp_path: Path, save, size: int, capfd: pytest.CaptureFixture[str]
) -> None:
    old, new = (el.testing.random_params(CONFIG, seed=seed) for seed in (0, 1))
    tokenizer = train_bpe(["some text of a few words"], 300)
    for target in (tmp_path / "new", tmp_path / "old"):
        if target.name == "old":
            save(target, old, tokenizer)
        with files_of_at_most(size), pytest.raises(OSError, match="File too large") as caught:
            save(target, new, tokenizer)
        assert str(caught.value.filename).startswith(str(target))
        assert "partial" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["old"]
    chex.assert_trees_all_equal(el.load(tmp_path / "old")[1], old)
    assert capfd.readouterr().err == ""
