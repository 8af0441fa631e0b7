"""A sampler that serves sub-networks: each runs as the ordinary smaller model that it is."""

import collections
import dataclasses
import gc
import weakref

import jax
import numpy as np
import pytest

from elastic_lm.config.model import ExitConfig
from elastic_lm.config.subnet import Budget, Menu, Subnet
from elastic_lm.decode.sampler import Sampler
from elastic_lm.decode.state import segments
from elastic_lm.depth.policies import (
    ConfidenceExit,
    DecayedExit,
    DepthSchedule,
    StaticExit,
    gate_row,
    on_subnet,
    threshold_table,
)
from elastic_lm.depth.subnet_exits import SubnetExits
from elastic_lm.models.decoder import Decoder
from elastic_lm.models.registry import init_params
from elastic_lm.testing import random_params, tiny_config
from elastic_lm.width.chooser import SubnetChooser
from elastic_lm.width.slicing import slice_params

MENU = Menu(mlp=(0.25, 0.5, 1.0), heads=(0.5, 1.0))
NEW = 10
WAYS = {"greedy": {}, "sampled": {"temperature": 1.0, "top_k": 20, "seed": 5}}


@pytest.fixture(scope="module")
def subnets(model) -> dict[str, Subnet]:
    uneven = Subnet((0, 1, 2), (16, 64, 32), (2, 1, 2), (2, 2, 1), 32)
    return {
        "uneven": uneven,
        "first exit": Subnet.uniform(model.config, mlp=0.5, layers=(0, 2)),
        "second exit": Subnet.uniform(model.config, heads=0.5, layers=(1, 2)),
        "exit at the end": Subnet.uniform(model.config, mlp=0.25, layers=(0, 1)),
        "no exit": Subnet.uniform(model.config, layers=(2,)),
    }


KEPT = {"uneven": (0, 1), "first exit": (0,), "second exit": (1,), "exit at the end": (0,), "no exit": ()}


def choices(model) -> SubnetChooser:
    return SubnetChooser(model.config, MENU)


def outputs(samples) -> list[tuple[list[int], list[int]]]:
    return [(s.tokens, s.exit_layers) for s in samples]


@pytest.mark.long
def test_every_width_leaves_by_its_own_thresholds(model, prompts):
    """As the slice does with these thresholds; a width without some, and the whole model, at full depth."""
    half, uneven, other = (Subnet.uniform(model.config, mlp=share) for share in (0.5, 0.25, 0.75))
    own = {half: (0.0, 2.0), uneven: (2.0, 0.0)}
    exits = SubnetExits({s: ConfidenceExit("max_prob", t, (1, 2)) for s, t in own.items()})
    sampler = Sampler(Decoder(model.config), model.params, exit=exits, window=2)
    for subnet, thresholds in own.items():
        config, params = slice_params(model.config, model.params, subnet)
        policy = ConfidenceExit("max_prob", thresholds, (1, 2))
        alone = Sampler(Decoder(config), params, exit=policy, window=2)
        expected = outputs(alone.sample(prompts[:3], NEW))
        assert outputs(sampler.sample(prompts[:3], NEW, subnet=subnet)) == expected
        assert {depth for _, depths in expected for depth in depths} == {thresholds.index(0.0) + 1}

        # Lossless, every token is the sub-network's own at full depth.
        whole = Sampler(Decoder(config), params, window=2).sample(prompts[:3], NEW)
        lossless = sampler.sample(prompts[:3], NEW, subnet=subnet, lossless=True)
        assert [s.tokens for s in lossless] == [s.tokens for s in whole]
        assert lossless[0].stats.drafted > 0
    for subnet in (None, other):
        found = sampler.sample(prompts[:3], NEW, subnet=subnet)
        assert all(depths == [3] * NEW for _, depths in outputs(found))


