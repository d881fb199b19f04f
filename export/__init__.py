"""Lower a reference model to ONNX, quantize it, build a TensorRT plan, and write a bundle.

    from export import export_model

    bundle = export_model("qwen", precision="fp16", output="engines/qwen-fp16")

    bundle.py      the export as a whole: graph, streamed weights, tokenizer and plan in one directory
    graph/         the decoder traced with torch.fx and lowered by one table of rules; custom nodes
                   (refmodels::FusedRmsNorm, refmodels::CachedAttention) carry their own function bodies, and values
                   have the names of the taps
    quantization/  RTN, GPTQ, AWQ, SmoothQuant, calibration, and the checkpoint that they write
    tensorrt/      building plans, with TensorRT's parser or through torch.export
    options.py          every option of an export   precision.py   dtypes and schemes of quantization by name
    precision_plan.py   which layers stay in fp32
    progress.py         the progress bar
    cli.py              the verb export; quantization/cli.py has quantize

May import refmodels and trt_runtime (the bundle format); it never imports debug.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from refmodels.lazy import public_names

if TYPE_CHECKING:
    from export.bundle import export_model as export_model
    from export.graph.trace import trace_decoder as trace_decoder
    from export.options import ExportOptions as ExportOptions
    from export.quantization.calibrate import quantize_model as quantize_model
    from export.quantization.schemes import QuantizeOptions as QuantizeOptions
else:
    __all__, __getattr__, __dir__ = public_names(globals())
