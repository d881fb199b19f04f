"""The two hosts of the kernels: torch, and files compiled ahead of time for the CUDA driver.

What each serves is tested on the CPU; `pytest -m gpu` shows that both compute the same bits, eagerly and inside CUDA
graphs, and that the models through them give Hugging Face's logits and tokens.
"""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import refmodels
from refmodels import ops
from refmodels.attention import AttentionInputs, to_torch
from refmodels.errors import LogitLockError
from tests.support.goldens import CASES, assert_reproduces_golden, case_source
from tests.support.gpu import needs_gpu
from tests.support.kernel_cases import (
    ADDRESSES,
    SPEC,
    attention_shape,
    changed,
    copied,
    facts_of,
    norm_shape,
    tensors,
)

pytest.importorskip("triton")
from trt_runtime.kernels import attention, compiled, rms_norm, torch_host
from trt_runtime.kernels.compiled import CompiledKernels, compile_kernels
from trt_runtime.kernels.launch import KERNEL_INPUTS, AttentionShape, unread_inputs

# ---- torch ----


@pytest.mark.slow
def test_registered_beside_the_body() -> None:
    for op in ("refmodels::fused_rms_norm", "refmodels::cached_attention"):
        for key in ("CUDA", "CompositeExplicitAutograd"):
            assert torch._C._dispatch_has_kernel_for_dispatch_key(op, key)
    code = "import refmodels.model, sys; assert 'triton' not in sys.modules and 'trt_runtime' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_only_inside_use_kernels_and_only_what_is_served(monkeypatch: pytest.MonkeyPatch) -> None:
    served: list[str] = []
    monkeypatch.setattr(torch_host, "rms_norm_rows", lambda *a, **k: served.append("norm"))
    monkeypatch.setattr(torch_host, "attention_into_caches", lambda *a, **k: served.append("attention"))

    def norm(dtype: torch.dtype = torch.float16, width: int = 8) -> Any:
        x = torch.randn(2, width).to(dtype)
        result = torch_host._rms_norm_on_cuda(x, x[0], 1e-6, False)
        return result is None or torch.equal(result, ops._rms_norm_body(x, x[0], 1e-6, False))

    def attend(arithmetic: str = "exact", dtype: torch.dtype = torch.float16, cache: Any = None) -> None:
        shape = attention_shape(SPEC)
        given = AttentionInputs(
            *(t.to(dtype) if t is not None and t.is_floating_point() else t for t in tensors(shape, device="cpu"))  # type: ignore[arg-type]
        )
        if cache is not None:
            given = given._replace(key_cache=cache(given.key_cache))
        expected, facts = copied(given), facts_of(shape, arithmetic)
        result = torch_host._attention_on_cuda(*to_torch(given, facts))
        if result is not None:
            body = ops.attention_body(expected, facts, in_place=True)[0]
            assert torch.equal(result, body) and torch.equal(given.key_cache, expected.key_cache)

    assert norm()
    attend()
    assert served == []
    with torch_host.use_kernels():
        assert norm() and served.pop() == "norm"
        attend()
        assert served.pop() == "attention"
        assert norm(torch.float64)
        assert norm(width=rms_norm.MAX_WIDTH + 1)
        attend(dtype=torch.float64)
        attend("eager_upcast")
        attend(cache=lambda c: c.transpose(1, 2).contiguous().transpose(1, 2))
        with torch_host.use_kernels():
            pass
        assert served == []
        attend(dtype=torch.bfloat16)
        assert served.pop() == "attention"
    attend()
    assert served == []


def test_inputs_that_no_kernel_reads_are_refused_by_name() -> None:
    """A quantized cache's scales: the host of the op leaves them to the body, the kernels themselves refuse them."""
    shape = attention_shape(SPEC)
    given = tensors(shape, device="cpu")._replace(key_scale=torch.ones(2), value_scale=torch.ones(2))
    read = [row.name for row in KERNEL_INPUTS]
    assert unread_inputs([*read, "key_scale", "value_scale"]) == ["key_scale", "value_scale"]
    with pytest.raises(LogitLockError, match="do not read key_scale, value_scale; use --attention decomposed"):
        torch_host.attention_into_caches(given, facts_of(shape))


