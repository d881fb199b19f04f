"""Baichuan 7B (RoPE) and 13B (ALiBi), Baichuan2 7B and 13B (NormHead).

One model_type covers four architectures, and no key of upstream's says which: it ships another modeling file with each.
RoPE or ALiBi follows from the published shapes, 32 heads of 4096 or 40 of 5120, from tensors, and from the code beside
the weights (which is read, never run); NormHead from the published vocabularies, 64000 without and 125696 with it, and
from the code.  `position` ("rope", "alibi") and `norm_head` say it for other models, in the config or as a variant.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from refmodels.errors import LogitLockError
from refmodels.families.config import LLAMA_LAYOUT, Config, Family
from refmodels.spec import AttentionSpec, MlpSpec, ModelSpec, NormSpec, RopeSpec

_CODE = "modeling_baichuan.py"
_POSITION_BY_SHAPE = {(4096, 32): "rope", (5120, 40): "alibi"}
_NORM_HEAD_BY_VOCABULARY = {64000: False, 125696: True}


def _norm_head(config: Config, vocab_size: int) -> bool:
    said = config.option("norm_head")
    if said is not None:
        return bool(said)
    code = config.beside.text(_CODE)
    if code:
        config.facts.append(f"NormHead, because {_CODE} has it" if "NormHead" in code else f"no NormHead in {_CODE}")
        return "NormHead" in code
    if vocab_size not in _NORM_HEAD_BY_VOCABULARY:
        raise LogitLockError(
            f"{config.where} does not say whether this Baichuan normalizes its head, and vocab_size {vocab_size} is "
            'neither 64000 nor 125696; add "norm_head": true (Baichuan2) or false (Baichuan)'
        )
    return _NORM_HEAD_BY_VOCABULARY[vocab_size]


def _position(config: Config, hidden: int, heads: int) -> str:
    told = config.told("position", ("rope", "alibi"), _position_facts(config, hidden, heads))
    if told is not None:
        return told
    likely, having = ("rope", "a") if config.has("max_position_embeddings") else ("alibi", "no")
    config.warnings.append(
        f"{config.where} is taken for a model with {likely}, because it has {having} key max_position_embeddings; if "
        'that is wrong, add "position": "rope" or "alibi" to it'
    )
    return likely


def _position_facts(config: Config, hidden: int, heads: int) -> Iterator[tuple[str, str]]:
    by_shape = _POSITION_BY_SHAPE.get((hidden, heads))
    if by_shape is not None:
        yield by_shape, f"hidden_size is {hidden} with {heads} heads"
    if any(name.endswith("rotary_emb.inv_freq") for name in config.beside.tensor_names):
        yield "rope", "tensors rotary_emb.inv_freq are stored"
    code = config.beside.text(_CODE)
    for position, word in (("rope", "RotaryEmbedding"), ("alibi", "_gen_alibi_mask")):
        if word in code:
            yield position, f"{_CODE} has {word}"


def _spec(config: Config) -> ModelSpec:
    hidden = config.get(int, "hidden_size")
    heads = config.get(int, "num_attention_heads")
    head_dim = config.divided(hidden, heads)
    vocab_size = config.get(int, "vocab_size")
    second = _norm_head(config, vocab_size)
    rope = _position(config, hidden, heads) == "rope"
    # Of either kind's own key upstream's default is 4096.
    keys = ("max_position_embeddings", "model_max_length")
    max_positions = config.get(int, *(keys if rope else reversed(keys)), default=4096)
    return ModelSpec(
        family="baichuan",
        variant=f"baichuan{'2' if second else ''}-{'7b' if rope else '13b'}",
        vocab_size=vocab_size,
        hidden_size=hidden,
        layers=config.get(int, "num_hidden_layers"),
        max_positions=max_positions,
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
    model_types={"baichuan": ("BaichuanForCausalLM", "BaiChuanForCausalLM")},
    describes="Baichuan 7B and 13B, Baichuan2 7B and 13B (RoPE, ALiBi, NormHead)",
    spec=_spec,
    layout=lambda spec: _LAYOUT,
    ignored=(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq", r"model\.future_mask"),
)
