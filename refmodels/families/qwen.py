"""Qwen v1 (1.8B, 7B, 14B, 72B; base and chat; both config generations), Qwen1.5 to Qwen3.

Upstream of v1: modeling_qwen.py of Qwen/Qwen-7B (December 2023), and its first revision (August 2023), told apart by
their config keys.
"""

from __future__ import annotations

from refmodels.checkpoints.weights import Layout
from refmodels.families.config import LLAMA_LAYOUT, Config, Family
from refmodels.families.qwen2 import qwen2_spec
from refmodels.spec import AttentionSpec, MlpSpec, ModelSpec, NormSpec, RopeSpec


def _spec(config: Config) -> ModelSpec:
    return _qwen1(config) if config.data.get("model_type") == "qwen" else qwen2_spec(config)


def _qwen1(config: Config) -> ModelSpec:
    first_generation = config.has("n_embd")
    heads = config.get(int, "num_attention_heads", "n_head")
    head_dim = config.get(int, "kv_channels", default=128)
    seq_length = config.get(int, "seq_length")
    bias = not config.get(bool, "no_bias", default=True)
    config.require("scale_attn_weights", True, True)
    config.require("use_cache_quantization", False, False)
    config.require("activation", "swiglu", "swiglu")
    config.require("pos_emb", "rotary", "rotary")
    config.require("apply_residual_connection_post_layernorm", False, False)
    return ModelSpec(
        family="qwen",
        variant="qwen",
        vocab_size=config.get(int, "padded_vocab_size", "vocab_size"),
        hidden_size=config.get(int, "hidden_size", "n_embd"),
        layers=config.get(int, "num_hidden_layers", "n_layer"),
        max_positions=config.get(int, "max_position_embeddings", "n_positions"),
        norm=NormSpec(kind="rms", eps=config.get(float, "layer_norm_epsilon")),
        attention=AttentionSpec(
            heads=heads,
            kv_heads=heads,
            head_dim=head_dim,
            qkv_bias=True,
            out_bias=bias,
            scale=head_dim**-0.5,
            upstream_arithmetic="eager_divide" if first_generation else "sdpa",
            logn_seq_length=seq_length if config.get(bool, "use_logn_attn", default=False) else None,
        ),
        # Both generations store twice the real width.
        mlp=MlpSpec(
            width=config.get(int, "intermediate_size", "ffn_hidden_size") // 2, activation="silu", gated=True, bias=bias
        ),
        position="rope",
        rope=RopeSpec(
            dim=int(head_dim * config.get(float, "rotary_pct", default=1.0)),
            theta=config.get(float, "rotary_emb_base", default=10000.0),
            ntk_seq_length=seq_length if config.get(bool, "use_dynamic_ntk", default=False) else None,
        ),
        position_origin="slot",
        tied_head=config.get(bool, "tie_word_embeddings", default=False),
        chat_format="qwen",
    )


_QWEN1 = Layout(
    embed="transformer.wte",
    block="transformer.h.{i}",
    attn_norm="ln_1",
    qkv=("attn.c_attn",),
    attn_out="attn.c_proj",
    mlp_norm="ln_2",
    # w2 is the gate: upstream computes w1(x) * silu(w2(x)).
    gate="mlp.w2",
    up="mlp.w1",
    mlp_out="mlp.c_proj",
    final_norm="transformer.ln_f",
    head="lm_head",
)


FAMILY = Family(
    name="qwen",
    model_types={
        "qwen": ("QWenLMHeadModel",),
        "qwen2": ("Qwen2ForCausalLM",),
        "qwen3": ("Qwen3ForCausalLM",),
    },
    describes="Qwen 1.8B, 7B, 14B, 72B (dynamic NTK, logn), Qwen1.5, Qwen2, Qwen2.5, Qwen3 (dense)",
    spec=_spec,
    layout=lambda spec: _QWEN1 if spec.variant == "qwen" else LLAMA_LAYOUT,
    harmless=("softmax_in_fp32", "sliding_window"),
    ignored=(r".*rotary_emb\.inv_freq", r"transformer\.h\.\d+\.attn\.(bias|masked_bias|logn_tensor)"),
)