@pytest.mark.long
@pytest.mark.parametrize("way", WAYS)
def test_rows_of_one_batch_have_sizes_of_their_own(model, prompts, way):
    """Every row is what its slice gives alone, at its own thresholds, and other mixtures compile nothing."""
    # Of exits that have widths of their own, a slice cuts those as well.
    config = model.config.with_exits((ExitConfig(1, "norm", tied=True),))
    params = init_params(config, jax.random.key(0))
    half = Subnet.uniform(config, mlp=0.5, heads=0.5)
    uneven = Subnet((0, 1, 2), (32, 64, 32), (2, 1, 2), (2, 2, 2), 32)
    sizes = [half, None, uneven, half]
    exits = SubnetExits({half: ConfidenceExit("max_prob", (0.0,), (1,))})
    sampler = Sampler(Decoder(config), params, exit=exits, window=2)
    found = outputs(sampler.sample(prompts[:4], NEW, subnet=sizes, **WAYS[way]))
    for row, (subnet, output) in enumerate(zip(sizes, found, strict=True)):
        seed = {"seed": WAYS[way]["seed"] + row} if "seed" in WAYS[way] else {}
        alone = sampler.sample(prompts[row : row + 1], NEW, subnet=subnet, **WAYS[way] | seed)
        assert outputs(alone) == [output]
    assert [set(depths) for _, depths in found] == [{1}, {3}, {3}, {1}]

    programs = sampler.compilations()
    other = outputs(sampler.sample(prompts[:4], NEW, subnet=[uneven, half, half, None], **WAYS[way]))
    assert sampler.compilations() == programs
    assert other[2][0] == outputs(sampler.sample(prompts[:3], NEW, subnet=half, **WAYS[way]))[2][0]


def test_sizes_of_rows_that_are_refused(model, prompts):
    sampler = Sampler(Decoder(model.config), model.params)
    half = Subnet.uniform(model.config, mlp=0.5)
    shallow = Subnet.uniform(model.config, layers=(0, 2))
    for subnet, more, message in (
        ([half, shallow], {}, r"subnet.layers=\(0, 2\): rows of one batch differ in neurons and heads alone"),
        ([half], {}, r"subnet=.*: has 1 entries: give one, or one per prompt \(2\)"),
        ([half, 3], {}, r"subnet=3"),
        ([half, None], {"budget": Budget(parameters=1e5)}, r"budget=.*: each says what runs"),
    ):
        with pytest.raises(ValueError, match=message):
            sampler.sample(prompts[:2], 2, subnet=subnet, **more)


def test_policies_of_widths_are_checked(model):
    half = Subnet.uniform(model.config, mlp=0.5)
    policy = ConfidenceExit("max_prob", (0.5, 0.5), (1, 2))
    of_half = dataclasses.replace(policy, provenance={"model": {"subnet": dataclasses.asdict(half)}})
    assert SubnetExits({half: of_half}).policies[half] is of_half
    quarter = Subnet.uniform(model.config, mlp=0.25)
    for policies, whole, message in (
        ({}, None, "policies={}: give one policy per sub-network"),
        (
            {half: policy},
            ConfidenceExit("margin", (1.0, 1.0), (1, 2)),
            r"\['margin', 'max_prob'\]: must have",
        ),
        ({quarter: of_half}, None, "was calibrated on Subnet.* calibrate on this one"),
    ):
        with pytest.raises(ValueError, match=message):
            SubnetExits(policies, whole)


def test_policies_of_widths_are_read_from_their_files(model, tmp_path):
    half = Subnet.uniform(model.config, mlp=0.5)
    plain = ConfidenceExit("max_prob", (0.5, 0.4), (1, 2))
    of_half = dataclasses.replace(plain, provenance={"model": {"subnet": dataclasses.asdict(half)}})
    files = [str(tmp_path / name) for name in ("whole.json", "half.json", "again.json")]
    for policy, file in zip((plain, of_half, of_half), files, strict=True):
        policy.save(file)
    found = SubnetExits.load([files[1]], whole=files[0])
    assert (found.thresholds, found.policies[half].thresholds) == ((0.5, 0.4), (0.5, 0.4))
    with pytest.raises(ValueError, match=r"whole.json: is not about a sub-network"):
        SubnetExits.load(files)
    with pytest.raises(ValueError, match=r"again.json=Subnet.*: is that of another file"):
        SubnetExits.load(files[1:])


