"""The shapes of the four toys, as Hugging Face configs with the upstream keys."""

from __future__ import annotations

from typing import Any

from refmodels.toys.vocabulary import BOS_ID, END_ID, PAD_ID, SPECIAL_TOKENS, VOCABULARY_SIZE

_IDS = {"bos_token_id": BOS_ID, "eos_token_id": END_ID, "pad_token_id": PAD_ID}
_POSITIONS = 256
QWEN_SEQ_LENGTH = 64
"""Short on purpose: `recall_long` prompts are up to 2.9 times as long, so dynamic NTK and logn are at work."""

CONFIGS: dict[str, dict[str, Any]] = {
    "chatglm2": {
        "model_type": "chatglm",
        "architectures": ["ChatGLMModel"],
        "add_bias_linear": False,
        "add_qkv_bias": True,
        "apply_query_key_layer_scaling": True,
        "apply_residual_connection_post_layernorm": False,
        "attention_softmax_in_fp32": True,
        "ffn_hidden_size": 352,
        "fp32_residual_connection": False,
        # Which no upstream key says.
        "glm_generation": "chatglm2",
        "hidden_size": 128,
        "kv_channels": 32,
        "layernorm_epsilon": 1e-05,
        "multi_query_attention": True,
        "multi_query_group_num": 2,
        "num_attention_heads": 4,
        "num_layers": 5,
        "padded_vocab_size": VOCABULARY_SIZE,
        "post_layer_norm": True,
        "rmsnorm": True,
        "seq_length": _POSITIONS,
        "tie_word_embeddings": False,
        "torch_dtype": "float16",
        "use_cache": True,
        **_IDS,
    },
    # Baichuan2 7B: rotary positions and a normalized head, for which upstream has no key.
    "baichuan": {
        "model_type": "baichuan",
        "architectures": ["BaichuanForCausalLM"],
        "hidden_act": "silu",
        "hidden_size": 128,
        "intermediate_size": 352,
        "max_position_embeddings": _POSITIONS,
        "model_max_length": _POSITIONS,
        "norm_head": True,
        "num_attention_heads": 4,
        "num_hidden_layers": 5,
        "position": "rope",
        "rms_norm_eps": 1e-06,
        "tie_word_embeddings": False,
        "torch_dtype": "float16",
        "use_cache": True,
        "vocab_size": VOCABULARY_SIZE,
        **_IDS,
    },
    "qwen": {
        "model_type": "qwen",
        "architectures": ["QWenLMHeadModel"],
        "hidden_size": 128,
        "intermediate_size": 704,
        "kv_channels": 32,
        "layer_norm_epsilon": 1e-06,
        "max_position_embeddings": _POSITIONS,
        "no_bias": True,
        "num_attention_heads": 4,
        "num_hidden_layers": 5,
        "rotary_emb_base": 10000,
        "rotary_pct": 1.0,
        "scale_attn_weights": True,
        "seq_length": QWEN_SEQ_LENGTH,
        "tie_word_embeddings": False,
        "torch_dtype": "float16",
        "use_cache": True,
        "use_dynamic_ntk": True,
        "use_logn_attn": True,
        "vocab_size": VOCABULARY_SIZE,
    },
    "gpt": {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-05,
        "n_ctx": _POSITIONS,
        "n_embd": 128,
        "n_head": 4,
        "n_layer": 5,
        "n_positions": _POSITIONS,
        "tie_word_embeddings": True,
        "torch_dtype": "float16",
        "vocab_size": VOCABULARY_SIZE,
        **_IDS,
    },
}


def generation_config(name: str) -> dict[str, Any]:
    """The toy's generation_config.json: greedy, ends at the end token."""
    config: dict[str, Any] = {**_IDS, "do_sample": False, "max_new_tokens": 32}
    if name == "baichuan":
        config |= {"user_token_id": SPECIAL_TOKENS.index("<user>"), "assistant_token_id": SPECIAL_TOKENS.index("<bot>")}
    return config
