"""The options of a sampler: each refusal names field, value and fix; keywords of `Sampler` build them."""

import dataclasses

import pytest

import elastic_lm as el
from elastic_lm.config.subnet import Budget, Menu, Subnet
from elastic_lm.decode.options import DecodeOptions
from elastic_lm.decode.sampler import Sampler
from elastic_lm.depth.policies import ConfidenceExit
from elastic_lm.models.decoder import Decoder
from elastic_lm.width.chooser import SubnetChooser

MENU = Menu(mlp=(0.5, 1.0), heads=(0.5, 1.0))


@pytest.fixture(scope="module")
def choices(model) -> dict[str, object]:
    """A value for every option that is not its default."""
    return {
        "exit": ConfidenceExit("margin", (0.5, 0.5), (1, 2)),
        "window": 4,
        "fire_share": 0.5,
        "stream_every": 3,
        "lossless": True,
        "draft": 2,
        "missing": "propagate",
        "together": True,
        "elastic": SubnetChooser(model.config, MENU),
        "budget": None,  # goes without a sub-network, and the other way round
        "subnet": Subnet.uniform(model.config, mlp=0.5),
        "keep_subnets": 2,
        "lookup": False,  # goes without propagation
        "drafter": None,  # goes without exits
        "preview": None,  # goes without sub-networks
        "slice_inside": True,
    }


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"window": 0}, r"window=0: must be at least 1"),
        ({"fire_share": 2.0}, r"fire_share=2.0: must be a share between 0 and 1"),
        ({"fire_share": -0.1}, r"fire_share=-0.1: must be a share between 0 and 1"),
        ({"stream_every": 0}, r"stream_every=0: must be at least 1"),
        ({"draft": 0}, r"draft=0: must be at least 1 and below window=16"),
        ({"draft": 8, "window": 8}, r"draft=8: must be at least 1 and below window=8"),
        ({"missing": "guess"}, r"missing='guess': must be exact or propagate"),
        ({"keep_subnets": 0}, r"keep_subnets=0: must be at least 1"),
        (
            {"budget": Budget(parameters=9)},
            r"budget=Budget.*: sub-networks for budgets are chosen by .*elastic=",
        ),
        (
            {"budget": Budget(parameters=9), "subnet": Subnet((0,), (8,), (2,), (1,), 32)},
            r"budget=Budget.*, subnet=Subnet.*: each says what runs; give one of them",
        ),
    ],
)
def test_each_refusal_names_field_value_and_fix(model, fields, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        DecodeOptions(**fields)
    with pytest.raises(ValueError, match=f"^{message}"):
        Sampler(Decoder(model.config), model.params, **fields)


def test_options_are_checked_against_the_model(model):
    other = dataclasses.replace(model.config, dtype="bfloat16")
    refused = {
        r"exits after layers \(1,\), the model has \(1, 2\)": {
            "exit": ConfidenceExit("margin", (0.5,), (1,))
        },
        r"elastic.config.dtype='bfloat16'": {"elastic": SubnetChooser(other, MENU)},
        r"subnet.mlp\[1\]=128": {"subnet": Subnet((0, 1, 2), (16, 128, 32), (2, 1, 2), (2, 2, 1), 32)},
    }
    for message, fields in refused.items():
        options = DecodeOptions(**fields)
        with pytest.raises(ValueError, match=message):
            options.check(model.config)
        with pytest.raises(ValueError, match=message):
            Sampler(Decoder(model.config), model.params, options=options)


def test_keywords_build_the_options(model, choices):
    assert set(choices) == {field.name for field in dataclasses.fields(DecodeOptions)}
    from_keywords = Sampler(Decoder(model.config), model.params, **choices)
    assert from_keywords.options == DecodeOptions(**choices)
    for name, value in choices.items():
        alone = Sampler(Decoder(model.config), model.params, **{name: value}).options
        assert alone == dataclasses.replace(DecodeOptions(), **{name: value})


def test_nothing_given_is_the_default(model):
    sampler = Sampler(Decoder(model.config), model.params)
    assert sampler.options == DecodeOptions()
    assert sampler.runs is None


def test_options_and_a_keyword_are_refused(model, choices):
    options = DecodeOptions()
    for name, value in choices.items():
        message = (
            rf"^{name}=.*: give either options or single fields; .*options=DecodeOptions\({name}=\.\.\.\)"
        )
        with pytest.raises(ValueError, match=message):
            Sampler(Decoder(model.config), model.params, options=options, **{name: value})


def test_a_keyword_that_is_no_option_is_refused(model):
    for options in (None, DecodeOptions()):
        with pytest.raises(TypeError, match="unexpected keyword argument 'windows'"):
            Sampler(Decoder(model.config), model.params, options=options, windows=4)


def test_options_do_not_change(model):
    options = DecodeOptions()
    with pytest.raises(dataclasses.FrozenInstanceError):
        options.window = 4  # pyright: ignore[reportAttributeAccessIssue]
    assert el.DecodeOptions is DecodeOptions


def test_options_decode_as_their_keywords_do(model, prompts, mixed):
    by_keywords = model.sampler(mixed[1], window=2, lossless=True, draft=1)
    by_options = Sampler(Decoder(model.config), model.params, options=by_keywords.options)
    expected, found = (sampler.sample(prompts[1], 6) for sampler in (by_keywords, by_options))
    assert (found.tokens, found.exit_layers) == (expected.tokens, expected.exit_layers)
    assert found.stats.drafted == expected.stats.drafted > 0
