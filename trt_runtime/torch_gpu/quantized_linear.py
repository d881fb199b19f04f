"""Linear layers of codes as `fused.py` runs them: by the kernels on a GPU, by the reference's arithmetic elsewhere.

Weight-only layers are packed for the kernels, in place of their codes: a `PackedLinear` makes these again when its
reference arithmetic asks for them, so that a model has its weights once, at four or eight bits each.  Layers whose
inputs are quantized too keep their codes as they are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from refmodels.model import RmsNorm
from refmodels.quantization.linear import QuantizedLinear
from trt_runtime.kernels.launch import Launch

if TYPE_CHECKING:
    from trt_runtime.kernels.quantized_chain import ChainRunner, Product

MOST_TOKENS = 16
"""Rows of one product by `kernels.quantized_linear.gemv`."""

SLICED_TOKENS = 64
"""Rows for which it runs slice by slice; for more, the weight is dequantized once and cuBLAS multiplies.  By estimate:
reading the codes four times moves 2 bytes a weight, dequantizing and reading the result 4.5.  Four slices were measured
(a step of Qwen-7B in int4 at 64 rows: 11 ms on an H200), dequantizing at 64 rows was not."""

MANY_TOKENS = 65
"""Rows from which on products of codes are faster by `kernels.quantized_gemm_hopper`, or, on GPUs that it does not
serve, those of fp8 by cuBLAS."""

LIBRARY_TOKENS = 1024
"""Rows from which on cuBLAS multiplies fp8 no slower than `kernels.quantized_gemm_hopper`: by measurement, a tie."""

AHEAD_BYTES = 8 * 2**20
"""What one product has fetched into L2 for the next two: by measurement, on an H200."""


class PackedLinear(QuantizedLinear):
    """A `QuantizedLinear` whose codes are packed; `pack` makes one of another, in place.

    Attributes:
        packed: int32, `kernels.packing.pack` of the codes.
        tiles, offset: scales, and zeros if there are any, by tile of rows.
    """

    packed: Tensor
    tiles: Tensor
    offset: Tensor | None

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        from trt_runtime.kernels.packing import unpack

        return unpack(self.packed, self.format.weight, rows=self.out_features, columns=self.in_features)

    def tensors(self) -> list[Tensor]:
        """What is not among the parameters."""
        return [self.packed, self.tiles, *([] if self.offset is None else [self.offset])]


def put_together(decoder: nn.Module, pairs: Sequence[tuple[nn.Module, nn.Module]]) -> None:
    """Bring the quantized layers of a model on a GPU into the form that the kernels read, in place.

    pairs: `gate` and `up` of each MLP; where they can be one product, their tensors become neighbours.
    """
    for gate, up in pairs:
        if paired(gate, up):
            assert isinstance(gate, QuantizedLinear) and isinstance(up, QuantizedLinear)
            _arrange(gate, up)
    for module in decoder.modules():
        if isinstance(module, QuantizedLinear):
            _arrange(module)


def paired(gate: nn.Module, up: nn.Module) -> bool:
    """Whether two layers of codes can be one product: one format, one order and one scale of the input."""
    if not isinstance(gate, QuantizedLinear) or not isinstance(up, QuantizedLinear) or gate.format != up.format:
        return False
    own = gate.format.reordered or gate.format.pre_quant_scale or gate.input_scale is not None
    return not own and (gate.bias is None) == (up.bias is None)


def _arrange(*linears: QuantizedLinear) -> None:
    if isinstance(linears[0], PackedLinear) or not linears[0].scale.is_cuda:
        return
    if _packable(linears[0]):
        pack(*linears)
    elif len(linears) > 1 and _coded(linears[0]):
        for name in ("weight", "scale"):
            parts = [getattr(linear, name) for linear in linears]
            if len({part.untyped_storage().data_ptr() for part in parts}) == 1:
                continue
            both = torch.cat([part.data for part in parts])
            for linear, part in zip(linears, both.split([len(part) for part in parts]), strict=True):
                setattr(linear, name, nn.Parameter(part, requires_grad=False))


def _packable(linear: QuantizedLinear) -> bool:
    """Whether `kernels.quantized_linear` serves this layer."""
    from trt_runtime.kernels import quantized_linear
    from trt_runtime.kernels.torch_host import ELEMENT_TYPES

    kind = ELEMENT_TYPES.get(linear.scale.dtype)
    return (
        linear.format.input is None
        and kind is not None
        and quantized_linear.serves(k=linear.in_features, group=linear.format.group, dtype=kind)
    )


def _coded(linear: QuantizedLinear) -> bool:
    """Whether `kernels.quantized_gemm` serves this layer."""
    from trt_runtime.kernels.rms_norm import MAX_WIDTH

    form, halves = linear.format, (torch.float16, torch.bfloat16)
    return (
        form.input is not None
        and form.group is None
        and form.symmetric
        and form.input_scale in ("tensor", "token")
        and linear.scale.dtype in halves
        and linear.in_features % 16 == 0
        and linear.in_features <= MAX_WIDTH
    )


def pack(*linears: QuantizedLinear) -> None:
    """Make `PackedLinear`s of layers of one format, in place, their tensors next to each other."""
    from trt_runtime.kernels import packing

    code, dtype = linears[0].format.weight, linears[0].scale.dtype
    packed = torch.cat([packing.pack(linear.weight.data, code) for linear in linears])
    tiles = torch.cat([packing.by_tile(linear.scale.data) for linear in linears])
    zeros = [packing.offsets(linear.zero.data, code, dtype) for linear in linears if linear.zero is not None]
    offset = torch.cat(zeros) if zeros else None
    start = 0
    for linear in linears:
        stop = start + -(-linear.out_features // packing.ROWS)
        del linear.weight
        linear.__class__ = PackedLinear
        assert isinstance(linear, PackedLinear)
        linear.packed, linear.tiles = packed[start:stop], tiles[start:stop]
        linear.offset = None if offset is None else offset[start:stop]
        start = stop


class QuantizedProjection(nn.Module):
    """As `fused.Projection`, of a `QuantizedLinear`, or of `gate` and `up` whose tensors are neighbours.

    forward(x [..., in], residual) gives residual + linear(x) [..., out]; of two, silu(gate(x)) * up(x) takes the place
    of linear(x).

    Attributes:
        packed: the packed weight of a weight-only layer on a GPU, else None.
        ahead: what `fetch_ahead` says.
        runner: runs this layer for one token, where `kernels.quantized_chain` does (`chained.chain_blocks` says).
        made: what the next `after` returns, if the chain before has made it; for one token.
        processors: multiprocessors of a GPU that `kernels.quantized_gemm_hopper` serves, else 0.
    """

    def __init__(self, linear: QuantizedLinear, up: QuantizedLinear | None = None) -> None:
        super().__init__()
        self.linear, self.up = linear, up
        self.coded = linear.scale.is_cuda and _coded(linear)
        self.packed: Tensor | None = None
        self.ahead: tuple[tuple[Tensor, int], ...] = ()
        self.runner: ChainRunner | None = None
        self.made: Tensor | None = None
        self.processors = 0
        both = _both if up is not None else _one
        if isinstance(linear, PackedLinear):
            self.packed, self.tiles = both(linear.packed), both(linear.tiles)
            self.offset = None if linear.offset is None else both(linear.offset)
        elif self.coded:
            self.codes, self.scale = both(linear.weight.data), both(linear.scale.data).flatten()
            self.wide_scale = self.scale.float()
            gpu = torch.cuda.get_device_properties(self.codes.device)
            self.processors = gpu.multi_processor_count if (gpu.major, gpu.minor) == (9, 0) else 0
        self.bias = linear.bias
        if up is not None and linear.bias is not None and up.bias is not None:
            self.bias = nn.Parameter(torch.cat([linear.bias, up.bias]), requires_grad=False)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        rows = math.prod(x.shape[:-1])
        if self.packed is not None and 0 < rows <= SLICED_TOKENS:
            return self._gemv(x, residual, rows)
        if self.coded and rows > 0:
            return self._product_of_codes(*self._quantized(x, rows), x, residual)
        y = self._product(self.linear, x)
        if self.up is not None:
            y = F.silu(y) * self._product(self.up, x)
        return y if residual is None else residual + y

    def after(self, norm: nn.Module, x: Tensor) -> Tensor:
        """forward(norm(x)), in one kernel where there is one; or the norm's kernel quantizes what it makes."""
        form = self.linear.format
        one = math.prod(x.shape[:-1]) == 1
        made, self.made = self.made, None
        if made is not None and one:
            return made
        if self.runner is not None and one and isinstance(norm, RmsNorm):
            return self._alone(self.runner, x, norm=norm)
        plain = form.input_scale == "token" and not form.pre_quant_scale
        if not self.coded or form.input is None or not plain or not isinstance(norm, RmsNorm):
            y: Tensor = self(norm(x))
            return y
        from trt_runtime.kernels.torch_host import quantized_rms_norm

        normed, codes, scales = quantized_rms_norm(
            x, norm.weight, eps=norm.norm.eps, weight_in_float=norm.norm.weight_in_float, kind=form.input
        )
        return self._product_of_codes(self._ordered(codes), scales.flatten(), normed, None)

    def _ordered(self, x: Tensor) -> Tensor:
        x = self.linear.scaled(x)
        return x if self.linear.order is None else x[..., self.linear.order]

    def _product(self, linear: QuantizedLinear, x: Tensor) -> Tensor:
        if not isinstance(linear, PackedLinear):
            y: Tensor = linear(x)
            return y
        x = linear.scaled(x)
        x = x if linear.order is None else x[..., linear.order]
        return F.linear(x, _dequantized(linear), linear.bias)

    def _gemv(self, x: Tensor, residual: Tensor | None, rows: int) -> Tensor:
        from trt_runtime.kernels import quantized_linear
        from trt_runtime.kernels.torch_host import execute

        if rows == 1 and self.runner is not None:
            return self._alone(self.runner, x, residual=residual)
        out = x.new_empty(*x.shape[:-1], self.linear.out_features)
        ordered = self._ordered(x).contiguous().view(rows, -1)
        onto = None if residual is None else residual.contiguous().view(rows, -1)
        for start in range(0, rows, MOST_TOKENS):
            slice_ = slice(start, min(rows, start + MOST_TOKENS))
            launch = quantized_linear.gemv(
                **_weight(self.linear, x.dtype) | {"weight": self.packed, "scale": self.tiles, "offset": self.offset},
                tokens=slice_.stop - start,
                x=ordered[slice_],
                out=out.view(rows, -1)[slice_],
                bias=self.bias,
                residual=None if onto is None else onto[slice_],
                gated=self.up is not None,
                ahead=self.ahead if rows == 1 else (),
            )
            execute([launch])
        return out

    def _alone(
        self, runner: ChainRunner, x: Tensor, *, norm: RmsNorm | None = None, residual: Tensor | None = None
    ) -> Tensor:
        """A chain of this layer only."""
        out = x.new_empty(*x.shape[:-1], self.linear.out_features)
        ahead = [memory[: size // memory.element_size()] for memory, size in self.ahead]
        runner.run([self.product(input=x.contiguous(), norm=norm, residual=residual, out=out)], ahead)
        return out

    @property
    def chainable(self) -> bool:
        """Whether `kernels.quantized_chain` serves this layer."""
        from trt_runtime.kernels import quantized_chain

        linear, form = self.linear, self.linear.format
        plain = form.weight == "int4" and not form.reordered and not form.pre_quant_scale and linear.zero is None
        half = self.packed is not None and linear.scale.dtype == torch.float16
        sizes = {"rows": linear.out_features, "columns": linear.in_features}
        served = quantized_chain.serves(**sizes, group=form.group)
        return plain and half and served and quantized_chain.on(linear.scale.device)

    def product(
        self,
        *,
        input: Tensor | None = None,
        norm: RmsNorm | None = None,
        residual: Tensor | int | None = None,
        out: Tensor | None = None,
    ) -> Product:
        """This layer in a chain; arguments as `kernels.quantized_chain.Product`."""
        from trt_runtime.kernels.quantized_chain import Product

        assert self.packed is not None
        return Product(
            rows=self.linear.out_features,
            columns=self.linear.in_features,
            weight=self.packed,
            scale=self.tiles,
            input=input,
            norm=None if norm is None else norm.weight,
            eps=0.0 if norm is None else norm.norm.eps,
            weight_in_float=norm is not None and norm.norm.weight_in_float,
            bias=self.bias,
            residual=residual,
            gated=self.up is not None,
            out=out,
        )

    def _quantized(self, x: Tensor, rows: int) -> tuple[Tensor, Tensor]:
        """Codes of x and their scales, one a token or the layer's own."""
        from trt_runtime.kernels import quantized_gemm
        from trt_runtime.kernels.torch_host import ELEMENT_TYPES, execute

        form, static = self.linear.format, self.linear.input_scale
        assert form.input is not None
        x = self._ordered(x).contiguous()
        codes = torch.empty_like(x, dtype=torch.int8)
        scales = x.new_empty(rows, dtype=torch.float32) if static is None else static
        execute(
            quantized_gemm.quantize(
                rows=rows,
                width=x.shape[-1],
                dtype=ELEMENT_TYPES[x.dtype],
                code=form.input,
                x=x,
                quantized=codes,
                scales=scales if static is None else None,
                static=static,
            )
        )
        return codes if form.input == "int8" else codes.view(torch.float8_e4m3fn), scales

    def _product_of_codes(self, codes: Tensor, scales: Tensor, x: Tensor, residual: Tensor | None) -> Tensor:
        from trt_runtime.kernels import quantized_gemm
        from trt_runtime.kernels.torch_host import ELEMENT_TYPES, execute

        form, n, k = self.linear.format, self.linear.out_features, self.linear.in_features
        assert form.input is not None
        rows = codes.numel() // k
        library_tokens = LIBRARY_TOKENS if self.processors else MANY_TOKENS
        if form.input == "fp8" and rows >= library_tokens and n % 16 == 0:
            return self._by_library(codes.view(rows, k), scales, x, residual)
        out = x.new_empty(*x.shape[:-1], n)
        given: dict[str, Any] = {
            "n": n,
            "k": k,
            "tokens": rows,
            "dtype": ELEMENT_TYPES[x.dtype],
            "code": form.input,
            "x": codes,
            "input_scale": scales,
            "weight": self.codes,
            "scale": self.scale,
            "out": out,
            "bias": self.bias,
            "residual": residual,
            "static": self.linear.input_scale is not None,
            "gated": self.up is not None,
        }
        execute(self._on_hopper(given) if self.processors and rows >= MANY_TOKENS else [quantized_gemm.gemm(**given)])
        return out

    def _on_hopper(self, given: dict[str, Any]) -> list[Launch]:
        from trt_runtime.kernels import quantized_gemm_hopper as hopper

        sized = {name: given[name] for name in ("n", "k", "tokens", "code", "gated")}
        tile = hopper.tile_of(**sized, processors=self.processors)
        sums = None
        if tile.splits > 1:
            kind = torch.int32 if given["code"] == "int8" else torch.float32
            sums = self.codes.new_empty(tile.splits, given["tokens"], given["n"], dtype=kind)
        return hopper.gemm(**given, tile=tile, processors=self.processors, sums=sums)

    def _by_library(self, codes: Tensor, scales: Tensor, x: Tensor, residual: Tensor | None) -> Tensor:
        from trt_runtime.torch_gpu.linear import gated

        by_token = scales.float().expand(len(codes)).contiguous()[:, None]
        y = torch._scaled_mm(
            codes, self.codes.T, scale_a=by_token, scale_b=self.wide_scale[None, :], out_dtype=x.dtype
        ).view(*x.shape[:-1], -1)
        y = y if self.bias is None else y + self.bias
        y = y if self.up is None else gated(y)
        return y if residual is None else residual + y


def _weight(linear: QuantizedLinear, dtype: torch.dtype) -> dict[str, Any]:
    from trt_runtime.kernels.torch_host import ELEMENT_TYPES

    return {
        "n": linear.out_features,
        "k": linear.in_features,
        "dtype": ELEMENT_TYPES[dtype],
        "code": linear.format.weight,
        "group": linear.format.group,
    }


def _dequantized(linear: PackedLinear) -> Tensor:
    from trt_runtime.kernels import quantized_linear
    from trt_runtime.kernels.torch_host import execute

    out = linear.tiles.new_empty(linear.out_features, linear.in_features)
    launch = quantized_linear.dequantize(
        **_weight(linear, out.dtype), weight=linear.packed, scale=linear.tiles, offset=linear.offset, out=out
    )
    execute([launch])
    return out


def _one(tensor: Tensor) -> Tensor:
    return tensor


def _both(first: Tensor) -> Tensor:
    """`first` and what lies right behind it, of the same shape."""
    return first.as_strided((2 * len(first), *first.shape[1:]), first.stride())


def fetch_ahead(products: Sequence[nn.Module]) -> None:
    """Tell quantized products, in the order of execution, what the next ones will read.

    In a decode step of one token the memory stands still between two products and during attention; weights that are
    asked for before come from L2 after.
    """
    weights = [product.packed if isinstance(product, QuantizedProjection) else product.weight for product in products]
    asked = [0] * len(products)
    for i, product in enumerate(products):
        if not isinstance(product, QuantizedProjection) or product.packed is None:
            continue
        room, ahead = AHEAD_BYTES, []
        for j in range(i + 1, min(i + 3, len(products))):
            weight = weights[j]
            if not isinstance(weight, Tensor) or not weight.is_contiguous():
                continue
            take = min(room, weight.nbytes - asked[j]) // 16 * 16
            if take > 0:
                ahead.append((weight.view(-1).view(torch.int32)[asked[j] // 4 :], take))
                asked[j] += take
                room -= take
        product.ahead = tuple(ahead)
