"""Kernels of quantized layers: against fp64, against the reference's arithmetic, and in whole models.

The small cases run on the CPU as well, through Triton's interpreter (`test_interpreted` starts that process).

Tolerance.  Codes, their zeros and the products are exact; a weight-only product rounds its scaled sum once, each part
of a gated one, silu, their product and the sum with a residual once more: the norm of the error is within 4 units of
what is rounded, as for `linear.gemv`.  Sums are made in fp32: of k products by matrix units, which may truncate, they
are within k * 2^-23 of the sum of magnitudes, below a unit of fp16 for every k here.
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import refmodels
from debug.capture.prompts import random_prompts
from debug.comparison.compare import diff_engine
from debug.comparison.results import verdict_line
from export.quantization.calibrate import quantize_model
from export.quantization.data import calibration_data
from export.quantization.schemes import QuantizeOptions
from refmodels.quantization.arithmetic import (
    LEAST_AMAX,
    quantize_static,
    quantize_tokens,
    quantize_weight,
    to_codes,
)
from refmodels.quantization.formats import LIMITS, Code, LinearFormat
from refmodels.quantization.linear import QuantizedLinear
from tests.support.goldens import case_source
from tests.support.marks import quick_first
from tests.support.paths import GOLDENS_MODELOPT

pytest.importorskip("triton")

from tests.support.gemm import Weights, check_gemm
from tests.support.gpu import CUDA, DEVICE, INTERPRETED, interpreted, needs_gpu, needs_kernels
from tests.support.torch_engines import FusedOnCpu, OnHost
from trt_runtime.kernels import packing, quantized_gemm, quantized_gemm_hopper, quantized_linear
from trt_runtime.kernels.torch_host import ELEMENT_TYPES, execute
from trt_runtime.torch_gpu.engine import TorchEngine
from trt_runtime.torch_gpu.linear import PREFETCH_BYTES, FusedFloatLinear, plan_prefetch
from trt_runtime.torch_gpu.quantized_linear import FusedQuantizedLinear
from trt_runtime.torch_gpu.weight_storage import mergeable, pack

HALF, BRAIN = torch.float16, torch.bfloat16
FORMATS = [
    LinearFormat(weight="int4", group=128),
    LinearFormat(weight="int4", group=64),
    LinearFormat(weight="int4", group=16),
    LinearFormat(weight="int4"),
    LinearFormat(weight="int4", group=128, symmetric=False),
    LinearFormat(weight="int4", group=32, symmetric=False),
    LinearFormat(weight="int8"),
    LinearFormat(weight="int8", group=32),
    LinearFormat(weight="int8", group=128, symmetric=False),
    LinearFormat(weight="fp8"),
    LinearFormat(weight="fp8", group=64),
]


SCALED = LinearFormat(weight="int4", group=32, pre_quant_scale=True)


def check_gemv(linear: LinearFormat, n: int, k: int, tokens: int, dtype: torch.dtype, **more: Any) -> None:
    gated = more.pop("gated", False)
    weights = Weights(linear, n, k, dtype, gated=gated, seed=n + k)
    g = torch.Generator().manual_seed(tokens)
    x, bias, residual = (
        torch.randn(*shape, generator=g).to(dtype).to(DEVICE)
        for shape in ((tokens, k), (n * (1 + gated),), (tokens, n))
    )
    for with_more in (False, True):
        memory = torch.full((tokens * n + 64,), float("nan"), dtype=dtype, device=DEVICE)
        out = memory[32:-32].view(tokens, n)
        given = {"bias": bias, "residual": residual} if with_more else {}
        execute([quantized_linear.gemv(**weights.arguments, tokens=tokens, x=x, out=out, gated=gated, **given, **more)])
        y = F.linear(x.double(), weights.exact(), bias.double() if with_more else None)
        y = F.silu(y[:, :n]) * y[:, n:] if gated else y
        y = y + residual.double() if with_more else y
        assert memory[:32].isnan().all() and memory[-32:].isnan().all(), "wrote outside"
        error = float((out.double() - y).norm() / max(1.0, float(y.norm())))
        assert error <= 4 * torch.finfo(dtype).eps, (linear, n, k, tokens, gated, dtype, error)


@pytest.mark.parametrize("code", ["int4", "int8", "fp8"])
@pytest.mark.parametrize(("rows", "columns"), [(1, 8), (16, 64), (37, 200), (40, 1024)])
def test_packing_is_invertible(code: Code, rows: int, columns: int) -> None:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows))
    codes = quantize_weight(weight, LinearFormat(weight=code)).codes
    if code == "int4":
        codes[0, :8] = torch.tensor([-8, 7, 0, -1, 1, -7, 6, -8])
    packed = packing.pack(codes, code)
    bytes_a_code = 0.5 if code == "int4" else 1
    padded = -(-rows // 16) * 16 * -(-columns // (64 if code == "int4" else 32)) * (64 if code == "int4" else 32)
    assert packed.nbytes == padded * bytes_a_code
    assert torch.equal(
        packing.unpack(packed, code, rows=rows, columns=columns).view(torch.int8), codes.view(torch.int8)
    )


def layer(linear: LinearFormat, *, bias: bool, seed: int) -> QuantizedLinear:
    g = torch.Generator().manual_seed(seed)
    made = QuantizedLinear(64, 40, bias=bias, linear=linear)
    weight = quantize_weight(torch.randn(40, 64, generator=g), linear)
    made.weight.data, made.scale.data = weight.codes, weight.scale
    if made.zero is not None and weight.zero is not None:
        made.zero.data = weight.zero
    if made.order is not None:
        made.order.data = torch.randperm(64, generator=g)
    if made.input_scale is not None:
        made.input_scale.data = torch.tensor(0.03)
    if made.pre_quant_scale is not None:
        made.pre_quant_scale.data = 0.5 + torch.rand(64, generator=g)
    if made.bias is not None:
        made.bias.data = torch.randn(40, generator=g)
    return made


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("linear", [FORMATS[3], FORMATS[5], FORMATS[6], FORMATS[9], SCALED], ids=str)
def test_a_packed_layer_is_still_the_reference(linear: LinearFormat, bias: bool) -> None:
    linears = [layer(linear, bias=bias, seed=seed) for seed in (1, 2)]
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    before = [linear(x) for linear in linears]
    packed = pack(*linears)
    assert all("weight" not in linear._parameters for linear in packed)
    assert all(torch.equal(linear(x), y) for linear, y in zip(packed, before, strict=True))
    for linear, original in zip(packed, linears, strict=True):
        parameters = dict(original.named_parameters())
        del parameters["weight"]
        assert all(parameters.pop(name) is parameter for name, parameter in linear.named_parameters())
        assert not parameters
    merged = FusedQuantizedLinear(*packed)
    assert merged.packed is not None and merged.packed.shape[0] == 6
    assert torch.equal(merged.packed, torch.cat([linear.packed for linear in packed]))
    assert merged.packed.data_ptr() == packed[0].packed.data_ptr()


def test_layers_that_scale_their_own_inputs_are_not_merged() -> None:
    assert not mergeable(*(layer(SCALED, bias=False, seed=seed) for seed in (1, 2)))
    assert mergeable(*(layer(replace(SCALED, pre_quant_scale=False), bias=False, seed=seed) for seed in (1, 2)))


def test_what_is_prefetched() -> None:
    """Every byte once, in the order in which it will be read, no more than the room at a time."""
    layers = [FusedQuantizedLinear(layer(FORMATS[3], bias=False, seed=i)) for i in range(4)]
    for size, linear in zip((64, PREFETCH_BYTES // 2, 3 * PREFETCH_BYTES, 64), layers, strict=True):
        linear.packed = torch.zeros(size // 4, dtype=torch.int32)
    floats = FusedFloatLinear(torch.zeros(4, 4), None)
    plan_prefetch([*layers, floats])
    half = PREFETCH_BYTES // 2
    sizes = [[piece.nbytes for piece in linear.prefetch] for linear in layers]
    assert sizes == [[half, half], [2 * half], [64, 64], []] and floats.prefetch == ()
    long = layers[2].packed
    assert long is not None and layers[1].prefetch[0].data_ptr() == long.data_ptr() + half


@needs_kernels
@pytest.mark.parametrize("linear", FORMATS, ids=str)
def test_small_products(linear: LinearFormat) -> None:
    k = 384 if linear.group == 128 else 320
    for (n, gated), tokens in zip(((37, False), (24, True), (16, False)), (1, 3, 11), strict=True):
        check_gemv(linear, n, k, tokens, HALF, gated=gated, block=(2, 1, 1) if tokens == 11 else None)
    if linear.group in (None, 16):
        check_gemv(linear, 20, 208, 1, HALF)


@needs_kernels
@pytest.mark.parametrize("tokens", [3, 20])
def test_small_projections_scale_their_input(tokens: int) -> None:
    """A pre-quant scale is the kernels' caller's to multiply by."""
    linear = layer(SCALED, bias=True, seed=1).half().to(DEVICE)
    x = torch.randn(tokens, 64, generator=torch.Generator().manual_seed(0)).half().to(DEVICE)
    wanted = linear.double()(x.double())
    [packed] = pack(linear.half())
    error = float((FusedQuantizedLinear(packed)(x).double() - wanted).norm() / wanted.norm())
    assert error <= 4 * torch.finfo(HALF).eps


@needs_kernels
def test_small_tiles_and_warps() -> None:
    for block in ((1, 1, 1), (4, 3, 2), (8, 2, 1)):
        check_gemv(FORMATS[0], 50, 1280, 1, HALF, block=block)


@needs_kernels
@pytest.mark.parametrize("linear", FORMATS, ids=str)
def test_small_dequantized_weights(linear: LinearFormat) -> None:
    """Bit for bit the reference's."""
    k = 384 if linear.group == 128 else 320
    weights = Weights(linear, 37, k, HALF, gated=False)
    out = torch.full((37, k), float("nan"), dtype=HALF, device=DEVICE)
    execute([quantized_linear.dequantize(**weights.arguments, out=out)])
    assert torch.equal(out, weights.parts[0].dequantized())


