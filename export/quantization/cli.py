"""The verb `quantize`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from export.precision import SCHEMES
from export.progress import progress_bar
from export.quantization.calibrate import quantize_model
from export.quantization.checkpoint import read_provenance
from export.quantization.data import SAMPLES, TOKENS, calibration_data
from export.quantization.method import MethodOptions
from export.quantization.schemes import QuantizeOptions
from refmodels.checkpoints.load import resolve, with_directory
from refmodels.command import JsonFlag
from refmodels.options import check_device, fields_in
from refmodels.terminal import new_console

_WHAT, _HOW, _DATA, _OUTPUT = "Format", "Method", "Calibration", "Output"
_SCHEME_LIST = "; ".join(f"{name}: {scheme.describes}" for name, scheme in SCHEMES.items())


def quantize(
    model: Annotated[
        str,
        typer.Option(
            help="Model to quantize: a family name (the bundled toy), a Hugging Face directory, or a hub id.",
            show_default=False,
        ),
    ],
    precision: Annotated[
        str | None,
        typer.Option(
            help=f"Quantization scheme. {_SCHEME_LIST}. Without it, --kv-cache quantizes only the cache.",
            show_default="none",
            rich_help_panel=_WHAT,
        ),
    ] = None,
    group: Annotated[
        int | None,
        typer.Option(
            help="Group size: number of input channels that share a scale; 0 means one scale per output channel.",
            show_default="128 for int4, else 0",
            rich_help_panel=_WHAT,
        ),
    ] = None,
    asymmetric: Annotated[
        bool, typer.Option("--asymmetric", help="Use zero points (not supported by TensorRT).", rich_help_panel=_WHAT)
    ] = False,
    inputs: Annotated[
        str | None,
        typer.Option(
            help="Inputs of the quantized layers: float keeps them; tensor, token and group quantize them to 8 "
            "bits with one static scale, one scale per token, or one scale per token and group (int8; "
            "this makes int4 and int8 weights fast on a CPU).",
            show_default="the scheme's",
            rich_help_panel=_WHAT,
        ),
    ] = None,
    head: Annotated[bool, typer.Option("--head", help="Also quantize the head.", rich_help_panel=_WHAT)] = False,
    kv_cache: Annotated[
        str | None,
        typer.Option(
            help="Also quantize cached keys and values, to int8 or fp8.",
            show_default="working dtype",
            rich_help_panel=_WHAT,
        ),
    ] = None,
    precision_plan: Annotated[
        Path | None,
        typer.Option(
            help='JSON file with schemes per layer: {"schema": 1, "precision": SCHEME, "schemes": '
            '{"blocks.0.*": "int8", "blocks.*.out": null}}.',
            show_default="none",
            rich_help_panel=_WHAT,
        ),
    ] = None,
    alpha: Annotated[
        float,
        typer.Option(
            help="SmoothQuant's migration strength alpha, from 0 to 1: the share of the difficulty that moves "
            "from inputs to weights.",
            rich_help_panel=_HOW,
        ),
    ] = 0.5,
    act_order: Annotated[
        bool,
        typer.Option(
            "--act-order", help="GPTQ: quantize the columns with the largest inputs first.", rich_help_panel=_HOW
        ),
    ] = False,
    clip: Annotated[
        bool | None,
        typer.Option(
            "--clip/--no-clip",
            help="AWQ and GPTQ: clip groups of weights if this lowers the error; GPTQ then takes twice the time.",
            show_default="AWQ: yes, GPTQ: no",
            rich_help_panel=_HOW,
        ),
    ] = None,
    damping: Annotated[
        float,
        typer.Option(help="GPTQ: damping of the Hessian, as a fraction of its mean diagonal.", rich_help_panel=_HOW),
    ] = 0.01,
    percentile: Annotated[
        float, typer.Option(help="Percentile of |x| that static input scales cover.", rich_help_panel=_HOW)
    ] = 100.0,
    calibration: Annotated[
        list[Path] | None,
        typer.Option(
            help='Calibration data: a text file, or .jsonl with "text" or "prompt" (and "answer"); repeatable.',
            show_default="bundled tasks",
            rich_help_panel=_DATA,
        ),
    ] = None,
    samples: Annotated[int, typer.Option(help="Maximum number of calibration rows.", rich_help_panel=_DATA)] = SAMPLES,
    tokens: Annotated[
        int, typer.Option(help="Maximum number of tokens per calibration row.", rich_help_panel=_DATA)
    ] = TOKENS,
    seed: Annotated[int, typer.Option(help="Random seed for the choice of rows.", rich_help_panel=_DATA)] = 0,
    device: Annotated[str, typer.Option(help="Device to quantize on: cpu or cuda.", rich_help_panel=_DATA)] = "cpu",
    output: Annotated[
        Path | None,
        typer.Option(
            help="Directory of the checkpoint to write.",
            show_default="models/<model>-<precision>",
            rich_help_panel=_OUTPUT,
        ),
    ] = None,
    layout: Annotated[
        str,
        typer.Option(
            help="Layout of the checkpoint: compressed-tensors (vLLM), gptq, awq or modelopt (TensorRT-LLM).",
            rich_help_panel=_OUTPUT,
        ),
    ] = "compressed-tensors",
    json_output: JsonFlag = False,
) -> None:
    """Quantize a model into a checkpoint that export, diff, eval and other programs read.

    The blocks are quantized one at a time while calibration data streams through them.  `export --precision SCHEME`
    does the same with the default options, and puts the checkpoint into the bundle.

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
    check_device(device)
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
    made = with_directory(source, target).spec.quantization
    assert made is not None
    print(f"{target}: {made.describe()}")
    measured = {name: r for name, r in provenance["layers"].items() if r["error"] is not None}
    if measured:
        table = Table("layer", "error", "rounded to nearest", title="relative squared error of outputs")
        for name, report in measured.items():
            table.add_row(name, f"{report['error']:.2e}", f"{report['nearest_error']:.2e}")
        new_console().print(table)
