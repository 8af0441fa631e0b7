"""Cascade, the third dial: a Swift model answers, larger ones are asked when it is not sure (E-LANG)."""

from etils import epy as _epy

with _epy.lazy_api_imports(globals()):
    from elastic_lm.cascade.answerer import Answer, Answerer
    from elastic_lm.cascade.cascade import Cascade
    from elastic_lm.cascade.classifier import Classifier
    from elastic_lm.cascade.endpoint import Endpoint
    from elastic_lm.cascade.function import Function
    from elastic_lm.cascade.generator import Generator
    from elastic_lm.cascade.guarantee import CascadeGuarantee, CascadeRisk
    from elastic_lm.cascade.joint import JointMeasurements, JointPoint
    from elastic_lm.cascade.joint_rule import JointRule, fit_joint, load_rule
    from elastic_lm.cascade.measure import MeasuredMembers, MeasuredPair, measure_cascade, measure_members
    from elastic_lm.cascade.multiple_choice import MultipleChoice
    from elastic_lm.cascade.plot import plot_cascade
    from elastic_lm.cascade.results import CascadeResult, CascadeStatistics, MemberStatistics
    from elastic_lm.cascade.rule import CascadeRule, Stage, fit_rule
    from elastic_lm.cascade.scores import Scoring
    from elastic_lm.cascade.shared_model import (
        shared_classifier,
        shared_generator,
        shared_members,
        shared_multiple_choice,
    )
    from elastic_lm.cascade.sweep import (
        ALWAYS_SUPER,
        ALWAYS_SWIFT,
        CascadeCurve,
        CascadePoint,
        Measurements,
    )
    from elastic_lm.cascade.text_answerer import TextAnswerer

__all__ = [
    "ALWAYS_SUPER",
    "ALWAYS_SWIFT",
    "Answer",
    "Answerer",
    "Cascade",
    "CascadeCurve",
    "CascadeGuarantee",
    "CascadePoint",
    "CascadeResult",
    "CascadeRisk",
    "CascadeRule",
    "CascadeStatistics",
    "Classifier",
    "Endpoint",
    "Function",
    "Generator",
    "JointMeasurements",
    "JointPoint",
    "JointRule",
    "MeasuredMembers",
    "MeasuredPair",
    "Measurements",
    "MemberStatistics",
    "MultipleChoice",
    "Scoring",
    "Stage",
    "TextAnswerer",
    "fit_joint",
    "fit_rule",
    "load_rule",
    "measure_cascade",
    "measure_members",
    "plot_cascade",
    "shared_classifier",
    "shared_generator",
    "shared_members",
    "shared_multiple_choice",
]


def __dir__() -> list[str]:
    return __all__
