"""The decode benchmark, on a model that only shows that it runs."""

import importlib.util

import jax
import numpy as np
import pytest

from elastic_lm.bench import decode, early
from elastic_lm.bench.report import Options
from elastic_lm.checkpoints.embedded import embedded_model
from elastic_lm.checkpoints.native import save_model
from elastic_lm.config.model import ExitConfig, ModelConfig
from elastic_lm.data.tokenizer import Tokenizer
from elastic_lm.models.registry import init_params

NAMES = {
    "full_vs_bandwidth",
    "exits_never",
    "exit_half",
    "compilations",
    "gated_exits_never",
    "gate_vs_head",
    "lossless_embedded",
    "batch8_per_row_vs_full",
    "batch8_per_row_vs_wait_for_all",
}
if all(importlib.util.find_spec(name) for name in ("torch", "transformers")):
    NAMES.add("full_vs_transformers")


@pytest.mark.long
def test_rows_and_compilations():
    rows = {row.name: row for row in decode.rows(Options(tiny=True, rounds=1))}
    assert set(rows) == {f"decode/{name}" for name in NAMES}
    assert rows["decode/compilations"].ratio == 1.0
    assert all(np.isfinite((row.measured, row.ideal)).all() for row in rows.values())
    differences = {"decode/gate_vs_head"}  # of timings: of either sign on a model this small
    assert all(row.ideal > 0 for name, row in rows.items() if name not in differences)


def test_an_own_model_is_checked_before_anything_is_timed(tmp_path, monkeypatch):
    monkeypatch.setattr(decode, "interleave", lambda *_: pytest.fail("timed"))
    with pytest.raises(FileNotFoundError, match="nowhere"):
        decode.rows(Options(tiny=True, model=str(tmp_path / "nowhere")))
    config = ModelConfig(vocab_size=1024, d_model=8, n_layers=1, n_heads=2, d_mlp=8, max_len=32)
    for exits, message in (((), "has no exits"), ((ExitConfig(1, "norm"),), "max_len=32 is below the 1")):
        model = config.with_exits(exits)
        tokenizer = Tokenizer.load(embedded_model())
        save_model(tmp_path / message[:5], model, init_params(model, jax.random.key(0)), tokenizer)
        with pytest.raises(ValueError, match=message):
            decode.rows(Options(tiny=True, model=str(tmp_path / message[:5])))


def test_a_lost_token_is_named(monkeypatch):
    config = ModelConfig(
        vocab_size=16, d_model=8, n_layers=2, n_heads=2, d_mlp=8, exits=(ExitConfig(1, "norm"),)
    )
    texts = iter([[[1, 2], [3, 4]], [[1, 2], [3, 5]]])
    monkeypatch.setattr(early, "_each", lambda *_: next(texts))
    with pytest.raises(ValueError, match="new token 1 of prompt 1 is 5 when drafted, but 4 at full depth"):
        early._lossless(
            "decode/x", config, init_params(config, jax.random.key(0)), [[1], [2]], tokens=2, rounds=1
        )
