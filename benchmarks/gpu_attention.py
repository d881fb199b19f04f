"""Attention kernels against torch's scaled_dot_product_attention, on one GPU, in one run.

    python benchmarks/gpu_attention.py

Every time is the median of replays of a CUDA graph, per call, over input sets that together exceed the L2 cache several
times.  Ours includes rotation and cache write; SDPA has neither: its keys are rotated and in the cache already.  Every
backend of SDPA that takes the shape is timed.  Decode is also compared with two kernels that only read: one of 4 GiB
(its bandwidth is the peak), one of as many bytes as the caches have (launch and ramp included, as in ours).  Prints a
table; writes gpu_attention.json to $OUT, or beside this file in results/.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from refmodels.dtypes import DTYPES
from trt_runtime.kernels import attention
from trt_runtime.kernels.launch import AttentionShape

RESULTS = Path(os.environ.get("OUT") or Path(__file__).parent / "results") / "gpu_attention.json"
HALF = ("fp16", "bf16")
DECODE = [(1, 32, 32, 2048), (64, 32, 32, 2048), (64, 32, 2, 2048), (256, 32, 2, 1024), (1, 32, 2, 32768)]
PREFILL = [(1, 32, 32, 2048), (1, 32, 32, 8192), (1, 32, 2, 2048), (1, 32, 2, 8192)]
HEAD_DIM = 128
ROTATED_BYTES = 512 * 2**20
BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
Call = Callable[[], Any]


@triton.jit(do_not_specialize=["count"])
def _read(source, out, count, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    acc = tl.zeros([BLOCK], tl.int32)
    at = tl.program_id(0).to(tl.int64) * count * BLOCK + tl.arange(0, BLOCK)
    for i in range(count):
        acc += tl.load(source + at + i * BLOCK)
    tl.store(out + tl.program_id(0), tl.sum(acc, 0))


def graph_time(calls: list[Call], *, seconds: float = 0.15) -> float:
    """Median microseconds of one call, the calls captured one after another in one graph."""
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]

    def replay() -> float:
        events[0].record()
        graph.replay()
        events[1].record()
        events[1].synchronize()
        return events[0].elapsed_time(events[1])

    first = statistics.median(replay() for _ in range(4))
    count = max(9, min(300, int(seconds * 1000 / first)))
    return statistics.median(replay() for _ in range(count)) * 1000 / len(calls)


def read_time(size: int) -> float:
    """Median microseconds of a kernel that only reads `size` bytes, the best of a few grids, under the same rules."""
    sources = [
        torch.randint(0, 100, (size // 4,), dtype=torch.int32, device="cuda")
        for _ in range(1 if size > ROTATED_BYTES * 4 else max(2, -(-ROTATED_BYTES // size)))
    ]
    best = float("inf")
    for block, programs in ((1024, 132 * 4), (1024, 132 * 8), (1024, 132 * 16), (2048, 132 * 64), (4096, 132 * 16)):
        count = size // 4 // (programs * block)
        out = torch.empty(programs, dtype=torch.int32, device="cuda")

        def call(source: Tensor, block: int = block, programs: int = programs, n: int = count, o: Tensor = out) -> None:
            _read[(programs,)](source, o, n, BLOCK=block, num_warps=8)

        if count > 0:
            took = graph_time([lambda s=s, call=call: call(s) for s in sources], seconds=0.05)  # type: ignore[misc]
            best = min(best, took * size / (programs * block * count * 4))
    return best


def shape_of(batch: int, heads: int, kv_heads: int, slots: int, tokens: int, dtype: str) -> AttentionShape:
    return AttentionShape(
        batch=batch,
        tokens=tokens,
        slots=slots,
        capacity=slots,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=HEAD_DIM,
        scale=HEAD_DIM**-0.5,
        dtype=dtype,  # type: ignore[arg-type]
        rotary_dim=HEAD_DIM,
    )


def sets_of(shape: AttentionShape) -> list[dict[str, Tensor]]:
    """Input sets of `ours`, rotated through."""
    cache = (shape.batch, shape.kv_heads, shape.capacity, shape.head_dim)
    width = (shape.heads + 2 * shape.kv_heads) * shape.head_dim
    each = (2 * shape.batch * shape.kv_heads * shape.capacity + shape.batch * shape.tokens * width // 128) * 128 * 2
    dtype = DTYPES[shape.dtype]

    def one() -> dict[str, Any]:
        angles = torch.rand(shape.batch, shape.tokens, shape.rotary_dim // 2, device="cuda") * 7
        return {
            "qkv": torch.randn(shape.batch, shape.tokens, width, device="cuda", dtype=dtype),
            "key_cache": torch.randn(*cache, device="cuda", dtype=dtype),
            "value_cache": torch.randn(*cache, device="cuda", dtype=dtype),
            "cache_lengths": torch.full((shape.batch,), shape.slots - shape.tokens, device="cuda"),
            "visible": torch.ones(shape.batch, shape.slots, dtype=torch.bool, device="cuda"),
            "cos": angles.cos(),
            "sin": angles.sin(),
            "query_scale": None,
            "alibi_slopes": None,
            "context": torch.empty(shape.batch, shape.tokens, shape.heads * HEAD_DIM, device="cuda", dtype=dtype),
        }

    return [one() for _ in range(max(2, -(-ROTATED_BYTES // each)))]


def our_calls(shape: AttentionShape, sets: list[dict[str, Tensor]], **choices: Any) -> list[Call]:
    workspace = torch.empty(attention.workspace_bytes(shape) // 4 + 1, device="cuda")
    counters = torch.zeros(attention.counter_count(shape), dtype=torch.int32, device="cuda")

    def call(tensors: dict[str, Tensor]) -> None:
        for launch in attention.launches(shape, **tensors, workspace=workspace, counters=counters, **choices):
            launch.kernel[launch.grid](
                **launch.arguments,
                **launch.constants,
                num_warps=launch.warps,
                num_stages=launch.stages,
                **launch.options,
            )

    return [lambda s=s: call(s) for s in sets]  # type: ignore[misc]


def sdpa_calls(shape: AttentionShape, sets: list[dict[str, Tensor]], backend: SDPBackend) -> list[Call]:
    def call(tensors: dict[str, Tensor]) -> Tensor:
        query = tensors["qkv"].view(shape.batch, shape.tokens, -1, HEAD_DIM)[:, :, : shape.heads].transpose(1, 2)
        key, value = tensors["key_cache"], tensors["value_cache"]
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(
                query, key, value, is_causal=shape.tokens > 1, enable_gqa=shape.heads != shape.kv_heads
            )

    return [lambda s=s: call(s) for s in sets]  # type: ignore[misc]


def measure(shape: AttentionShape, bandwidth: float) -> dict[str, Any]:
    sets = sets_of(shape)
    row: dict[str, Any] = {
        "kind": "decode" if shape.tokens == 1 else "prefill",
        "dtype": shape.dtype,
        "shape": f"{shape.batch}x{shape.heads}/{shape.kv_heads}x{shape.slots}",
        "ours_us": round(graph_time(our_calls(shape, sets)), 2),
        "sdpa_us": {},
    }
    for name, backend in BACKENDS.items():
        if name == "math" and shape.tokens > 1:
            continue
        try:
            row["sdpa_us"][name] = round(graph_time(sdpa_calls(shape, sets, backend)), 2)
        except RuntimeError as error:
            row["sdpa_us"][name] = str(error).splitlines()[0][:120]
    row["ours_again_us"] = round(graph_time(our_calls(shape, sets)), 2)
    times = {name: t for name, t in row["sdpa_us"].items() if isinstance(t, float)}
    row["best"] = min(times, key=lambda name: times[name])
    row["best_over_ours"] = round(times[row["best"]] / row["ours_us"], 3)
    if "flash" in times:
        row["flash_over_ours"] = round(times["flash"] / row["ours_us"], 3)
    if shape.tokens == 1:
        read = 2 * shape.batch * shape.kv_heads * shape.slots * HEAD_DIM * 2
        row["bandwidth_fraction"] = round(read / row["ours_us"] * 1e6 / bandwidth, 3)
        del sets
        torch.cuda.empty_cache()
        row["read_us"] = round(read_time(read), 2)
        row["read_over_ours"] = round(row["read_us"] / row["ours_us"], 3)
    else:
        flops = 4 * shape.batch * shape.heads * HEAD_DIM * shape.tokens * (shape.tokens + 1) / 2
        row["ours_tflops"] = round(flops / row["ours_us"] / 1e6, 1)
    return row


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    torch.manual_seed(0)
    bandwidth = 2**32 / read_time(2**32) * 1e6
    rows = []
    for dtype in HALF:
        for kind, shapes in (("decode", DECODE), ("prefill", PREFILL)):
            for batch, heads, kv_heads, slots in shapes:
                tokens = 1 if kind == "decode" else slots
                rows.append(measure(shape_of(batch, heads, kv_heads, slots, tokens, dtype), bandwidth))
                torch.cuda.empty_cache()
                print(json.dumps(rows[-1]), flush=True)
    result = {
        "command": "python benchmarks/gpu_attention.py",
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "read_bandwidth_tb_s": round(bandwidth / 1e12, 3),
        "rows": rows,
    }
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    print(f"read bandwidth {bandwidth / 1e12:.3f} TB/s")
    print(f"{'':13} {'shape':16} {'ours us':>9} {'SDPA us':>9} {'':9} {'x best':>7} {'x flash':>7}  rate")
    for row in rows:
        if row["kind"] == "decode":
            rate = f"{row['bandwidth_fraction']:.3f} of peak, {row['read_over_ours']:.3f} of a read"
        else:
            rate = f"{row['ours_tflops']:.0f} TFLOP/s"
        print(
            f"{row['kind']:8}{row['dtype']:5} {row['shape']:16} {row['ours_us']:9.1f} "
            f"{row['sdpa_us'][row['best']]:9.1f} {row['best']:9} {row['best_over_ours']:7.2f} "
            f"{row.get('flash_over_ours', 0):7.2f}  {rate}"
        )


if __name__ == "__main__":
    main()
