"""Segments: the runs of layers between the exits of a model, and what a tick of one of them computes."""

import dataclasses

import flax.struct
import jax

from elastic_lm.config.model import ModelConfig
from elastic_lm.decode.state import Controls, Mode, segments
from elastic_lm.models.decoder import Decoder, Params
from elastic_lm.nn.preview import HeadPreview
from elastic_lm.width.nested_decoder import decoder_of

PREVIEW = "preview"  # key of a `HeadPreview` beside the parameters


@dataclasses.dataclass(frozen=True)
class Segment:
    """One segment, with everything that stays the same while it decodes.

    Attributes:
      config: of the model; static.
      params: canonical parameters of the model.
      controls: traced.
      mode: of the loop; static.
      index: j, counted from the lowest segment; static.
    """

    config: ModelConfig
    params: Params
    controls: Controls
    mode: Mode
    index: int

    @property
    def start(self) -> int:
        """The first layer."""
        return segments(self.config)[self.index][0]

    @property
    def stop(self) -> int:
        """One past the last layer; as a number of layers, the depth at which this segment's exit lies."""
        return segments(self.config)[self.index][1]

    @property
    def is_last(self) -> bool:
        """Whether the model's own vocabulary head follows, instead of an exit."""
        return self.stop == self.config.n_layers

    @property
    def preview(self) -> HeadPreview | None:
        """The preview of the model's own vocabulary head; None where the whole head is read."""
        return self.params.get(PREVIEW)

    @property
    def decoder(self) -> Decoder:
        """The model, bound to its parameters."""
        return decoder_of(self.config).bind({"params": self.params})


@flax.struct.dataclass
class TickOutput:
    """What a tick computed at the newest position of each row; fields that a segment does not need are None.

    Attributes:
      features: [B, 1, D] input of the vocabulary head that follows the segment.
      state_confidence: [B] float32 confidence by a metric of states, 0 where the metric reads none; only for
        segments with an exit.
      deep: [B, W + 1] or [B, W + 1, 1 + C] int32, the tokens that `lossless.look_deep` draws; only for the
        last segment of a loop that verifies, which needs no `features`.
    """

    features: jax.Array | None = None
    state_confidence: jax.Array | None = None
    deep: jax.Array | None = None
