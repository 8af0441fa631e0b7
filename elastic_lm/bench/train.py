"""Training steps of elastic methods against a plain fine-tuning step (SFT) of the same model.

Every row of time has `measured` = seconds of one optimizer step, `ideal` = seconds of an SFT step, timed in
turns with it, and `ratio` = the median over rounds of measured / ideal: here smaller is better. The row of
memory has bytes instead, of the compiled steps: temporaries + arguments + results - reused arguments.

- train/ee_tuning_vs_sft: two `mlp` exits after a quarter and a half of the layers. Aim: at most 0.5.
- train/self_supervised_vs_sft: the same exits trained on the full model's distribution (kl), whose frozen
  layers all run.
- train/self_supervised_cached_vs_sft: the same from cached taps, without the frozen layers.
- train/elastic_vs_sft: the whole model and two random sub-networks, one of which is the smallest half of the
  time; every layer draws its share of the neurons (a quarter to all) and of the heads (half or all). Steps
  differ in what they draw, so the first 8 steps of a seed are run over and over and timed together; the row's
  note says what they drew.
- train/soft8_vs_sft: sorted fine-tuning of 8 nested sub-models. Aim: at most 1.15.
- train/soft8_memory_vs_sft: the same, bytes. Aim: at most 1.3.

The model is an 8-layer Llama (d 256, MLP 688, sequences of 256, float32, AdamW). Eight sub-models read the
vocabulary head eight times, so what they cost hangs on its size. Sorted LLaMA reports 0.98 of SFT's time and
1.27 of its memory for 13 billion parameters, where the head has 1.3 % of them; a vocabulary of 320 gives
this small model the same share. With the vocabulary of a large model on a small one, the heads would be
most of the work and SoFT several times as slow as SFT.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from elastic_lm.bench.report import Measurement, Options
from elastic_lm.bench.timing import interleave
from elastic_lm.config.model import ExitConfig, ModelConfig
from elastic_lm.config.subnet import Menu
from elastic_lm.data.batch import Batch
from elastic_lm.depth.ee_tuning import EETuning
from elastic_lm.depth.self_supervised import SelfSupervisedExits, cache_taps
from elastic_lm.depth.sorted_finetuning import SortedFineTuning
from elastic_lm.models.decoder import Params
from elastic_lm.models.exits import without_exits
from elastic_lm.models.registry import init_params
from elastic_lm.models.sharding import make_mesh, param_shardings, stacked_shardings
from elastic_lm.train.config import TrainConfig
from elastic_lm.train.method import Method
from elastic_lm.train.optim import make_optimizer
from elastic_lm.train.pretraining import Pretraining
from elastic_lm.train.state import create_state, state_shardings
from elastic_lm.train.step import make_train_step, place_batch
from elastic_lm.width.elastic_training import ElasticTraining
from elastic_lm.width.switched import MenuIndices

SUB_MODELS = 8
ELASTIC_STEPS = 8  # whose draws are timed together
MENU = Menu(mlp=(0.25, 0.5, 0.75, 1.0), heads=(1.0,), groups=(0.5, 1.0))  # heads share no groups


def rows(options: Options) -> list[Measurement]:
    """Measures every row of this module.

    Args:
      options: size, rounds and seed.

    Returns:
      One row per line of the list above.

    Raises:
      ValueError: a model is named, which this benchmark does not take.
    """
    if options.model:
        raise ValueError(
            f"--model {options.model}: bench train measures a model of its own; leave --model out, or run "
            "bench decode"
        )
    config, shape = _model(options.tiny)
    layers = config.n_layers
    exits = config.with_exits((ExitConfig(layers // 4), ExitConfig(layers // 2)))
    batch = random_batch(config, shape, options.seed)
    distilled, params = SelfSupervisedExits(exits), random_params(exits, options.seed)
    cached = cache_taps(distilled, distilled.split(params)[1], [batch])[0]
    count = min(SUB_MODELS, layers)
    depths = tuple(layers * (i + 1) // count for i in range(count))
    elastic = Repeating(config, menu=MENU, samples=2, smallest_share=0.5, seed=options.seed)
    methods: dict[str, tuple[Method[Any], Any]] = {
        "sft": (Pretraining(config), batch),
        "ee_tuning": (EETuning(exits), batch),
        "self_supervised": (distilled, batch),
        "self_supervised_cached": (distilled, jax.device_put(cached)),
        "elastic": (elastic, batch),
        "soft8": (SortedFineTuning(config, depths=depths), batch),
    }
    _, plain = without_exits(exits, params)
    sides, memory = {}, {}
    for name, (method, data) in methods.items():
        weights = plain if name in ("sft", "elastic", "soft8") else params
        steps = ELASTIC_STEPS if name == "elastic" else 1
        sides[name], memory[name] = timed_step(method, jax.tree.map(jnp.copy, weights), data, steps)
    seconds = {name: np.asarray(s) for name, s in interleave(sides, options.rounds).items()}
    seconds["elastic"] /= ELASTIC_STEPS
    notes = {"elastic": _drawn(elastic)}
    found = [
        _time(name, seconds[name], seconds["sft"], notes.get(name, "")) for name in methods if name != "sft"
    ]
    return [*found, Measurement.of("train/soft8_memory_vs_sft", memory["soft8"], memory["sft"])]


class Repeating(ElasticTraining):
    """Elastic training that draws the sub-networks of its first `ELASTIC_STEPS` steps again and again."""

    def subnets(self, step: jax.Array | int) -> MenuIndices:
        """Subnets of a step, [S, L] each."""
        return super().subnets(step % ELASTIC_STEPS)


def _drawn(method: ElasticTraining) -> str:
    """What the timed steps draw."""
    drawn = jax.device_get(jax.vmap(method.subnets)(jnp.arange(ELASTIC_STEPS)))
    smallest = np.all((drawn.mlp == 0) & (drawn.groups == 0), axis=-1)
    mlp, heads = np.asarray(method.menu.mlp)[drawn.mlp], np.asarray(method.menu.groups)[drawn.groups]
    return (
        f"{smallest.size} sub-networks in {ELASTIC_STEPS} steps, {smallest.sum()} of them the smallest; with "
        f"{mlp.mean():.2f} of the neurons and {heads.mean():.2f} of the heads on average"
    )


def _model(tiny: bool) -> tuple[ModelConfig, tuple[int, int]]:
    """The model, and rows and length of a batch."""
    if tiny:
        small = ModelConfig(vocab_size=64, d_model=16, n_layers=4, n_heads=2, d_mlp=32, max_len=16)
        return small, (2, 16)
    return ModelConfig(vocab_size=320, d_model=256, n_layers=SUB_MODELS, n_heads=4, d_mlp=688, max_len=256), (
        4,
        256,
    )


def random_params(config: ModelConfig, seed: int) -> Params:
    """Stacked parameters on a mesh of all devices."""
    shardings = stacked_shardings(param_shardings(config, make_mesh()))
    return init_params(config, jax.random.key(seed), shardings=shardings, stacked=True)


def random_batch(config: ModelConfig, shape: tuple[int, int], seed: int) -> Batch:
    """Random tokens, one document per row."""
    tokens = np.random.default_rng(seed).integers(0, config.vocab_size, (shape[0], shape[1] + 1), np.int32)
    arrays = {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "weights": np.ones(shape, np.float32),
        "positions": np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape),
        "segments": np.ones(shape, np.int32),
    }
    return place_batch(arrays, make_mesh())


def timed_step(
    method: Method[Any], params: Params, batch: Any, steps: int = 1
) -> tuple[Callable[[], Any], float]:
    """(`steps` optimizer steps that go on from the last, bytes that one needs)."""
    optimizer = make_optimizer(TrainConfig())
    trainable, frozen = method.split(params)
    state = create_state(optimizer, trainable)
    step = make_train_step(method, optimizer, state_shardings(optimizer, trainable))
    compiled = jax.jit(step, donate_argnums=0).lower(state, frozen, batch).compile()
    used = compiled.memory_analysis()
    if used is None:
        raise RuntimeError(f"{jax.default_backend()} does not tell how much memory a program takes")
    size = used.temp_size_in_bytes + used.argument_size_in_bytes + used.output_size_in_bytes
    states = [state]

    def run() -> Any:
        metrics = None
        for _ in range(steps):
            states[0], metrics = compiled(states[0], frozen, batch)
        return states[0].params, metrics

    return run, float(size - used.alias_size_in_bytes)


def _time(name: str, seconds: np.ndarray, sft: np.ndarray, note: str) -> Measurement:
    """One row of time per step; ratios are formed within a round, then the median is taken."""
    ratio = float(np.median(seconds / sft))
    return Measurement(f"train/{name}_vs_sft", float(np.median(seconds)), float(np.median(sft)), ratio, note)
