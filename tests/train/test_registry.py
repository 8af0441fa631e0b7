"""Methods from outside the package, and recipes that return the dataclasses themselves."""

from pathlib import Path

import pytest

from elastic_lm.checkpoints.native import load_model
from elastic_lm.cli.main import main
from elastic_lm.train import registry
from elastic_lm.train.config import RunConfig
from elastic_lm.train.recipes import load_config

RECIPE = '''
import dataclasses

import jax.numpy as jnp

import elastic_lm as el


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeadOnlyConfig(el.train.MethodConfig):
    name: str = "head_only"
    factor: float = 1.0


@el.train.register
@dataclasses.dataclass(frozen=True)
class HeadOnly(HeadOnlyConfig, el.train.Method):
    """Trains the final norm and nothing else."""

    section = HeadOnlyConfig
    config: el.ModelConfig
    loss_chunk: int = 256

    def split(self, params):
        frozen = {name: tree for name, tree in params.items() if name != "final_norm"}
        return {"final_norm": params["final_norm"]}, frozen

    def loss(self, trainable, frozen, batch, step):
        output = el.Decoder(self.config).apply({"params": {**frozen, **trainable}}, batch.tokens)
        loss = self.factor * jnp.mean(output.logits**2)
        return loss, {"loss": loss}


def get_config(arg=""):
    return el.RunConfig(
        data=el.DataConfig(source="text", paths=(TEXT,), seq_len=16, batch_size=8),
        method=HeadOnlyConfig(factor=2.0),
        train=el.TrainConfig(init_from=MODEL, steps=3, warmup=1, eval_every=0),
    )
'''


@pytest.fixture(autouse=True)
def forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_REGISTERED", {})


def test_a_method_from_outside_trains_by_the_command(
    run_config: RunConfig, text_file: Path, tmp_path: Path
) -> None:
    from training_runs import changed

    from elastic_lm.train.run import fit

    _, before, _ = fit(changed(run_config, steps=3, eval_every=0), tmp_path / "base")
    model = str(tmp_path / "base" / "model")
    file = tmp_path / "recipe.py"
    file.write_text(f"TEXT, MODEL = {str(text_file)!r}, {model!r}\n" + RECIPE)
    command = ["train", "--config", str(file), "--workdir", str(tmp_path / "run")]
    assert main([*command, "--config.method.factor=3.0"]) == 0
    _, after = load_model(tmp_path / "run" / "model")
    assert (after["embed"]["table"] == before["embed"]["table"]).all()
    assert not (after["final_norm"]["scale"] == before["final_norm"]["scale"]).all()
    assert load_config(str(file)).method.factor == 2.0


def test_names_of_the_package_are_taken() -> None:
    with pytest.raises(ValueError, match="name='joint': a method of the package has this name"):
        registry.register(registry.method_class("joint"))
    with pytest.raises(ValueError, match=r"method\.name='other': must be one of pretraining"):
        registry.method_class("other")


def test_every_method_of_the_package_is_found() -> None:
    for name in registry.METHODS:
        assert registry.method_class(name).section.name == name
