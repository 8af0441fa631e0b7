"""Routers that read states, decoded: whatever stands beside a row, and one program for all budgets."""

import dataclasses
import functools
from typing import Any

import jax
import numpy as np
import pytest
from elastic_models import make

from elastic_lm.config.model import ExitConfig
from elastic_lm.config.subnet import Budget, Menu
from elastic_lm.cost.counted import counted_table
from elastic_lm.decode.sampler import Sampler
from elastic_lm.depth.policies import StaticExit
from elastic_lm.models.decoder import Decoder
from elastic_lm.width.chooser import SubnetChooser, budget_inputs, nested_model
from elastic_lm.width.nested_decoder import WIDTH_INPUTS, NestedDecoder, prompt_choices
from elastic_lm.width.trained_routers import Routers, RouterShape

MENU = Menu((0.5, 1.0), (0.5, 1.0))
EXITS = (ExitConfig(1, "norm", tied=True),)
NEW = 6
PROMPTS = [[3, 1, 4, 1, 5, 9, 2], [6, 5, 3], [5, 8, 9, 7, 9]]


@functools.cache
def with_routers(exits: tuple[ExitConfig, ...] = ()) -> tuple[Decoder, Any, SubnetChooser]:
    """A model, and random routers."""
    config, params = make("llama", exits, n_layers=2)
    shape = RouterShape(config.with_exits(()), MENU, (0.6, 0.8, 1.0), "hidden", 8)
    trained = shape.init(jax.random.key(2))
    table = counted_table(config, MENU, "parameters")
    routers = Routers(shape, trained, table, (-0.5, -0.2, 0.0))
    return Decoder(config), params, SubnetChooser(config, MENU, routers=routers)


def budget(share: float) -> Budget:
    chooser = with_routers()[2]
    return Budget(parameters=share * chooser.costs("parameters").range(MENU)[1])


def sampler(**settings: Any) -> Sampler:
    model, params, chooser = with_routers(settings.pop("exits", ()))
    chooser = dataclasses.replace(chooser, per=settings.pop("per", "token"))
    return Sampler(model, params, elastic=chooser, budget=budget(0.7), window=1, **settings)


def test_greedy_tokens_are_those_of_the_forward_pass() -> None:
    model, params, chooser = with_routers()
    assert chooser.routers is not None
    config, nested = nested_model(model.config, params, chooser.routers)
    nested = {**nested, WIDTH_INPUTS: budget_inputs(chooser.routers, budget(0.7))}
    forward = jax.jit(lambda tokens: NestedDecoder(config).apply({"params": nested}, tokens).logits)
    tokens = PROMPTS[0]
    for emitted in sampler().sample(tokens, NEW, ignore_eos=True).tokens:
        padded = np.zeros((1, 16), np.int32)
        padded[0, : len(tokens)] = tokens
        assert emitted == int(np.argmax(forward(padded)[0, len(tokens) - 1]))
        tokens = [*tokens, emitted]


@pytest.mark.parametrize("settings", [{}, {"per": "prompt"}, {"exits": EXITS, "exit": StaticExit(1, (1,))}])
def test_batch_equals_single_rows(settings: dict[str, Any]) -> None:
    decode = sampler(**settings)
    together = decode.sample(PROMPTS, NEW, ignore_eos=True)
    alone = decode.sample(PROMPTS[0], NEW, ignore_eos=True)
    assert alone.tokens == together[0].tokens
    assert alone.exit_layers == together[0].exit_layers


def test_budgets_change_text_and_compile_nothing() -> None:
    decode = sampler()
    first = decode.sample(PROMPTS, NEW, ignore_eos=True)
    before = decode.compilations()
    others = [decode.sample(PROMPTS, NEW, ignore_eos=True, budget=budget(b)) for b in (0.65, 0.85)]
    assert decode.compilations() == before
    assert len({tuple(tuple(s.tokens) for s in samples) for samples in (first, *others)}) > 1


