"""Llama, Mistral and Granite code, and what the families that inherited Llama's code share (`llama_spec`).

Upstream: transformers models/llama and models/mistral (read at 5.24.0).  The published Granite code models of 3B and 8B
are of Llama's class, with biases and a tied head; those of 20B and 34B are of GPTBigCode's.
"""

from __future__ import annotations

from collections.abc import Collection

from refmodels.errors import LogitLockError
from refmodels.families.config import LLAMA_LAYOUT, Config, Family
from refmodels.families.rope import read_rope
from refmodels.positions import longest_dynamic
from refmodels.spec import MAX_LAYERS, AttentionSpec, MlpSpec, ModelSpec, NormSpec


def llama_spec(
    config: Config,
    *,
    family: str,
    variant: str,
    qkv_bias: bool = False,
    out_bias: bool = False,
    mlp_bias: bool = False,
    head_dim: int | None = None,
    kv_heads: int | None = None,
    head_norms: bool = False,
    sandwich_norms: bool = False,
    rotated: float | None = None,
    interleaved: bool = False,
    window: int | None = None,
    limited: Collection[int] | None = None,
    chat_format: str = "raw",
) -> ModelSpec:
    """A decoder as Llama's: RMSNorm, rope, grouped heads, gated MLP.

    Args:
        head_dim, kv_heads: where the config does not say them; None: hidden_size / heads, and as many as heads.
        rotated, interleaved: as for `refmodels.families.rope.read_rope`.
        window, limited: the sliding window, and the layers that have it; None: all.
        family, variant, and the other arguments: facts of the spec.
    """
    hidden = config.get(int, "hidden_size")
    heads = config.get(int, "num_attention_heads")
    layers = config.get(int, "num_hidden_layers", maximum=MAX_LAYERS)
    if head_dim is None and not config.has("head_dim"):
        head_dim = config.divided(hidden, heads)
    head_dim = config.get(int, "head_dim", default=head_dim)
    limited = range(layers) if limited is None else limited
    positions = config.get(int, "max_position_embeddings")
    rope = read_rope(config, head_dim=head_dim, positions=positions, rotated=rotated, interleaved=interleaved)
    if rope.scaling is not None and rope.scaling.kind in ("yarn", "dynamic"):
        # Model cards switch YaRN on without raising max_position_embeddings; for dynamic it is the original length.
        positions = max(positions, int(rope.scaling.factor * rope.scaling.original_positions))
    if rope.scaling is not None and rope.scaling.kind == "dynamic":
        positions = longest_dynamic(rope, positions)
    return ModelSpec(
        family=family,
        variant=variant,
        vocab_size=config.get(int, "vocab_size"),
        hidden_size=hidden,
        layers=layers,
        max_positions=positions,
        norm=NormSpec(kind="rms", eps=config.get(float, "rms_norm_eps")),
        attention=AttentionSpec(
            heads=heads,
            kv_heads=config.get(int, "num_key_value_heads", default=heads if kv_heads is None else kv_heads),
            head_dim=head_dim,
            qkv_bias=qkv_bias,
            out_bias=out_bias,
            scale=head_dim**-0.5,
            upstream_arithmetic="eager_multiply_float32",
            window=window if limited else None,
            window_first_layer=min(limited, default=0),
            window_skips=tuple(i for i in range(min(limited, default=layers), layers) if i not in limited),
            head_norms=head_norms,
        ),
        mlp=MlpSpec(
            width=config.get(int, "intermediate_size"),
            activation=config.activation("hidden_act", default="silu"),
            gated=True,
            bias=mlp_bias,
        ),
        position="rope",
        rope=rope,
        tied_head=config.get(bool, "tie_word_embeddings", default=False),
        sandwich_norms=sandwich_norms,
        chat_format=chat_format,
    )


def _spec(config: Config) -> ModelSpec:
    if config.data.get("model_type") == "mistral":
        return _mistral(config)
    bias = config.get(bool, "attention_bias", default=False)
    return llama_spec(
        config,
        family="llama",
        variant="llama",
        qkv_bias=bias,
        out_bias=bias,
        mlp_bias=config.get(bool, "mlp_bias", default=False),
    )


def _mistral(config: Config) -> ModelSpec:
    """Mistral: a sliding window of sliding_window keys in all layers, unless it is null."""
    given = config.has("sliding_window") or "sliding_window" not in config.data
    window = config.get(int, "sliding_window", default=4096) if given else None
    kinds = config.raw("layer_types")
    expected = "full_attention" if window is None else "sliding_attention"
    if kinds is not None and (not isinstance(kinds, list) or any(kind != expected for kind in kinds)):
        raise LogitLockError(
            f"{config.where}: layer_types of a Mistral must all be {expected}, which is what its class computes with "
            f"sliding_window {window}"
        )
    return llama_spec(config, family="llama", variant="mistral", kv_heads=8, window=window)


FAMILY = Family(
    name="llama",
    model_types={"llama": ("LlamaForCausalLM",), "mistral": ("MistralForCausalLM",)},
    describes="Llama 1 to 3.3 and models of its class (Granite code 3B and 8B), Mistral 7B, Nemo, Small (text)",
    spec=_spec,
    layout=lambda spec: LLAMA_LAYOUT,
    ignored=(r".*rotary_emb\.inv_freq",),
)
