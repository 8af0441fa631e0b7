"""Hugging Face checkpoints in and out, one declarative two-way table per family.

Supported: Llama 1, 2, 3, Mistral, Qwen 2, Qwen 3, Gemma 2, GPT-2, GPT-NeoX (Pythia), Nemotron; of
encoders BERT (TinyBERT, MiniLM), DistilBERT, RoBERTa; of encoder-decoders T5 (1.0, 1.1, Flan-T5). Neither
torch nor transformers is needed. How exits are stored: `elastic_lm.hf.tensors`.
"""

from etils import epy as _epy

with _epy.lazy_api_imports(globals()):
    from elastic_lm.hf.config_json import config_from_hf, config_to_hf
    from elastic_lm.hf.exporting import export
    from elastic_lm.hf.loading import load
    from elastic_lm.hf.pushing import push
    from elastic_lm.hf.registry import FAMILIES

__all__ = [
    "FAMILIES",
    "config_from_hf",
    "config_to_hf",
    "export",
    "load",
    "push",
]


def __dir__() -> list[str]:
    return __all__
