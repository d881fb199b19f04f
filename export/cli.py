"""The verb `export`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, cast

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from export.compile import export_model
from refmodels.cli import JsonFlag
from refmodels.spec import Numerics
from trt_runtime.bundle import AttentionMode, Precision, read_bundle


def export(
    model: Annotated[
        str, typer.Option(help="Family name (the bundled toy), Hugging Face directory, or hub id.", show_default=False)
    ],
    precision: Annotated[str, typer.Option(help="fp32, fp16 or bf16.")] = "fp16",
    attention: Annotated[
        str, typer.Option(help="plugin: custom nodes with function bodies; decomposed: plain ONNX operators.")
    ] = "plugin",
    numerics: Annotated[
        str, typer.Option(help="exact: fp32 tables and reductions; upstream: Hugging Face's rounding.")
    ] = "exact",
    output: Annotated[
        Path | None, typer.Option(help="Directory of the bundle.", show_default="engines/<model>-<precision>")
    ] = None,
    max_positions: Annotated[
        int | None, typer.Option(help="Longest cache in tokens.", show_default="what the model allows")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a bundle at the output.")] = False,
    json_output: JsonFlag = False,
) -> None:
    """Export a model to a bundle: model.onnx, weights, tokenizer and manifest.

    Example: python -m export --model qwen --precision fp16
    """
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=json_output or not console.is_terminal) as bar:
        task = bar.add_task(f"export {model}", total=None)
        path = export_model(
            model,
            precision=cast(Precision, precision),
            attention=cast(AttentionMode, attention),
            numerics=cast(Numerics, numerics),
            output=output,
            max_positions=max_positions,
            overwrite=overwrite,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    info = read_bundle(path, verify_hashes=False).info
    size = sum(file.bytes for file in info.files.values())
    if json_output:
        result = {"bundle": str(path), "model": info.model, "precision": info.precision, "attention": info.attention}
        print(json.dumps({**result, "numerics": info.numerics, "bytes": size}, ensure_ascii=False))
    else:
        print(f"{path}: {info.model}, {info.precision}, attention {info.attention}, {size / 1e6:.1f} MB")
