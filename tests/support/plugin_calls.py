"""The operator's arguments for a call of the attention plugin."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from refmodels.attention import AttentionFacts, AttentionInputs


def plugin_call(plugin: Any, inputs: Sequence[Tensor]) -> tuple[AttentionInputs, AttentionFacts]:
    """The arguments of `cached_attention` for a plugin's inputs, in the plugin's order."""
    a = plugin.attributes
    given = AttentionInputs(**{row.name: tensor for row, tensor in zip(plugin.rows(), inputs, strict=True)})
    return given, AttentionFacts(a.heads, a.kv_heads, a.scale, bool(a.rotary_interleaved), a.window)