def executables() -> collections.Counter[str]:
    """Programs for prefill and decoding that the backend holds."""
    programs = jax.devices()[0].client.live_executables()
    names = [program.hlo_modules()[0].name for program in programs]
    return collections.Counter(name for name in names if name in ("jit_prefill", "jit_run"))


@pytest.fixture(scope="module")
def bare(make_model):
    """One layer without exits, whose programs compile fast."""
    config = tiny_config(n_layers=1)
    return make_model(config, random_params(config))


@pytest.fixture(scope="module")
def serving(model, mixed) -> Sampler:
    return model.sampler(mixed[0], window=2, keep_subnets=8)


def sliced(model, make_model, subnet: Subnet):
    return make_model(*slice_params(model.config, model.params, subnet))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", KEPT)
def test_tokens_and_depths_are_those_of_the_slice(model, make_model, serving, subnets, prompts, name, way):
    thresholds = serving.options.exit.thresholds
    subnet, settings = subnets[name], WAYS[way]
    own = tuple(thresholds[i] for i in KEPT[name])
    small = sliced(model, make_model, subnet)
    given = (*own, *[2.0] * (len(small.config.exits) - len(own)))
    expected = small.sampler(given, window=2).sample(prompts[:3], NEW, **settings)
    found = serving.sample(prompts[:3], NEW, subnet=subnet, **settings)
    assert outputs(found) == outputs(expected)
    assert found[0].stats.subnet == subnet
    assert max(d for s in found for d in s.exit_layers) <= len(subnet.layers)


def test_some_tokens_leave_a_slice_early(serving, subnets, prompts):
    """The comparison above is about early tokens too."""
    samples = serving.sample(prompts[:3], NEW, subnet=subnets["uneven"])
    depths = {d for s in samples for d in s.exit_layers}
    assert len(depths) > 1


def test_verification_is_by_the_slice_at_full_depth(model, make_model, subnets, prompts):
    subnet = subnets["first exit"]
    full = sliced(model, make_model, subnet).sampler(window=2).sample(prompts[:3], NEW)
    drafting = model.sampler((0.0, 0.0), window=2, lossless=True, subnet=subnet)
    found = drafting.sample(prompts[:3], NEW)
    assert [s.tokens for s in found] == [s.tokens for s in full]
    assert found[0].stats.drafted > 0


class Letters:
    """One character per token."""

    def encode(self, text, *, bos=False):
        return [ord(c) - 48 for c in text]

    def decode(self, ids):
        return "".join(chr(48 + i) for i in ids)


def test_streams_are_those_of_the_slice(bare, make_model):
    subnet = Subnet.uniform(bare.config, mlp=0.5, heads=0.5)
    small = sliced(bare, make_model, subnet)
    expected = Sampler(Decoder(small.config), small.params, Letters(), window=1).sample("hello", NEW).text
    sampler = Sampler(Decoder(bare.config), bare.params, Letters(), window=1, stream_every=3)
    assert "".join(sampler.stream("hello", NEW, subnet=subnet)) == expected
    stopped = sampler.sample("hello", NEW, subnet=subnet, stop=expected[4:6])
    assert stopped.text == expected[: expected.index(expected[4:6])]


WIDE, NARROW = Budget(parameters=12_000), Budget(parameters=9_000)


