"""How true text stays to the full model while it is generated, which agreement on given text does not say.

On given text every token follows tokens of the text. Generated text follows its own tokens, so that one token
that is not the full model's is read by all that come after it. With x_1 .. x_n the tokens that are emitted
after a prompt, greedily, over all texts,

    agreement   (1/n) sum_t [x_t = argmax p(. | prompt, x_<t)]            p: the full model
    repeats     1 - (different runs of 4 tokens) / (runs of 4 tokens), the mean over texts

A way to decode is degenerate at a target agreement where one of these holds:

    upper(agreement) < target - SLACK     upper: one-sided Clopper-Pearson bound at EPSILON
    repeats > repeats of full depth + LOOPS

The bound takes tokens as independent, which those of one text are not; the slack is there for that.
"""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from elastic_lm.bounds import clopper_pearson
from elastic_lm.config.model import ModelConfig
from elastic_lm.decode.sampler import Sampler
from elastic_lm.decode.settings import pad_rows
from elastic_lm.models.decoder import Decoder, Params

RUN = 4  # tokens that make a repeat
SLACK = 0.05  # agreement on generated text may be this far below the target
EPSILON = 0.01  # probability with which the bound may fail
LOOPS = 0.25  # share of repeats that is more than chance, beyond that of full depth


@dataclasses.dataclass(frozen=True)
class GeneratedText:
    """How text that was generated in some way compares with the full model.

    Attributes:
      tokens: emitted tokens of all texts.
      agreement: share of them that the full model chooses after the same tokens.
      bound: upper bound on that share for other text, except with probability `EPSILON`.
      repeats: share of runs of 4 tokens that occurred before in their text, the mean over texts.
      full_repeats: the same of full depth's texts.
    """

    tokens: int
    agreement: float
    bound: float
    repeats: float
    full_repeats: float

    def degenerate(self, target: float) -> str:
        """Why this way to decode is not to be used at a target agreement; "" where nothing speaks against it.

        Args:
          target: agreement with the full model that was asked for, in (0, 1].
        """
        if self.bound < target - SLACK:
            return (
                f"agreement is {self.agreement:.2%} on the text that it generates ({self.tokens} tokens), "
                f"far below {target:g}"
            )
        if self.repeats > self.full_repeats + LOOPS:
            return (
                f"its text loops: {self.repeats:.0%} of all runs of {RUN} tokens are repeats, and "
                f"{self.full_repeats:.0%} at full depth"
            )
        return ""


def compare(
    config: ModelConfig,
    params: Params,
    prompts: Sequence[Sequence[int]],
    texts: Sequence[Sequence[int]],
    full_texts: Sequence[Sequence[int]],
) -> GeneratedText:
    """Compares generated text with what the full model chooses after the same tokens.

    Args:
      config: the model; its exits are not used. Static under `jit`.
      params: its parameters, canonical or stacked.
      prompts: token ids.
      texts: token ids of one greedy continuation per prompt, each of at least one token.
      full_texts: those of full depth.
    """
    agrees = agreeing(config, params, prompts, texts)
    right, count = int(np.sum(agrees)), len(agrees)
    return GeneratedText(
        tokens=count,
        agreement=right / count,
        bound=clopper_pearson(right, count, EPSILON),
        repeats=float(np.mean([repeated_share(text) for text in texts])),
        full_repeats=float(np.mean([repeated_share(text) for text in full_texts])),
    )


def measure(sampler: Sampler, prompts: Sequence[list[int]], new_tokens: int) -> GeneratedText:
    """Continues prompts as a sampler does and at full depth, as one batch each, and compares.

    Args:
      sampler: with the exit policy in question; at full depth the same programs run.
      prompts: token ids.
      new_tokens: per prompt; end tokens do not stop a text.

    Raises:
      ValueError: there is no prompt, or one is too long.
    """
    rows = [list(prompt) for prompt in prompts]
    texts = [sample.tokens for sample in sampler.sample(rows, new_tokens, ignore_eos=True)]
    full = [sample.tokens for sample in sampler.sample(rows, new_tokens, ignore_eos=True, exit=None)]
    return compare(sampler.config, sampler.params, rows, texts, full)


def agreeing(
    config: ModelConfig,
    params: Params,
    prompts: Sequence[Sequence[int]],
    texts: Sequence[Sequence[int]],
) -> np.ndarray:
    """Which generated tokens the full model would have chosen after the same tokens.

    Args:
      config: the model; its exits are not used. Static under `jit`.
      params: its parameters, canonical or stacked.
      prompts: token ids, at least one each.
      texts: token ids of one greedy continuation per prompt.

    Returns:
      [N] bool, over all tokens of all texts.
    """
    rows = [[*prompt, *text] for prompt, text in zip(prompts, texts, strict=True)]
    tokens_BT, lengths = pad_rows(rows, len(rows), max(map(len, rows)))
    best_BT = np.asarray(full_choices(config.with_exits(()), params, jnp.asarray(tokens_BT)))

    # The choice at a position is about the token after it; what lies behind a row's end changes nothing.
    spans = [slice(len(prompt), int(length)) for prompt, length in zip(prompts, lengths, strict=True)]
    return np.concatenate(
        [
            best_BT[row, span.start - 1 : span.stop - 1] == tokens_BT[row, span]
            for row, span in enumerate(spans)
        ]
    )


@functools.partial(jax.jit, static_argnums=0)
def full_choices(config: ModelConfig, params: Params, tokens_BT: jax.Array) -> jax.Array:
    """The full model's likeliest next token after every position.

    Args:
      config: the model without exits; static.
      params: its parameters, canonical or stacked; those of exits are not read.
      tokens_BT: int32 token ids.

    Returns:
      [B, T] int32.
    """
    decoder = Decoder(config).bind({"params": params})

    def one(tokens_T: jax.Array) -> jax.Array:
        return jnp.argmax(decoder(tokens_T[None]).logits[0], axis=-1).astype(jnp.int32)

    # Row by row: the logits of all rows would be many times larger than the model.
    return jax.lax.map(one, tokens_BT)


def repeated_share(tokens: Sequence[int], run: int = RUN) -> float:
    """Share of the runs of `run` tokens that occurred before in the text; 0 where it is too short for two.

    Args:
      tokens: ids.
      run: length of a run.
    """
    runs = [tuple(tokens[i : i + run]) for i in range(len(tokens) - run + 1)]
    return 1 - len(set(runs)) / len(runs) if runs else 0.0
