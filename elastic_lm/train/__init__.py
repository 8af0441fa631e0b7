"""Training: `fit` runs what a config describes; `load_config` reads one from a file.

A method of your own is a `Method` with a `MethodConfig`, added by `register`.
"""

from etils import epy as _epy

from elastic_lm.files import library_messages as _messages  # noqa: F401 - before grain is imported

with _epy.lazy_api_imports(globals()):
    from elastic_lm.config.data import DataConfig
    from elastic_lm.config.log import LogConfig
    from elastic_lm.config.mesh import MeshConfig
    from elastic_lm.config.task import TaskConfig
    from elastic_lm.models.decoder import stack_layers
    from elastic_lm.train.config import RunConfig, TaskRun, TrainConfig
    from elastic_lm.train.gin_files import load_gin
    from elastic_lm.train.loop import Stopped
    from elastic_lm.train.method import Method, MethodConfig
    from elastic_lm.train.pretraining import Pretraining, PretrainingConfig
    from elastic_lm.train.recipes import load_config
    from elastic_lm.train.registry import register
    from elastic_lm.train.run import fit
    from elastic_lm.train.step_model import save_step_model
    from elastic_lm.train.tasks.config import TaskTuningConfig
    from elastic_lm.train.tasks.tuning import TaskTuning

__all__ = [
    "DataConfig",
    "LogConfig",
    "MeshConfig",
    "Method",
    "MethodConfig",
    "Pretraining",
    "PretrainingConfig",
    "RunConfig",
    "Stopped",
    "TaskConfig",
    "TaskRun",
    "TaskTuning",
    "TaskTuningConfig",
    "TrainConfig",
    "fit",
    "load_config",
    "load_gin",
    "register",
    "save_step_model",
    "stack_layers",
]


def __dir__() -> list[str]:
    return __all__
