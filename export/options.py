"""Every option of `export_model`, once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

from export.precision import Precision
from export.quantization.schemes import QuantizeOptions
from export.tensorrt.options import BuildOptions
from refmodels.errors import LogitLockError
from refmodels.options import check_choice
from refmodels.quantization.formats import EightBit
from refmodels.spec import ModelSpec, Numerics
from trt_runtime.bundle import AttentionMode

Backend = Literal["onnxruntime", "tensorrt", "torch-tensorrt"]
_CACHE_SLOTS = 4096
_INPUT_TOKENS = 2048
_BATCH = 8


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """Options of an export.

    Attributes:
        precision: fp32, fp16 or bf16: dtype of weights, activations and cache; or a scheme of
            `export.precision.SCHEMES`: the model is quantized first, and the quantized checkpoint is put into the
            bundle.
        dtype: with a scheme, dtype of everything that is not quantized; None: fp16.
        kv_cache: int8 or fp8 keys and values; None: they have the dtype.
        quantize: options of quantization beyond these words; its `scheme` is `precision`, or None to quantize the
            cache only.
        attention, numerics: see `export.graph.trace.build_graph`.
        backend: "onnxruntime" writes the graph only; the others also build a TensorRT plan.
        output: the bundle's directory, missing or empty; None: `default_output`.
        max_batch, max_input, max_seq, workspace, optimization_level, compute_capabilities: see `BuildOptions`; None:
            what `build_options` chooses.
        taps: also build a plan whose taps are outputs.
        random_weights: no checkpoint is read; see `export.graph.external_data.random_parameters`.
        precision_plan: a file that says which modules stay in fp32; see `export.precision_plan`.
        overwrite: replace a bundle at `output`.
    Raises:
        LogitLockError: an unknown word, or options that exclude each other.
    """

    precision: str
    dtype: str | None = None
    kv_cache: EightBit | None = None
    quantize: QuantizeOptions | None = None
    attention: AttentionMode = "plugin"
    numerics: Numerics = "exact"
    backend: Backend = "onnxruntime"
    output: Path | str | None = None
    max_batch: int | None = None
    max_input: int | None = None
    max_seq: int | None = None
    workspace: int | None = None
    optimization_level: int | None = None
    compute_capabilities: Sequence[str] = ()
    taps: bool = False
    random_weights: bool = False
    precision_plan: Path | None = None
    overwrite: bool = False

    def __post_init__(self) -> None:
        scheme = self.parsed.scheme
        if self.quantize is not None and self.quantize.scheme != scheme:
            raise LogitLockError(
                f"--precision is {self.precision!r}, but the options are those of {self.quantize.scheme!r}"
            )
        if self.quantize is not None and self.kv_cache is not None:
            raise LogitLockError("--kv-cache is a part of the quantization options that are given; say it there")
        check_choice("attention", self.attention, AttentionMode)
        check_choice("numerics", self.numerics, Numerics)
        check_choice("backend", self.backend, Backend)
        if self.precision_plan is not None and self.random_weights:
            raise LogitLockError("--precision-plan is for the weights that it was made for, not for --random-weights")

    @cached_property
    def parsed(self) -> Precision:
        """`precision` and `dtype` as a dtype and a scheme."""
        return Precision.parse(self.precision, dtype=self.dtype)

    @cached_property
    def quantization(self) -> QuantizeOptions | None:
        """How the model is quantized before it is exported; None: it is exported as it is."""
        if self.quantize is not None or (self.parsed.scheme is None and self.kv_cache is None):
            return self.quantize
        return QuantizeOptions(scheme=self.parsed.scheme, cache=self.kv_cache)

    def build_options(self, spec: ModelSpec) -> BuildOptions:
        """The limits of the engine, with the model's defaults where an option is None.

        A TensorRT engine always has caches of `max_seq` slots; their default is then at most 4096.

        Raises:
            LogitLockError: as `BuildOptions`, or a cache that is longer than the model's learned positions.
        """
        max_seq = self.max_seq
        if max_seq is None:
            fixed_cache = self.backend != "onnxruntime"
            max_seq = min(spec.max_positions, _CACHE_SLOTS) if fixed_cache else spec.max_positions
        if spec.position == "learned" and max_seq > spec.max_positions:
            raise LogitLockError(
                f"--max-seq is {max_seq}; {spec.variant} has {spec.max_positions} learned positions, so it must be at "
                "most that"
            )
        return BuildOptions(
            max_batch=_BATCH if self.max_batch is None else self.max_batch,
            max_input=min(max_seq, _INPUT_TOKENS) if self.max_input is None else self.max_input,
            max_seq=max_seq,
            workspace=self.workspace,
            optimization_level=self.optimization_level,
            compute_capabilities=tuple(self.compute_capabilities),
        )
