"""Training: `fit` runs what a config describes; `load_config` reads one from a file."""

from etils import epy as _epy

with _epy.lazy_api_imports(globals()):
    from elastic_lm.config.data import DataConfig
    from elastic_lm.config.mesh import MeshConfig
    from elastic_lm.config.task import TaskConfig
    from elastic_lm.train.config import RunConfig, TaskRun, TrainConfig
    from elastic_lm.train.load_config import load_config
    from elastic_lm.train.run import fit

__all__ = [
    "DataConfig",
    "MeshConfig",
    "RunConfig",
    "TaskConfig",
    "TaskRun",
    "TrainConfig",
    "fit",
    "load_config",
]


def __dir__() -> list[str]:
    return __all__
