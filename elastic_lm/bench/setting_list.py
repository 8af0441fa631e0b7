"""The ways in which a model can run on this device, with milliseconds and quality, to choose from.

From a plan (`bench.plan`) come full depth, previews of the head, exits, and lossless decoding with lookup and
exits; from the search for draft layers (`bench.drafter_plan`) the best drafter; and of a model that was made
elastic its uniform widths, whose times and qualities are measured here. The others are forecast, except for
full depth.
"""

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from elastic_lm.bench.drafter_plan import DrafterPlan, describe, plan_drafter
from elastic_lm.bench.parts import Shape, measure_parts
from elastic_lm.bench.plan import Explored
from elastic_lm.config.model import ModelConfig
from elastic_lm.config.subnet import Menu, Subnet
from elastic_lm.data.batch import Batch
from elastic_lm.decode.setting_choice import Setting
from elastic_lm.depth.confidence import NEVER_EXITS
from elastic_lm.models.decoder import Decoder, Output, Params
from elastic_lm.models.exits import without_exits
from elastic_lm.train.losses import token_losses
from elastic_lm.width.elastic_training import uniform_subnets
from elastic_lm.width.slicing import slice_params

WIDTHS = 6  # sub-networks that are measured at most
ROUNDS = 3


def all_settings(
    found: Explored,
    config: ModelConfig,
    params: Params,
    prompts: Sequence[list[int]],
    new_tokens: int,
    *,
    menu: Menu | None,
    testing: Callable[[], Iterable[Batch]],
    model: str = "MODEL",
    data: Sequence[str] = (),
    say: Callable[[str], None] = print,
) -> list[Setting]:
    """Everything that there is to choose from.

    Args:
      found: a plan of the model.
      config: the model, in the dtype that it will run in.
      params: its canonical parameters.
      prompts: token ids, all equally long.
      new_tokens: per prompt.
      menu: that the model was made elastic for; None = it was not.
      testing: batches of text, by which widths are compared.
      model: the model's name in commands.
      data: the text's name in commands.
      say: told what is going on.
    """
    settings = plan_settings(found, model, data)
    shape = found.ahead.shape
    drafters = plan_drafter(
        config, params, prompts, new_tokens, window=shape.window, batch_size=shape.batch, say=say
    )
    settings.append(drafter_setting(drafters, 1e3 * found.plan.full, model, data))
    if menu is not None:
        named = uniform_subnets(config, menu)
        places = np.linspace(0, len(named) - 1, min(WIDTHS, len(named)))
        names = [list(named)[round(place)] for place in places]
        subnets = {name: named[name] for name in names if named[name] != Subnet.full(config)}
        say(f"measuring {len(subnets)} widths")
        settings += width_settings(
            config, params, subnets, testing, shape, full_ms=1e3 * found.plan.full, model=model
        )
    return settings


def plan_settings(found: Explored, model: str = "MODEL", data: Sequence[str] = ()) -> list[Setting]:
    """What a plan has forecast; exits are those of the model with the exit of `Explored.with_exit`."""
    full = 1e3 * found.plan.full
    generate = f"elastic-lm generate --model {model}"
    settings = [Setting("full depth", full, lossless=True, measured=True, command=generate)]
    for one in found.plan.configurations:
        dials: dict[str, Any] = {"lossless": True} if one.lossless else {}
        flags = " --lossless" if one.lossless else ""
        before = ""
        if "lookup" in one.name:
            dials["lookup"] = True
            flags += " --lookup"
        if "preview" in one.name and one.target is not None:
            dials["preview"] = found.previews[one.target]
            before += _data(f"elastic-lm preview --model {model} --agreement {one.target:g}", data) + "\n"
            flags += " --preview preview.safetensors"
        if one.layer is not None:
            assert one.target is not None
            if found.thresholds[one.layer, one.target] >= NEVER_EXITS:
                continue
            dials["exit"] = found.with_exit(one.layer, one.target)[2]
            before += (
                f"elastic-lm train --config ee_tuning:{one.layer} --config.train.init_from={model} "
                "--workdir runs/exits\n"
                + _data(f"elastic-lm calibrate --model runs/exits/model --target {one.target:g}", data)
                + "\n"
            )
            flags += " --thresholds thresholds.json"
        runs = generate.replace(model, "runs/exits/model") if one.layer is not None else generate
        name, _, _ = str(one).rpartition(":")
        settings.append(
            Setting(
                name,
                full / one.speedup,
                agreement=None if one.lossless else one.target,
                lossless=one.lossless,
                dials=dials,
                command=f"{before}{runs}{flags}",
            )
        )
    return settings


