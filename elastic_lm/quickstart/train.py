"""The two training runs of a quickstart: the exits, and with --from-scratch the model before them."""

import dataclasses
from pathlib import Path

import jax

from elastic_lm.config.data import DataConfig
from elastic_lm.config.model import ExitConfig, ModelConfig
from elastic_lm.depth.ee_tuning import EETuningConfig
from elastic_lm.depth.fitting import FIT_TOKENS
from elastic_lm.depth.self_supervised import SelfSupervisedConfig
from elastic_lm.models.decoder import Decoder, Params
from elastic_lm.quickstart import folders
from elastic_lm.quickstart.options import Options
from elastic_lm.train.config import RunConfig, TrainConfig
from elastic_lm.train.run import MODEL_FOLDER, fit

# How fitted exits are tuned: many small steps on new text (one setting of experiments/real_model, no search).
HIDDEN = 1024  # width of the MLP beside a fitted map
CANDIDATES = 4096  # columns of the vocabulary that a step reads
EPOCHS = 1  # passes over what the frozen layers have computed, as far as memory goes
CACHE_BYTES = 2 * 2**30  # of what they have computed, at most; the steps beyond read it again


def tune_exits(
    options: Options, source: Path, base: ModelConfig, data: DataConfig, fit_tokens: int = FIT_TOKENS
) -> tuple[Decoder, Params, Path]:
    """Attaches exits to the model in `source` and tunes them; the model itself does not change.

    Args:
      options: exits, steps, learning rate, seed.
      source: Hugging Face folder or elastic checkpoint.
      base: the model there.
      data: text to tune on.
      fit_tokens: of it, that a closed form is fitted on.

    Returns:
      (model with exits, its parameters, the folder of the elastic checkpoint).
    """
    fitted = bool(options.hf_dir) and options.kind is None
    steps = options.steps
    if fitted:
        # A closed form, and beside it an MLP that starts at zero: both learn the model's own distribution.
        exits = tuple(
            ExitConfig(layer, "linear", tied=True, init="fit", hidden=HIDDEN)
            for layer in exit_layers(options, base.n_layers)
        )
        # As many tokens as asked for, in steps of one row per device.
        rows = jax.device_count()
        steps = max(2, options.steps * options.batch_size // rows)
        data = dataclasses.replace(data, batch_size=rows)
        room = CACHE_BYTES // (4 * base.d_model * (1 + len(exits)) * rows * data.seq_len)
        cached = max(2, min(steps // EPOCHS, room))
        method = SelfSupervisedConfig(cached_batches=cached, candidates=CANDIDATES, fit_tokens=fit_tokens)
    else:
        kind = options.kind or "norm"
        exits = tuple(ExitConfig(layer, kind, options.tied) for layer in exit_layers(options, base.n_layers))
        method = EETuningConfig()
    train = TrainConfig(
        init_from=str(source),
        steps=steps,
        lr=options.lr,
        warmup=min(10, steps - 1),
        weight_decay=0.0,
        seed=options.seed,
        log_every=max(1, steps // 6),
        eval_every=0,
        eval_batches=4,
        save_every=steps,
    )
    folder = Path(options.out) / folders.TUNING
    config, params = _fit(RunConfig(exits=exits, data=data, method=method, train=train), folder)
    return Decoder(config), params, folder / MODEL_FOLDER


def check_exits(options: Options, model: ModelConfig) -> None:
    """Refuses exits that the model cannot get.

    Args:
      options: `exits` are those asked for.
      model: what is loaded.

    Raises:
      ValueError: a layer is not below the last one, or has an exit already.
    """
    layers = exit_layers(options, model.n_layers)
    there = tuple(e.layer for e in model.exits)
    if set(layers) & set(there):
        source = options.hf_dir
        raise ValueError(
            f"{source} has exits after layers {there} and cannot get new ones after layers {layers}: remove "
            f"them with `elastic-lm export --from {source} --to DIR --without-exits` and give --hf-dir DIR, "
            f"calibrate them as they are with `elastic-lm calibrate --model {source}`, or choose other "
            "layers with --exits"
        )


def exit_layers(options: Options, n_layers: int) -> tuple[int, ...]:
    """Layers with an exit: those asked for, or one after three quarters of the depth.

    Args:
      options: `exits` are those asked for.
      n_layers: layers of the model.

    Returns:
      The layers, in the order that they were asked for.

    Raises:
      ValueError: a layer is not below the last one.
    """
    layers = options.exits or (max(1, 3 * n_layers // 4),)
    wrong = [layer for layer in layers if not 1 <= layer < n_layers]
    if wrong or not layers:
        raise ValueError(
            f"--exits {layers}: the model has {n_layers} layers, exits lie between 1 and {n_layers - 1}"
        )
    return layers


def pretrain(options: Options, data: DataConfig) -> Path:
    """Trains a small model and its tokenizer from nothing.

    Args:
      options: steps, seed, and whether it is tiny.
      data: text to train on.

    Returns:
      The folder of its elastic checkpoint.
    """
    train = TrainConfig(
        steps=options.pretrain_steps,
        lr=3e-3,
        warmup=min(50, options.pretrain_steps - 1),
        log_every=max(1, options.pretrain_steps // 10),
        eval_every=0,
        eval_batches=4,
        save_every=options.pretrain_steps,
        seed=options.seed,
    )
    folder = Path(options.out) / "pretraining"
    _fit(RunConfig(model=small_model(options.tiny), data=data, train=train), folder)
    return folder / MODEL_FOLDER


def small_model(tiny: bool) -> ModelConfig:
    """The architecture that is pretrained: thinner than the embedded model, or with `tiny` four layers."""
    if tiny:
        return ModelConfig(
            vocab_size=512, d_model=32, n_layers=4, n_heads=4, d_mlp=96, max_len=256, tied=True
        )
    return ModelConfig(
        vocab_size=1024, d_model=96, n_layers=12, n_heads=3, n_kv_heads=1, d_mlp=256, max_len=1024, tied=True
    )


def _fit(config: RunConfig, folder: Path) -> tuple[ModelConfig, Params]:
    """`train.fit` from the start, whatever an earlier quickstart left in `folder`."""
    source = Path(config.train.init_from) if config.train.init_from else None
    folders.renew(folder, source)
    model, params, _ = fit(config, folder)
    return model, params
