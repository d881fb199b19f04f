"""The verb `export`."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from export.bundle import export_model, quantized_spec
from export.options import ExportOptions
from export.precision import DTYPES, SCHEMES
from export.progress import progress_bar
from export.tensorrt.backends import default_backend
from refmodels.checkpoints.load import resolve
from refmodels.command import JsonFlag
from refmodels.options import fields_in
from refmodels.toys import TOYS
from trt_runtime.bundle import LAYERS_NAME, read_bundle
from trt_runtime.plan_layers import read_layers

_MODEL, _ENGINE, _OUTPUT = "Model", "Engine", "Output"


def export(
    model: Annotated[
        str,
        typer.Option(
            help="Model to export: a family name (the bundled toy), a Hugging Face directory, or a hub id.",
            show_default=False,
            autocompletion=lambda: TOYS,
            rich_help_panel=_MODEL,
        ),
    ],
    precision: Annotated[
        str,
        typer.Option(
            help="Dtype of weights, activations and cache (fp32, fp16 or bf16), or a quantization scheme "
            "(int8, int4, int4-awq, int4-gptq, smoothquant or fp8) with the default options of `logitlock "
            "quantize`.",
            autocompletion=lambda: [*DTYPES, *SCHEMES],
            rich_help_panel=_MODEL,
        ),
    ] = "fp16",
    dtype: Annotated[
        str | None,
        typer.Option(
            help="Dtype of everything that a quantization scheme does not quantize.",
            show_default="fp16",
            rich_help_panel=_MODEL,
        ),
    ] = None,
    kv_cache: Annotated[
        str | None,
        typer.Option(
            help="Quantize cached keys and values to int8 or fp8 (ONNX Runtime only).",
            show_default="the dtype",
            rich_help_panel=_MODEL,
        ),
    ] = None,
    attention: Annotated[
        str,
        typer.Option(
            help="Attention of the TensorRT plan: plugin uses our fused kernels, native TensorRT's own "
            "attention, decomposed plain operators. ONNX Runtime runs all three.",
            rich_help_panel=_MODEL,
        ),
    ] = "plugin",
    numerics: Annotated[
        str,
        typer.Option(
            help="Numerics: exact has fp32 tables and reductions, upstream repeats Hugging Face's rounding.",
            rich_help_panel=_MODEL,
        ),
    ] = "exact",
    precision_plan: Annotated[
        Path | None,
        typer.Option(
            help="JSON file from `logitlock bisect` that lists the modules to keep in fp32.",
            show_default="none",
            rich_help_panel=_MODEL,
        ),
    ] = None,
    random_weights: Annotated[
        bool,
        typer.Option(
            "--random-weights",
            help="Use random weights, for benchmarks: config.json is the only file needed.",
            rich_help_panel=_MODEL,
        ),
    ] = False,
    backend: Annotated[
        str | None,
        typer.Option(
            help="Back end: tensorrt writes the graph and a TensorRT plan, torch-tensorrt makes the plan through "
            "torch.export, onnxruntime writes the graph only.",
            show_default="tensorrt if it can build here, else onnxruntime",
            rich_help_panel=_ENGINE,
        ),
    ] = None,
    max_batch: Annotated[int, typer.Option(help="Maximum batch size, in prompts.", rich_help_panel=_ENGINE)] = 8,
    max_input: Annotated[
        int | None,
        typer.Option(
            help="Maximum number of prompt tokens per step; longer prompts take several steps.",
            show_default="2048, at most --max-seq",
            rich_help_panel=_ENGINE,
        ),
    ] = None,
    max_seq: Annotated[
        int | None,
        typer.Option(
            help="Maximum length of the cache, in tokens; the cache of a TensorRT plan always has this size.",
            show_default="the model's maximum; with a plan at most 4096",
            rich_help_panel=_ENGINE,
        ),
    ] = None,
    compute_capabilities: Annotated[
        list[str] | None,
        typer.Option(
            "--compute-capability",
            help="Compute capability of a GPU to build for, such as 8.9 (TensorRT-RTX only); repeatable.",
            show_default="8.0 and newer",
            rich_help_panel=_ENGINE,
        ),
    ] = None,
    workspace: Annotated[
        int | None,
        typer.Option(
            help="Maximum scratch memory of a TensorRT kernel, in MiB.",
            show_default="no limit",
            rich_help_panel=_ENGINE,
        ),
    ] = None,
    optimization_level: Annotated[
        int | None,
        typer.Option(
            help="Optimization effort of TensorRT's builder, from 0 to 5.",
            show_default="TensorRT's",
            rich_help_panel=_ENGINE,
        ),
    ] = None,
    taps: Annotated[
        bool,
        typer.Option(
            "--taps",
            help="Also build a second plan that outputs every tap, for `logitlock diff`.",
            rich_help_panel=_ENGINE,
        ),
    ] = False,
    output: Annotated[
        Path | None,
        typer.Option(
            help="Directory of the bundle to write.",
            show_default="engines/<model>-<precision>",
            rich_help_panel=_OUTPUT,
        ),
    ] = None,
    overwrite: Annotated[
        bool,
        typer.Option(
            "--overwrite", help="Replace an existing bundle in the output directory.", rich_help_panel=_OUTPUT
        ),
    ] = False,
    json_output: JsonFlag = False,
) -> None:
    """Export a model to a bundle: graph, weights, tokenizer and TensorRT engine.

    Every bundle runs on ONNX Runtime; its TensorRT plan runs on NVIDIA GPUs.  TensorRT-RTX can build without a GPU.

    Example: logitlock export --model qwen --precision fp16

    Example: logitlock export --model Qwen/Qwen-7B --compute-capability 8.9 --max-seq 8192 --taps
    """
    options = ExportOptions(**fields_in(ExportOptions, locals()))
    source = resolve(model)
    reason = ""
    if backend is None:
        spec = quantized_spec(source, options.quantization)
        chosen, why = default_backend(spec, attention=options.attention, numerics=options.numerics)
        options, reason = replace(options, backend=chosen), f" (the default: {why})"
    with progress_bar(f"export {model}", quiet=json_output) as progress:
        path = export_model(source, options, progress=progress)
    bundle = read_bundle(path, verify_hashes=False)
    info = bundle.info
    quantization = None if bundle.spec.quantization is None else bundle.spec.quantization.describe()
    for plan in read_layers(path / LAYERS_NAME) if info.engine is not None else []:
        for warning in plan.warnings:
            print(f"warning: TensorRT said of {plan.plan}: {warning}", file=sys.stderr)
    size = sum(file.bytes for file in info.files.values())
    if json_output:
        result: dict[str, Any] = {
            "bundle": str(path),
            "model": info.model,
            "precision": info.precision,
            "attention": info.attention,
        }
        result |= {"numerics": info.numerics, "backend": options.backend, "quantization": quantization}
        engine = None if info.engine is None else vars(info.engine)
        print(json.dumps({**result, "engine": engine, "bytes": size}, ensure_ascii=False))
    else:
        kept = ", ".join(filter(None, (info.precision, quantization)))
        what = f"{info.model}, {kept}, attention {info.attention}, {size / 1e6:.1f} MB"
        print(f"{path}: {what}, backend {options.backend}{reason}")
