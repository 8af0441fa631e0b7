"""Forecasts of configurations: the decode loop's rules over text of the model's own, in measured times.

The text is the model's own at full depth. What an exit, a preview and the text itself would have said at
every token is known then (`Evidence`), `decode.schedule` counts the iterations, and `bench.parts` has timed
what they are made of:

    speed-up = F T / sum over iterations of (shallow + look + deep + head)

for T tokens per row, each of which takes F at full depth.
"""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from elastic_lm.bench.parts import Parts, Shape
from elastic_lm.config.model import ModelConfig
from elastic_lm.data.batch import Batch
from elastic_lm.data.text_parts import whole_rows
from elastic_lm.decode.sampler import Sampler
from elastic_lm.decode.schedule import KnownText, Schedule, foresee
from elastic_lm.depth.observations import observe
from elastic_lm.depth.previewing import vocab_head
from elastic_lm.models.decoder import Decoder, Params
from elastic_lm.nn.preview import HeadPreview, preview_logits
from elastic_lm.nn.vocab_head import Head

Continued = tuple[list[int], list[int]]  # a prompt and its continuation, token ids


@dataclasses.dataclass(frozen=True)
class Configuration:
    """One way to decode, and what it is forecast to give.

    Attributes:
      name: "exits", "preview", "exits + preview", "lossless lookup", "lossless exits" or
        "lossless lookup + exits".
      target: agreement of the exit's thresholds, or of the preview; None = neither takes part.
      speedup: forecast, relative to full depth.
      layer: of the exit; None = it has none.
      share: of the tokens of the model's own text, how many leave there, or are drafted and accepted.
      accepted: drafted tokens accepted per verification; 0 where nothing is verified.
    """

    name: str
    target: float | None
    speedup: float
    layer: int | None = None
    share: float = 0.0
    accepted: float = 0.0

    @property
    def lossless(self) -> bool:
        """Whether the text is the full model's."""
        return self.name.startswith("lossless")

    def __str__(self) -> str:
        target = "" if self.target is None or self.lossless else f" at {100 * self.target:g} %"
        layer = "" if self.layer is None else f" after layer {self.layer}"
        return f"{self.name}{layer}{target}: {self.speedup:.2f}x"


