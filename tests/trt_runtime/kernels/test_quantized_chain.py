"""Chains of int4 GEMVs in one launch: their use in a model, and the kernel itself.

The kernel runs on a GPU, and on the CPU as C++ (`cuda_on_cpu.h`), there with few blocks and small sizes.

Tolerance.  As for the products of `test_quantized_linear.py`: sums are exact but for fp32's rounding, and what is
rounded to fp16 afterwards is at most the sum, each part of a gated one, silu, their product and the sum with a
residual: the norm of the error is within 4 units.  Each product is checked on what the one before it really gave.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from refmodels.checkpoints.load import empty_decoder
from refmodels.errors import LogitLockError
from refmodels.families import spec_from_config
from refmodels.model import Decoder
from refmodels.ops import fused_rms_norm
from refmodels.quantization.formats import LinearFormat, group_formats
from refmodels.quantization.linear import QuantizedLinear
from tests.support.gpu import DEVICE, needs_hopper
from tests.support.paths import ROOT
from trt_runtime.kernels import packing, quantized_chain
from trt_runtime.kernels.quantized_chain import ChainRunner, Product
from trt_runtime.torch_gpu import chain as chained
from trt_runtime.torch_gpu import convert
from trt_runtime.torch_gpu.engine import TorchEngine
from trt_runtime.torch_gpu.quantized_linear import FusedQuantizedLinear
from trt_runtime.torch_gpu.weight_storage import PackedLinear, pack

HALF = torch.float16


def by_row(tiles: Tensor) -> Tensor:
    """The inverse of `packing.by_tile`."""
    return tiles.unflatten(2, (8, 2)).permute(0, 3, 2, 1).flatten(0, 2)


def computed(product: Product, results: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """A product from those before it, in `dtype`, with the roundings of its results' dtype."""
    x = product.input.flatten() if product.input is not None else results[-1]
    if product.norm is not None:
        x = fused_rms_norm(x.cpu(), product.norm.cpu(), eps=product.eps, weight_in_float=product.weight_in_float).to(x)
    rounded: Callable[[Tensor], Tensor] = lambda y: y.to(x.dtype).to(dtype)  # noqa: E731
    codes = packing.unpack(product.weight, "int4", rows=product.rows * (1 + product.gated), columns=product.columns).to(
        dtype
    )
    weight = codes * by_row(product.scale).to(dtype).repeat_interleave(quantized_chain.GROUP, 1)
    y = F.linear(x.to(dtype), weight, None if product.bias is None else product.bias.to(dtype))
    if product.gated:
        gate, up = (rounded(part) for part in y.chunk(2))
        y = rounded(F.silu(gate)) * up
    if product.residual is not None:
        onto = results[product.residual] if isinstance(product.residual, int) else product.residual.flatten()
        y = rounded(y) + onto.to(dtype)
    return y


# A model's wiring, on the CPU


class ChainOnCpu:
    """`ChainRunner` in torch."""

    def __init__(self, *, rows: int, device: torch.device) -> None:
        self.rows = rows
        self.launches: list[int] = []

    def run(self, products: Sequence[Product], prefetch: Sequence[Tensor] = ()) -> None:
        self.launches.append(len(products))
        results: list[Tensor] = []
        for product in products:
            results.append(computed(product, results, torch.float32))
            assert len(results[-1]) == product.rows <= self.rows
            if product.out is not None:
                product.out.copy_(results[-1].view_as(product.out))


def small_spec(hidden: int = 128, width: int = 256) -> Any:
    config = {
        "model_type": "qwen", "vocab_size": 304, "hidden_size": hidden, "num_hidden_layers": 3, "kv_channels": 128,
        "num_attention_heads": hidden // 128, "intermediate_size": 2 * width, "layer_norm_epsilon": 1e-6,
        "seq_length": 64, "max_position_embeddings": 64,
    }  # fmt: skip
    spec = spec_from_config(config)
    linear = LinearFormat(weight="int4", group=128)
    return replace(spec, quantization=group_formats(dict.fromkeys(spec.linears, linear)))


