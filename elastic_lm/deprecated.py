"""Names of elastic_lm 0.1 that still work for one release: each warns once and leads to its new name."""

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
import types
import warnings
from collections.abc import Callable, Sequence
from typing import Any

# Name under `elastic_lm` in 0.1 -> its new home.
NAMES = {
    "Elastic": "elastic_lm.width.chooser.SubnetChooser",
    "RoutingRule": "elastic_lm.cascade.rule.CascadeRule",
    "measure_routing": "elastic_lm.cascade.measure.measure_cascade",
    "calibrate": "elastic_lm.depth",
    "checkpoint": "elastic_lm.checkpoints.native",
    "methods": "elastic_lm.train",
    "render": "elastic_lm.report.colour",
    "sharding": "elastic_lm.models.sharding",
}

# Names that modules of 0.1 had whose names are rooms today.
ROOM_NAMES: dict[str, dict[str, str]] = {
    "elastic_lm.config": {
        "DataConfig": "elastic_lm.config.data.DataConfig",
        "ExitConfig": "elastic_lm.config.model.ExitConfig",
        "MeshConfig": "elastic_lm.config.mesh.MeshConfig",
        "ModelConfig": "elastic_lm.config.model.ModelConfig",
        "RopeConfig": "elastic_lm.config.rope.RopeConfig",
        "RunConfig": "elastic_lm.train.config.RunConfig",
        "TrainConfig": "elastic_lm.train.config.TrainConfig",
    },
    "elastic_lm.cost": {
        "Cost": "elastic_lm.cost.counted.Cost",
        "CostTable": "elastic_lm.cost.counted.CostTable",
        "Load": "elastic_lm.cost.counted.Workload",
        "counted_table": "elastic_lm.cost.counted.counted_table",
        "model_cost": "elastic_lm.cost.counted.model_cost",
    },
    "elastic_lm.evaluate": {"plots": "elastic_lm.report.plots", "quality": "elastic_lm.depth.quality"},
}

# Modules that the documents of 0.1 imported from -> module of today, and names that differ there.
MODULES: dict[str, tuple[str, dict[str, str]]] = {
    "elastic_lm.calibrate": ("elastic_lm.depth", {}),
    "elastic_lm.calibrate.risk_control": ("elastic_lm.depth.guarantee", {}),
    "elastic_lm.calibrate.routing": (
        "elastic_lm.cascade.sweep",
        {"Measured": "Measurements", "RoutingCurve": "CascadeCurve", "RoutingPoint": "CascadePoint"},
    ),
    "elastic_lm.calibrate.routing_risk": (
        "elastic_lm.cascade.guarantee",
        {"RoutingRisk": "CascadeRisk", "RoutingGuarantee": "CascadeGuarantee"},
    ),
    "elastic_lm.calibrate.routing_rule": (
        "elastic_lm.cascade.rule",
        {"fit_routing": "fit_rule", "RoutingRule": "CascadeRule"},
    ),
    "elastic_lm.calibrate.routing_scores": ("elastic_lm.cascade.scores", {}),
    "elastic_lm.calibrate.thresholds": (
        "elastic_lm.depth.calibration",
        {"CurvePoint": "CalibrationPoint", "fit": "fit_thresholds"},
    ),
    "elastic_lm.checkpoint": ("elastic_lm.checkpoints.native", {}),
    "elastic_lm.decode.black_boxes": ("elastic_lm.cascade", {}),  # Endpoint and Function
    "elastic_lm.decode.choice": ("elastic_lm.cascade.multiple_choice", {"Choice": "MultipleChoice"}),
    "elastic_lm.decode.classifier": ("elastic_lm.cascade.classifier", {}),
    "elastic_lm.decode.generator": ("elastic_lm.cascade.generator", {}),
    "elastic_lm.decode.nested": (
        "elastic_lm.cascade.shared_model",
        {
            "nested_choice": "shared_multiple_choice",
            "nested_generator": "shared_generator",
            "nested_classifier": "shared_classifier",
        },
    ),
    "elastic_lm.decode.text_answerer": ("elastic_lm.cascade.text_answerer", {}),
    "elastic_lm.elastic": ("elastic_lm.config.subnet", {}),
    "elastic_lm.embedded": ("elastic_lm.checkpoints.embedded", {}),
    "elastic_lm.methods": ("elastic_lm.train", {}),
    "elastic_lm.methods.ee_tuning": ("elastic_lm.depth", {}),
    "elastic_lm.methods.search": ("elastic_lm.width.search", {}),
    "elastic_lm.render": ("elastic_lm.report.colour", {}),
    "elastic_lm.sharding": ("elastic_lm.models.sharding", {}),
    "elastic_lm.task_config": ("elastic_lm.config.task", {}),
}


def with_old_names(resolve: Callable[[str], Any], public: Sequence[str]) -> Callable[[str], Any]:
    """A module's `__getattr__` that knows the old names too.

    Args:
      resolve: the `__getattr__` of today's names.
      public: today's names, for the message.

    Returns:
      The function; it raises AttributeError for names that are neither old nor new.
    """

    def getattr_(name: str) -> Any:
        if name in NAMES:
            _warn(f"elastic_lm.{name}", NAMES[name])
            return _find(NAMES[name])
        if name not in public:
            names = ", ".join(public)
            raise AttributeError(f"module 'elastic_lm' has no attribute {name!r}; public names: {names}")
        return resolve(name)

    return getattr_


def old_room_names(room: str, resolve: Callable[[str], Any] | None = None) -> Callable[[str], Any]:
    """A room's `__getattr__` for the names that a module of the same name had in 0.1.

    Args:
      room: dotted name of the room.
      resolve: the `__getattr__` of today's names; None = the room has no lazy names.
    """

    def getattr_(name: str) -> Any:
        if name in ROOM_NAMES[room]:
            _warn(f"{room}.{name}", ROOM_NAMES[room][name])
            return _find(ROOM_NAMES[room][name])
        if resolve is None:
            raise AttributeError(f"module {room!r} has no attribute {name!r}")
        return resolve(name)

    return getattr_


def _warn(old: str, new: str) -> None:
    # Python shows a warning once for each place that calls; `stacklevel` makes that the user's line.
    warnings.warn(f"{old} is now {new}; the old name goes in 0.3", DeprecationWarning, stacklevel=3)


def _find(dotted: str) -> Any:
    """The module, or the name in a module, of a dotted path."""
    try:
        return importlib.import_module(dotted)
    except ModuleNotFoundError:
        module, _, name = dotted.rpartition(".")
        return getattr(importlib.import_module(module), name)


class _OldModules(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Imports an old module as a stand-in whose names are those of the module of today."""

    def find_spec(
        self, fullname: str, path: Any = None, target: Any = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname not in MODULES:
            return None
        return importlib.util.spec_from_loader(fullname, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return types.ModuleType(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        new, renamed = MODULES[module.__name__]
        _warn(module.__name__, new)
        home = importlib.import_module(new)

        def getattr_(name: str) -> Any:
            return getattr(home, renamed.get(name, name))

        module.__dict__["__getattr__"] = getattr_


sys.meta_path.append(_OldModules())
