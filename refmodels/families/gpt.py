"""GPT-2, GPTBigCode (SantaCoder, StarCoder, Granite), SantaCoder as first published, and StarCoder2.

Upstream: transformers models/gpt2, models/gpt_bigcode, models/starcoder2 (read at 5.23.0), eager attention.

bigcode/santacoder says model_type "gpt2" and ships its own code, configuration_gpt2_mq.py and modeling_gpt2_mq.py:
GPT-2 with one key and value for all heads where `attention_head_type` is "multiquery", in modules q_attn and kv_attn
that are Conv1D as in GPT-2.  In which order that code rounds is not known here; its `upstream` numerics are exact ones.
"""

from __future__ import annotations

from dataclasses import replace

from refmodels.checkpoints.weights import Layout
from refmodels.errors import LogitLockError
from refmodels.families.config import LLAMA_LAYOUT, Config, Family
from refmodels.families.rope import read_rope
from refmodels.spec import AttentionArithmetic, AttentionSpec, MlpSpec, ModelSpec, NormSpec


def _spec(config: Config) -> ModelSpec:
    return _starcoder2(config) if config.data.get("model_type") == "starcoder2" else _learned(config)


def _learned(config: Config) -> ModelSpec:
    """GPT-2 and GPTBigCode: learned positions, LayerNorm, tied head."""
    bigcode = config.data.get("model_type") == "gpt_bigcode"
    santacoder = not bigcode and _is_santacoder(config)
    hidden = config.get(int, "n_embd", "hidden_size")
    heads = config.get(int, "n_head", "num_attention_heads")
    head_dim = config.divided(hidden, heads)
    multi_query = santacoder or (bigcode and config.get(bool, "multi_query", default=True))
    arithmetic: AttentionArithmetic = "eager_multiply_float32" if bigcode else "eager_multiply"
    if santacoder:
        arithmetic = "exact"
    elif config.get(bool, "reorder_and_upcast_attn", default=False):
        arithmetic = "eager_upcast"
    return ModelSpec(
        family="gpt",
        variant="gpt_bigcode" if bigcode else "santacoder" if santacoder else "gpt2",
        vocab_size=config.get(int, "vocab_size"),
        hidden_size=hidden,
        layers=config.get(int, "n_layer", "num_hidden_layers"),
        max_positions=config.get(int, "n_positions", "max_position_embeddings"),
        norm=NormSpec(kind="layer", eps=config.get(float, "layer_norm_epsilon", default=1e-5)),
        attention=AttentionSpec(
            heads=heads,
            kv_heads=1 if multi_query else heads,
            head_dim=head_dim,
            qkv_bias=True,
            out_bias=True,
            scale=head_dim**-0.5 if config.get(bool, "scale_attn_weights", default=True) else 1.0,
            scale_by_layer=config.get(bool, "scale_attn_by_inverse_layer_idx", default=False),
            upstream_arithmetic=arithmetic,
        ),
        mlp=MlpSpec(
            width=config.get(int, "n_inner", default=4 * hidden),
            activation=config.activation("activation_function", default="gelu_new"),
            gated=False,
            bias=True,
        ),
        position="learned",
        tied_head=config.get(bool, "tie_word_embeddings", default=True),
    )


def _is_santacoder(config: Config) -> bool:
    """Whether a config of type gpt2 is one of SantaCoder's code with one key and value for all heads.

    Raises:
        LogitLockError: the config and the tensors contradict each other.
    """
    kind = config.raw("attention_head_type")
    config.one_of("attention_head_type", ("multihead", "multiquery", None))
    names = config.beside.tensor_names
    stored = any(name.endswith(".attn.kv_attn.weight") for name in names)
    if names and kind is not None and stored != (kind == "multiquery"):
        raise LogitLockError(
            f"{config.where} says attention_head_type {kind!r}, but its weights have "
            f"{'' if stored else 'no '}tensors attn.kv_attn of one key and value for all heads"
        )
    if stored:
        config.facts.append("SantaCoder, because tensors attn.kv_attn are stored")
    return stored or kind == "multiquery"


def _starcoder2(config: Config) -> ModelSpec:
    config.require("mlp_type", "default", "default")
    config.require("norm_type", "layer_norm", "layer_norm")
    hidden = config.get(int, "hidden_size")
    heads = config.get(int, "num_attention_heads")
    head_dim = config.get(int, "head_dim", default=config.divided(hidden, heads))
    bias = config.get(bool, "use_bias", default=True)
    positions = config.get(int, "max_position_embeddings")
    return ModelSpec(
        family="gpt",
        variant="starcoder2",
        vocab_size=config.get(int, "vocab_size"),
        hidden_size=hidden,
        layers=config.get(int, "num_hidden_layers"),
        max_positions=positions,
        norm=NormSpec(kind="layer", eps=config.get(float, "norm_epsilon", default=1e-5)),
        attention=AttentionSpec(
            heads=heads,
            kv_heads=config.get(int, "num_key_value_heads", default=heads),
            head_dim=head_dim,
            qkv_bias=bias,
            out_bias=bias,
            scale=head_dim**-0.5,
            upstream_arithmetic="eager_multiply_float32",
            window=config.get(int, "sliding_window") if config.has("sliding_window") else None,
        ),
        mlp=MlpSpec(
            width=config.get(int, "intermediate_size"),
            activation=config.activation("hidden_act", default="gelu_pytorch_tanh"),
            gated=False,
            bias=bias,
        ),
        position="rope",
        rope=read_rope(config, head_dim=head_dim, positions=positions),
        tied_head=config.get(bool, "tie_word_embeddings", default=True),
    )


_GPT2 = Layout(
    embed="transformer.wte",
    position_embed="transformer.wpe",
    block="transformer.h.{i}",
    attn_norm="ln_1",
    qkv=("attn.c_attn",),
    attn_out="attn.c_proj",
    mlp_norm="ln_2",
    up="mlp.c_fc",
    mlp_out="mlp.c_proj",
    final_norm="transformer.ln_f",
    head="lm_head",
    conv1d=True,
)
_SANTACODER = replace(_GPT2, qkv=("attn.q_attn", "attn.kv_attn"))
_STARCODER2 = replace(LLAMA_LAYOUT, gate=None, up="mlp.c_fc", mlp_out="mlp.c_proj")


def _layout(spec: ModelSpec) -> Layout:
    if spec.variant == "starcoder2":
        return _STARCODER2
    if spec.variant == "santacoder":
        return _SANTACODER
    if spec.variant == "gpt_bigcode":
        return replace(_GPT2, conv1d=False, fused_by_head=spec.attention.kv_heads == spec.attention.heads)
    return _GPT2


FAMILY = Family(
    name="gpt",
    model_types={
        "gpt2": ("GPT2LMHeadModel", "GPT2LMHeadCustomModel"),
        "gpt_bigcode": ("GPTBigCodeForCausalLM",),
        "starcoder2": ("Starcoder2ForCausalLM",),
    },
    describes="GPT-2, SantaCoder, GPTBigCode (StarCoder, Granite), StarCoder2",
    spec=_spec,
    layout=_layout,
    harmless=(
        *("n_ctx", "num_key_value_heads", "attention_softmax_in_fp32", "scale_attention_softmax_in_fp32"),
        *("inference_runner", "validate_runner_input", "pre_allocate_kv_cache", "max_sequence_length"),
        "max_batch_size",
    ),
    ignored=(r"transformer\.h\.\d+\.attn\.(bias|masked_bias)", r".*rotary_emb\.inv_freq"),
)
