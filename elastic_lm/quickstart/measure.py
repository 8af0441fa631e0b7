"""Speed and agreement of several exit policies against full depth, measured side by side."""

import dataclasses
import functools
import statistics
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from elastic_lm.bench.timing import interleave
from elastic_lm.config import ModelConfig
from elastic_lm.decode.sampler import Sample, Sampler
from elastic_lm.models.decoder import Decoder, Params


@dataclasses.dataclass(frozen=True)
class Generation:
    """What one sampler did with all prompts.

    Attributes:
      samples: one continuation per prompt.
      tokens_per_s: generated tokens per second, prefill included; median over rounds.
      mean_layers: mean depth of the generated tokens.
    """

    samples: list[Sample]
    tokens_per_s: float
    mean_layers: float


def generate(
    samplers: Mapping[str, Sampler], prompts: Sequence[list[int]], new_tokens: int, rounds: int
) -> dict[str, Generation]:
    """Greedy continuations at batch 1; samplers take turns, so they share the machine's moods.

    Args:
      samplers: name -> sampler.
      prompts: token ids.
      new_tokens: tokens per prompt; end tokens do not stop a row.
      rounds: timed rounds.

    Returns:
      {name: Generation}.
    """
    results: dict[str, list[Sample]] = {}

    def run(name: str) -> None:
        sampler = samplers[name]
        results[name] = [sampler.sample(ids, new_tokens, ignore_eos=True) for ids in prompts]

    seconds = interleave({name: functools.partial(run, name) for name in samplers}, rounds)
    return {name: _summary(results[name], seconds[name]) for name in samplers}


def _summary(samples: list[Sample], seconds: list[float]) -> Generation:
    depths = [depth for sample in samples for depth in sample.exit_layers]
    return Generation(samples, len(depths) / statistics.median(seconds), statistics.mean(depths))


def agreement(
    config: ModelConfig, params: Params, prompts: Sequence[list[int]], samples: Sequence[Sample]
) -> float:
    """Share of generated tokens that the full model would have chosen after the same tokens.

    Args:
      config: the model; exits are not used.
      params: its canonical parameters.
      prompts: token ids, all equally long.
      samples: greedy continuations, all equally long.
    """
    rows = np.asarray([[*p, *s.tokens] for p, s in zip(prompts, samples, strict=True)], np.int32)
    start = len(prompts[0])
    best = full_choices(config.with_exits(()), params, jnp.asarray(rows))
    return float(np.mean(np.asarray(best)[:, start - 1 : -1] == rows[:, start:]))


@functools.partial(jax.jit, static_argnums=0)
def full_choices(config: ModelConfig, params: Params, tokens_BT: jax.Array) -> jax.Array:
    """The full model's likeliest next token after every position: [B, T] int32."""
    logits = Decoder(config).bind({"params": params})(tokens_BT).logits
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)
