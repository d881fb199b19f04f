"""Torch engines for tests: the fused modules on the CPU, and an engine on a GPU seen from the CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from refmodels.cache import KVCache, StepInputs
from refmodels.model import Decoder
from refmodels.recorder import Recorder, recording
from trt_runtime.engine import Engine
from trt_runtime.torch_gpu.convert import fused_decoder
from trt_runtime.torch_gpu.cuda_graph import StaticDecode
from trt_runtime.torch_gpu.engine import TorchEngine


class FusedOnCpu(TorchEngine):
    """The engine of kernels=True on the CPU: fused modules and static steps, without kernels and graphs."""

    def __init__(self, decoder: Decoder) -> None:
        super().__init__(decoder)
        self.static = self._static = StaticDecode(fused_decoder(decoder))

    def _run(self, step: StepInputs, cache: KVCache, recorder: Recorder | None, ids: Tensor | None) -> Tensor:
        with torch.no_grad(), recording(recorder):
            if recorder is None and step.input_ids.shape[1] == 1:
                return self.static.run(step, cache, ids)
            return self._model.run(step, cache)


class OnHost(Engine):
    """An engine on a GPU whose caches, logits and taps are seen on the CPU, where the diff's references run."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.spec, self.max_positions, self.dtype = engine.spec, engine.max_positions, engine.dtype
        self.device, self.tap_names, self.arithmetic = torch.device("cpu"), engine.tap_names, engine.arithmetic
        self.inner: dict[int, KVCache] = {}

    def new_cache(self, *, batch: int, capacity: int) -> KVCache:
        cache = super().new_cache(batch=batch, capacity=capacity)
        self.inner[id(cache)] = self.engine.new_cache(batch=batch, capacity=capacity)
        return cache

    def run(self, step: StepInputs, cache: KVCache, *, recorder: Recorder | None = None) -> Tensor:
        inner, taps = self.inner[id(cache)], Recorder()
        logits = self.engine.run(step, inner, recorder=None if recorder is None else taps).cpu()
        for ours, theirs in ((cache.key, inner.key), (cache.value, inner.value)):
            for mine, other in zip(ours, theirs, strict=True):
                mine.copy_(other)
        cache.advance(step)
        if recorder is not None:
            recorder.live_slots = step.attention_mask.shape[1]
            for name, tensor in taps.tensors.items():
                recorder(name, tensor.cpu())
        return logits
