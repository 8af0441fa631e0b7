"""Decoding with early exits: what a sampler does where a caller says nothing, and names of its choices.

The names and numbers stand here so that the command line can show them without JAX.
"""

from typing import Literal

WINDOW = 16  # tokens of a row that may wait for their deeper layers
MAX_NEW_TOKENS = 64  # tokens that are generated per prompt at most
PREVIEW_AGREEMENT = 0.9995  # share of tokens that keep the choice of the whole vocabulary head

# Keys and values of early tokens in the deeper layers: computed later, or CALM's approximation (propagate).
Missing = Literal["exact", "propagate"]
