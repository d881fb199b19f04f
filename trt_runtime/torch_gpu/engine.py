"""The reference behind the engine interface, and the same model on a GPU with this project's kernels."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from refmodels.cache import KVCache, StepInputs
from refmodels.dtypes import torch_name
from refmodels.errors import LogitLockError
from refmodels.model import Decoder
from refmodels.recorder import Recorder, recording
from refmodels.taps import tap_names
from trt_runtime.engine import Engine

if TYPE_CHECKING:
    from trt_runtime.torch_gpu.cuda_graph import StaticDecode


def kernels_serve(decoder: Decoder) -> bool:
    """Whether the CUDA kernels support this model on this machine."""
    exact = decoder.numerics == "exact" and decoder.dtype != torch.float64
    return exact and decoder.device.type == "cuda" and importlib.util.find_spec("triton") is not None


class TorchEngine(Engine):
    """The reference model as an engine, on the device where it is.

    Args:
        decoder: the model.
        max_positions: longest cache; default is the spec's (position tables are made as needed).
        kernels: run it for speed, on a CUDA GPU: attention, norms and linear layers by the project's kernels, decode
            steps by a CUDA graph for each cache and width of its mask.  The decoder's weights are then rearranged in
            place, and it must not be moved or cast any more; as a reference it serves as before.
    Raises:
        LogitLockError: the kernels do not serve the model.
    """

    def __init__(self, decoder: Decoder, *, max_positions: int | None = None, kernels: bool = False) -> None:
        self.decoder = decoder.eval()
        self.spec = decoder.spec
        self.max_positions = decoder.spec.max_positions if max_positions is None else max_positions
        self.dtype, self.device = decoder.dtype, decoder.device
        self.tap_names = tap_names(decoder.spec)
        name = torch_name(decoder.dtype)
        self.arithmetic = f"PyTorch in {name}, {decoder.numerics} numerics"
        self._static: StaticDecode | None = None
        if kernels:
            if not kernels_serve(decoder):
                raise LogitLockError(
                    "the kernels serve fp32, fp16 and bf16 models of exact numerics on a CUDA GPU, with the package "
                    f"triton; this one is in {name}, of {decoder.numerics} numerics, on {decoder.device}"
                )
            # Everything else in this folder needs Triton, so it is imported only where kernels are asked for.
            from trt_runtime.torch_gpu.convert import fused_decoder
            from trt_runtime.torch_gpu.cuda_graph import StaticDecode

            self._static = StaticDecode(fused_decoder(decoder))
            self.arithmetic += ", this project's kernels"

    def new_cache(self, *, batch: int, capacity: int) -> KVCache:
        self.check_capacity(capacity)
        self._model.prepare_tables(capacity)
        if self._static is None:
            return super().new_cache(batch=batch, capacity=capacity)
        return self._static.new_cache(batch=batch, capacity=capacity)

    def run(self, step: StepInputs, cache: KVCache, *, recorder: Recorder | None = None) -> Tensor:
        return self._run(step, cache, recorder, None)

    def decode(
        self,
        input_ids: Tensor,
        cache: KVCache,
        attention_mask: Tensor | None = None,
        *,
        recorder: Recorder | None = None,
    ) -> Tensor:
        """As `Engine.decode`.  With kernels, ids on the GPU stay there: the host does not wait for them, and they are
        not checked."""
        if self._static is None or recorder is not None or not input_ids.is_cuda:
            return super().decode(input_ids, cache, attention_mask, recorder=recorder)
        ids = input_ids.reshape(-1, 1)
        mask = None if attention_mask is None else attention_mask.reshape(-1, 1)
        step = cache.next_step(torch.zeros(ids.shape, dtype=torch.int64), mask, last_logits_only=True)
        return self._run(step, cache, None, ids)

    @property
    def _model(self) -> Decoder:
        return self.decoder if self._static is None else self._static.model

    def _run(self, step: StepInputs, cache: KVCache, recorder: Recorder | None, ids: Tensor | None) -> Tensor:
        if self._static is None:
            with torch.no_grad(), recording(recorder):
                return self.decoder.run(step, cache)
        with torch.no_grad(), torch.cuda.device(self.device):
            # A graph hides its tensors, so a recorder gets the same kernels without one.
            if recorder is None and step.input_ids.shape[1] == 1:
                self._model.prepare_tables(cache.capacity)
                return self._static.run(step, cache, ids)
            return self._static.run_without_graph(step, cache, recorder)