def test_a_budget_for_the_whole_model_serves_it_as_it_is(bare, prompts):
    expected = bare.sampler(window=1).sample(prompts[:3], NEW)
    before = Sampler.compilations()
    sampler = bare.sampler(window=1, elastic=choices(bare), budget=NARROW)
    for asked in ({"budget": Budget(parameters=1e9)}, {"subnet": Subnet.full(bare.config)}):
        found = sampler.sample(prompts[:3], NEW, **asked)
        assert outputs(found) == outputs(expected)
        assert found[0].stats.subnet is None
    assert Sampler.compilations() == before
    assert sampler._models.serve(None).params is bare.params


def test_alternating_budgets_compile_each_sub_network_once(bare, prompts):
    chooser = choices(bare)
    assert len({chooser.subnet(b) for b in (WIDE, NARROW)}) == 2
    sampler = bare.sampler(window=1, elastic=chooser, budget=WIDE, keep_subnets=2)

    def both() -> list:
        samples = [sampler.sample(prompts[0], 4, **asked) for asked in ({}, {"budget": NARROW})]
        assert [s.stats.subnet for s in samples] == [chooser.subnet(b) for b in (WIDE, NARROW)]
        return outputs(samples)

    before, first = Sampler.compilations(), both()
    programs = Sampler.compilations()
    assert programs == before + 4
    for seed in range(3):
        assert both() == first
        sampler.sample(prompts[0], 4, temperature=1.0, seed=seed)
    assert Sampler.compilations() == programs


@pytest.mark.long
def test_evicted_sub_networks_leave_nothing_behind(bare, prompts):
    sampler = bare.sampler(window=1, keep_subnets=2)
    chosen = [Subnet.uniform(bare.config, mlp=share) for share in (0.25, 0.5, 0.75)]
    sampler.sample(prompts[0], 2)
    gc.collect()
    held, before, alive = executables(), Sampler.compilations(), []
    for subnet in chosen:
        sampler.sample(prompts[0], 2, subnet=subnet)
        served = sampler._models.serve(subnet)
        cut = served.params["layers_0"]["mlp"]["down"]["kernel"]
        alive.append([weakref.ref(x) for x in (served, served.run, served.prefill, cut)])
        del served, cut
        gc.collect()
    assert [[ref() is None for ref in refs] for refs in alive] == [[True] * 4, [False] * 4, [False] * 4]
    assert executables() - held == {"jit_prefill": 2, "jit_run": 2}
    assert Sampler.compilations() == before + 6  # those of the evicted one too
    sampler.sample(prompts[0], 2, subnet=chosen[1])
    assert Sampler.compilations() == before + 6
    sampler.sample(prompts[0], 2, subnet=chosen[0])  # evicts the one that was not used since
    gc.collect()
    assert Sampler.compilations() == before + 8
    assert [refs[0]() is None for refs in alive] == [True, False, True]
    del sampler
    gc.collect()
    assert all(ref() is None for refs in alive for ref in refs)
    assert executables() == held
    assert Sampler.compilations() == before + 8


def test_a_stream_keeps_what_it_runs(bare):
    first, second = (Subnet.uniform(bare.config, mlp=share) for share in (0.25, 0.5))
    sampler = Sampler(Decoder(bare.config), bare.params, Letters(), window=1, stream_every=3, keep_subnets=1)
    expected = sampler.sample("hello", NEW, subnet=first).text
    pieces = sampler.stream("hello", NEW, subnet=first)
    begun = next(pieces)
    sampler.sample("hello", 2, subnet=second)
    assert begun + "".join(pieces) == expected


def thresholds(policy, config, subnet: Subnet, count: int) -> list[list[float]]:
    found = on_subnet(policy, config, subnet)
    assert found is not None
    table = threshold_table(found, len(segments(subnet.sliced(config))) - 1, count)
    return table.tolist()


