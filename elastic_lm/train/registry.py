"""Training methods by name. A run names its method; the module is imported when it is needed.

Methods from outside the package are added by `register`, from a config file too:

    @el.train.register
    class MyMethod(MyMethodConfig, el.train.Method): ...
"""

import importlib
from typing import TYPE_CHECKING, Any, TypeVar

from elastic_lm.config.checks import require

if TYPE_CHECKING:
    from elastic_lm.train.method import Method

AnyMethod = TypeVar("AnyMethod", bound="type[Method[Any]]")

# Name in the `method` section -> where the class is.
METHODS: dict[str, str] = {
    "pretraining": "elastic_lm.train.pretraining.Pretraining",
    "ee_tuning": "elastic_lm.depth.ee_tuning.EETuning",
    "joint": "elastic_lm.depth.ee_tuning.JointTraining",
    "sorted_finetuning": "elastic_lm.depth.sorted_finetuning.SortedFineTuning",
    "self_supervised_exits": "elastic_lm.depth.self_supervised.SelfSupervisedExits",
    "flextron": "elastic_lm.width.elastic_training.ElasticTraining",
    "routers": "elastic_lm.width.router_training.RouterTraining",
    "task_tuning": "elastic_lm.train.tasks.tuning.TaskTuning",
}
_REGISTERED: "dict[str, type[Method[Any]]]" = {}


def names() -> tuple[str, ...]:
    """Names of all methods."""
    return (*METHODS, *_REGISTERED)


def names_with(ability: str) -> str:
    """The methods whose options say that they can do something, as a message lists them.

    Args:
      ability: a class attribute of `MethodConfig`: "trains_exits" or "trains_gates".
    """
    able = [name for name in names() if getattr(method_class(name).section, ability)]
    return " or ".join(filter(None, (", ".join(able[:-1]), *able[-1:])))


def register(method: AnyMethod) -> AnyMethod:
    """Adds a method of a user's own; a class decorator.

    Args:
      method: a `Method` whose `section` has a default `name`.

    Returns:
      The same class.

    Raises:
      ValueError: a method of the package has that name.

    Example:
      ```python
      import dataclasses

      import elastic_lm as el


      @dataclasses.dataclass(frozen=True, kw_only=True)
      class MineConfig(el.train.MethodConfig):
          name: str = "mine"


      @el.train.register
      @dataclasses.dataclass(frozen=True)
      class Mine(MineConfig, el.train.Method):
          section = MineConfig
      ```
    """
    name = method.section.name  # the default of a dataclass field is an attribute of the class
    require(name not in METHODS, "name", name, "a method of the package has this name; choose another")
    _REGISTERED[name] = method
    return method


def method_class(name: str) -> "type[Method[Any]]":
    """The class of a method.

    Args:
      name: as in the `method` section of a config.

    Raises:
      ValueError: there is no such method.
    """
    require(name in names(), "method.name", name, f"must be one of {', '.join(names())}")
    if name in _REGISTERED:
        return _REGISTERED[name]
    module, _, attribute = METHODS[name].rpartition(".")
    return getattr(importlib.import_module(module), attribute)