def check_codes(code: Any, rows: int, width: int, dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(width)
    x = (torch.randn(rows, width, generator=g) * 2.0 ** torch.randint(-6, 4, (rows, 1), generator=g)).to(dtype)
    x[rows // 2] = 0
    x = x.to(DEVICE)
    codes = torch.full((rows, width), 77, dtype=torch.int8, device=DEVICE)
    scales = torch.full((rows,), float("nan"), device=DEVICE)
    given: dict[str, Any] = {"rows": rows, "width": width, "dtype": ELEMENT_TYPES[dtype], "code": code, "x": x}
    execute(quantized_gemm.quantize(**given, quantized=codes, scales=scales))
    # As the RMSNorm kernel: quotients of two tensors are IEEE's, those of a tensor and a number are not always.
    limit = torch.tensor(LIMITS[code], device=DEVICE)
    amax = x.float().abs().amax(-1, keepdim=True).clamp(min=LEAST_AMAX)
    expected = to_codes((x.float() * (limit / amax)).clamp(-limit, limit), code)
    assert torch.equal(codes, expected.view(torch.int8)) and torch.equal(scales, (amax / limit).flatten())
    # They part where a code is a tie; numbers with few bits make many.
    assert float((quantize_tokens(x, code)[0].view(torch.int8) != codes).double().mean()) < 1e-3
    static = torch.tensor(0.013, dtype=dtype, device=DEVICE)
    execute(quantized_gemm.quantize(**given, quantized=codes, static=static))
    assert torch.equal(codes.cpu(), quantize_static(x.cpu(), static.cpu(), code).view(torch.int8))


@needs_kernels
@pytest.mark.parametrize("code", ["int8", "fp8"])
def test_small_codes_of_inputs(code: Any) -> None:
    check_codes(code, 5, 200, HALF)


@needs_kernels
@pytest.mark.parametrize("code", ["int8", "fp8"])
def test_small_products_of_codes(code: Any) -> None:
    check_gemm(code, 70, 96, 5, HALF, gated=False, static=False)
    check_gemm(code, 40, 256, 33, HALF, gated=True, static=True)


@needs_kernels
@pytest.mark.parametrize("kind", [torch.int32, torch.float32], ids=str)
def test_small_finished_sums(kind: torch.dtype) -> None:
    """Of a product whose parts of k are summed apart: the rest of it, and nothing else of its arguments."""
    n, tokens, tile = 70, 5, quantized_gemm_hopper.Tile(tokens=128, rows=64, stages=2, splits=2)
    g = torch.Generator().manual_seed(0)
    sums = torch.randint(-9999, 9999, (2, tokens, n), generator=g).to(kind).to(DEVICE)
    codes = torch.zeros(16, dtype=torch.int8, device=DEVICE)
    scale, bias, residual = (torch.randn(*s, generator=g).to(HALF).to(DEVICE) for s in ((n,), (n,), (tokens, n)))
    for static in (False, True):
        scales = torch.tensor(0.01, dtype=HALF) if static else torch.rand(tokens, generator=g) / 100
        out = torch.full((tokens, n), float("nan"), dtype=HALF, device=DEVICE)
        _, finish = quantized_gemm_hopper.gemm(
            n=n, k=32, tokens=tokens, dtype="fp16", code="int8" if kind == torch.int32 else "fp8", x=codes, scale=scale,
            input_scale=scales.to(DEVICE), weight=codes, out=out, tile=tile, processors=1, sums=sums, bias=bias,
            residual=residual, static=static,
        )  # fmt: skip
        execute([finish])
        by_token = scales.to(DEVICE).float() if static else scales.to(DEVICE)[:, None]
        y = (sums.sum(0).float() * (by_token * scale.float())).to(HALF) + bias + residual
        assert torch.equal(out, y)


@pytest.mark.slow
@pytest.mark.skipif(CUDA or INTERPRETED, reason="the GPU runs the small cases itself")
def test_interpreted() -> None:
    assert f"{2 * len(FORMATS) + 9} passed" in interpreted(__file__, "test_small")


@pytest.mark.skipif(INTERPRETED, reason="compiles")
@pytest.mark.parametrize("tokens", [1, 8])
def test_operands_lie_where_matrix_instructions_want_them(tokens: int) -> None:
    """No exchange between threads before the sums are complete, and 16 bytes a load: what the layouts are for."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    launch = quantized_linear.gemv(
        n=4096, k=4096, tokens=tokens, dtype="fp16", code="int4", group=128, x=0, weight=0, scale=0, out=0
    ).on(90)
    names = launch.kernel.arg_names
    constants = {**launch.constants, **{a: None for a, value in launch.arguments.items() if value is None}}
    signature = {
        a: "constexpr" if a in constants else "*" + launch.pointers[a] if a in launch.pointers else "i32" for a in names
    }
    source = ASTSource(
        fn=launch.kernel,
        signature=signature,
        constexprs={(names.index(a),): value for a, value in constants.items()},
        attrs={(names.index(a),): [["tt.divisibility", 16]] for a in names if signature[a].startswith("*")},
    )
    options = {"num_warps": launch.warps, "num_stages": launch.stages, **launch.options}
    ptx = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]
    assert "shfl.sync.idx" not in ptx and "mma.sync" in ptx and "griddepcontrol.wait" in ptx
    before, after = ptx.split("griddepcontrol.wait", 1)
    assert before.count("ld.global.L1::evict_first.v4") + before.count(".v4.b32") >= 4, "nothing is read in advance"
    assert after.count("mma.sync") >= 16


# In whole models

MODELS: dict[str, QuantizeOptions] = {
    "int4": QuantizeOptions(scheme="int4", group=32, head=True),
    "int4 with zeros": QuantizeOptions(scheme="int4", group=16, symmetric=False),
    "int8": QuantizeOptions(scheme="int8"),
    "smoothquant": QuantizeOptions(scheme="smoothquant"),
    "smoothquant, one scale": QuantizeOptions(scheme="smoothquant", inputs="tensor"),
    "fp8": QuantizeOptions(scheme="fp8", head=True),
    "int8 cache": QuantizeOptions(scheme="int4", group=32, cache="int8"),
}


def quantized(case: str, name: str, directory: Path) -> refmodels.ModelSource:
    source, options = case_source(case), MODELS[name]
    if source.spec.tied_head:
        options = replace(options, head=False)
    data = calibration_data(source, samples=4, tokens=16)
    return refmodels.resolve(quantize_model(source, directory / "q", options, data=data))


@pytest.mark.parametrize("name", quick_first(["int4 with zeros", "smoothquant"]))
@pytest.mark.parametrize("case", quick_first(["qwen", "gpt2"]))
def test_fused_modules_are_the_quantized_reference(case: str, name: str, tmp_path: Path) -> None:
    source = quantized(case, name, tmp_path)
    model = refmodels.load(source)
    engine = FusedOnCpu(refmodels.load(source))
    prompts = random_prompts(model.spec.vocab_size, (20, 13, 9), seed=0)
    result = diff_engine(engine, refmodels.load(source, dtype=torch.float64), model, prompts, steps=3)
    assert result.verdict == "aligned", verdict_line(result)


def check_every_tap(source: refmodels.ModelSource, dtype: torch.dtype, lengths: tuple[int, ...]) -> None:
    engine = OnHost(TorchEngine(refmodels.load(source, dtype=dtype, device="cuda"), kernels=True))
    prompts = random_prompts(engine.spec.vocab_size, lengths, seed=0)
    truth, rounded = refmodels.load(source, dtype=torch.float64), refmodels.load(source, dtype=dtype)
    result = diff_engine(engine, truth, rounded, prompts, steps=3)
    assert result.verdict == "aligned", verdict_line(result)


@needs_gpu
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("dtype", [HALF, BRAIN], ids=str)
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("case", ["qwen", "chatglm2", "gpt2"])
def test_every_tap_of_quantized_models_on_the_gpu(
    case: str, name: str, dtype: torch.dtype, batch: int, tmp_path: Path
) -> None:
    check_every_tap(quantized(case, name, tmp_path), dtype, (20, 13, 9)[:batch])


@needs_gpu
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("golden", ["int4_awq", "int8_sq"])
def test_every_tap_of_checkpoints_with_pre_quant_scales_on_the_gpu(golden: str, batch: int) -> None:
    source = refmodels.resolve(GOLDENS_MODELOPT / golden)
    check_every_tap(source, HALF, (6, 5, 3)[:batch])


@needs_gpu
@pytest.mark.parametrize("dtype", [HALF, BRAIN], ids=str)
@pytest.mark.parametrize("linear", FORMATS, ids=str)
def test_products_on_the_gpu(linear: LinearFormat, dtype: torch.dtype) -> None:
    for (n, k, gated), tokens in itertools.product(((4096, 4096, False), (1000, 2048, True)), (1, 7, 16)):
        check_gemv(linear, n, k, tokens, dtype, gated=gated)
    weights = Weights(linear, 500, 1024, dtype, gated=False)
    out = torch.full((500, 1024), float("nan"), dtype=dtype, device=DEVICE)
    execute([quantized_linear.dequantize(**weights.arguments, out=out)])
    assert torch.equal(out, weights.parts[0].dequantized())


@needs_gpu
@pytest.mark.parametrize("dtype", [HALF, BRAIN], ids=str)
@pytest.mark.parametrize("code", ["int8", "fp8"])
def test_products_of_codes_on_the_gpu(code: Any, dtype: torch.dtype) -> None:
    check_codes(code, 33, 4096, dtype)
    for tokens in (1, 50, 200, 700):
        for gated, static in ((False, False), (True, True)):
            check_gemm(code, 1000, 2048, tokens, dtype, gated=gated, static=static)
