"""Pretrained language models whose compute is a dial, in JAX.

    import elastic_lm as el
    model, params = el.load("path/or/hf-dir")

Every name below is imported when it is first used, so `import elastic_lm` is instant.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from elastic_lm import (
        calibrate,
        checkpoint,
        data,
        evaluate,
        hf,
        methods,
        render,
        sharding,
        testing,
        train,
    )
    from elastic_lm.calibrate.risk_control import RiskControl
    from elastic_lm.calibrate.routing_rule import RoutingRule
    from elastic_lm.calibrate.thresholds import ConfidenceExit
    from elastic_lm.config import ExitConfig, ModelConfig, RopeConfig
    from elastic_lm.data.tokenizer import Tokenizer
    from elastic_lm.decode.cascade import Cascade
    from elastic_lm.decode.elastic import Elastic
    from elastic_lm.decode.measuring import measure_routing
    from elastic_lm.decode.policies import DecayedExit, DepthSchedule, StaticExit
    from elastic_lm.decode.sampler import Sampler
    from elastic_lm.decode.text_to_text import TextToText
    from elastic_lm.elastic import Budget, Menu, Subnet
    from elastic_lm.embedded import embedded_model
    from elastic_lm.encoder_config import EncoderConfig
    from elastic_lm.encoder_decoder_config import EncoderDecoderConfig
    from elastic_lm.latency_table import LatencyTable
    from elastic_lm.loading import load
    from elastic_lm.methods.ee_tuning import attach_exits
    from elastic_lm.models.decoder import Decoder
    from elastic_lm.models.encoder import Encoder
    from elastic_lm.models.encoder_decoder import EncoderDecoder
    from elastic_lm.models.task_heads import attach_task_exits, attach_task_head
    from elastic_lm.slicing import slice_params

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
    "EncoderConfig": "encoder_config",
    "attach_task_exits": "models.task_heads",
    "attach_task_head": "models.task_heads",
    "Budget": "elastic",
    "Menu": "elastic",
    "Subnet": "elastic",
    "Cascade": "decode.cascade",
    "ConfidenceExit": "calibrate.thresholds",
    "DecayedExit": "decode.policies",
    "LatencyTable": "latency_table",
    "DepthSchedule": "decode.policies",
    "RiskControl": "calibrate.risk_control",
    "RoutingRule": "calibrate.routing_rule",
    "measure_routing": "decode.measuring",
    "StaticExit": "decode.policies",
    "Decoder": "models.decoder",
    "Elastic": "decode.elastic",
    "EncoderDecoder": "models.encoder_decoder",
    "EncoderDecoderConfig": "encoder_decoder_config",
    "ExitConfig": "config",
    "ModelConfig": "config",
    "RopeConfig": "config",
    "Sampler": "decode.sampler",
    "TextToText": "decode.text_to_text",
    "Tokenizer": "data.tokenizer",
    "attach_exits": "methods.ee_tuning",
    "embedded_model": "embedded",
    "load": "loading",
    "slice_params": "slicing",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"elastic_lm.{_HOMES[name]}"), name)
    if name in __all__:
        return importlib.import_module(f"elastic_lm.{name}")
    raise AttributeError(f"module 'elastic_lm' has no attribute {name!r}; public names: {', '.join(__all__)}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
