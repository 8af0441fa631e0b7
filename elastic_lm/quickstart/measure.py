"""Speed and agreement of several exit policies against full depth, measured side by side."""

import dataclasses
import functools
import statistics
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from elastic_lm.bench.timing import interleave
from elastic_lm.config.model import ModelConfig
from elastic_lm.decode.results import Sample
from elastic_lm.decode.sampler import Sampler
from elastic_lm.models.decoder import Decoder, Params


@dataclasses.dataclass(frozen=True)
class Generation:
    """What one sampler did with all prompts.

    Attributes:
      samples: one continuation per prompt.
      seconds: of each round, all prompts together, prefill included.
    """

    samples: list[Sample]
    seconds: list[float]

    @property
    def depths(self) -> list[int]:
        """Depth of every generated token."""
        return [depth for sample in self.samples for depth in sample.exit_layers]

    @property
    def mean_layers(self) -> float:
        """Mean depth of the generated tokens."""
        return statistics.mean(self.depths)

    @property
    def tokens_per_s(self) -> float:
        """Generated tokens per second; median over rounds."""
        return len(self.depths) / statistics.median(self.seconds)

    def speedup(self, full: "Generation") -> float:
        """How much faster than `full` this was, which took turns with it; median over rounds of the ratio."""
        return statistics.median(a / b for a, b in zip(full.seconds, self.seconds, strict=True))


def generate(
    samplers: Mapping[str, Sampler], prompts: Sequence[list[int]], new_tokens: int, rounds: int
) -> dict[str, Generation]:
    """Greedy continuations at batch 1; samplers take turns at every prompt.

    Args:
      samplers: name -> sampler.
      prompts: token ids.
      new_tokens: tokens per prompt; end tokens do not stop a row.
      rounds: timed rounds.

    Returns:
      {name: Generation}.
    """
    results: dict[str, dict[int, Sample]] = {name: {} for name in samplers}

    def run(name: str, i: int) -> None:
        results[name][i] = samplers[name].sample(prompts[i], new_tokens, ignore_eos=True)

    seconds = [
        interleave({name: functools.partial(run, name, i) for name in samplers}, rounds)
        for i in range(len(prompts))
    ]
    rows = {name: [sum(s[name][r] for s in seconds) for r in range(rounds)] for name in samplers}
    return {name: Generation(list(results[name].values()), rows[name]) for name in samplers}


def agreement(
    config: ModelConfig, params: Params, prompts: Sequence[list[int]], samples: Sequence[Sample]
) -> float:
    """Share of generated tokens that the full model would have chosen after the same tokens.

    Args:
      config: the model; exits are not used.
      params: its canonical parameters.
      prompts: token ids, all equally long.
      samples: greedy continuations, all equally long.

    Returns:
      The share, in [0, 1], over all tokens of all samples.
    """
    rows = np.asarray([[*p, *s.tokens] for p, s in zip(prompts, samples, strict=True)], np.int32)
    start = len(prompts[0])
    best = full_choices(config.with_exits(()), params, jnp.asarray(rows))
    return float(np.mean(np.asarray(best)[:, start - 1 : -1] == rows[:, start:]))


@functools.partial(jax.jit, static_argnums=0)
def full_choices(config: ModelConfig, params: Params, tokens_BT: jax.Array) -> jax.Array:
    """The full model's likeliest next token after every position.

    Args:
      config: the model without exits; static.
      params: its canonical parameters; those of exits are not read.
      tokens_BT: int32 token ids.

    Returns:
      [B, T] int32.
    """
    logits = Decoder(config).bind({"params": params})(tokens_BT).logits
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)
