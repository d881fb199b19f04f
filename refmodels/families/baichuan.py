"""Baichuan 7B (RoPE) and 13B (ALiBi), Baichuan2 7B and 13B (NormHead).

One model_type covers four architectures.  RoPE models have `max_position_embeddings` in their config; NormHead is in no
key (upstream ships another modeling file): it follows from the published vocabulary sizes, 64000 without and 125696
with it, from `norm_head` in the config, or from the variant that the caller names.
"""

from __future__ import annotations

from dataclasses import replace

from refmodels.errors import LogitLockError
from refmodels.families.config import LLAMA_LAYOUT, Config, Family
from refmodels.spec import AttentionSpec, MlpSpec, ModelSpec, NormSpec, RopeSpec

_NORM_HEAD_BY_VOCABULARY = {64000: False, 125696: True}


def _norm_head(config: Config, vocab_size: int) -> bool:
    for source in (config.variant, config.data):
        if source.get("norm_head") is not None:
            return bool(source["norm_head"])
    if vocab_size not in _NORM_HEAD_BY_VOCABULARY:
        raise LogitLockError(
            f"{config.where} does not say whether this Baichuan normalizes its head, and vocab_size {vocab_size} is "
            'neither 64000 nor 125696; add "norm_head": true (Baichuan2) or false (Baichuan)'
        )
    return _NORM_HEAD_BY_VOCABULARY[vocab_size]


def _spec(config: Config) -> ModelSpec:
    hidden = config.get(int, "hidden_size")
    heads = config.get(int, "num_attention_heads")
    head_dim = config.divided(hidden, heads)
    vocab_size = config.get(int, "vocab_size")
    second = _norm_head(config, vocab_size)
    rope = config.variant.get("position", "rope" if config.has("max_position_embeddings") else "alibi") == "rope"
    return ModelSpec(
        family="baichuan",
        variant=f"baichuan{'2' if second else ''}-{'7b' if rope else '13b'}",
        vocab_size=vocab_size,
        hidden_size=hidden,
        layers=config.get(int, "num_hidden_layers"),
        max_positions=config.get(int, "max_position_embeddings", "model_max_length"),
        norm=NormSpec(kind="rms", eps=config.get(float, "rms_norm_eps")),
        attention=AttentionSpec(
            heads=heads,
            kv_heads=heads,
            head_dim=head_dim,
            qkv_bias=False,
            out_bias=False,
            scale=head_dim**-0.5,
            upstream_arithmetic=("sdpa" if second else "eager_divide_float32") if rope else "eager_divide",
        ),
        mlp=MlpSpec(
            width=config.get(int, "intermediate_size"),
            activation=config.activation("hidden_act"),
            gated=True,
            bias=False,
        ),
        position="rope" if rope else "alibi",
        rope=RopeSpec(dim=head_dim, table="float32" if second else "working") if rope else None,
        tied_head=config.get(bool, "tie_word_embeddings", default=False),
        head_normalized=second,
        chat_format="baichuan2" if second else "raw" if rope else "baichuan",
    )


_LAYOUT = replace(LLAMA_LAYOUT, qkv=("self_attn.W_pack",))


FAMILY = Family(
    name="baichuan",
    model_types=("baichuan",),
    describes="Baichuan 7B and 13B, Baichuan2 7B and 13B (RoPE, ALiBi, NormHead)",
    spec=_spec,
    layout=lambda spec: _LAYOUT,
    ignored=(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq", r"model\.future_mask"),
)