def drafter_setting(
    plan: DrafterPlan, full_ms: float, model: str = "MODEL", data: Sequence[str] = ()
) -> Setting:
    """The best drafter."""
    best = plan.best
    search = _data(f"elastic-lm drafter --model {model}", data)
    return Setting(
        f"lossless drafter of {describe(best.candidate.drafter)}",
        full_ms / best.speedup,
        lossless=True,
        dials={"lossless": True, "drafter": best.candidate.drafter},
        command=f"{search}\nelastic-lm generate --model {model} --lossless --drafter drafter.json",
    )


def width_settings(
    config: ModelConfig,
    params: Params,
    subnets: Mapping[str, Subnet],
    testing: Callable[[], Iterable[Batch]],
    shape: Shape,
    *,
    full_ms: float,
    rounds: int = ROUNDS,
    model: str = "MODEL",
) -> list[Setting]:
    """Sub-networks with measured times, agreement with the whole model and loss above it.

    Args:
      config: the whole model; its exits are not looked at.
      params: its canonical parameters.
      subnets: by name.
      testing: batches of text.
      shape: rows, capacity and window.
      full_ms: milliseconds of a token of the whole model. It is timed again beside the sub-networks, and
        their times are told relative to it, because a machine slows down and speeds up.
      rounds: of timing.
      model: the model's name in commands.

    Returns:
      One setting per sub-network whose logits are finite.
    """
    config, params = without_exits(config, params)
    batches = list(testing())
    whole = [_read(config, params, batch) for batch in batches]
    seconds = functools.partial(measure_parts, shape=shape, lookup=False, rounds=rounds)
    unit = full_ms / seconds(config, params).full
    settings = []
    for name, subnet in subnets.items():
        small, sliced = slice_params(config, params, subnet)
        read = [_read(small, sliced, batch) for batch in batches]
        weights = sum(float(np.sum(batch.weights)) for batch in batches)
        equal = sum(
            float(np.sum((one[0] == other[0]) * batch.weights))
            for one, other, batch in zip(read, whole, batches, strict=True)
        )
        losses = (sum(float(np.sum(one[1])) for one in side) / weights for side in (read, whole))
        own, others = losses
        if not np.isfinite(own):
            continue  # a slice that overflows is no way to run the model
        flags = " ".join(_shares(name))
        settings.append(
            Setting(
                f"width {name}",
                unit * seconds(small, sliced).full,
                agreement=equal / weights,
                added_loss=own - others,
                measured=True,
                dials={"subnet": subnet},
                command=f"elastic-lm generate --model {model} --subnet {flags}" if flags else "",
            )
        )
    return settings


@functools.partial(jax.jit, static_argnames="config")
def _read(config: ModelConfig, params: Params, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """[B, T] likeliest tokens, and weighted losses of the text's. Static: the config."""
    output = Decoder(config).apply({"params": params}, batch.tokens, batch.positions, batch.segments)
    assert isinstance(output, Output)
    losses = token_losses(output.logits, batch.targets).cross_entropy
    return jnp.argmax(output.logits, axis=-1), losses * batch.weights


def _shares(name: str) -> list[str]:
    """The flags of a width that `uniform_subnets` has named, such as mlp_0.5_heads_1; [] = none are known."""
    words = name.split("_")
    if len(words) % 2:
        return []
    return [f"{key}={value}" for key, value in zip(words[::2], words[1::2], strict=True)]


def _data(command: str, data: Sequence[str]) -> str:
    return f"{command} --data {' '.join(data)}" if data else command
