"""The table of attention's inputs in the plugin contract, from `refmodels.attention`."""

from __future__ import annotations

from markdown_of import cell, table

from refmodels.attention import ATTENTION_INPUTS, AttentionInput

_DTYPES = {"working": "of qkv", "cache": "of qkv, or a quantized type", "table": "fp32, fp16 or bf16"}


def attention_inputs() -> str:
    """One row per input, in the order of the node's inputs."""
    head = ("input", "shape", "type", "when it is present", "announced by", "in a TensorRT plan", "meaning")
    return table(head, map(_row, ATTENTION_INPUTS))


def _row(row: AttentionInput) -> tuple[str, ...]:
    name = f"`{row.node}`" if row.node == row.name else f"`{row.node}` (`{row.name}` in PyTorch)"
    return (
        name,
        cell(f"[{', '.join(row.axes)}]"),
        _DTYPES.get(row.dtype, row.dtype),
        row.when,
        "" if row.attribute is None else f"`{row.attribute}`",
        "yes" if row.tensorrt else "no",
        cell(row.meaning),
    )