def test_exits_that_are_left_keep_their_thresholds(model, subnets):
    config = model.config
    policy = ConfidenceExit("margin", (0.25, 0.75), (1, 2))
    found = {name: thresholds(policy, config, subnet, 1) for name, subnet in subnets.items()}
    all_ = [[0.25], [0.75]]
    assert found == {name: [all_[i] for i in kept] for name, kept in KEPT.items()}
    mapped = on_subnet(policy, config, subnets["second exit"])
    assert mapped is not None
    assert (mapped.metric, mapped.thresholds) == ("margin", (0.75,))
    assert on_subnet(None, config, subnets["uneven"]) is None


def test_gates_and_schedules_stay_with_their_exits(model, subnets):
    config, second = model.config, subnets["second exit"]
    gated = ConfidenceExit("margin", (0.25, 0.75), (1, 2), gates=(0.1, 0.7))
    assert gate_row(on_subnet(gated, config, second), 1).tolist() == pytest.approx([0.7])
    assert gate_row(on_subnet(gated, config, subnets["no exit"]), 0).tolist() == []
    fallen = DecayedExit(gated, tau=4.0)
    assert thresholds(fallen, config, second, 3) == [np.float32(fallen.schedule(3)[1]).tolist()]
    depths = DepthSchedule(3, 1, (1, 2))  # depths of the whole model: 3, 2, 1
    ((first, *later),) = thresholds(depths, config, second, 3)
    assert first > 1
    assert later == [0.0, 0.0]


def test_a_fixed_exit_that_is_gone_is_refused(serving, subnets, prompts):
    sampler = serving
    for layer, name in ((1, "first exit"), (2, "second exit"), (3, "no exit")):
        samples = sampler.sample(prompts[:3], NEW, exit=StaticExit(layer, (1, 2)), subnet=subnets[name])
        assert [s.exit_layers for s in samples] == [[1] * NEW] * 3
    message = r"exit.layer=2: the sub-network leaves that layer and its exit out; .* after layers \(1,\)"
    with pytest.raises(ValueError, match=message):
        sampler.sample(prompts[0], 3, exit=StaticExit(2, (1, 2)), subnet=subnets["first exit"])


def test_policies_are_checked_against_the_whole_model(model, subnets, prompts):
    sampler = model.sampler(window=2, subnet=subnets["first exit"])
    with pytest.raises(ValueError, match=r"exits after layers \(1,\), the model has \(1, 2\)"):
        sampler.sample(prompts[0], 3, exit=ConfidenceExit("margin", (0.5,), (1,)))


def test_what_cannot_be_served_is_named(model, subnets, prompts):
    budget, subnet = Budget(parameters=30_000), subnets["uneven"]
    chooser = choices(model)
    sampler = model.sampler(elastic=chooser)

    def refuse(message: str, call, *args, **kwargs) -> None:
        with pytest.raises(ValueError, match=message):
            call(*args, **kwargs)

    refuse("budget=Budget.*: sub-networks for .*elastic=", model.sampler, budget=budget)
    both = {"budget": budget, "subnet": subnet}
    refuse("each says what runs; give one of them", model.sampler, elastic=chooser, **both)
    refuse("each says what runs", sampler.sample, prompts[0], 2, **both)
    refuse("keep_subnets=0: must be at least 1", model.sampler, keep_subnets=0)
    wide = dataclasses.replace(subnet, mlp=(16, 128, 32))
    refuse(r"subnet.mlp\[1\]=128: there are 64 MLP neurons of layer 1", model.sampler, subnet=wide)
    refuse(r"subnet.mlp\[1\]=128", sampler.sample, prompts[0], 2, subnet=wide)
    least = Budget(parameters=10)
    refuse(r"budget.parameters=10.0: the cheapest", sampler.sample, prompts[0], 2, budget=least)
    other = SubnetChooser(dataclasses.replace(model.config, dtype="bfloat16"), MENU)
    refuse("elastic.config.dtype='bfloat16': the .* has 'float32'", model.sampler, elastic=other)
    wider = dataclasses.replace(chooser, choose=lambda budget: wide)
    refuse(r"subnet.mlp\[1\]=128", model.sampler, elastic=wider, budget=budget)
