"""Evaluation: quality of every depth, agreement against thresholds, and the curves of both."""

from etils import epy as _epy

from elastic_lm.deprecated import old_room_names as _old_room_names

with _epy.lazy_api_imports(globals()):
    from elastic_lm.cascade.measure import measure_cascade
    from elastic_lm.cascade.plot import plot_cascade
    from elastic_lm.depth.observations import Observations, observe
    from elastic_lm.depth.quality import DepthQuality, by_depth, evaluate, shared_threshold_curve
    from elastic_lm.report.colour import legend, spans, to_ansi, to_html
    from elastic_lm.report.plots import SpeedPoint, exit_depths, quality_speed
    from elastic_lm.report.slices import FailureSlices, Slice, failure_slices, length_buckets

__all__ = [
    "DepthQuality",
    "FailureSlices",
    "Observations",
    "Slice",
    "SpeedPoint",
    "by_depth",
    "evaluate",
    "exit_depths",
    "failure_slices",
    "legend",
    "length_buckets",
    "measure_cascade",
    "observe",
    "plot_cascade",
    "quality_speed",
    "shared_threshold_curve",
    "spans",
    "to_ansi",
    "to_html",
]


def __dir__() -> list[str]:
    return __all__


__getattr__ = _old_room_names(__name__, globals()["__getattr__"])
