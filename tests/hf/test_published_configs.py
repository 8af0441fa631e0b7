"""What published config.json files say is read, and what no family knows is refused."""

import pytest

import elastic_lm as el
from elastic_lm.hf.family import REQUIRED, Family
from elastic_lm.hf.registry import FAMILIES

SIZES = {"vocab_size": 60000, "d_model": 64, "n_layers": 4, "n_decoder_layers": 4, "n_heads": 4, "d_mlp": 64}
FURTHER = {
    "deberta-v2": {"relative_attention": True, "share_att_key": True, "pos_att_type": ["p2c", "c2p"]},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "gptj": {"rotary_dim": 8},
    "helium": {"head_dim": 16},
    **{
        kind: {"decoder_attention_heads": 4, "decoder_ffn_dim": 64}
        for kind in ("bart", "mbart", "pegasus", "marian")
    },
}


def least(model_type: str, family: Family) -> dict:
    """The keys that a file of this family cannot do without, and those that agree with them."""
    due = [field for field in family.fields if field.default is REQUIRED or field.ours == "n_kv_heads"]
    sizes = {field.theirs: SIZES.get(field.ours, SIZES["n_heads"]) for field in due}
    return {"model_type": model_type, **sizes, **FURTHER.get(model_type, {})}


@pytest.mark.parametrize("model_type", sorted(FAMILIES))
def test_a_key_that_no_family_knows_is_refused_by_each(model_type: str) -> None:
    entries = least(model_type, FAMILIES[model_type])
    el.hf.config_from_hf(entries)
    with pytest.raises(ValueError, match=r"no_such_key=3: model_type"):
        el.hf.config_from_hf(entries | {"no_such_key": 3})


