"""Qwen1.5, Qwen2 and Qwen2.5.  Upstream: transformers models/qwen2 (read at 5.24.0)."""

from __future__ import annotations

from refmodels.errors import LogitLockError
from refmodels.families.config import Config
from refmodels.spec import MAX_LAYERS, AttentionSpec, MlpSpec, ModelSpec, NormSpec, RopeSpec


def qwen2_spec(config: Config) -> ModelSpec:
    hidden = config.get(int, "hidden_size")
    heads = config.get(int, "num_attention_heads")
    head_dim = config.get(int, "head_dim", default=config.divided(hidden, heads))
    layers = config.get(int, "num_hidden_layers", maximum=MAX_LAYERS)
    window, limited = _windows(config, layers)
    return ModelSpec(
        family="qwen",
        variant="qwen2",
        vocab_size=config.get(int, "vocab_size"),
        hidden_size=hidden,
        layers=layers,
        max_positions=config.get(int, "max_position_embeddings"),
        norm=NormSpec(kind="rms", eps=config.get(float, "rms_norm_eps")),
        attention=AttentionSpec(
            heads=heads,
            kv_heads=config.get(int, "num_key_value_heads", default=heads),
            head_dim=head_dim,
            qkv_bias=True,
            out_bias=False,
            scale=head_dim**-0.5,
            upstream_arithmetic="eager_multiply_float32",
            window=window,
            window_first_layer=min(limited, default=0),
            window_skips=tuple(i for i in range(min(limited, default=layers), layers) if i not in limited),
        ),
        mlp=MlpSpec(
            width=config.get(int, "intermediate_size"),
            activation=config.activation("hidden_act"),
            gated=True,
            bias=False,
        ),
        position="rope",
        rope=RopeSpec(dim=head_dim, theta=config.rope_theta(default=10000.0), table="working"),
        tied_head=config.get(bool, "tie_word_embeddings", default=False),
        chat_format="qwen2",
    )


def _windows(config: Config, layers: int) -> tuple[int | None, set[int]]:
    """The sliding window and the layers that have it (configuration_qwen2.py); no window where no layer has one."""
    window: int | None = None
    if config.get(bool, "use_sliding_window", default=False):
        given = config.has("sliding_window") or "sliding_window" not in config.data
        window = config.get(int, "sliding_window", default=4096, minimum=0) if given else None
    first = config.get(int, "max_window_layers", default=28, minimum=0)
    kinds = config.raw("layer_types")
    if kinds is None:
        kinds = ["full_attention" if window is None or i < first else "sliding_attention" for i in range(layers)]
    if not isinstance(kinds, list) or len(kinds) != layers:
        raise LogitLockError(f"{config.where}: layer_types must be a list of {layers} kinds, one for each layer")
    for kind in kinds:
        if kind not in ("sliding_attention", "full_attention"):
            raise LogitLockError(
                f"{config.where}: layer_types holds {kind!r}, which is not supported; only full_attention and "
                "sliding_attention are"
            )
    limited = {i for i, kind in enumerate(kinds) if kind == "sliding_attention"}
    if limited and not window:
        raise LogitLockError(
            f"{config.where}: layers have sliding_attention, but sliding_window is "
            f"{'not used' if window is None else 0}; it must be at least 1, with use_sliding_window"
        )
    return (window if limited else None), limited
