"""CUDA-graph decode with static buffers.

A step runs one token per row.  One transfer from pinned memory copies all inputs that change from step to step into one
block of device memory; the caches stay where they are, and the mask's width is a multiple of `BUCKET`, so that a graph
serves many steps.  On the CPU the same steps run without a graph.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from refmodels.cache import KVCache, StepInputs
from refmodels.model import Decoder
from refmodels.recorder import Recorder, recording
from trt_runtime.kernels.launch import AttentionShape
from trt_runtime.kernels.torch_host import ELEMENT_TYPES, Workspace, use_kernels

BUCKET = 256
"""The width of a mask is a multiple of this number of slots, or that of the cache."""

_ALIGNMENT = 16
_NAMES = ("input_ids", "cache_lengths", "position_ids", "ntk_table", "logit_index")


def bucket(slots: int, capacity: int) -> int:
    """Width of the mask for `slots` slots in use."""
    return min(-(-slots // BUCKET) * BUCKET, capacity)


class Inputs:
    """The inputs of a step in one block of memory: each of `_NAMES` [batch, 1] or [batch] int64, the mask bool.

    Each starts at a multiple of 16 bytes, as the kernels need it.
    """

    def __init__(self, batch: int, slots: int, device: torch.device | str, *, pinned: bool = False) -> None:
        self.batch = batch
        stride = -(-batch * 8 // _ALIGNMENT) * _ALIGNMENT
        ends = stride * len(_NAMES)
        self.block = torch.zeros(ends + batch * slots, dtype=torch.uint8, device=device, pin_memory=pinned)
        self.tensors = {
            name: self.block[i * stride : i * stride + batch * 8].view(torch.int64) for i, name in enumerate(_NAMES)
        }
        for name in ("input_ids", "position_ids", "logit_index"):
            self.tensors[name] = self.tensors[name][:, None]
        self.tensors["attention_mask"] = self.block[ends:].view(torch.bool).view(batch, slots)

    def fill(self, step: StepInputs) -> None:
        for name, value in step.tensors().items():
            target = self.tensors[name]
            if name == "attention_mask":
                target[:, value.shape[1] :] = False
                target = target[:, : value.shape[1]]
            target.copy_(value)


class _Step:
    """A step for one cache and one width of the mask; holds all the memory that its graph works on."""

    def __init__(self, model: Decoder, cache: KVCache, slots: int) -> None:
        self.model, self.key, self.value = model, cache.key, cache.value
        cuda = model.device.type == "cuda"
        self.inputs = Inputs(cache.batch, slots, model.device)
        # Two buffers to send from, so that one can be written while the other is being sent.
        self.pinned = [Inputs(cache.batch, slots, "cpu", pinned=cuda) for _ in range(2)]
        self.sent = [torch.cuda.Event() for _ in range(2)] if cuda else []
        self.tables = (model.rope_cos, model.rope_sin, model.logn, model.alibi_slopes)
        self.workspace = _workspace(model, cache, slots) if cuda else None
        self.graph: torch.cuda.CUDAGraph | None = None
        self.logits: Tensor

    def serves(self, cache: KVCache) -> bool:
        """Whether the cache still has the tensors that this step was made for."""
        ours, theirs = (*self.key, *self.value), (*cache.key, *cache.value)
        return all(a is b for a, b in zip(ours, theirs, strict=True))

    def send(self, step: StepInputs, ids: Tensor | None) -> None:
        """Set the inputs of the next run; `ids` [batch, 1] on the device replaces the step's."""
        self.pinned.reverse()
        self.sent.reverse()
        if self.sent:
            self.sent[0].synchronize()
        self.pinned[0].fill(step)
        self.inputs.block.copy_(self.pinned[0].block, non_blocking=True)
        if self.sent:
            self.sent[0].record()
        if ids is not None:
            self.inputs.tensors["input_ids"].copy_(ids)

    def forward(self) -> Tensor:
        logits: Tensor
        logits, _, _ = self.model(past_key=self.key, past_value=self.value, **self.inputs.tensors)
        return logits

    def capture(self, stream: torch.cuda.Stream, pool: Any, *, warm: bool) -> None:
        """Make the graph.  If it is not warm, the step runs once before, which loads the kernels; running it twice
        does no harm, since it writes the same slots with the same values."""
        stream.wait_stream(torch.cuda.current_stream())
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(stream), use_kernels(self.workspace), _blas_for(self.inputs.batch):
            if not warm:
                self.forward()
            graph.capture_begin(pool=pool, capture_error_mode="thread_local")
            try:
                self.logits = self.forward()
            finally:
                graph.capture_end()
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = graph