BART = {
    "activation_dropout": 0.0, "add_bias_logits": False, "add_final_layer_norm": False,
    "attention_dropout": 0.0, "bos_token_id": 0, "classif_dropout": 0.0, "decoder_start_token_id": 2,
    "dropout": 0.1, "early_stopping": True, "eos_token_id": 2, "gradient_checkpointing": False,
    "init_std": 0.02, "is_encoder_decoder": True, "model_type": "bart", "normalize_before": False,
    "num_beams": 4, "pad_token_id": 1, "scale_embedding": False, "static_position_embeddings": False,
}  # fmt: skip
PUBLISHED = {
    "google/gemma-2-9b": {
        "architectures": ["Gemma2ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
        "attn_logit_softcapping": 50.0, "bos_token_id": 2, "cache_implementation": "hybrid",
        "eos_token_id": 1, "final_logit_softcapping": 30.0, "head_dim": 256,
        "hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 3584,
        "initializer_range": 0.02, "intermediate_size": 14336, "max_position_embeddings": 8192,
        "model_type": "gemma2", "num_attention_heads": 16, "num_hidden_layers": 42,
        "num_key_value_heads": 8, "pad_token_id": 0, "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0, "sliding_window": 4096, "sliding_window_size": 4096,
        "torch_dtype": "float32", "transformers_version": "4.42.0.dev0", "use_cache": True,
        "vocab_size": 256000,
    },
    "distilbart": BART | {
        "activation_function": "gelu", "architectures": ["BartForConditionalGeneration"], "d_model": 1024,
        "decoder_attention_heads": 16, "decoder_ffn_dim": 4096, "decoder_layers": 6,
        "encoder_attention_heads": 16, "encoder_ffn_dim": 4096, "encoder_layers": 12,
        "extra_pos_embeddings": 2, "force_bos_token_to_be_generated": True, "length_penalty": 2.0,
        "max_length": 142, "max_position_embeddings": 1024, "min_length": 56, "no_repeat_ngram_size": 3,
        "normalize_embedding": True, "num_hidden_layers": 12, "output_past": True, "prefix": " ",
        "replacing_rate": 0, "save_step": 58, "student_decoder_layers": None,
        "student_encoder_layers": [0, 1, 2], "vocab_size": 50264,
    },
    "Helsinki-NLP/opus-mt": BART | {
        "activation_function": "swish", "architectures": ["MarianMTModel"], "bad_words_ids": [[65000]],
        "d_model": 512, "decoder_attention_heads": 8, "decoder_ffn_dim": 2048, "decoder_layers": 6,
        "decoder_start_token_id": 65000, "decoder_vocab_size": 65001, "encoder_attention_heads": 8,
        "encoder_ffn_dim": 2048, "encoder_layers": 6, "eos_token_id": 0, "forced_eos_token_id": 0,
        "max_length": 512, "max_position_embeddings": 512, "model_type": "marian",
        "normalize_embedding": False, "num_beams": 6, "num_hidden_layers": 6, "pad_token_id": 65000,
        "scale_embedding": True, "share_encoder_decoder_embeddings": True,
        "static_position_embeddings": True, "vocab_size": 65001,
    },
    "facebook/opt-1.3b": {
        "activation_dropout": 0.0, "activation_function": "relu", "architectures": ["OPTForCausalLM"],
        "attention_dropout": 0.0, "bos_token_id": 2, "do_layer_norm_before": True, "dropout": 0.1,
        "eos_token_id": 2, "ffn_dim": 8192, "hidden_size": 2048, "init_std": 0.02, "layerdrop": 0.0,
        "max_position_embeddings": 2048, "model_type": "opt", "num_attention_heads": 32,
        "num_hidden_layers": 24, "pad_token_id": 1, "prefix": "</s>", "torch_dtype": "float16",
        "transformers_version": "4.21.0.dev0", "use_cache": True, "vocab_size": 50272,
        "word_embed_proj_dim": 2048,
    },
    "cross-encoder/ms-marco": {
        "architectures": ["BertForSequenceClassification"], "attention_probs_dropout_prob": 0.1,
        "classifier_dropout": None, "gradient_checkpointing": False, "hidden_act": "gelu",
        "hidden_dropout_prob": 0.1, "hidden_size": 384, "id2label": {"0": "LABEL_0"},
        "initializer_range": 0.02, "intermediate_size": 1536, "label2id": {"LABEL_0": 0},
        "layer_norm_eps": 1e-12, "max_position_embeddings": 512, "model_type": "bert",
        "num_attention_heads": 12, "num_hidden_layers": 6, "pad_token_id": 0,
        "position_embedding_type": "absolute",
        "sbert_ce_default_activation_function": "torch.nn.modules.linear.Identity",
        "sentence_transformers": {"activation_fn": "torch.nn.modules.linear.Identity", "version": "4.0.1"},
        "transformers_version": "4.4.0", "type_vocab_size": 2, "use_cache": True, "vocab_size": 30522,
    },
    "google/electra-base-discriminator": {
        "architectures": ["ElectraForPreTraining"], "attention_probs_dropout_prob": 0.1,
        "embedding_size": 768, "hidden_act": "gelu", "hidden_dropout_prob": 0.1, "hidden_size": 768,
        "initializer_range": 0.02, "intermediate_size": 3072, "layer_norm_eps": 1e-12,
        "max_position_embeddings": 512, "model_type": "electra", "num_attention_heads": 12,
        "num_hidden_layers": 12, "pad_token_id": 0, "position_embedding_type": "absolute",
        "summary_activation": "gelu", "summary_last_dropout": 0.1, "summary_type": "first",
        "summary_use_proj": True, "transformers_version": "4.2.0", "type_vocab_size": 2,
        "use_cache": True, "vocab_size": 30522,
    },
    "bigscience/bloom-560m": {
        "apply_residual_connection_post_layernorm": False, "architectures": ["BloomForCausalLM"],
        "attention_dropout": 0.0, "attention_softmax_in_fp32": True, "bias_dropout_fusion": True,
        "bos_token_id": 1, "eos_token_id": 2, "hidden_dropout": 0.0, "initializer_range": 0.02,
        "layer_norm_epsilon": 1e-5, "masked_softmax_fusion": True, "model_type": "bloom", "n_embed": 1024,
        "n_inner": None, "n_layer": 24, "num_attention_heads": 16, "offset_alibi": 100, "pad_token_id": 3,
        "pretraining_tp": 1, "skip_bias_add": True, "skip_bias_add_qkv": False, "seq_length": 2048,
        "transformers_version": "4.20.0", "unk_token_id": 0, "use_cache": True, "vocab_size": 250880,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_published_files_are_read(name: str) -> None:
    config = el.hf.config_from_hf(PUBLISHED[name])
    assert config.vocab_size == PUBLISHED[name]["vocab_size"]


def test_gemma_2_has_one_window() -> None:
    entries = PUBLISHED["google/gemma-2-9b"] | {"sliding_window_size": 2048}
    with pytest.raises(ValueError, match=r"sliding_window_size=2048: must be sliding_window=4096"):
        el.hf.config_from_hf(entries)


def test_a_quantised_model_of_images_and_text_is_refused_by_name() -> None:
    inner = least("mistral", FAMILIES["mistral"])
    entries = {"model_type": "mistral3", "text_config": inner, "quantization_config": {"quant_method": "fp8"}}
    with pytest.raises(ValueError, match=r"quantization_config=.*quantised checkpoints are not supported"):
        el.hf.config_from_hf(entries)
