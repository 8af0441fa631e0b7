"""FLOPs of whole sequences, counted: what one forward pass over T tokens costs.

A layer whose query heads are N wide H, which sees min(t + 1, window) keys at position t, costs per sequence

    T (2 weights) + 4 N H sum_t min(t + 1, window)

and a vocabulary head 2 V D per position that is read. Generating n tokens after a prompt of P runs the
layers over P + n - 1 tokens and reads the head n times, cached or not. In an encoder every position sees
all T, or a window in local layers, and a decoder that sees a source of S projects its keys and values once.

Norms, biases, look-ups and softmaxes are not counted.
"""

from elastic_lm.config.encoder import EncoderConfig
from elastic_lm.config.encoder_decoder import EncoderDecoderConfig
from elastic_lm.config.model import ModelConfig
from elastic_lm.cost.counted import attention_cost, mlp_cost


def layer_flops(config: ModelConfig, tokens: int, start: int = 0, stop: int | None = None) -> int:
    """FLOPs of layers start .. stop - 1 over one sequence.

    Args:
      config: the model; layers may differ in size.
      tokens: T.
      start: first layer, counted from 0.
      stop: one past the last layer; None = all.
    """
    return sum(_layer(config, i, tokens) for i in range(start, config.n_layers if stop is None else stop))


def _layer(config: ModelConfig, layer: int, tokens: int) -> int:
    """FLOPs of one layer over one sequence."""
    neurons, heads, groups = config.sizes(layer)
    alone = attention_cost(config, layer, heads // groups, groups).flops + mlp_cost(config, neurons).flops

    # Keys that all positions see together: a triangle until the window is full, then the window for each.
    window = config.window(layer) or tokens
    whole = min(window, tokens)  # positions that see all before them
    seen = whole * (whole + 1) // 2 + (tokens - whole) * window

    # `alone` has one key per position already.
    return tokens * alone + 4 * heads * config.head_dim * (seen - tokens)


def head_flops(config: ModelConfig, positions: int) -> int:
    """FLOPs of a vocabulary head read at so many positions."""
    return 2 * config.vocab_size * config.d_model * positions


def generation_flops(config: ModelConfig, prompt: int, emitted: int) -> int:
    """FLOPs of emitting tokens after a prompt, greedily and at full depth.

    Args:
      config: the model.
      prompt: tokens of the prompt, at least 1.
      emitted: tokens after it.
    """
    return layer_flops(config, prompt + emitted - 1) + head_flops(config, emitted) if emitted else 0


def encoder_flops(config: EncoderConfig, tokens: int, layers: int | None = None) -> int:
    """FLOPs of an encoder with pooler and task head over one sequence.

    Args:
      config: the model.
      tokens: T, special tokens included.
      layers: the last ones, that run; None = all.
    """
    d, t = config.d_model, tokens
    count = config.n_layers if layers is None else layers
    weights = 4 * d * d + (3 if config.gated else 2) * d * config.d_mlp
    seen = sum(_pairs(config, i, t) for i in range(config.n_layers - count, config.n_layers))
    whole = count * 2 * t * weights + 4 * d * seen

    if config.relative == "disentangled":
        # Vectors of distances are projected in every layer, and meet all queries and all keys.
        vectors = 2 * config.distances
        whole += count * (2 * vectors * 3 * d * d + 2 * 2 * d * vectors * t)
    if count == config.n_layers:
        whole += 2 * t * d * (config.embed_dim if config.embed_map else 0)
        whole += 2 * t * d * d * config.conv_kernel

    return whole + 2 * d * config.n_labels + (2 * d * d if config.pooler != "none" else 0)


def _pairs(config: EncoderConfig, layer: int, tokens: int) -> int:
    """Pairs of a query and a key that it sees, in one layer of an encoder."""
    if not config.local(layer):
        return tokens * tokens
    side = min(config.window // 2, tokens - 1)
    return tokens * (2 * side + 1) - side * (side + 1)


def text_to_text_flops(config: EncoderDecoderConfig, source: int, emitted: int) -> int:
    """FLOPs of encoding one source and emitting a target, greedily.

    Args:
      config: the model.
      source: S, tokens of the source with its end token.
      emitted: M, tokens of the target with its end token; 0 = the source is encoded, nothing else.
    """
    d, inner, s, m = config.d_model, config.n_heads * config.head_dim, source, emitted
    mlp = 2 * (3 if config.gated else 2) * d * config.d_mlp

    encoder = s * (8 * d * inner + mlp) + 4 * inner * s * s
    own = m * (8 * d * inner + mlp) + 4 * inner * m * (m + 1) // 2
    # Keys and values of the source are projected once, queries and outputs for every token of the target.
    cross = 4 * d * inner * (s + m) + 4 * inner * m * s if m else 0
    head = 2 * config.vocab_size * d * m
    return config.n_layers * encoder + config.n_decoder_layers * (own + cross) + head
