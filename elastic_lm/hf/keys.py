"""Which keys of config.json are understood: a key that nothing reads may change what the model computes.

Reading a config records every key that is looked at. Of the others, those pass that say nothing (null, or an
empty value), begin with "_", or are known to leave the model's output as it is; the rest are refused. A
checkpoint whose `model_type` was edited, or that carries a feature of its own, is then not computed wrongly
in silence.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

FULL = "full_attention"  # the kind of every layer where `layer_types` says nothing
SHOWN = 60  # characters of a value in a message

# Keys that say how a model was made, trained, stored or sampled from, whatever their values; and sizes under
# names that a family does not use, which the shapes of the tensors would contradict.
HARMLESS = re.compile(
    r"""_.* | .*token_ids? | .*token_index | .*dropout | .*dropout_(prob|rate|p) | .*_pdrop | .*layerdrop
    | initializer_.* | init_std | summary_.* | classifier_.* | .*_loss_coef | unsloth_.* | .*_version
    | transformers\.js.*
    | architectures | model_type | torch_dtype | dtype | auto_map | elastic | quantization_config
    | use_cache | use_flash_attn.* | .*attn_implementation | cache_implementation | deterministic_flash_attn
    | gradient_checkpointing | pretraining_tp | chunk_size_feed_forward | torchscript | use_bfloat16
    | tf_legacy_loss | reorder_and_upcast_attn | (scale_)?attention_softmax_in_fp32 | slow_but_exact
    | output_(past|attentions|hidden_states|scores|router_logits) | return_dict(_in_generate)?
    | id2label | label2id | num_labels | problem_type | finetuning_task | task_specific_params
    | sentence_transformers | sbert_ce_default_activation_function | neftune_noise_alpha
    | tokenizer_class | prefix | model_max_length | max_sequence_length | seq_length | n_ctx
    | is_decoder | is_encoder_decoder | is_llama_config | use_return_dict
    | max_length | min_length | max_new_tokens | do_sample | early_stopping | num_beams | num_beam_groups
    | diversity_penalty | temperature | top_k | top_p | typical_p | repetition_penalty | length_penalty
    | no_repeat_ngram_size | encoder_no_repeat_ngram_size | bad_words_ids | num_return_sequences
    | exponential_decay_length_penalty | (begin_)?suppress_tokens | remove_invalid_values
    | force_bos_token_to_be_generated | normalize_before_sampling
    | hidden_size | intermediate_size | num_hidden_layers
    | directionality | pooler_(fc_size|num_attention_heads|num_fc_layers|size_per_head|type)
    | tie_weights_ | sparse_pred(iction|_ignore_index) | router_jitter_noise""",
    re.VERBOSE,
)

# Keys that switch something on, with the values under which they do not.
OFF: dict[str, tuple[Any, ...]] = {
    "add_cross_attention": (False,),
    "alibi": (False,),
    "attention_bias": (False,),
    "attention_multiplier": (),
    "embedding_multiplier": (1,),
    "lm_head_bias": (False,),
    "logit_scale": (1,),
    "logits_scaling": (1,),
    "mlp_bias": (False,),
    "partial_rotary_factor": (1,),
    "position_embedding_type": ("absolute", "rope"),
    "qk_layernorm": (False,),
    "qkv_bias": (False,),
    "residual_multiplier": (1,),
    "rope_interleaved": (False,),
    "rotary_pct": (1,),
    "tie_encoder_decoder": (False,),
    "use_bias": (False,),
    "use_bidirectional_attention": (False,),
    "use_mrope": (False,),
    "use_qk_norm": (False,),
    "use_sliding_window": (False,),
}


class ReadKeys(Mapping[str, Any]):
    """A config.json that remembers which of its keys were looked at.

    Attributes:
      read: the keys that were asked for, whether the file has them or not.
    """

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._values = values
        self.read: set[str] = set()

    def __getitem__(self, key: str) -> Any:
        self.read.add(key)
        return self._values[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def unread(self) -> dict[str, Any]:
        """The entries that nothing looked at."""
        return {key: value for key, value in self._values.items() if key not in self.read}


def refuse_unread(model_type: str, hf: ReadKeys, ignored: Mapping[str, tuple[Any, ...] | None]) -> None:
    """Refuses a key that nothing has read and that may change what the model computes.

    Args:
      model_type: of the file.
      hf: the file, after it was read.
      ignored: keys that models of this type do not compute with, with the values that they may have; None =
        any value.

    Raises:
      ValueError: names the key, its value, and what to do.
    """
    for key, value in hf.unread().items():
        allowed = ignored.get(key, OFF.get(key, ()))
        empty = value is None or value in ("", [], {})
        plain = key == "layer_types" and isinstance(value, list) and value == [FULL] * len(value)
        if (
            empty
            or plain
            or allowed is None
            or value in allowed
            or (key not in OFF and HARMLESS.fullmatch(key))
        ):
            continue
        shown = repr(value) if len(repr(value)) <= SHOWN else f"{repr(value)[:SHOWN]}..."
        raise ValueError(
            f"{key}={shown}: model_type {model_type!r} does not read this key here, and it may change what "
            "the model computes; use the model's own model_type, or remove the key if it changes nothing"
        )
