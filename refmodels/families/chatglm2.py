"""ChatGLM2-6B, ChatGLM3-6B and GLM-4-9B (the remote code, model_type "chatglm"), with their long-context models.

Upstream: modeling_chatglm.py of THUDM/chatglm2-6b, chatglm3-6b, chatglm3-6b-128k and glm-4-9b-chat.  The first half of
each head is rotated in interleaved pairs.  ChatGLM2 makes the rotary table wholly in the working dtype, angles
included, and divides positions by `rope_ratio`; the others make it in fp32, cast it, and multiply the base.
"""

from __future__ import annotations

from dataclasses import replace

from refmodels.checkpoints.weights import Layout
from refmodels.families.chatglm2_generation import generation_of
from refmodels.families.config import Config, Family
from refmodels.spec import AttentionSpec, MlpSpec, ModelSpec, NormSpec, RopeSpec


def _spec(config: Config) -> ModelSpec:
    config.require("position_encoding_2d", None, None)
    config.require("rotary_percent", 0.5, 0.5)
    config.require("tie_word_embeddings", False, False)
    config.require("interleaved_qkv", False, False)
    config.require("rmsnorm", True, True)
    config.require("post_layer_norm", True, True)
    config.require("apply_residual_connection_post_layernorm", False, False)
    config.require("fp32_residual_connection", False, False)
    config.require("pre_seq_len", None, None)
    config.require("quantization_bit", 0, 0)
    heads = config.get(int, "num_attention_heads")
    head_dim = config.get(int, "kv_channels")
    multi_query = config.get(bool, "multi_query_attention", default=False)
    ratio = config.get(float, "rope_ratio", default=1.0)
    generation = generation_of(config)
    second = generation == "chatglm2"
    bias = config.get(bool, "add_bias_linear", default=False)
    # GLM-4 was made with a ratio from the start.
    longer = {"chatglm2": "-32k", "chatglm3": "-long"}.get(generation, "") if ratio != 1.0 else ""
    return ModelSpec(
        family="chatglm2",
        variant=f"{generation}{longer}",
        vocab_size=config.get(int, "padded_vocab_size"),
        hidden_size=config.get(int, "hidden_size"),
        layers=config.get(int, "num_layers"),
        max_positions=config.get(int, "seq_length"),
        norm=NormSpec(kind="rms", eps=config.get(float, "layernorm_epsilon"), weight_in_float=True),
        attention=AttentionSpec(
            heads=heads,
            kv_heads=config.get(int, "multi_query_group_num") if multi_query else heads,
            head_dim=head_dim,
            qkv_bias=bias or config.get(bool, "add_qkv_bias", default=False),
            out_bias=bias,
            scale=head_dim**-0.5,
            upstream_arithmetic="sdpa",
        ),
        mlp=MlpSpec(width=config.get(int, "ffn_hidden_size"), activation="silu", gated=True, bias=bias),
        position="rope",
        rope=RopeSpec(
            dim=head_dim // 2,
            theta=10000.0 * (1.0 if second else ratio),
            position_divisor=ratio if second else 1.0,
            interleaved=True,
            table="working_arithmetic" if second else "working",
        ),
        chat_format=generation,
    )


_LAYOUT = Layout(
    embed="transformer.embedding.word_embeddings",
    block="transformer.encoder.layers.{i}",
    attn_norm="input_layernorm",
    qkv=("self_attention.query_key_value",),
    attn_out="self_attention.dense",
    mlp_norm="post_attention_layernorm",
    gate="mlp.dense_h_to_4h",
    up="mlp.dense_h_to_4h",
    mlp_out="mlp.dense_4h_to_h",
    final_norm="transformer.encoder.final_layernorm",
    head="transformer.output_layer",
)


def _layout(spec: ModelSpec) -> Layout:
    return replace(_LAYOUT, fused_by_head=spec.attention.kv_heads == spec.attention.heads)


FAMILY = Family(
    name="chatglm2",
    model_types={"chatglm": ("ChatGLMModel", "ChatGLMForConditionalGeneration")},
    describes="ChatGLM2-6B, ChatGLM3-6B and their long-context models, GLM-4-9B (remote code)",
    spec=_spec,
    layout=_layout,
    harmless=(
        *("apply_query_key_layer_scaling", "attention_softmax_in_fp32", "original_rope", "prefix_projection"),
        *("num_hidden_layers", "vocab_size"),
    ),
    ignored=(r"transformer\.rotary_pos_emb\.inv_freq",),
)
