"""The expected form of a TensorRT plan of native attention."""

from __future__ import annotations

from collections import Counter

from refmodels.spec import ModelSpec
from refmodels.taps import is_cache_tap, tap_names
from trt_runtime.plan_layers import Layer

FUSED = {0: "_gemm_mha", 1: "_gemv_mha"}
"""The prefix of the fused attention kernel's name, by profile: prefill and decode."""


def check_plan(spec: ModelSpec, kinds: Counter[str], layers: list[Layer], *, kernels: dict[int, str]) -> None:
    """`kernels`: what the name of the attention kernel of a profile begins with."""
    assert kinds["ATTENTION_INPUT"] == spec.layers
    assert kinds["KV_CACHE_UPDATE"] == 2 * spec.layers
    for profile in (0, 1):
        mine = [layer for layer in layers if layer.profile == profile]
        for name in filter(is_cache_tap, tap_names(spec)):
            written = [layer for layer in mine if name in {t.name for t in layer.outputs}]
            assert len(written) == 1 and name in {t.name for t in written[0].inputs}, f"{name} is not updated in place"
        if profile in kernels:
            attention = [layer for layer in mine if layer.name.startswith(kernels[profile])]
            assert [layer.taps for layer in attention] == [[f"blocks.{i}.attn.context"] for i in range(spec.layers)]
            assert all(len(layer.inputs) == 4 for layer in attention), "query, key, value and mask"
