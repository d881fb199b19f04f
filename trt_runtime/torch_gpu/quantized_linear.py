"""Linear layers of the fused decoder with quantized weights: kernels on a GPU, the reference's arithmetic elsewhere.
`kernel_choice.choose` chooses the kernel; this module calls it."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from refmodels.model import RmsNorm
from refmodels.quantization.linear import QuantizedLinear
from trt_runtime.kernels import quantized_gemm, quantized_gemm_hopper, quantized_linear
from trt_runtime.kernels.launch import Launch
from trt_runtime.kernels.quantized_chain import ChainRunner, Product
from trt_runtime.kernels.torch_host import ELEMENT_TYPES, execute, quantized_rms_norm
from trt_runtime.torch_gpu.kernel_choice import Kernel, LinearFacts, Storage, capability_of, choose, storage_for
from trt_runtime.torch_gpu.linear import FusedLinear, silu_and_multiply
from trt_runtime.torch_gpu.weight_storage import PackedLinear, adjacent_view


class FusedQuantizedLinear(FusedLinear):
    """A `QuantizedLinear`, or gate and up with adjacent weights and scales (`weight_storage.arranged`), fused.

    Args:
        linear: the layer, or gate.
        up: makes it gate and up merged.
        runner: runs the layer for one row, if `kernels.quantized_chain` serves it.
    """

    def __init__(
        self, linear: QuantizedLinear, up: QuantizedLinear | None = None, *, runner: ChainRunner | None = None
    ) -> None:
        super().__init__()
        self.linear, self.up, self.runner = linear, up, runner
        self.merged = up is not None
        device, dtype = linear.scale.device, linear.scale.dtype
        storage: Storage = "reference"
        if isinstance(linear, PackedLinear):
            storage = "packed"
        elif linear.scale.is_cuda and linear.format.input is not None:
            storage = storage_for(linear.format, in_features=linear.in_features, dtype=dtype)
        self.facts = LinearFacts(
            storage=storage,
            in_features=linear.in_features,
            out_features=linear.out_features,
            dtype=dtype,
            capability=capability_of(device),
            input=linear.format.input,
            has_chain_runner=runner is not None,
        )
        self.packed: Tensor | None = None
        if isinstance(linear, PackedLinear):
            self.packed = self._whole("packed")
            self.scale = self._whole("scale_tiles")
            self.offset = None if linear.offset_tiles is None else self._whole("offset_tiles")
        elif storage == "quantized":
            self.weight, self.scale = self._whole("weight"), self._whole("scale").flatten()
            self.scale_fp32 = self.scale.float()
            self.processors = torch.cuda.get_device_properties(device).multi_processor_count
        self.bias = linear.bias
        if up is not None and linear.bias is not None and up.bias is not None:
            self.bias = nn.Parameter(torch.cat([linear.bias, up.bias]), requires_grad=False)

    def _whole(self, name: str) -> Tensor:
        """The layer's tensor of that name; of gate and up, both."""
        first: Tensor = getattr(self.linear, name)
        return first.detach() if self.up is None else adjacent_view(first, getattr(self.up, name))

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        rows = math.prod(x.shape[:-1])
        kernel = choose(rows, self.facts)
        if kernel is Kernel.CHAIN:
            return self._chain_of_one(x, residual=residual)
        if kernel is Kernel.PACKED_GEMV:
            return self._packed_gemv(x, residual, rows)
        if kernel.reads_quantized_input:
            quantized, scales = self._quantized_input(x, rows)
            return self._quantized_gemm(kernel, quantized, scales, x, residual)
        y = self._separate(self.linear, x, kernel)
        if self.up is not None:
            y = F.silu(y) * self._separate(self.up, x, kernel)
        return y if residual is None else residual + y

    def forward_normed(self, norm: nn.Module, x: Tensor) -> Tensor:
        linear = self.linear.format
        kernel = choose(math.prod(x.shape[:-1]), self.facts)
        if isinstance(norm, RmsNorm) and kernel is Kernel.CHAIN:
            return self._chain_of_one(x, norm=norm)
        by_token = linear.input_scale == "token" and not linear.pre_quant_scale
        if not isinstance(norm, RmsNorm) or not kernel.reads_quantized_input or not by_token:
            return super().forward_normed(norm, x)
        # The norm's kernel quantizes its result.
        assert linear.input is not None
        normed, quantized, scales = quantized_rms_norm(
            x, norm.weight, eps=norm.norm.eps, weight_in_float=norm.norm.weight_in_float, kind=linear.input
        )
        return self._quantized_gemm(kernel, self._as_weight_expects(quantized), scales.flatten(), normed, None)

    @property
    def decode_weight(self) -> Tensor | None:
        return self.packed

    @property
    def can_prefetch(self) -> bool:
        return self.packed is not None

    def chain_product(
        self,
        *,
        input: Tensor | None = None,
        norm: RmsNorm | None = None,
        residual: Tensor | int | None = None,
        out: Tensor | None = None,
    ) -> Product:
        """The product of a chain that computes this layer; see `kernels.quantized_chain.Product` for the arguments."""
        assert self.packed is not None
        return Product(
            rows=self.linear.out_features,
            columns=self.linear.in_features,
            weight=self.packed,
            scale=self.scale,
            input=input,
            norm=None if norm is None else norm.weight,
            eps=0.0 if norm is None else norm.norm.eps,
            weight_in_float=norm is not None and norm.norm.weight_in_float,
            bias=self.bias,
            residual=residual,
            gated=self.merged,
            out=out,
        )

    def _chain_of_one(self, x: Tensor, *, norm: RmsNorm | None = None, residual: Tensor | None = None) -> Tensor:
        assert self.runner is not None
        out = x.new_empty(*x.shape[:-1], self.linear.out_features)
        product = self.chain_product(input=x.contiguous(), norm=norm, residual=residual, out=out)
        self.runner.run([product], self.prefetch)
        return out

    def _packed_gemv(self, x: Tensor, residual: Tensor | None, rows: int) -> Tensor:
        out = x.new_empty(*x.shape[:-1], self.linear.out_features)
        inputs = self._as_weight_expects(self.linear.scaled(x)).contiguous().view(rows, -1)
        onto = None if residual is None else residual.contiguous().view(rows, -1)
        stored: dict[str, Any] = {"weight": self.packed, "scale": self.scale, "offset": self.offset}
        for start in range(0, rows, quantized_linear.MAX_TOKENS):
            slice_ = slice(start, min(rows, start + quantized_linear.MAX_TOKENS))
            launch = quantized_linear.gemv(
                **_sizes(self.linear, x.dtype),
                **stored,
                tokens=slice_.stop - start,
                x=inputs[slice_],
                out=out.view(rows, -1)[slice_],
                bias=self.bias,
                residual=None if onto is None else onto[slice_],
                gated=self.merged,
                prefetch=[(piece, piece.nbytes) for piece in self.prefetch] if rows == 1 else (),
            )
            execute([launch])
        return out

    def _as_weight_expects(self, x: Tensor) -> Tensor:
        """x [..., in] with its columns in the weight's order."""
        return x if self.linear.order is None else x[..., self.linear.order]

    def _separate(self, linear: QuantizedLinear, x: Tensor, kernel: Kernel) -> Tensor:
        """linear(x) with one kernel per operation."""
        if kernel is Kernel.REFERENCE or not isinstance(linear, PackedLinear):
            y: Tensor = linear(x)
            return y
        return F.linear(self._as_weight_expects(linear.scaled(x)), _dequantized(linear), linear.bias)

    def _quantized_input(self, x: Tensor, rows: int) -> tuple[Tensor, Tensor]:
        """x in int8 or fp8, and its scales: one per token, or the layer's own."""
        code, static = self.linear.format.input, self.linear.input_scale
        assert code is not None
        x = self._as_weight_expects(self.linear.scaled(x)).contiguous()
        quantized = torch.empty_like(x, dtype=torch.int8)
        scales = x.new_empty(rows, dtype=torch.float32) if static is None else static
        execute(
            quantized_gemm.quantize(
                rows=rows,
                width=x.shape[-1],
                dtype=ELEMENT_TYPES[x.dtype],
                code=code,
                x=x,
                quantized=quantized,
                scales=scales if static is None else None,
                static=static,
            )
        )
        return quantized if code == "int8" else quantized.view(torch.float8_e4m3fn), scales

    def _quantized_gemm(
        self, kernel: Kernel, quantized: Tensor, scales: Tensor, x: Tensor, residual: Tensor | None
    ) -> Tensor:
        """The layer's result from its quantized input.

        Args:
            kernel: one that reads quantized inputs.
            quantized, scales: from `_quantized_input`.
            x: [..., in], of which only the shape and the dtype matter.
        """
        n, k = self.linear.out_features, self.linear.in_features
        rows = quantized.numel() // k
        if kernel is Kernel.FP8_CUBLAS:
            return self._fp8_cublas(quantized.view(rows, k), scales, x, residual)
        out = x.new_empty(*x.shape[:-1], n)
        arguments: dict[str, Any] = {
            "n": n,
            "k": k,
            "tokens": rows,
            "dtype": ELEMENT_TYPES[x.dtype],
            "code": self.linear.format.input,
            "x": quantized,
            "input_scale": scales,
            "weight": self.weight,
            "scale": self.scale,
            "out": out,
            "bias": self.bias,
            "residual": residual,
            "static": self.linear.input_scale is not None,
            "gated": self.merged,
        }
        on_hopper = kernel is Kernel.HOPPER_GEMM
        execute(self._hopper_gemm(arguments) if on_hopper else [quantized_gemm.gemm(**arguments)])
        return out

    def _hopper_gemm(self, arguments: dict[str, Any]) -> list[Launch]:
        sizes = {name: arguments[name] for name in ("n", "k", "tokens", "code", "gated")}
        tile = quantized_gemm_hopper.tile_of(**sizes, processors=self.processors)
        sums = None
        if tile.splits > 1:
            kind = torch.int32 if arguments["code"] == "int8" else torch.float32
            sums = self.weight.new_empty(tile.splits, arguments["tokens"], arguments["n"], dtype=kind)
        return quantized_gemm_hopper.gemm(**arguments, tile=tile, processors=self.processors, sums=sums)

    def _fp8_cublas(self, quantized: Tensor, scales: Tensor, x: Tensor, residual: Tensor | None) -> Tensor:
        by_token = scales.float().expand(len(quantized)).contiguous()[:, None]
        y = torch._scaled_mm(
            quantized, self.weight.T, scale_a=by_token, scale_b=self.scale_fp32[None, :], out_dtype=x.dtype
        ).view(*x.shape[:-1], -1)
        y = y if self.bias is None else y + self.bias
        y = silu_and_multiply(y) if self.merged else y
        return y if residual is None else residual + y


def _sizes(linear: QuantizedLinear, dtype: torch.dtype) -> dict[str, Any]:
    """The layout facts that `kernels.quantized_linear` needs of a weight."""
    return {
        "n": linear.out_features,
        "k": linear.in_features,
        "dtype": ELEMENT_TYPES[dtype],
        "code": linear.format.weight,
        "group": linear.format.group,
    }


def _dequantized(linear: PackedLinear) -> Tensor:
    out = linear.scale_tiles.new_empty(linear.out_features, linear.in_features)
    launch = quantized_linear.dequantize(
        **_sizes(linear, out.dtype),
        weight=linear.packed,
        scale=linear.scale_tiles,
        offset=linear.offset_tiles,
        out=out,
    )
    execute([launch])
    return out
