"""llama.cpp as a competitor: a model as a float32 GGUF file, decoded by the wheel `xllamacpp`.

Prompts and answers are token ids, so that the file names its tokens by number instead of holding a
tokenizer. Both `xllamacpp` and `gguf` are optional (`pip install "xllamacpp[all]"`).
"""

import importlib
import importlib.util
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from elastic_lm.config.model import ModelConfig
from elastic_lm.config.rope import RopeConfig
from elastic_lm.models.decoder import Params

KEPT = (
    *("vocab_size", "d_model", "n_layers", "n_heads", "n_kv_heads", "head_dim", "d_mlp", "max_len"),
    *("norm_eps", "tied", "dtype", "param_dtype", "family", "bos_id", "eos_ids"),
)  # what a Llama may choose; anything else makes another architecture of it
CONTEXT = 1024  # tokens that a call may hold
Generate = Callable[[list[int], int], list[int]]


def generator(config: ModelConfig, params: Params, path: Path, threads: int) -> Generate | None:
    """Greedy decoding by llama.cpp in float32, or None, with a line that says why.

    Args:
      config: of the model, without exits; static.
      params: canonical parameters.
      path: file that the model is written to, 4 bytes a parameter; it stays while llama.cpp runs.
      threads: cores that are used.

    Returns:
      A function of a prompt and a number of new tokens that gives these tokens; end-of-text tokens do not
      end it.
    """
    reason = _missing() or _other_than_llama(config)
    if reason:
        print(f"{reason}: real/full_vs_llamacpp is left out", file=sys.stderr)
        return None
    write_gguf(config, params, path)

    xllamacpp = importlib.import_module("xllamacpp")
    settings = xllamacpp.CommonParams()
    settings.model.path = str(path)
    settings.n_ctx = CONTEXT
    settings.n_gpu_layers = 0
    settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = threads
    settings.verbosity = 0
    server = xllamacpp.Server(settings)

    def generate(prompt: list[int], new_tokens: int) -> list[int]:
        answer = server.handle_completions(
            {
                "prompt": prompt,
                "max_tokens": new_tokens,
                "ignore_eos": True,
                "cache_prompt": False,
                "samplers": ["top_k"],
                "top_k": 1,
            }
        )
        return [int(token) for token in re.findall(r"<(\d+)>", answer["choices"][0]["text"])]

    return generate


def _missing() -> str:
    """Which package is not installed; "" = none."""
    missing = [name for name in ("xllamacpp", "gguf") if importlib.util.find_spec(name) is None]
    return f"{' and '.join(missing)} not installed" if missing else ""


def _other_than_llama(config: ModelConfig) -> str:
    """Why a model is no plain Llama; "" where it is one."""
    plain = ModelConfig(**{name: getattr(config, name) for name in KEPT}, rope=RopeConfig(config.rope.theta))
    return "" if config == plain else "the model is no plain Llama"


def write_gguf(config: ModelConfig, params: Params, path: Path) -> None:
    """Writes a plain Llama as a float32 GGUF file whose tokens are named by number.

    Args:
      config: of the model, without exits; static.
      params: canonical parameters.
      path: the file.
    """
    gguf = importlib.import_module("gguf")
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_len)
    writer.add_embedding_length(config.d_model)
    writer.add_block_count(config.n_layers)
    writer.add_feed_forward_length(config.d_mlp)
    writer.add_head_count(config.n_heads)
    writer.add_head_count_kv(config.n_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope.theta)
    writer.add_layer_norm_rms_eps(config.norm_eps)

    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([f"<{i}>" for i in range(config.vocab_size)])
    writer.add_token_types([gguf.TokenType.NORMAL] * config.vocab_size)
    writer.add_token_merges(["< >"])

    for name, array in tensors(config, params):
        writer.add_tensor(name, np.ascontiguousarray(array, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def tensors(config: ModelConfig, params: Params) -> Iterator[tuple[str, np.ndarray]]:
    """The parameters by llama.cpp's names.

    Args:
      config: of a plain Llama; static.
      params: its canonical parameters.

    Yields:
      (name, array) pairs, matrices as [out, in].
    """
    d, h = config.d_model, config.head_dim
    yield "token_embd.weight", np.asarray(params["embed"]["table"])
    yield "output_norm.weight", np.asarray(params["final_norm"]["scale"])
    if not config.tied:
        yield "output.weight", np.asarray(params["head"]["kernel"])

    for i in range(config.n_layers):
        layer, block = params[f"layers_{i}"], f"blk.{i}"
        qkv = np.asarray(layer["attn"]["qkv"]["kernel"])
        gate, up = np.asarray(layer["mlp"]["up"]["kernel"])
        yield f"{block}.attn_norm.weight", np.asarray(layer["attn_norm"]["scale"])
        yield f"{block}.attn_q.weight", _neighbouring(qkv[:, :-2].reshape(-1, h, d))
        yield f"{block}.attn_k.weight", _neighbouring(qkv[:, -2])
        yield f"{block}.attn_v.weight", qkv[:, -1].reshape(-1, d)
        yield f"{block}.attn_output.weight", np.asarray(layer["attn"]["out"]["kernel"])
        yield f"{block}.ffn_norm.weight", np.asarray(layer["mlp_norm"]["scale"])
        yield f"{block}.ffn_gate.weight", gate
        yield f"{block}.ffn_up.weight", up
        yield f"{block}.ffn_down.weight", np.asarray(layer["mlp"]["down"]["kernel"])


def _neighbouring(kernel_NHD: np.ndarray) -> np.ndarray:
    """[N H, D] with the two halves of every head interleaved: llama.cpp rotates neighbours in a Llama."""
    n, h, d = kernel_NHD.shape
    return kernel_NHD.reshape(n, 2, h // 2, d).swapaxes(1, 2).reshape(n * h, d)