def test_workspace_must_hold_the_shape() -> None:
    shape = attention_shape(SPEC)
    small = torch_host.Workspace.allocate(shape, torch.device("cpu"))
    assert small.holds(replace(shape, batch=1)) and not small.holds(replace(shape, batch=9000))
    assert not small.counters.any() and small.counters.numel() == attention.counter_count(shape)
    assert torch_host._workspace(shape, torch.device("cpu"), small) is small
    with pytest.raises(LogitLockError, match="too small for batch 9000, 1 tokens and 40 slots"):
        torch_host._workspace(replace(shape, batch=9000), torch.device("cpu"), small)
    with pytest.raises(LogitLockError, match=r"weight \[n\] in fp32, fp16 or bf16, not \[2, 8\] torch.float64"):
        torch_host.rms_norm_rows(torch.ones(2, 8, dtype=torch.float64), torch.ones(8), eps=1e-6, weight_in_float=False)


# ---- on a GPU ----


def launcher_on_this_gpu(kernels: CompiledKernels) -> compiled.KernelLauncher:
    torch.ones(1, device="cuda")
    return kernels.launcher(torch_host._capability(torch.device("cuda")))


def raw(tensor: Tensor | None) -> Any:
    return tensor.data_ptr() if tensor is not None else None


def both_hosts(
    launcher: compiled.KernelLauncher, shape: AttentionShape, *, graph: bool, seed: int
) -> list[tuple[Tensor, Tensor]]:
    """(torch host, compiled host) pairs: context, key cache, value cache, normed row; fresh outputs poisoned."""
    given = tensors(shape, seed=seed)
    twin = copied(given)
    qkv = given.qkv
    workspace = torch_host.Workspace.allocate(shape, qkv.device)
    context = torch.full((shape.batch, shape.tokens, shape.heads * shape.head_dim), torch.inf, device="cuda").half()
    x, weight = (
        torch.randn(9, SPEC.hidden_size, device="cuda").half(),
        torch.randn(SPEC.hidden_size, device="cuda").half(),
    )
    y = torch.full_like(x, torch.inf)
    norm = norm_shape(SPEC, rows=9)

    def step() -> None:
        stream = torch.cuda.current_stream().cuda_stream
        launcher.attention(
            shape,
            **{name: raw(tensor) for name, tensor in twin._asdict().items() if name in ADDRESSES},
            context=context.data_ptr(),
            workspace=workspace.memory.data_ptr(),
            counters=workspace.counters.data_ptr(),
            stream=stream,
        )
        launcher.rms_norm(norm, x=x.data_ptr(), weight=weight.data_ptr(), y=y.data_ptr(), stream=stream)

    torch.cuda.synchronize()
    if graph:
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            step()
        assert torch.isinf(context).all(), "capturing launched"
        for _ in range(3):
            captured.replay()
    else:
        step()
    expected = torch_host.attention_into_caches(given, facts_of(shape))
    normed = torch_host.rms_norm_rows(x, weight, eps=norm.eps, weight_in_float=norm.weight_in_float)
    torch.cuda.synchronize()
    assert not workspace.counters.any()
    caches = [(given.key_cache, twin.key_cache), (given.value_cache, twin.value_cache)]
    return [(expected, context), *caches, (normed, y)]


@needs_gpu
@pytest.mark.parametrize("graph", [False, True])
@pytest.mark.parametrize("name", ["chatglm2", "large"])
def test_compiled_host_gives_the_bits_of_the_torch_host(name: str, graph: bool) -> None:
    spec = SPEC if name == "chatglm2" else replace(changed(SPEC, 32, 2, 128), hidden_size=SPEC.hidden_size)
    here = torch_host._capability(torch.device("cuda"))
    launcher = launcher_on_this_gpu(CompiledKernels.load(compile_kernels(spec, "fp16", capabilities=[here])))
    for seed, (batch, tokens, slots) in enumerate([(1, 1, 33), (3, 1, 180), (2, 7, 60), (2, 100, 150), (1, 1, 128)]):
        shape = attention_shape(spec, batch=batch, tokens=tokens, slots=slots, capacity=200)
        for torch_result, compiled_result in both_hosts(launcher, shape, graph=graph, seed=seed):
            assert torch.equal(torch_result, compiled_result), shape