@dataclass(frozen=True)
class _Spare:
    """The memory of a discarded cache, and the steps that work on it."""

    batch: int
    capacity: int
    key: list[Tensor]
    value: list[Tensor]
    steps: dict[int, _Step]


class StaticDecode:
    """Runs a decoder with the kernels: steps of one token per row as CUDA graphs, all others without.

    The memory and the graphs of the last discarded cache serve the next one of its size: making graphs takes as long as
    several steps.

    Args:
        model: the decoder; its position tables must be prepared for every cache that comes.
    """

    def __init__(self, model: Decoder) -> None:
        self.model = model
        self._steps: weakref.WeakKeyDictionary[KVCache, dict[int, _Step]] = weakref.WeakKeyDictionary()
        self._spare: _Spare | None = None
        self._warm: set[tuple[int, int, int]] = set()
        if model.device.type == "cuda":
            self._stream = torch.cuda.Stream(model.device)

    def new_cache(self, *, batch: int, capacity: int) -> KVCache:
        spare, self._spare = self._spare, None
        if spare is not None and (spare.batch, spare.capacity) != (batch, capacity):
            spare = None
        cache = KVCache(
            self.model.spec,
            batch=batch,
            capacity=capacity,
            dtype=self.model.dtype,
            device=self.model.device,
            buffers=None if spare is None else (spare.key, spare.value),
        )
        steps = self._steps[cache] = {} if spare is None else spare.steps
        left = _Spare(batch, capacity, cache.key, cache.value, steps)
        weakref.finalize(cache, self._keep, left).atexit = False
        return cache

    def run_without_graph(self, step: StepInputs, cache: KVCache, recorder: Recorder | None) -> Tensor:
        """Run any step, with or without a recorder, and advance the cache: logits [batch, N, vocab]."""
        with recording(recorder), use_kernels():
            return self.model.run(step, cache)

    def _keep(self, spare: _Spare) -> None:
        self._spare = spare

    def run(self, step: StepInputs, cache: KVCache, ids: Tensor | None = None) -> Tensor:
        """Run a step and advance the cache.

        Args:
            step: one token per row, and logits of that token.
            ids: [batch, 1] int64 on the model's device, instead of the step's; not checked against the vocabulary.
        Returns: logits [batch, 1, vocab], a tensor of their own.
        """
        slots = bucket(step.attention_mask.shape[1], cache.capacity)
        steps = self._steps.setdefault(cache, {})
        captured = steps.get(slots)
        if captured is None or not captured.serves(cache):
            captured = steps[slots] = _Step(self.model, cache, slots)
        captured.send(step, ids)
        if self.model.device.type != "cuda":
            logits = captured.forward()
        else:
            if captured.graph is None:
                kind = (cache.batch, slots, cache.capacity)
                # The steps of a cache share their scratch memory: no two of them run at a time.
                others = (other.graph.pool() for other in steps.values() if other.graph is not None)
                captured.capture(self._stream, next(others, None), warm=kind in self._warm)
                self._warm.add(kind)
            assert captured.graph is not None
            captured.graph.replay()
            logits = captured.logits.clone()
        cache.advance(step)
        return logits


@contextmanager
def _blas_for(batch: int) -> Iterator[None]:
    """cuBLASLt where it beats cuBLAS: at a batch of 64, by up to a fifth in GEMMs with few outputs.

    Up to 16 rows they are equally fast; at 256 either is faster sometimes (benchmarks/gpu_linear.py).
    """
    if not 16 < batch <= 128:
        yield
        return
    before = torch.backends.cuda.preferred_blas_library()
    torch.backends.cuda.preferred_blas_library("cublaslt")
    try:
        yield
    finally:
        torch.backends.cuda.preferred_blas_library(before)


def _workspace(model: Decoder, cache: KVCache, slots: int) -> Workspace:
    a = model.spec.attention
    shape = AttentionShape(
        batch=cache.batch,
        tokens=1,
        slots=slots,
        capacity=cache.capacity,
        heads=a.heads,
        kv_heads=a.kv_heads,
        head_dim=a.head_dim,
        scale=a.scale,
        dtype=ELEMENT_TYPES[model.dtype],
    )
    return Workspace.allocate(shape, model.device)