@dataclasses.dataclass(frozen=True)
class Evidence:
    """What exits and previews say about every token of the model's own text; P prompts, T new tokens.

    Attributes:
      confidence: [P, T, E] float32.
      agrees: [P, T, E] bool.
      sure: by target, [P, T, E + 1] bool: the preview's, at every exit and at full depth.
    """

    confidence: np.ndarray
    agrees: np.ndarray
    sure: dict[float, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Forecaster:
    """Forecasts configurations on texts that the model has written at full depth.

    Attributes:
      config: the model without exits.
      parts: measured times.
      shape: rows that are decoded together, and the window.
      texts: continued prompts, then those that repeat themselves: (prompt, new tokens) each.
      evidence: of the first of these.
      thresholds: by layer and target.
    """

    config: ModelConfig
    parts: Parts
    shape: Shape
    texts: Sequence[Sequence[Continued]]
    evidence: Evidence
    thresholds: dict[tuple[int, float], float]

    def preview(self, target: float) -> Configuration:
        """A preview in place of the vocabulary head."""
        return self._configuration("preview", target, self._foresee(), preview=target)

    def exits(self, layer: int, target: float, preview: bool = False) -> Configuration:
        """An exit, and a preview of its head and the model's."""
        name = "exits + preview" if preview else "exits"
        leaves, _ = self._says(layer, target, preview)
        schedule = self._foresee(layer, target, preview=preview)
        found = self._configuration(name, target, schedule, layer=layer, preview=target if preview else None)
        return dataclasses.replace(found, share=float(leaves.mean()))

    def lookup(self, repeats: bool = False) -> Configuration:
        """Prompt lookup, on texts that repeat themselves or on the others."""
        name = "lossless lookup of a repeated text" if repeats else "lossless lookup"
        return self._configuration(name, None, self._foresee(lookup=True, lossless=True, repeats=repeats))

    def drafts(self, layer: int, target: float, lookup: bool = False) -> Configuration:
        """An exit that drafts, alone or after lookup."""
        name = "lossless lookup + exits" if lookup else "lossless exits"
        schedule = self._foresee(layer, target, lookup=lookup, lossless=True)
        return self._configuration(name, target, schedule, layer=layer)

    def _says(self, layer: int, target: float, preview: bool = False) -> tuple[np.ndarray, np.ndarray]:
        """Where the exit is confident, and where it agrees; [P, T] bool each."""
        column = sorted({at for at, _ in self.thresholds}).index(layer)
        leaves = self.evidence.confidence[:, :, column] >= self.thresholds[layer, target]
        if preview:
            leaves = leaves & self.evidence.sure[target][:, :, column]
        return leaves, self.evidence.agrees[:, :, column]

    def _foresee(
        self,
        layer: int | None = None,
        target: float | None = None,
        *,
        preview: bool = False,
        lookup: bool = False,
        lossless: bool = False,
        repeats: bool = False,
    ) -> Schedule:
        """The schedule of all texts, batch after batch."""
        texts = [KnownText(prompt, new) for prompt, new in self.texts[1 if repeats else 0]]
        used = layer is not None and target is not None
        if layer is not None and target is not None:
            says = zip(*self._says(layer, target, preview), strict=True)
            texts = [
                dataclasses.replace(text, leaves=leaves, agrees=agrees)
                for text, (leaves, agrees) in zip(texts, says, strict=True)
            ]
        b = self.shape.batch
        foreseen = [
            foresee(
                texts[i : i + b],
                window=self.shape.window,
                exits=used,
                lossless=lossless,
                lookup=self.parts.ticks if lookup else None,
                config=self.config,
            )
            for i in range(0, len(texts), b)
        ]
        return functools.reduce(lambda one, other: one + other, foreseen)

    def _configuration(
        self,
        name: str,
        target: float | None,
        schedule: Schedule,
        *,
        layer: int | None = None,
        preview: float | None = None,
    ) -> Configuration:
        unsure = 0.0
        if preview is not None:
            # A batch reads the whole head as soon as one of its rows is not sure.
            unsure = 1 - float(self.evidence.sure[preview][:, :, -1].mean()) ** self.shape.batch
        seconds = self.parts.seconds(
            schedule,
            layer=layer,
            lookup="lookup" in name,
            lossless=name.startswith("lossless"),
            preview=None if preview is None else str(preview),
            unsure=unsure,
        )
        return Configuration(
            name,
            target,
            speedup=self.parts.full * schedule.tokens / self.shape.batch / seconds,
            layer=layer,
            share=schedule.accepted / schedule.tokens,
            accepted=schedule.accepted / max(schedule.verifications, 1),
        )


def one_exit(config: ModelConfig, params: Params, layer: int) -> tuple[ModelConfig, Params]:
    """A model with one of its exits alone."""
    others = {e.name for e in config.exits if e.layer != layer}
    kept = tuple(e for e in config.exits if e.layer == layer)
    return config.with_exits(kept), {name: tree for name, tree in params.items() if name not in others}


def continued(full: Sampler, prompts: Sequence[list[int]], new_tokens: int, batch: int) -> list[Continued]:
    """Prompts with the model's own greedy text, `batch` of them at a time."""
    texts = []
    for i in range(0, len(prompts), batch):
        some = list(prompts[i : i + batch])
        texts += [sample.tokens for sample in full.sample(some, new_tokens, ignore_eos=True)]
    return list(zip(prompts, texts, strict=True))


def gather_evidence(
    config: ModelConfig,
    params: Params,
    texts: Sequence[Continued],
    shape: tuple[int, ...],
    previews: dict[float, HeadPreview],
) -> Evidence:
    """What exits and previews say about texts; `shape` is that of batches for which programs exist."""
    whole = np.asarray([[*prompt, *new] for prompt, new in texts], np.int32)
    first = len(texts[0][0]) - 1
    batches = [whole_rows(whole[i : i + shape[0]], first) for i in range(0, len(whole), shape[0])]

    # All batches are padded to the shape of the first, for which a program exists if they fit.
    empty = jax.tree.map(lambda x: np.zeros(shape, x.dtype), batches[0])
    fits = whole.shape[1] - 1 <= shape[1]
    seen = observe(config, params, [empty, *batches] if fits else batches)
    sure = {}
    if previews:
        inputs = np.concatenate([np.asarray(head_inputs(config, params, batch)) for batch in batches])
        head = vocab_head(config.with_exits(()), params)
        sure = {target: _sure(preview, inputs[:, first:], head) for target, preview in previews.items()}
    shape_PTE = (len(whole), whole.shape[1] - 1 - first, len(config.exits))
    return Evidence(seen.confidence.reshape(shape_PTE), seen.agrees.reshape(shape_PTE), sure)


@functools.partial(jax.jit, static_argnames="config")
def head_inputs(config: ModelConfig, params: Params, batch: Batch) -> jax.Array:
    """[B, T, E + 1, D] inputs of the vocabulary heads of all exits and of the model. Static: the config."""
    decoder = Decoder(config).bind({"params": params})
    depths = [*(e.layer for e in config.exits), config.n_layers]
    taps = decoder.taps(batch.tokens, depths, batch.positions, batch.segments)
    at_exits = [
        decoder.exit_features(i, taps[e.layer], batch.positions, batch.segments)
        for i, e in enumerate(config.exits)
    ]
    return jnp.stack([*at_exits, decoder.final_features(taps[config.n_layers].hidden)], axis=2)


def _sure(preview: HeadPreview, features_PTED: np.ndarray, head: Head) -> np.ndarray:
    """[P, T, E] bool: where a preview can be relied on."""
    rows = [np.asarray(_gaps(preview, row, head)) for row in features_PTED]
    return np.stack(rows) >= float(preview.margin)


@jax.jit
def _gaps(preview: HeadPreview, features: jax.Array, head: Head) -> jax.Array:
    """[T, E] float32; everything is traced."""
    return preview_logits(preview, features, head).gap
