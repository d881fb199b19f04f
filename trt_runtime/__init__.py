"""Run a bundle: the bundle format, three engines behind one interface, generation.

    from trt_runtime import GenerationConfig, generate, open_engine

    engine = open_engine("engines/qwen-fp16")                    # TensorRT where there is a plan and a GPU for it
    results = generate(engine, tokenizer, [tokenizer.encode("Sort: t j e r o ->")], GenerationConfig(max_new_tokens=32))

    bundle.py         the directory that an export writes: bundle.json, ONNX model, plan, tokenizer, hashes
    engine.py         the interface of all engines      open.py         which engine runs a bundle here
    torch_gpu/        the reference, with CUDA kernels  onnxruntime/    the bundle's graph on a CPU
    tensorrt/         the bundle's plan, and plugins    kernels/        CUDA kernels and how they are launched
    generation.py     greedy and sampled generation     sampling.py     temperature, top-k, top-p, penalties
    plan_layers.py    the layers of a TensorRT plan     inspect_bundle.py, cli.py   the verbs inspect and generate

May import: the standard library, torch, numpy, onnx and refmodels; onnxruntime, tensorrt and triton only inside the
modules that need them.  It never imports export or debug: a bundle runs where nothing can be exported.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from refmodels.lazy import public_names

if TYPE_CHECKING:
    from trt_runtime.bundle import Bundle as Bundle
    from trt_runtime.bundle import read_bundle as read_bundle
    from trt_runtime.engine import Engine as Engine
    from trt_runtime.generation import GenerationConfig as GenerationConfig
    from trt_runtime.generation import GenerationResult as GenerationResult
    from trt_runtime.generation import generate as generate
    from trt_runtime.kernels.compiled import CompiledKernels as CompiledKernels
    from trt_runtime.onnxruntime.engine import OnnxRuntimeEngine as OnnxRuntimeEngine
    from trt_runtime.open import open_engine as open_engine
    from trt_runtime.plan_layers import PlanLayers as PlanLayers
    from trt_runtime.plan_layers import read_layers as read_layers
    from trt_runtime.sampling import Sampling as Sampling
    from trt_runtime.tensorrt.api import trt as trt
    from trt_runtime.tensorrt.engine import TensorRTEngine as TensorRTEngine
    from trt_runtime.tensorrt.plugins import register_plugins as register_plugins
    from trt_runtime.tensorrt.plugins.attention import CachedAttentionPlugin as CachedAttentionPlugin
    from trt_runtime.tensorrt.plugins.base import PLUGIN_NAMESPACE as PLUGIN_NAMESPACE
    from trt_runtime.tensorrt.plugins.base import PluginCreator as PluginCreator
    from trt_runtime.tensorrt.plugins.base import use_compiled as use_compiled
    from trt_runtime.tensorrt.plugins.rms_norm import FusedRmsNormPlugin as FusedRmsNormPlugin
    from trt_runtime.tensorrt.plugins.rms_norm import FusedRmsNormQuantPlugin as FusedRmsNormQuantPlugin
    from trt_runtime.torch_gpu.engine import TorchEngine as TorchEngine
else:
    __all__, __getattr__, __dir__ = public_names(globals())
