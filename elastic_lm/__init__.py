"""Pretrained language models whose compute is a dial, in JAX.

    import elastic_lm as el
    model, params = el.load("path/or/hf-dir")

Every name below is imported when it is first used, so `import elastic_lm` is instant.
"""

from etils import epy as _epy

with _epy.lazy_api_imports(globals()):
    from elastic_lm import cascade, data, depth, evaluate, hf, testing, train, width
    from elastic_lm.bench.latency_build import build as measure_latency
    from elastic_lm.cascade.cascade import Cascade
    from elastic_lm.cascade.measure import measure_cascade
    from elastic_lm.cascade.rule import CascadeRule
    from elastic_lm.checkpoints.embedded import embedded_model
    from elastic_lm.checkpoints.loading import load
    from elastic_lm.config.data import DataConfig
    from elastic_lm.config.drafter import Drafter
    from elastic_lm.config.encoder import EncoderConfig
    from elastic_lm.config.encoder_decoder import EncoderDecoderConfig
    from elastic_lm.config.log import LogConfig
    from elastic_lm.config.mesh import MeshConfig
    from elastic_lm.config.model import ExitConfig, ModelConfig
    from elastic_lm.config.rope import RopeConfig
    from elastic_lm.config.subnet import Budget, Menu, Subnet
    from elastic_lm.config.task import TaskConfig
    from elastic_lm.cost.latency_table import LatencyTable
    from elastic_lm.data.tokenizer import Tokenizer
    from elastic_lm.decode.chat import Chat
    from elastic_lm.decode.options import DecodeOptions
    from elastic_lm.decode.prefix import PrefixCache
    from elastic_lm.decode.sampler import Sampler
    from elastic_lm.decode.seq2seq import TextToText
    from elastic_lm.decode.setting_choice import Choice, Setting, choose
    from elastic_lm.depth.guarantee import RiskControl
    from elastic_lm.depth.policies import ConfidenceExit, DecayedExit, DepthSchedule, StaticExit
    from elastic_lm.files.compilation_cache import use_compilation_cache
    from elastic_lm.meeting import start_processes
    from elastic_lm.models.decoder import Decoder
    from elastic_lm.models.encoder import Encoder
    from elastic_lm.models.encoder_decoder import EncoderDecoder
    from elastic_lm.models.exits import attach_exits
    from elastic_lm.models.registry import init_params
    from elastic_lm.models.task_heads import attach_task_exits, attach_task_head
    from elastic_lm.train.config import RunConfig, TaskRun, TrainConfig
    from elastic_lm.train.recipes import load_config
    from elastic_lm.train.run import fit
    from elastic_lm.width.chooser import SubnetChooser
    from elastic_lm.width.slicing import slice_params

from elastic_lm import deprecated as _deprecated

__version__ = "0.2.0.dev0"

__all__ = [
    "Budget",
    "Cascade",
    "CascadeRule",
    "Chat",
    "Choice",
    "ConfidenceExit",
    "DataConfig",
    "DecayedExit",
    "DecodeOptions",
    "Decoder",
    "DepthSchedule",
    "Drafter",
    "Encoder",
    "EncoderConfig",
    "EncoderDecoder",
    "EncoderDecoderConfig",
    "ExitConfig",
    "LatencyTable",
    "LogConfig",
    "Menu",
    "MeshConfig",
    "ModelConfig",
    "PrefixCache",
    "RiskControl",
    "RopeConfig",
    "RunConfig",
    "Sampler",
    "Setting",
    "StaticExit",
    "Subnet",
    "SubnetChooser",
    "TaskConfig",
    "TaskRun",
    "TextToText",
    "Tokenizer",
    "TrainConfig",
    "attach_exits",
    "attach_task_exits",
    "attach_task_head",
    "cascade",
    "choose",
    "data",
    "depth",
    "embedded_model",
    "evaluate",
    "fit",
    "hf",
    "init_params",
    "load",
    "load_config",
    "measure_cascade",
    "measure_latency",
    "slice_params",
    "start_processes",
    "testing",
    "train",
    "use_compilation_cache",
    "width",
]


def __dir__() -> list[str]:
    return [*__all__, "__version__"]


__getattr__ = _deprecated.with_old_names(globals()["__getattr__"], __all__)
