"""Names of 0.1 lead to today's and say so."""

import importlib
import sys

import pytest

import elastic_lm as el
from elastic_lm.deprecated import MODULES, NAMES, ROOM_NAMES


@pytest.mark.parametrize("name", NAMES)
def test_an_old_name_warns_and_leads_to_the_new_one(name: str) -> None:
    vars(el).pop(name, None)  # a stand-in that another test imported
    with pytest.warns(DeprecationWarning, match=f"elastic_lm.{name} is now {NAMES[name]}") as warned:
        found = getattr(el, name)
    assert len(warned) == 1
    assert warned[0].filename == __file__
    module, _, new = NAMES[name].rpartition(".")
    assert found is getattr(importlib.import_module(module), new)


@pytest.mark.parametrize("old", MODULES)
def test_an_old_module_warns_and_has_the_new_names(old: str) -> None:
    new, renamed = MODULES[old]
    sys.modules.pop(old, None)
    with pytest.warns(DeprecationWarning, match=f"{old} is now {new}"):
        module = importlib.import_module(old)
    home = importlib.import_module(new)
    for name, today in renamed.items():
        assert getattr(module, name) is getattr(home, today)


@pytest.mark.parametrize(("room", "name"), [(room, name) for room in ROOM_NAMES for name in ROOM_NAMES[room]])
def test_an_old_name_of_a_room_warns_and_leads_to_the_new_one(room: str, name: str) -> None:
    module = importlib.import_module(room)
    with pytest.warns(DeprecationWarning, match=f"{room}.{name} is now"):
        assert getattr(module, name) is not None
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = module.no_such_name


def test_a_name_that_never_was_is_an_import_error() -> None:
    with pytest.raises(ImportError):
        importlib.import_module("elastic_lm.calibrate.no_such_module")


def test_options_of_a_sampler_are_its_attributes_as_in_0_1() -> None:
    config = el.testing.tiny_config()
    sampler = el.Sampler(el.Decoder(config), el.testing.random_params(config), window=8)
    with pytest.warns(DeprecationWarning, match=r"Sampler.window is now Sampler.options.window") as warned:
        assert sampler.window == 8
    assert warned[0].filename == __file__
    with pytest.raises(AttributeError, match="no attribute 'no_such_name'"):
        _ = sampler.no_such_name
