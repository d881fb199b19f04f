"""The verb `quantize`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from export.precision import SCHEMES
from export.progress import progress_bar
from export.quantization.calibrate import quantize_model
from export.quantization.checkpoint import read_provenance
from export.quantization.data import SAMPLES, TOKENS, calibration_data
from export.quantization.method import MethodOptions
from export.quantization.schemes import QuantizeOptions
from refmodels.checkpoints.load import moved, resolve
from refmodels.command import JsonFlag
from refmodels.options import fields_in

_WHAT, _HOW, _DATA, _OUTPUT = "What is quantized", "How codes are found", "Calibration", "Output"
_SCHEME_LIST = "; ".join(f"{name}: {scheme.describes}" for name, scheme in SCHEMES.items())


def quantize(
    model: Annotated[
        str, typer.Option(help="Family name (the bundled toy), Hugging Face directory, or hub id.", show_default=False)
    ],
    precision: Annotated[
        str | None,
        typer.Option(
            help=f"{_SCHEME_LIST}. None, with --kv-cache: the cache only.", show_default="none", rich_help_panel=_WHAT
        ),
    ] = None,
    group: Annotated[
        int | None,
        typer.Option(
            help="Input columns that share a scale; 0: one scale an output channel.",
            show_default="128 for int4, else 0",
            rich_help_panel=_WHAT,
        ),
    ] = None,
    asymmetric: Annotated[
        bool, typer.Option("--asymmetric", help="Zero points (not for TensorRT).", rich_help_panel=_WHAT)
    ] = False,
    inputs: Annotated[
        str | None,
        typer.Option(
            help="Inputs of the layers: float; or 8-bit codes with one constant scale (tensor), one a token (token), "
            "or one a token and group (group: int8, what makes int4 and int8 weights fast on a CPU).",
            show_default="the scheme's",
            rich_help_panel=_WHAT,
        ),
    ] = None,
    head: Annotated[bool, typer.Option("--head", help="The head too.", rich_help_panel=_WHAT)] = False,
    kv_cache: Annotated[
        str | None,
        typer.Option(help="int8 or fp8: keys and values too.", show_default="working dtype", rich_help_panel=_WHAT),
    ] = None,
    precision_plan: Annotated[
        Path | None,
        typer.Option(
            help='JSON: {"schema": 1, "precision": SCHEME, "schemes": {"blocks.0.*": "int8", "blocks.*.out": null}}.',
            show_default="none",
            rich_help_panel=_WHAT,
        ),
    ] = None,
    alpha: Annotated[
        float, typer.Option(help="SmoothQuant: share of the difficulty that weights take.", rich_help_panel=_HOW)
    ] = 0.5,
    act_order: Annotated[
        bool, typer.Option("--act-order", help="GPTQ: columns of large inputs first.", rich_help_panel=_HOW)
    ] = False,
    clip: Annotated[
        bool | None,
        typer.Option(
            "--clip/--no-clip",
            help="AWQ, GPTQ: clip groups of weights where it lowers the error; GPTQ takes twice the time.",
            show_default="AWQ: yes, GPTQ: no",
            rich_help_panel=_HOW,
        ),
    ] = None,
    damping: Annotated[float, typer.Option(help="GPTQ: share of the mean diagonal.", rich_help_panel=_HOW)] = 0.01,
    percentile: Annotated[
        float, typer.Option(help="Constant input scales: of |x| that they cover.", rich_help_panel=_HOW)
    ] = 100.0,
    calibration: Annotated[
        list[Path] | None,
        typer.Option(
            help='Text, or .jsonl with "text" or "prompt" (and "answer"); repeatable.',
            show_default="bundled tasks",
            rich_help_panel=_DATA,
        ),
    ] = None,
    samples: Annotated[int, typer.Option(help="At most so many rows.", rich_help_panel=_DATA)] = SAMPLES,
    tokens: Annotated[int, typer.Option(help="At most so many tokens a row.", rich_help_panel=_DATA)] = TOKENS,
    seed: Annotated[int, typer.Option(help="Of the choice of rows.", rich_help_panel=_DATA)] = 0,
    device: Annotated[str, typer.Option(help="cpu or cuda.", rich_help_panel=_DATA)] = "cpu",
    output: Annotated[
        Path | None,
        typer.Option(
            help="Directory of the checkpoint.", show_default="models/<model>-<precision>", rich_help_panel=_OUTPUT
        ),
    ] = None,
    layout: Annotated[
        str,
        typer.Option(
            help="compressed-tensors (vLLM), gptq, awq or modelopt (TensorRT-LLM): how codes are stored.",
            rich_help_panel=_OUTPUT,
        ),
    ] = "compressed-tensors",
    json_output: JsonFlag = False,
) -> None:
    """Quantize a model into a checkpoint that export, diff, eval and other programs read.

    The blocks are quantized one at a time, while calibration data streams through them.  `export --precision SCHEME`
    does this with the defaults and puts the checkpoint into the bundle.

    Example: logitlock quantize --model qwen --precision int4-awq --group 64

    Example: logitlock quantize --model qwen --precision int8 --inputs group --kv-cache int8 --output models/cpu
    """
    given = locals()  # words are checked where they are used
    options = QuantizeOptions(
        scheme=precision,
        symmetric=not asymmetric,
        cache=given["kv_cache"],
        plan=precision_plan,
        method=MethodOptions(**fields_in(MethodOptions, given)),
        **fields_in(QuantizeOptions, given),
    )
    source = resolve(model)
    target = output
    if target is None:
        parts = [source.name.rpartition("/")[2], precision or "", f"kv-{kv_cache}" if kv_cache else ""]
        target = Path("models") / "-".join(filter(None, parts))
    data = calibration_data(source, calibration or (), samples=samples, tokens=tokens, seed=seed)
    with progress_bar(f"quantize {source.name}", quiet=json_output) as progress:
        quantize_model(source, target, options, data=data, layout=given["layout"], device=device, progress=progress)
    provenance = read_provenance(target)
    assert provenance is not None
    if json_output:
        print(json.dumps({"checkpoint": str(target), **provenance}, ensure_ascii=False))
        return
    made = moved(source, target).spec.quantization
    assert made is not None
    print(f"{target}: {made.describe()}")
    measured = {name: r for name, r in provenance["layers"].items() if r["error"] is not None}
    if measured:
        table = Table("layer", "error", "rounded to nearest", title="relative squared error of outputs")
        for name, report in measured.items():
            table.add_row(name, f"{report['error']:.2e}", f"{report['nearest_error']:.2e}")
        Console().print(table)
