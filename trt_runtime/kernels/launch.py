"""The description of a kernel launch, independent of the host that executes it.

A kernel family (`rms_norm.py`, `attention.py`) turns shapes and addresses into a list of `Launch`; a host executes it.
There are two hosts: `torch_host.py` (Triton's own launcher, on torch tensors) and `compiled.py` (kernels compiled
ahead of time for named compute capabilities, launched through the CUDA driver on raw addresses, as a TensorRT plugin
has them).  The kernel, block sizes and grid for a shape are therefore chosen in one place, for all hosts.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

from refmodels.attention import ATTENTION_INPUTS, AttentionInput
from refmodels.errors import LogitLockError

ElementType = Literal["fp32", "fp16", "bf16"]


@dataclass(frozen=True, kw_only=True)
class Launch:
    """One kernel launch.

    Attributes:
        kernel: the `triton.jit` function.
        grid: blocks in x, y, z.
        arguments: run-time arguments by parameter name: tensors (torch host) or addresses (compiled host), int, float.
        constants: `tl.constexpr` arguments by parameter name.
        pointers: element type of every pointer among `arguments`, in Triton's spelling without the star ("fp16",
            "i64", ...): the compiled host's signature.
        warps, stages: Triton's num_warps and num_stages.
        options: further compile options of Triton.  "launch_pdl" (programmatic dependent launch) lets the kernel start
            before the one ahead has finished; it then has a constant OVERLAP and, where that is true, calls gdc_wait()
            before it touches data that other kernels write.
    """

    kernel: Any
    grid: tuple[int, int, int]
    arguments: Mapping[str, Any]
    constants: Mapping[str, Any]
    pointers: Mapping[str, str]
    warps: int = 4
    stages: int = 2
    options: Mapping[str, Any] = field(default_factory=dict)

    def on(self, capability: int) -> Launch:
        """This launch as a GPU of compute capability `capability` (90 for 9.0) can do it: no overlap before 9.0."""
        if capability >= 90 or not self.options.get("launch_pdl"):
            return self
        options = {name: value for name, value in self.options.items() if name != "launch_pdl"}
        return replace(self, constants={**self.constants, "OVERLAP": False}, options=options)


@dataclass(frozen=True, kw_only=True)
class NormShape:
    """`fused_rms_norm` on x [rows, width].  `quantized`: also int8 or fp8 output with one fp32 scale per row."""

    rows: int
    width: int
    eps: float
    weight_in_float: bool
    dtype: ElementType
    quantized: Literal["int8", "fp8"] | None = None


@dataclass(frozen=True, kw_only=True)
class AttentionShape:
    """`cached_attention` (arithmetic "exact") on qkv [batch, tokens, (heads + 2 * kv_heads) * head_dim].

    `slots` is the width of `visible`, `capacity` the third axis of the caches; `rotary_dim` 0 means no rotation;
    `table_dtype` is that of cos, sin and query_scale.  The other names are those of `AttentionFacts`, and attributes of
    `ATTENTION_INPUTS` that say which optional inputs are given.
    """

    batch: int
    tokens: int
    slots: int
    capacity: int
    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    dtype: ElementType
    rotary_dim: int = 0
    rotary_interleaved: bool = False
    window: int = 0
    has_query_scale: bool = False
    has_alibi: bool = False
    table_dtype: ElementType = "fp32"

    def gives(self, row: AttentionInput) -> bool:
        """Whether the input is given."""
        return row.attribute is None or bool(getattr(self, row.attribute))


_FIELDS = {shape_field.name for shape_field in fields(AttentionShape)}
KERNEL_INPUTS = tuple(row for row in ATTENTION_INPUTS if not row.optional or row.attribute in _FIELDS)
"""The inputs of attention that kernels read: those whose attribute `AttentionShape` has."""


def unread_inputs(given: Collection[str]) -> list[str]:
    """Those among `given`, names of `AttentionInputs`, that no kernel reads."""
    read = {row.name for row in KERNEL_INPUTS}
    return [name for name in given if name not in read]


def shape_flags(given: Collection[str]) -> dict[str, Any]:
    """The `has_..` fields of an `AttentionShape` with the inputs `given`.

    Raises:
        LogitLockError: no kernel reads one of them.
    """
    unread = unread_inputs(given)
    if unread:
        raise LogitLockError(f"the attention kernels do not read {', '.join(unread)}; use --attention decomposed")
    flags = {row.attribute: row.name in given for row in KERNEL_INPUTS if row.attribute is not None}
    return {name: flag for name, flag in flags.items() if name.startswith("has_")}