def small_decoder(dtype: torch.dtype, device: str, **sizes: int) -> Decoder:
    decoder, g = empty_decoder(small_spec(**sizes)), torch.Generator().manual_seed(0)
    for name, parameter in list(decoder.named_parameters()):
        owner, _, leaf = name.rpartition(".")
        if parameter.dtype == torch.int8:
            value = torch.randint(-8, 8, parameter.shape, generator=g, dtype=torch.int8)
        else:
            value = torch.rand(parameter.shape, generator=g) * (0.01 if leaf == "scale" else 1) + 0.002
            value = value.to(dtype)
        setattr(decoder.get_submodule(owner), leaf, nn.Parameter(value.to(device), requires_grad=False))
    return decoder.eval()


@torch.no_grad()
def test_a_step_of_one_token_runs_by_chains(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = small_decoder(torch.float32, "cpu")
    for module in decoder.modules():
        if hasattr(module, "gate"):
            module.gate, module.up = pack(module.gate, module.up)
    for module in decoder.modules():
        for name, child in list(module.named_children()):
            if isinstance(child, QuantizedLinear) and not isinstance(child, PackedLinear):
                [packed] = pack(child)
                setattr(module, name, packed)
    monkeypatch.setattr(chained, "chainable", lambda linear: True)
    monkeypatch.setattr(chained, "ChainRunner", ChainOnCpu)
    quick = convert.fused_decoder(decoder)
    assert isinstance(quick.head, FusedQuantizedLinear)
    runner = quick.head.runner
    assert isinstance(runner, ChainOnCpu)
    caches = [decoder.new_cache(batch=1, capacity=16) for _ in range(2)]
    quick.prepare_tables(16)
    for cache in caches:
        decoder.step(torch.tensor([[5, 6, 7]]), cache)
    for token in (8, 9, 10):
        expected, found = (m.step(torch.tensor([[token]]), c) for m, c in zip((decoder, quick), caches, strict=True))
        assert torch.allclose(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    # Query, key and value of the first block, and a chain for each block: the last makes the logits.
    assert runner.launches == [1, 4, 4, 4] * 3


def test_what_is_not_chained(monkeypatch: pytest.MonkeyPatch) -> None:
    def served(rows: int = 64, columns: int = 256, group: int | None = 128) -> bool:
        return quantized_chain.serves(rows=rows, columns=columns, group=group)

    assert served() and not served(rows=24) and not served(columns=192)
    assert not served(group=64) and not served(group=None)
    assert not quantized_chain.on(torch.device("cpu"))
    # A block that cannot have a chain leaves the whole model without.
    decoder = small_decoder(torch.float32, "cpu")
    quick = convert.fused_decoder(decoder)
    assert isinstance(quick.head, FusedQuantizedLinear)
    assert all(block.chain is None for block in quick.blocks) and quick.head.runner is None

    # Without a compiler for the kernel neither has any, and says so.
    def refuse(**_: Any) -> None:
        raise LogitLockError("no NVRTC")

    monkeypatch.setattr(chained, "chainable", lambda linear: True)
    monkeypatch.setattr(chained, "ChainRunner", refuse)
    with pytest.warns(UserWarning, match="no NVRTC"):
        quick = convert.fused_decoder(decoder)
    assert isinstance(quick.head, FusedQuantizedLinear)
    assert all(block.chain is None for block in quick.blocks) and quick.head.runner is None


@pytest.mark.slow
def test_the_kernel_compiles() -> None:
    """For which no GPU is needed; also a check of its threads and shared memory: see the static_assert."""
    cubin = quantized_chain.compiled()
    assert cubin[:4] == b"\x7fELF" and b"quantized_chain" in cubin


def test_records_are_laid_out_as_the_kernel_has_them() -> None:
    product, chain = quantized_chain._Product, quantized_chain._Chain
    assert (ctypes.sizeof(product), product.rows.offset, product.eps.offset) == (96, 72, 92)
    assert (chain.prefetch.offset, chain.counters.offset, chain.count.offset) == (384, 448, 456)


# The kernel


def packed(rows: int, columns: int, seed: int, *, gated: bool = False) -> dict[str, Any]:
    g = torch.Generator().manual_seed(seed)
    n = rows * (1 + gated)
    codes = torch.randint(-8, 8, (n, columns), generator=g, dtype=torch.int8)
    scale = (torch.rand(n, columns // 128, generator=g) + 0.5).to(HALF) * columns**-0.5 / 5
    made = {"weight": packing.pack(codes, "int4"), "scale": packing.by_tile(scale)}
    return {"rows": rows, "columns": columns, "gated": gated} | {k: v.to(DEVICE) for k, v in made.items()}


def numbers(count: int, seed: int) -> Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(seed)).to(HALF).to(DEVICE)


def empty(count: int) -> Tensor:
    return torch.full((count,), float("nan"), dtype=HALF, device=DEVICE)


class KernelOnCpu:
    """A `ChainRunner` that runs the kernel as C++, in `blocks` blocks, in another order at every launch."""

    def __init__(self, library: Path, *, rows: int, blocks: int) -> None:
        self.function, self.blocks, self.seed = ctypes.CDLL(str(library)).run, blocks, 0
        self.function.restype = ctypes.c_bool
        self.results, self.counters = quantized_chain.scratch(rows, "cpu")

    def run(self, products: Sequence[Product], prefetch: Sequence[Tensor] = ()) -> None:
        chain = quantized_chain.described(products, prefetch, self.results, self.counters, self.blocks)
        self.seed += 1
        assert self.function(ctypes.byref(chain), self.blocks, self.seed), "threads wait for each other for ever"
        assert self.counters.tolist() == [self.seed + 1, 0]


RUN_ON_CPU = """
#include "quantized_chain.cu"
extern "C" bool run(const Chain* chain, u32 blocks, u32 seed) {
    return cpu::run(blocks, ALL_THREADS, sizeof(Memory), seed, [=] { quantized_chain(*chain); });
}
"""


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("needs g++")
    here = tmp_path_factory.mktemp("cuda_on_cpu")
    shutil.copy(Path(quantized_chain.__file__).with_suffix(".cu"), here)
    shutil.copy(ROOT / "tests" / "support" / "cuda_on_cpu.h", here / "hopper.cuh")
    (here / "run.cpp").write_text(RUN_ON_CPU)
    options = ["-std=c++17", "-O2", "-U_FORTIFY_SOURCE", "-Wno-unknown-pragmas", *quantized_chain.DEFINES]
    command = [compiler, *options, "-shared", "-fPIC", "-o", "run.so", "run.cpp"]
    subprocess.run(command, cwd=here, check=True)
    return here / "run.so"


def check(products: Sequence[Product], runner: ChainRunner | KernelOnCpu | None = None, launches: int = 3) -> None:
    runner = runner or ChainRunner(rows=max(product.rows for product in products), device=torch.device("cuda", 0))
    for _ in range(launches):
        for product in products:
            assert product.out is not None
            product.out.fill_(float("nan"))
        runner.run(products, [product.weight for product in products])
        results: list[Tensor] = []
        for i, product in enumerate(products):
            expected = computed(product, results, torch.float64)
            assert product.out is not None
            error = float((product.out.double() - expected).norm() / max(1.0, float(expected.norm())))
            assert error <= 4 * torch.finfo(HALF).eps, (i, error)
            results.append(product.out)


@needs_hopper
@pytest.mark.parametrize("in_float", [False, True])
@pytest.mark.parametrize(
    ("hidden", "width"), [(128, 128), (256, 384), (4096, 11008), (4224, 4352), (5120, 13824), (8192, 2048)]
)
def test_the_products_of_a_block(hidden: int, width: int, in_float: bool) -> None:
    check(products_of_a_block(hidden, width, in_float=in_float))
    norm = {"eps": 1e-6, "weight_in_float": in_float, "norm": numbers(hidden, 13)}
    check([Product(**packed(48, hidden, 12), **norm, input=numbers(hidden, 2), out=empty(48))])


@pytest.mark.slow
@pytest.mark.parametrize(("hidden", "width", "blocks"), [(128, 128, 1), (256, 384, 2), (128, 256, 10), (256, 128, 13)])
def test_the_products_of_a_small_block(library: Path, hidden: int, width: int, blocks: int) -> None:
    """Tiles for many times as many blocks, and fewer."""
    products = products_of_a_block(hidden, width, in_float=blocks == 2)
    check(products, KernelOnCpu(library, rows=max(hidden, width), blocks=blocks), launches=2)


@pytest.mark.slow
def test_sums_of_many_tiles_wait_for_their_turn(library: Path) -> None:
    product = Product(**packed(640, 128, 1, gated=True), input=numbers(128, 2), out=empty(640))
    check([product], KernelOnCpu(library, rows=640, blocks=1), launches=2)


@pytest.mark.slow
@pytest.mark.parametrize("norm", [False, True])
def test_wide_inputs_of_few_rows(library: Path, norm: bool) -> None:
    """Two panels of columns, the second with one group."""
    normed: dict[str, Any] = {"norm": numbers(4224, 3), "eps": 1e-6} if norm else {}
    products = [
        Product(**packed(4224, 128, 1), input=numbers(128, 2), out=empty(4224)),
        Product(**packed(48, 4224, 4), **normed, out=empty(48)),
    ]
    check(products, KernelOnCpu(library, rows=4224, blocks=5), launches=1)


def products_of_a_block(hidden: int, width: int, *, in_float: bool) -> list[Product]:
    def norm(seed: int) -> dict[str, Any]:
        return {"eps": 1e-6, "weight_in_float": in_float, "norm": numbers(hidden, seed)}

    x = numbers(hidden, 2)
    return [
        Product(**packed(hidden, hidden, 1), input=x, residual=numbers(hidden, 3), out=empty(hidden)),
        Product(**packed(width, hidden, 4, gated=True), **norm(5), bias=numbers(2 * width, 6), out=empty(width)),
        Product(**packed(hidden, width, 7), residual=0, bias=numbers(hidden, 8), out=empty(hidden)),
        Product(**packed(48, hidden, 9), **norm(10), bias=numbers(48, 11), out=empty(48)),
    ]


@needs_hopper
@pytest.mark.parametrize(("rows", "columns"), [(16, 128), (151936, 512), (2112, 2176), (12288, 4096)])
def test_one_product(rows: int, columns: int) -> None:
    check([Product(**packed(rows, columns, 1), input=numbers(columns, 2), out=empty(rows))])


@needs_hopper
def test_inputs_of_any_size() -> None:
    check_inputs_of_any_size(ChainRunner(rows=64, device=torch.device("cuda", 0)))


@pytest.mark.slow
def test_small_inputs_of_any_size(library: Path) -> None:
    check_inputs_of_any_size(KernelOnCpu(library, rows=64, blocks=2))


def check_inputs_of_any_size(runner: ChainRunner | KernelOnCpu) -> None:
    x = numbers(1024, 1)
    x[:128], x[128:256], x[256:384] = 0, x[128:256] * 2**-20, x[256:384] * 2**12
    x[384:512:2] *= 2**-16
    check([Product(**packed(64, 1024, 2), input=x, out=empty(64))], runner)
    for wrong in (float("inf"), float("nan")):
        x[700], out = wrong, empty(64).fill_(1)
        runner.run([Product(**packed(64, 1024, 2), input=x, out=out)])
        assert out.isnan().all()


@needs_hopper
def test_a_graph_of_chains_gives_the_same_every_time() -> None:
    runner = ChainRunner(rows=4096, device=torch.device("cuda", 0))
    x, y, z = numbers(1024, 1), empty(4096), empty(1024)
    products = [
        Product(**packed(4096, 1024, 2), input=x, out=y),
        Product(**packed(1024, 4096, 3), residual=x, out=z),
    ]
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        runner.run(products)
    first = y.clone(), z.clone()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, stream=stream):
        for _ in range(5):
            runner.run(products)
    for _ in range(50):
        y.fill_(float("nan")), z.fill_(float("nan"))
        graph.replay()
        assert torch.equal(y, first[0]) and torch.equal(z, first[1])


@needs_hopper
@torch.no_grad()
def test_an_engine_gives_the_logits_of_separate_products(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for chain_runner in (chained.chain_runner, lambda decoder: None):
        monkeypatch.setattr(convert, "chain_runner", chain_runner)
        engine = TorchEngine(small_decoder(HALF, "cuda", hidden=256, width=384), kernels=True)
        static = engine._static
        assert static is not None
        assert all((block.chain is None) == bool(found) for block in static.model.blocks)
        cache = engine.new_cache(batch=1, capacity=32)
        logits = [engine.prefill(torch.tensor([[5, 6, 7]]), cache, last_logits_only=True)]
        logits += [engine.decode(torch.tensor([[token]]), cache) for token in range(8, 14)]
        found.append(torch.cat(logits).double())
    error = float((found[0] - found[1]).norm() / found[1].norm())
    assert error <= 4 * torch.finfo(HALF).eps * static.model.spec.layers, error
