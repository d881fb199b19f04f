"""Run the engine's modules on the reference's tensors: the counterpart of the local error.

A diff runs the reference's modules on the engine's tensors.  If an executor's graph can be cut, its own modules can run
on the reference's tensors: one run gives every module's error on inputs that no fault has touched.
"""

from __future__ import annotations

import torch

from debug.capture.prompts import Prompts
from debug.capture.streaming import Reference, ready
from debug.comparison.metrics import token_errors
from refmodels.recorder import Recorder, recording
from refmodels.taps import is_cache_tap
from trt_runtime.onnxruntime.engine import OnnxRuntimeEngine


def cut_errors(engine: OnnxRuntimeEngine, rounded: Reference, prompts: Prompts) -> dict[str, float]:
    """Relative L2 error of each tap that is not a cache tensor, over the real prompt tokens.

    Args:
        engine: a bundle on ONNX Runtime.
        rounded: the reference in the engine's dtype; the modules get its tensors, and should give its outputs.
        prompts: one prefill.
    """
    batch, tokens = prompts.ids.shape
    recorder = Recorder([tap for tap in engine.tap_names if not is_cache_tap(tap)])
    with torch.inference_mode(), ready(rounded) as decoder, recording(recorder):
        cache = decoder.new_cache(batch=batch, capacity=tokens)
        decoder.run(cache.next_step(prompts.ids, prompts.mask), cache)
    cache = engine.new_cache(batch=batch, capacity=tokens)
    made = engine.run_cut(cache.next_step(prompts.ids, prompts.mask), cache, recorder.tensors)
    real = prompts.mask != 0
    return {
        tap: token_errors(made[tap], right, real, engine.dtype).stats().rel_l2
        for tap, right in recorder.tensors.items()
    }
