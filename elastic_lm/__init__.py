"""Pretrained language models whose compute is a dial, in JAX.

    import elastic_lm as el
    model, params = el.load("path/or/hf-dir")

Every name below is imported when it is first used, so `import elastic_lm` is instant.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from elastic_lm import calibrate, data, evaluate, hf, methods, testing, train
    from elastic_lm.cascade.cascade import Cascade
    from elastic_lm.cascade.measure import measure_routing
    from elastic_lm.cascade.rule import RoutingRule
    from elastic_lm.checkpoints import native as checkpoint
    from elastic_lm.checkpoints.embedded import embedded_model
    from elastic_lm.checkpoints.load import load
    from elastic_lm.config.encoder import EncoderConfig
    from elastic_lm.config.encoder_decoder import EncoderDecoderConfig
    from elastic_lm.config.model import ExitConfig, ModelConfig, RopeConfig
    from elastic_lm.config.subnet import Budget, Menu, Subnet
    from elastic_lm.cost.latency_table import LatencyTable
    from elastic_lm.data.tokenizer import Tokenizer
    from elastic_lm.decode.sampler import Sampler
    from elastic_lm.decode.seq2seq import TextToText
    from elastic_lm.depth.guarantee import RiskControl
    from elastic_lm.depth.policies import ConfidenceExit, DecayedExit, DepthSchedule, StaticExit
    from elastic_lm.models import sharding
    from elastic_lm.models.decoder import Decoder
    from elastic_lm.models.encoder import Encoder
    from elastic_lm.models.encoder_decoder import EncoderDecoder
    from elastic_lm.models.exits import attach_exits
    from elastic_lm.models.task_heads import attach_task_exits, attach_task_head
    from elastic_lm.report import colour as render
    from elastic_lm.width.chooser import Elastic
    from elastic_lm.width.slicing import slice_params

__version__ = "0.1.0"

__all__ = [
    "Budget",
    "Cascade",
    "ConfidenceExit",
    "DecayedExit",
    "Decoder",
    "DepthSchedule",
    "Elastic",
    "Encoder",
    "EncoderConfig",
    "EncoderDecoder",
    "EncoderDecoderConfig",
    "ExitConfig",
    "LatencyTable",
    "Menu",
    "ModelConfig",
    "RiskControl",
    "RopeConfig",
    "RoutingRule",
    "Sampler",
    "StaticExit",
    "Subnet",
    "TextToText",
    "Tokenizer",
    "attach_exits",
    "attach_task_exits",
    "attach_task_head",
    "calibrate",
    "checkpoint",
    "data",
    "embedded_model",
    "evaluate",
    "hf",
    "load",
    "measure_routing",
    "methods",
    "render",
    "sharding",
    "slice_params",
    "testing",
    "train",
]

_HOMES = {
    "Encoder": "models.encoder",
    "EncoderConfig": "config.encoder",
    "attach_task_exits": "models.task_heads",
    "attach_task_head": "models.task_heads",
    "Budget": "config.subnet",
    "Menu": "config.subnet",
    "Subnet": "config.subnet",
    "Cascade": "cascade.cascade",
    "ConfidenceExit": "depth.calibration",
    "DecayedExit": "depth.policies",
    "LatencyTable": "cost.latency_table",
    "DepthSchedule": "depth.policies",
    "RiskControl": "depth.guarantee",
    "RoutingRule": "cascade.rule",
    "measure_routing": "cascade.measure",
    "StaticExit": "depth.policies",
    "Decoder": "models.decoder",
    "Elastic": "width.chooser",
    "EncoderDecoder": "models.encoder_decoder",
    "EncoderDecoderConfig": "config.encoder_decoder",
    "ExitConfig": "config.model",
    "ModelConfig": "config.model",
    "RopeConfig": "config.model",
    "Sampler": "decode.sampler",
    "TextToText": "decode.seq2seq",
    "Tokenizer": "data.tokenizer",
    "attach_exits": "depth.ee_tuning",
    "embedded_model": "checkpoints.embedded",
    "load": "checkpoints.load",
    "slice_params": "width.slicing",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"elastic_lm.{_HOMES[name]}"), name)
    if name in __all__:
        return importlib.import_module(f"elastic_lm.{name}")
    raise AttributeError(f"module 'elastic_lm' has no attribute {name!r}; public names: {', '.join(__all__)}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