@needs_gpu
def test_ptx_of_an_older_capability() -> None:
    """A GPU newer than every cubin: the driver compiles the PTX of 8.0.  Sums in another order: not the same bits."""
    launcher = launcher_on_this_gpu(CompiledKernels.load(compile_kernels(SPEC, "fp16", capabilities=[80])))
    assert launcher.capability == 80
    for graph in (False, True):
        for tokens in (1, 70):
            shape = attention_shape(SPEC, tokens=tokens, slots=90, capacity=96)
            for torch_result, compiled_result in both_hosts(launcher, shape, graph=graph, seed=tokens):
                # Context and norm round once to fp16; an fp32 sum on a rounding boundary moves that by one step.
                torch.testing.assert_close(torch_result, compiled_result, rtol=2.0**-9, atol=2.0**-11)


@needs_gpu
def test_ops_on_cuda() -> None:
    """Outside `use_kernels` the op is its body to the bit; inside, captured or not, the kernels give one result."""
    shape = attention_shape(SPEC, tokens=1, slots=60)

    def attend(arithmetic: str = "exact", fresh: bool = True) -> list[Tensor]:
        given = tensors(shape) if fresh else static
        context = torch.ops.refmodels.cached_attention(*to_torch(given, facts_of(shape, arithmetic)))
        return [context, given.key_cache, given.value_cache]

    def by_body(arithmetic: str = "exact") -> list[Tensor]:
        return list(ops.attention_body(tensors(shape), facts_of(shape, arithmetic), in_place=True))

    def same(a: list[Tensor], b: list[Tensor]) -> bool:
        return all(map(torch.equal, a, b))

    body = by_body()
    assert same(attend(), body)
    with torch_host.use_kernels():
        ours = attend()
        assert not same(ours, body) or not torch.equal(ours[0], body[0])
        torch.testing.assert_close(ours[0], body[0], rtol=2.0**-7, atol=2.0**-8)
        assert same(attend("eager_upcast"), by_body("eager_upcast"))
        static = tensors(shape)
        kept = dict(torch_host._WORKSPACES)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            first = attend(fresh=False)
            second = attend(fresh=False)
        graph.replay()
        assert same(first, ours) and same(second, ours)
        assert kept and kept.keys() == torch_host._WORKSPACES.keys(), "memory of a graph was kept for others"
    workspace = torch_host.Workspace.allocate(shape, torch.device("cuda"))
    with torch_host.use_kernels(workspace):
        static = tensors(shape)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            third = attend(fresh=False)
        for _ in range(2):
            graph.replay()
            assert same(third, ours)
    x, weight = torch.randn(5, 4096, device="cuda").half(), torch.randn(4096, device="cuda").half()
    outside = ops.fused_rms_norm(x, weight, eps=1e-6, weight_in_float=True)
    assert torch.equal(outside, ops._rms_norm_body(x, weight, 1e-6, True))
    with torch_host.use_kernels():
        inside = ops.fused_rms_norm(x, weight, eps=1e-6, weight_in_float=True)
        assert torch.equal(inside, torch_host.rms_norm_rows(x, weight, eps=1e-6, weight_in_float=True))


@needs_gpu
@pytest.mark.parametrize("case", CASES)
def test_goldens_through_the_kernels(case: str) -> None:
    """Every family and variant in fp32: Hugging Face's logits, and its greedy tokens."""
    model = refmodels.load(case_source(case), device="cuda")
    with torch_host.use_kernels():
        assert_reproduces_golden(model, case)
