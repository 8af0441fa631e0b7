"""The model that speed is measured on where a user names none."""

from elastic_lm.config.model import ModelConfig


def random_model(tiny: bool = False) -> ModelConfig:
    """A 12-layer Llama of 134 million parameters, to be drawn at random.

    Args:
      tiny: one that only shows that a measurement runs instead.
    """
    if tiny:
        return ModelConfig(vocab_size=64, d_model=32, n_layers=2, n_heads=4, d_mlp=64, max_len=256)
    return ModelConfig(vocab_size=32000, d_model=768, n_layers=12, n_heads=12, d_mlp=2048, max_len=1024)
