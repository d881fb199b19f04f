"""The RMSNorm kernel against torch's F.rms_norm and the five-op eager form, on one GPU, in one run.

    python benchmarks/gpu_rms_norm.py

Width 4096, 1 to 8192 rows, fp16 and bf16.  Every time is the median of replays of a CUDA graph, per call; a graph calls
over many input sets with outputs of their own: up to 64 rows they stay in the L2 cache, as in a model, where the layer
before has just written them; from 2048 rows on they exceed it several times.  The bandwidth of reading and writing is
that of torch's copy or negation, the best of several sizes.  Prints a table; writes gpu_rms_norm.json to $OUT, or
beside this file in results/.
"""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import triton

from refmodels.dtypes import DTYPES
from refmodels.ops import _rms_norm_body
from trt_runtime.kernels import rms_norm, torch_host
from trt_runtime.kernels.launch import NormShape

RESULTS = Path(os.environ.get("OUT") or Path(__file__).parent / "results") / "gpu_rms_norm.json"
WIDTH = 4096
EPS = 1e-6
HALF = ("fp16", "bf16")
ROTATED_BYTES = 512 * 2**20
Call = Callable[[], Any]


def graph_times(calls: list[Call], *, replays: int = 40) -> list[float]:
    """Two medians, one after the other, of microseconds a call; their difference is noise."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for call in calls[:2]:
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = [call() for call in calls]  # kept, or torch would give all calls one output
    for _ in range(5):
        graph.replay()
    medians = []
    for _ in range(2):
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(replays)]
        for start, end in events:
            start.record()
            graph.replay()
            end.record()
        torch.cuda.synchronize()
        medians.append(statistics.median(s.elapsed_time(e) for s, e in events) * 1e3 / len(calls))
    del outputs
    return medians


def copy_bandwidth() -> dict[str, float]:
    """Bytes read and written a second by torch's copy and by a kernel that negates, by MiB of the source."""
    found = {}
    for mib in (64, 256, 1024, 4096):
        size = mib * 2**20
        count = max(2, ROTATED_BYTES // size)
        sources = [torch.randint(0, 2**30, (size // 4,), dtype=torch.int32, device="cuda") for _ in range(count)]
        targets = [torch.empty_like(s) for s in sources]
        pairs = list(zip(sources, targets, strict=True))
        copies = [lambda a=a, b=b: b.copy_(a) for a, b in pairs]  # type: ignore[misc]
        negations = [lambda a=a, b=b: torch.neg(a, out=b) for a, b in pairs]  # type: ignore[misc]
        found[f"copy {mib}"] = 2 * size / min(graph_times(copies)) * 1e6
        found[f"neg {mib}"] = 2 * size / min(graph_times(negations)) * 1e6
    return found


def measure(rows: int, dtype: str) -> dict[str, Any]:
    bytes_each = 2 * rows * WIDTH * 2
    sets = 64 if rows <= 64 else max(4, min(64, ROTATED_BYTES // bytes_each))
    xs = [torch.randn(rows, WIDTH, device="cuda").to(DTYPES[dtype]) for _ in range(sets)]
    weights = [(1 + torch.randn(WIDTH, device="cuda") / 4).to(DTYPES[dtype]) for _ in range(sets)]
    pairs = list(zip(xs, weights, strict=True))

    def quantized(kind: Any) -> list[Call]:
        return [
            lambda x=x, w=w: torch_host.quantized_rms_norm(x, w, eps=EPS, weight_in_float=False, kind=kind)  # type: ignore[misc]
            for x, w in pairs
        ]

    versions: dict[str, list[Call]] = {
        "F.rms_norm": [lambda x=x, w=w: F.rms_norm(x, (WIDTH,), w, EPS) for x, w in pairs],  # type: ignore[misc]
        "eager": [lambda x=x, w=w: _rms_norm_body(x, w, EPS, False) for x, w in pairs],  # type: ignore[misc]
        "ours": [
            lambda x=x, w=w: torch_host.rms_norm_rows(x, w, eps=EPS, weight_in_float=False)  # type: ignore[misc]
            for x, w in pairs
        ],
        "ours, without overlap": [lambda x=x, w=w: alone(x, w) for x, w in pairs],  # type: ignore[misc]
        "ours, int8 as well": quantized("int8"),
        "ours, fp8 as well": quantized("fp8"),
    }
    microseconds = {name: graph_times(calls) for name, calls in versions.items()}
    x, w = pairs[0]
    exact = F.rms_norm(x.double(), (WIDTH,), w.double(), EPS)
    errors = {
        name: float((calls[0]().double() - exact).norm() / exact.norm()) for name, calls in list(versions.items())[:4]
    }
    assert all(error < 2.0**-7 for error in errors.values()), errors
    return {
        "rows": rows,
        "dtype": dtype,
        "sets": sets,
        "bytes": bytes_each,
        "microseconds": microseconds,
        "errors": errors,
    }


def alone(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Ours, started when the kernel ahead has finished: what GPUs before compute capability 9.0 do."""
    y = torch.empty_like(x)
    shape = NormShape(rows=len(x), width=WIDTH, eps=EPS, weight_in_float=False, dtype=torch_host.ELEMENT_TYPES[x.dtype])
    torch_host.execute([launch.on(80) for launch in rms_norm.launches(shape, x=x, weight=weight, y=y)])
    return y


def main() -> None:
    warm = torch.randn(8192, 8192, device="cuda")
    for _ in range(30):
        warm = (warm @ warm).clamp(-1, 1)  # the clocks rise before anything is timed
    results = [measure(2**k, dtype) for dtype in HALF for k in range(14)]
    copies = copy_bandwidth()
    bandwidth = max(copies.values())
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}")
    print("TB/s by MiB:", {name: round(rate / 1e12, 2) for name, rate in copies.items()})
    names = list(results[0]["microseconds"])
    print("dtype  rows | us: " + " | ".join(names) + " | ours / F.rms_norm | of bandwidth")
    for result in results:
        best = {name: min(times) for name, times in result["microseconds"].items()}
        result["ratio"] = best["ours"] / best["F.rms_norm"]
        result["of_bandwidth"] = result["bytes"] / (best["ours"] * 1e-6) / bandwidth
        times = " ".join(f"{best[name]:8.2f}" for name in names)
        print(f"{result['dtype']} {result['rows']:5} {times}  {result['ratio']:5.2f}  {result['of_bandwidth']:5.1%}")
    record = {
        "command": "python benchmarks/gpu_rms_norm.py",
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "width": WIDTH,
        "bytes_per_second": copies,
        "results": results,
    }
    RESULTS.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