def test_whole_budget_is_the_whole_model() -> None:
    model, params, _ = with_routers()
    plain = Sampler(model, params, window=1).sample(PROMPTS, NEW, ignore_eos=True)
    found = sampler().sample(PROMPTS, NEW, ignore_eos=True, budget=budget(1.0))
    assert [s.tokens for s in found] == [s.tokens for s in plain]


def test_prompts_choose_what_their_rows_run() -> None:
    model, params, chooser = with_routers()
    assert chooser.routers is not None
    config, nested = nested_model(model.config, params, chooser.routers)
    nested = {**nested, WIDTH_INPUTS: budget_inputs(chooser.routers, budget(0.7))}
    prompt = PROMPTS[0]
    chosen = prompt_choices(config, nested, np.asarray([prompt], np.int32), np.asarray([len(prompt)]))
    subnet = _subnet(chosen)
    fixed = Sampler(model, params, subnet=subnet, window=1).sample(prompt, NEW, ignore_eos=True)
    assert sampler(per="prompt").sample(prompt, NEW, ignore_eos=True).tokens == fixed.tokens


def _subnet(chosen: dict[str, jax.Array]) -> Any:
    config = with_routers()[0].config
    sizes = MENU.sizes(config)
    whole = MENU.largest(config)
    heads = tuple(sizes.heads[i][h] for i, h in enumerate(chosen["heads"][0].tolist()))
    mlp = tuple(sizes.mlp[i][f] for i, f in enumerate(chosen["mlp"][0].tolist()))
    return dataclasses.replace(whole, heads=heads, mlp=mlp)


def test_a_share_is_a_budget_of_routers_too() -> None:
    chooser = with_routers()[2]
    assert chooser.routers is not None
    share, amount = Budget(parameters="70%"), budget(0.7)
    assert chooser.chooses_while_decoding(share)
    assert not chooser.chooses_while_decoding(Budget(parameters="100%"))
    expected = budget_inputs(chooser.routers, amount)
    for name, value in budget_inputs(chooser.routers, share).items():
        np.testing.assert_allclose(value, expected[name], rtol=1e-6)
    with pytest.raises(ValueError, match="fitted to budgets of parameters"):
        chooser.chooses_while_decoding(Budget(flops="70%"))


def test_errors_say_what_to_do() -> None:
    model, params, chooser = with_routers()
    with pytest.raises(ValueError, match="for every token"):
        chooser.subnet(budget(0.7))
    with pytest.raises(ValueError, match="cheapest sub-network"):
        sampler().sample(PROMPTS[0], NEW, budget=Budget(parameters=1.0))
    with pytest.raises(ValueError, match="cheapest sub-network"):
        Sampler(model, params, elastic=chooser, budget=Budget(parameters=1.0))
    assert chooser.routers is not None
    few = dataclasses.replace(chooser.routers.shape, anchors=(0.8, 0.9, 1.0))
    other = dataclasses.replace(chooser, routers=dataclasses.replace(chooser.routers, shape=few))
    with pytest.raises(ValueError, match=r"trained for .* and more; .* lower method\.budgets"):
        other.chooses_while_decoding(budget(0.7))
    with pytest.raises(ValueError, match="fitted to budgets of parameters"):
        chooser.chooses_while_decoding(Budget(flops=1e9))
    with pytest.raises(ValueError, match=r"elastic\.menu=.*take their menu"):
        dataclasses.replace(chooser, menu=Menu((0.25, 1.0), (0.5, 1.0)))
    with pytest.raises(ValueError, match=r"tilts=\(\): needs 3"):
        dataclasses.replace(chooser.routers, tilts=())
    with pytest.raises(ValueError, match="use 'exact'"):
        sampler(missing="propagate")
    with pytest.raises(ValueError, match=r"elastic\.per='row'"):
        dataclasses.replace(chooser, per="row")
    assert Sampler(model, params, missing="propagate").runs is None
