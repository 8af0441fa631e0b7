"""Depth, the first dial: easy tokens leave the network after a few layers.

How exits learn (EE-Tuning, sorted fine-tuning, self-supervised exits), when a token leaves (confidence and
policies), and how thresholds are chosen (calibration, guarantee, forecast).
"""

from etils import epy as _epy

with _epy.lazy_api_imports(globals()):
    from elastic_lm.config.model import ExitConfig
    from elastic_lm.depth.calibration import calibrate
    from elastic_lm.depth.confidence import METRICS
    from elastic_lm.depth.ee_tuning import EETuning, EETuningConfig, JointTraining, JointTrainingConfig
    from elastic_lm.depth.fitting import fit_exits
    from elastic_lm.depth.forecasting import Forecast, forecast, forecast_outcome, weight_bytes
    from elastic_lm.depth.guarantee import Guarantee, RiskControl
    from elastic_lm.depth.observations import Observations, observe
    from elastic_lm.depth.per_exit import exit_thresholds
    from elastic_lm.depth.policies import ConfidenceExit, DecayedExit, DepthSchedule, ExitPolicy, StaticExit
    from elastic_lm.depth.preview_files import load_preview, save_preview
    from elastic_lm.depth.previewing import PreviewReport, fit_preview
    from elastic_lm.depth.self_supervised import SelfSupervisedConfig, SelfSupervisedExits
    from elastic_lm.depth.slices import exit_slices
    from elastic_lm.depth.sorted_finetuning import SortedFineTuning, SortedFineTuningConfig
    from elastic_lm.depth.subnet_exits import SubnetExits
    from elastic_lm.models.exits import attach_exits, extract, without_exits
    from elastic_lm.nn.preview import HeadPreview

__all__ = [
    "METRICS",
    "ConfidenceExit",
    "DecayedExit",
    "DepthSchedule",
    "EETuning",
    "EETuningConfig",
    "ExitConfig",
    "ExitPolicy",
    "Forecast",
    "Guarantee",
    "HeadPreview",
    "JointTraining",
    "JointTrainingConfig",
    "Observations",
    "PreviewReport",
    "RiskControl",
    "SelfSupervisedConfig",
    "SelfSupervisedExits",
    "SortedFineTuning",
    "SortedFineTuningConfig",
    "StaticExit",
    "SubnetExits",
    "attach_exits",
    "calibrate",
    "exit_slices",
    "exit_thresholds",
    "extract",
    "fit_exits",
    "fit_preview",
    "forecast",
    "forecast_outcome",
    "load_preview",
    "observe",
    "save_preview",
    "weight_bytes",
    "without_exits",
]


def __dir__() -> list[str]:
    return __all__
