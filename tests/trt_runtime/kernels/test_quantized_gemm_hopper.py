"""int8 and fp8 GEMMs with many tokens on Hopper: on the CPU by `gluon_on_cpu`, compiled without a GPU, and on a GPU."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.support.marks import quick_first

pytest.importorskip("triton")

from tests.support.gemm import check_gemm
from tests.support.gluon_on_cpu import execute_on_cpu
from tests.support.gpu import CUDA, INTERPRETED, needs_hopper
from trt_runtime.kernels import quantized_gemm_hopper as hopper
from trt_runtime.kernels.launch import Launch
from trt_runtime.kernels.quantized_gemm_hopper import Tile
from trt_runtime.kernels.torch_host import ELEMENT_TYPES, execute

HALF, BRAIN = torch.float16, torch.bfloat16


def sums_of(tile: Tile, given: dict[str, Any]) -> torch.Tensor | None:
    if tile.splits == 1:
        return None
    kind, poison = (torch.int32, 2**31 - 1) if given["code"] == "int8" else (torch.float32, float("nan"))
    shape = (tile.splits, given["tokens"], given["n"])
    return torch.full(shape, poison, dtype=kind, device=given["out"].device)


@pytest.mark.skipif(CUDA or INTERPRETED, reason="of CPU tensors")
@pytest.mark.parametrize("code", quick_first(["int8", "fp8"]))
@pytest.mark.parametrize(
    ("tile", "n", "k", "tokens", "gated", "processors"),
    quick_first(
        [
            (Tile(tokens=128, rows=64, stages=2), 150, 656, 300, False, 4),
            (Tile(tokens=256, rows=128, stages=3), 130, 400, 257, False, 1),
            (Tile(tokens=128, rows=64, stages=2), 70, 272, 130, True, 3),
        ]
    ),
)
def test_on_the_cpu(code: Any, tile: Tile, n: int, k: int, tokens: int, gated: bool, processors: int) -> None:
    """More units than blocks, more steps than buffers, and a rest in every direction."""

    def run(**given: Any) -> None:
        (launch,) = hopper.gemm(**given, tile=tile, processors=processors)
        execute_on_cpu(launch.on(80))

    for static in (False, True):
        check_gemm(code, n, k, tokens, HALF, gated=gated, static=static, run=run)


@pytest.mark.skipif(CUDA or INTERPRETED, reason="of CPU tensors")
@pytest.mark.parametrize("code", ["int8", "fp8"])
def test_parts_of_k_on_the_cpu(code: Any) -> None:
    tile = Tile(tokens=128, rows=64, stages=2, splits=2)

    def run(**given: Any) -> None:
        sums = sums_of(tile, given)
        assert sums is not None
        product, finish = hopper.gemm(**given, tile=tile, processors=3, sums=sums)
        execute_on_cpu(product.on(80))
        # `test_small_finished_sums` has the kernel; here, what it does.
        assert finish.arguments["sums"] is sums and finish.arguments["residual"] is given["residual"]
        scales = given["input_scale"][:, None] * given["scale"].float()
        y = ((sums[0] + sums[1]).float() * scales).to(HALF) + given["bias"]
        given["out"].copy_(y + given["residual"])

    check_gemm(code, 100, 656, 150, HALF, gated=False, static=False, run=run)


def test_tiles_of_qwen_7b() -> None:
    """The fastest tiles on an H200 with 132 multiprocessors (benchmarks/results/gpu_quantized.log)."""
    wide, square, narrow = hopper._COSTS
    gated_wide, gated_narrow = hopper._GATED_COSTS
    two = {tile: replace(tile, splits=2) for tile in (square, narrow)}
    qkv, out, gate_up, down = (12288, 4096, False), (4096, 4096, False), (11008, 4096, True), (4096, 11008, False)
    fastest = {
        128: (square, narrow, gated_wide, two[narrow]),
        256: (wide, narrow, gated_narrow, two[square]),
        1024: (wide, wide, gated_wide, wide),
        4096: (wide, wide, gated_wide, wide),
    }
    for tokens, tiles in fastest.items():
        for (n, k, gated), tile in zip((qkv, out, gate_up, down), tiles, strict=True):
            assert hopper.tile_of(n, k, tokens, code="int8", gated=gated, processors=132) == tile, (n, k, tokens)
    for n, k, gated in (qkv, out, gate_up, down):
        tile = hopper.tile_of(n, k, 256, code="fp8", gated=gated, processors=132)
        assert tile.tokens * tile.rows * (1 + gated) <= 128 * 128
    assert hopper.tile_of(4096, 16, 100, code="int8", gated=False, processors=132).splits == 1


def compiled(launch: Launch) -> Any:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.experimental.gluon._runtime import GluonASTSource

    names = launch.kernel.arg_names
    constants = {**launch.constants, **{a: None for a, value in launch.arguments.items() if value is None}}
    kinds = {torch.int8: "i8", torch.float8_e4m3fn: "fp8e4nv", HALF: "fp16", torch.float32: "fp32", torch.int32: "i32"}

    def kind(name: str) -> str:
        if name in constants:
            return "constexpr"
        value = launch.arguments[name]
        if isinstance(value, int):
            return "i32"
        if isinstance(value, torch.Tensor):
            return "*" + kinds[value.dtype]
        return f"tensordesc<{kinds[value.base.dtype]}{list(value.block_shape)},{value.layout!r}>"

    signature = {name: kind(name) for name in names}
    aligned = [["tt.divisibility", 16]]
    source = GluonASTSource(
        fn=launch.kernel,
        signature=signature,
        constexprs={(names.index(a),): value for a, value in constants.items()},
        attrs={(names.index(a),): aligned for a in names if signature[a][0] == "*" or a in ("n", "k")},
    )
    options = {"num_warps": launch.warps, "num_stages": launch.stages, "enable_fp_fusion": True, **launch.options}
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)


@pytest.mark.skipif(INTERPRETED, reason="compiles")
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("code", ["int8", "fp8"])
def test_compiled_for_hopper(code: Any, gated: bool) -> None:
    """Shared memory suffices, int8 products follow each other without a pause, and operands come by TMA."""
    kind = torch.int8 if code == "int8" else torch.float8_e4m3fn
    x, one = torch.zeros(64, dtype=torch.int8).view(kind), torch.zeros(64, dtype=HALF)
    for tile in hopper._GATED_COSTS if gated else hopper._COSTS:
        if code == "fp8" and tile.tokens * tile.rows * (1 + gated) > hopper._LARGEST_SUMS:
            continue
        (launch,) = hopper.gemm(
            n=4096, k=4096, tokens=256, dtype="fp16", code=code, x=x, input_scale=one.float(), weight=x, scale=one,
            out=one, residual=None if gated else one, gated=gated, tile=tile, processors=132,
        )  # fmt: skip
        made = compiled(launch.on(90))
        ptx = made.asm["ptx"]
        assert made.metadata.shared <= 232448, tile
        assert "wgmma.mma_async" in ptx and "cp.async.bulk.tensor" in ptx and "griddepcontrol.wait" in ptx
        waits = ptx.count(f"wgmma.wait_group.sync.aligned {1 + gated};")
        assert waits == (2 if code == "int8" else 0), "one in the loop of each half"


@needs_hopper
@pytest.mark.parametrize("dtype", [HALF, BRAIN], ids=str)
@pytest.mark.parametrize("code", ["int8", "fp8"])
@pytest.mark.parametrize("gated", [False, True])
def test_on_the_gpu(code: Any, dtype: torch.dtype, gated: bool) -> None:
    tiles = list(hopper._GATED_COSTS if gated else hopper._COSTS)
    tiles += [] if gated else [replace(tile, splits=2) for tile in tiles]
    for tile in tiles:
        if code == "fp8" and tile.tokens * tile.rows * (1 + gated) > hopper._LARGEST_SUMS:
            continue

        def run(tile: Tile = tile, **given: Any) -> None:
            given["dtype"] = ELEMENT_TYPES[dtype]
            execute(hopper.gemm(**given, tile=tile, processors=132, sums=sums_of(tile, given)))

        for (n, k, tokens), static in (((1000, 2096, 200), False), ((520, 4112, 700), True)):
            check_gemm(code, n, k, tokens, dtype, gated=gated, static=static, run=run)
