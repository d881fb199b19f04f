"""Qwen1.5, Qwen2, Qwen2.5 and Qwen3.  Upstream: transformers models/qwen2 and models/qwen3 (read at 5.24.0)."""

from __future__ import annotations

from refmodels.errors import LogitLockError
from refmodels.families.config import Config
from refmodels.families.llama import llama_spec
from refmodels.spec import MAX_LAYERS, ModelSpec


def qwen2_spec(config: Config) -> ModelSpec:
    window, limited = _windows(config, config.get(int, "num_hidden_layers", maximum=MAX_LAYERS))
    third = config.data.get("model_type") == "qwen3"
    bias = third and config.get(bool, "attention_bias", default=False)
    return llama_spec(
        config,
        family="qwen",
        variant="qwen3" if third else "qwen2",
        qkv_bias=bias or not third,
        out_bias=bias,
        head_dim=128 if third else None,
        head_norms=third,
        window=window,
        limited=limited,
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
