"""The verb `eval`."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from refmodels.command import JsonFlag
from refmodels.errors import LogitLockError


def evaluate(
    sides: Annotated[
        list[str] | None,
        typer.Argument(metavar="SIDE...", help="Executors to evaluate, side by side; the forms are below."),
    ] = None,
    bundle: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Bundle to evaluate as one more executor, on TensorRT if this machine can run its plan."
        ),
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(
            metavar="SIDE",
            help="Executor to compare with: KL, top-1 agreement, and accuracy lost on the same examples.",
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="Model, before any quantization, that the executors were made from: a family name, a "
            "directory or a hub id.",
            show_default="as recorded in the executor",
        ),
    ] = None,
    tasks: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TASK|FILE.jsonl",
            help='Task of a toy, or a file with one {"prompt": …, "answer": …} per line; repeatable.',
            show_default="all of a toy",
        ),
    ] = None,
    texts: Annotated[
        list[Path] | None, typer.Option("--text", metavar="FILE", help="UTF-8 text file for perplexity; repeatable.")
    ] = None,
    limit: Annotated[int, typer.Option(min=1, help="Maximum number of examples per task.")] = 200,
    seed: Annotated[int, typer.Option(help="Random seed for the choice of examples of a toy's tasks.")] = 1,
    window: Annotated[
        int | None,
        typer.Option(
            min=2,
            help="Window for perplexity, in tokens per forward pass.",
            show_default="the model's positions, up to 1024",
        ),
    ] = None,
    stride: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Distance from one window to the next, in tokens: each token is scored once, with window - "
            "stride tokens before it.",
            show_default="half the window",
        ),
    ] = None,
    shape: Annotated[
        list[str] | None,
        typer.Option(
            metavar="BATCHxPROMPTxNEW",
            help="Workload to time: batch size, prompt tokens and new tokens; repeatable.",
            show_default="1x128x32",
        ),
    ] = None,
    speed: Annotated[bool, typer.Option("--speed/--no-speed", help="Time prefill and decode.")] = True,
    batch_size: Annotated[int, typer.Option(min=1, help="Maximum number of rows per batch, except when timing.")] = 64,
    chat: Annotated[
        bool, typer.Option("--chat", help="Put the prompts of files into the model's chat format.")
    ] = False,
    max_new_tokens: Annotated[
        int, typer.Option(min=1, help="Maximum number of new tokens per answer, for tasks from a file.")
    ] = 128,
    max_loss: Annotated[
        float | None,
        typer.Option(
            metavar="POINTS",
            help="Exit with code 1 if an executor loses more points of accuracy than this (mean of the tasks).",
        ),
    ] = None,
    max_kl: Annotated[
        float | None,
        typer.Option(
            metavar="NATS", help="Exit with code 1 if the mean KL of an executor is larger than this, in nats."
        ),
    ] = None,
    emulate_rounding: Annotated[
        bool,
        typer.Option(help="Round every node of a half-precision graph to its dtype on the CPU (never when timing)."),
    ] = True,
    name_map: Annotated[
        Path | None, typer.Option("--map", help="JSON file that maps values of an ONNX file to taps (see diff).")
    ] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run the Python code in a Hugging Face directory.")
    ] = False,
    device: Annotated[
        str | None,
        typer.Option(help="Device for the reference, kernels and hf executors: cpu or cuda.", show_default="cpu"),
    ] = None,
    markdown: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Also write the tables as Markdown to this file.")
    ] = None,
    json_output: JsonFlag = False,
) -> None:
    """Measure accuracy, perplexity, KL, ROUGE and speed, and the accuracy that an engine loses.

    The verb measures task accuracy with 95 % intervals (Wilson), perplexity and bits per byte of texts, ROUGE of
    summaries, and tokens per second after warm-up.  With --against, it also measures KL (fp64) and top-1 agreement on
    the same tokens, and the accuracy lost on the same examples, whose interval is much narrower than those of two
    accuracies.

    The bundled toys have their own tasks; for any other model, give --text or --tasks FILE.jsonl, or measure speed
    only.  The reference is the model of --model before quantization, so for a quantized bundle, `--against reference`
    shows the cost of quantization.

    SIDE and --against are one of:

    {forms}

    A golden case is a recording and cannot be evaluated.  `reference` is fp64; if the model is too large for that,
    write reference:bf16.

    Exit code 0: measured; 1: an executor is over --max-loss or --max-kl; 2: bad input.

    Example: logitlock eval --bundle engines/qwen-int4 --against reference --max-loss 2

    Example: logitlock eval engines/my-qwen2 hf:bf16 --model ./my-qwen2 --against hf:fp32 --text wiki.txt --no-speed
    """
    from debug.evaluate.options import EvaluateOptions
    from debug.evaluate.run import evaluate_model
    from debug.evaluate.speed import parse_shape
    from debug.evaluate.tables import MARK, print_evaluation
    from debug.evaluate.tables import markdown as page
    from debug.sides import bundle_side
    from export.progress import progress_bar
    from refmodels.files import check_file_output, write_text
    from refmodels.options import check_device, fields_in

    if device is not None:
        check_device(device)
    options = EvaluateOptions(**fields_in(EvaluateOptions, locals()))
    timed = tuple(parse_shape(each) for each in shape or ()) or options.shapes
    if against is None and (max_loss is not None or max_kl is not None):
        raise LogitLockError("--max-loss and --max-kl are for a comparison; name the other executor with --against")
    for option, budget in (("--max-loss", max_loss), ("--max-kl", max_kl)):
        if budget is not None and not budget >= 0:
            raise typer.BadParameter("must be a number of at least 0", param_hint=option)
    if markdown is not None:
        check_file_output(markdown, "page", MARK)
    named = [*([] if bundle is None else [bundle_side(bundle)]), *(sides or ())]
    with progress_bar("evaluate", quiet=json_output) as progress:
        result = evaluate_model(named, options, shapes=timed if speed else (), progress=progress)
    if max_loss is not None and all(side.loss is None for side in result.sides):
        raise LogitLockError("--max-loss needs tasks, and none was measured; give --tasks FILE.jsonl")
    if max_kl is not None and all(side.agreement is None for side in result.sides):
        raise LogitLockError("--max-kl needs tokens to compare on; give --tasks or --text")
    exceeded = result.exceeded(max_loss=max_loss, max_kl=max_kl)
    if markdown is not None:
        write_text(markdown, page(result, command=shlex.join(["logitlock", *sys.argv[1:]])), "page", MARK)
    if json_output:
        print(json.dumps(result.to_json() | {"exceeded": exceeded}, ensure_ascii=False, allow_nan=False))
    else:
        print_evaluation(result)
        for sentence in exceeded:
            print(f"OVER BUDGET: {sentence}")
    if exceeded:
        raise typer.Exit(1)
