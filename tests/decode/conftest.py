"""One tiny model with three segments, shared by the decode tests: compilation is what they cost."""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from elastic_lm.config.model import ExitConfig, ModelConfig
from elastic_lm.decode.sampler import Sampler
from elastic_lm.depth.confidence import LOGIT_METRICS, confidence
from elastic_lm.models.decoder import Decoder, Params
from elastic_lm.models.registry import init_params
from elastic_lm.testing import tiny_config


@dataclasses.dataclass(frozen=True)
class Policy:
    """Plain thresholds."""

    thresholds: tuple[float, ...]
    metric: str = "max_prob"

    def check(self, config: ModelConfig) -> None:
        """Every policy fits."""


@dataclasses.dataclass(frozen=True)
class Model:
    """A model, and decoding it the slow and obvious way."""

    config: ModelConfig
    params: Params

    def sampler(
        self, thresholds: Sequence[float] | None = None, metric: str = "max_prob", **kwargs
    ) -> Sampler:
        policy = None if thresholds is None else Policy(tuple(thresholds), metric)
        return Sampler(Decoder(self.config), self.params, exit=policy, **kwargs)

    @functools.cached_property
    def forward(self):
        return jax.jit(lambda tokens: Decoder(self.config).apply({"params": self.params}, tokens))

    @functools.cached_property
    def newest(self):
        """Confidence under every metric [metrics, exits] and arg max [exits + 1] at one position."""

        def look(tokens, index):
            output = self.forward(tokens)
            exits = jnp.stack([x[0, index] for x in output.exit_logits])
            best = jnp.argmax(jnp.concatenate([exits, output.logits[0, index][None]]), axis=-1)
            return jnp.stack([confidence(metric, exits) for metric in LOGIT_METRICS]), best

        return jax.jit(look)

    def reference(
        self, prompt: Sequence[int], count: int, thresholds: Sequence[float], metric: str = "max_prob"
    ) -> tuple[list[int], list[int]]:
        """Tokens and depths by a full pass over everything for each token, exits read in order of depth."""
        tokens, depths = list(prompt), []
        layers = [*(e.layer for e in self.config.exits), self.config.n_layers]
        for _ in range(count):
            # Padding counts as text, which LongRoPE rotates otherwise from some length on.
            padded = np.zeros((1, self.config.recomputed_from or 64), np.int32)
            padded[0, : len(tokens)] = tokens
            sure, best = jax.device_get(self.newest(padded, len(tokens) - 1))
            taken = [
                c >= t and t <= 1 for c, t in zip(sure[LOGIT_METRICS.index(metric)], thresholds, strict=True)
            ]
            exit = [*taken, True].index(True)
            tokens.append(int(best[exit]))
            depths.append(layers[exit])
        return tokens[len(prompt) :], depths


def sharpen(params: Params) -> Params:
    """Larger weights, so that confidences spread over (0, 1) instead of sitting at 1 / V."""
    return jax.tree.map(lambda x: 6.0 * x if x.ndim > 1 else x, params)


@pytest.fixture(scope="session")
def model() -> Model:
    exits = (ExitConfig(1, "block"), ExitConfig(2, "mlp", tied=True))
    config = dataclasses.replace(tiny_config(n_layers=3), exits=exits)
    return Model(config, sharpen(init_params(config, jax.random.key(0))))


@pytest.fixture(scope="session")
def prompts() -> list[list[int]]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 64, size).tolist() for size in (1, 5, 9, 17, 3, 24, 2, 12)]


@pytest.fixture(scope="session")
def mixed(model: Model, prompts: list[list[int]]) -> list[tuple[float, float]]:
    """Threshold pairs at which every depth is used: quantiles of the confidences along the prompts."""
    seen = []
    for prompt in prompts:
        tokens, _ = model.reference(prompt, 8, (2.0, 2.0))
        output = model.forward(jnp.asarray([prompt + tokens]))
        seen.append(np.stack([confidence("max_prob", x[0]) for x in output.exit_logits], -1))
    cuts = np.quantile(np.concatenate(seen), [0.3, 0.5, 0.75], axis=0)
    return [tuple(map(float, row)) for row in cuts]


@pytest.fixture(scope="session")
def make_model() -> type[Model]:
    return Model
