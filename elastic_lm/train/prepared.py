"""What `train.run.fit` needs at step 0 of a run, be it on text or on labelled records."""

import dataclasses
import json
import math
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax

from elastic_lm.config.model import ModelConfig
from elastic_lm.config.subnet import Menu
from elastic_lm.cost.counted import model_cost
from elastic_lm.data.tokenizer import Tokenizer, train_bpe
from elastic_lm.models.decoder import Params
from elastic_lm.models.registry import Config, abstract_params
from elastic_lm.processes import bytes_of_first
from elastic_lm.report.machine import require_memory
from elastic_lm.train.identity import FILE as RUN_FILE
from elastic_lm.train.method import Method, RunData

TRAINED_BYTES = 12  # of a parameter: itself and two moments in float32


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A model with its method and data.

    Attributes:
      method: trains the model; its `config` is the model's.
      params: all parameters, on the mesh, in the form that they train in.
      tokenizer: of the model.
      data: what the run reads.
      per_step: what is counted per optimizer step.
      rate: name of what is counted per second.
      menu: widths that the initial checkpoint is elastic for; None = it is not.
      canonical: from the form that parameters train in to the form that they are saved in.
      learned: the tokenizer was learned for this run, and is kept in its workdir.
      weights: fingerprint of the parameters as they were read; "" = none were. What a run adds to them, drawn
        or computed on its device, is no part of it.
    """

    method: Method[Any]
    params: Params
    tokenizer: Tokenizer
    data: RunData
    per_step: int
    rate: str = "tokens_per_s"
    menu: Menu | None = None
    canonical: Callable[[Params], Params] = lambda params: params
    learned: bool = False
    weights: str = ""


def check_new_model(field: str, config: Config) -> None:
    """Refuses a new model that no memory holds, before anything of it is made.

    Args:
      field: of the run's config, for the message.
      config: the model.

    Raises:
      ValueError: it would not fit.
    """
    if isinstance(config, ModelConfig):
        parameters = model_cost(config).parameters  # counted, however absurd the sizes
    else:
        parameters = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(nn.unbox(abstract_params(config))))
    require_memory(field, f"{parameters:,} parameters", parameters * TRAINED_BYTES, "training it")


def learned_tokenizer(workdir: Path, texts: Callable[[], Iterable[str]], vocab_size: int) -> Tokenizer:
    """A BPE tokenizer of a run that has none.

    A run keeps it from its first step on, so that a resumed run reads the same ids. Where no run has begun,
    a tokenizer.json that lies there is not this run's.

    Args:
      workdir: the tokenizer.json of the run is read here, where the run has begun.
      texts: gives what the tokenizer is learned from; called only where none is kept.
      vocab_size: number of ids.
    """
    if (workdir / RUN_FILE).is_file() and (workdir / "tokenizer.json").is_file():
        return Tokenizer.load(workdir)
    if jax.process_count() == 1:
        return train_bpe(texts(), vocab_size)

    # Learned once: the others wait for it.
    def learned() -> bytes:
        with tempfile.TemporaryDirectory() as folder:
            train_bpe(texts(), vocab_size).save(folder)
            return json.dumps({file.name: file.read_text() for file in Path(folder).iterdir()}).encode()

    files = json.loads(bytes_of_first(learned))
    with tempfile.TemporaryDirectory() as folder:
        for name, text in files.items():
            (Path(folder) / name).write_text(text)
        return Tokenizer.load(folder)
