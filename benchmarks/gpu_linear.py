"""Products with a weight matrix on one GPU, in one run: our `gemv` against cuBLAS, and what cuBLAS makes of batches.

    python benchmarks/gpu_linear.py

The matrices of Qwen-7B and ChatGLM2-6B in fp16.  Times are medians of replays of a CUDA graph, per product; a graph
multiplies with enough different matrices that the L2 cache does not matter.  Bandwidth is the matrix's bytes over that
time; the fraction is of a long read's, measured here.  "gate and up" includes silu and the product in ours, not in
cuBLAS's.  Prints a table; writes gpu_linear.json to $OUT, or beside this file in results/.
"""

from __future__ import annotations

import functools
import json
import os
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.gpu_generate import read_bandwidth  # noqa: E402
from trt_runtime.kernels import linear  # noqa: E402
from trt_runtime.kernels.torch_host import execute  # noqa: E402

RESULTS = Path(os.environ.get("OUT") or Path(__file__).parent / "results") / "gpu_linear.json"
SHAPES = {
    "Qwen-7B qkv": (12288, 4096),
    "attention out": (4096, 4096),
    "Qwen-7B gate and up": (22016, 4096),
    "Qwen-7B mlp out": (4096, 11008),
    "Qwen-7B head": (151936, 4096),
    "ChatGLM2 qkv": (4608, 4096),
    "ChatGLM2 gate and up": (27392, 4096),
    "ChatGLM2 mlp out": (4096, 13696),
    "ChatGLM2 head": (65024, 4096),
}
BLOCKS = (
    (2, 2048, 4), (2, 1024, 4), (2, 1024, 2), (1, 2048, 2), (1, 2048, 4), (1, 4096, 4), (2, 2048, 8), (4, 1024, 4),
    (4, 2048, 4), (2, 4096, 4),
)  # fmt: skip
BATCHES = (1, 2, 4, 8, 16, 64, 256)
ROTATED_BYTES = 2 * 2**30


def graph_time(calls: Callable[[], Any], *, replays: int = 9) -> float:
    """Median milliseconds of a graph of these calls."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        calls()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        calls()
    graph.replay()
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(replays)]
    for start, end in events:
        start.record()
        graph.replay()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in events)


def gemv(weight: Tensor, *, x: Tensor, out: Tensor, gated: bool, block: tuple[int, int, int]) -> None:
    n, k = out.numel(), x.numel()
    execute([linear.gemv(n=n, k=k, dtype="fp16", x=x, weight=weight, out=out, gated=gated, block=block)])


def main() -> None:
    bandwidth = read_bandwidth()
    print(f"{torch.cuda.get_device_name()}, reads {bandwidth / 1e12:.2f} TB/s")
    found: dict[str, Any] = {}
    for name, (n, k) in SHAPES.items():
        size = 2 * n * k
        weights = [torch.randn(n, k, device="cuda", dtype=torch.float16) * k**-0.5 for _ in range(2)]
        weights += [w.clone() for w in weights * (ROTATED_BYTES // size // 2)]

        def per_product(product: Callable[[Tensor], Any], weights: list[Tensor] = weights) -> float:
            return graph_time(lambda: [product(w) for w in weights]) / len(weights)

        row: dict[str, Any] = {}
        for library in ("cublas", "cublaslt"):
            torch.backends.cuda.preferred_blas_library(library)
            for batch in BATCHES:
                x = torch.randn(batch, k, device="cuda", dtype=torch.float16)
                residual = torch.randn(batch, n, device="cuda", dtype=torch.float16)
                time = per_product(lambda w, x=x: F.linear(x, w))
                row[f"{library} {batch}"] = {"us": time * 1e3, "fraction": size / time / bandwidth * 1e3}
                if n == 4096 and batch >= 16:
                    time = per_product(lambda w, x=x, r=residual: r.addmm_(x, w.T))
                    row[f"{library} {batch} onto residual"] = {"us": time * 1e3}
        torch.backends.cuda.preferred_blas_library("default")
        gated = "gate" in name
        x = torch.randn(k, device="cuda", dtype=torch.float16)
        out = torch.empty(n // 2 if gated else n, device="cuda", dtype=torch.float16)
        expected = F.linear(x.double(), weights[-1].double())
        if gated:
            expected = F.silu(expected[: n // 2]) * expected[n // 2 :]
        for block in BLOCKS:
            out.fill_(float("nan"))
            time = per_product(functools.partial(gemv, x=x, out=out, gated=gated, block=block))
            error = float((out.double() - expected).norm() / expected.norm())
            assert error < 1e-3, (name, block, error)
            row[f"gemv {block}"] = {"us": time * 1e3, "fraction": size / time / bandwidth * 1e3, "error": error}
        found[name] = row
        ours = row[f"gemv {(*linear.block_of(k, gated=gated), linear.WARPS)}"]
        best = min((v["us"], key) for key, v in row.items() if key.startswith("gemv"))
        line = (
            f"{name:20s} gemv {ours['us']:6.1f} us {ours['fraction']:.0%} (best {best[0]:6.1f}: {best[1]}), cuBLAS/Lt"
        )
        for batch in BATCHES:
            line += f" {batch}: {row[f'cublas {batch}']['us']:.1f}/{row[f'cublaslt {batch}']['us']:.1f}"
        if "cublas 64 onto residual" in row:
            line += f"; onto residual 64: {row['cublas 64 onto residual']['us']:.1f}"
            line += f"/{row['cublaslt 64 onto residual']['us']:.1f}"
        print(line, flush=True)
        del weights
        torch.cuda.empty_cache()
    versions = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__}
    data = {"versions": versions, "read_bytes_per_second": bandwidth, "products": found}
    RESULTS.write_text(json.dumps(data, indent=1) + "\n")


if __name__ == "__main__":
    main()
