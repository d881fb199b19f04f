"""Conversion of the reference decoder to fused layers, on the same weights."""

from __future__ import annotations

import torch

from refmodels.model import Decoder
from trt_runtime.torch_gpu.chain import chain_runner
from trt_runtime.torch_gpu.fused import FusedDecoder
from trt_runtime.torch_gpu.weight_storage import arrange_weights


def fused_decoder(decoder: Decoder) -> FusedDecoder:
    """A decoder on the same parameters, in eval mode, with as few kernels as this GPU allows.

    The weights of `decoder` are arranged for the kernels, in place (see `weight_storage`); its modules, some of them
    new ones, work as before.
    """
    with torch.no_grad():
        arrange_weights(decoder)
        return FusedDecoder(decoder, runner=chain_runner(decoder))
