"""The verbs `check` and `inspect`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from debug.check.describe import check_model, rows
from refmodels.command import JsonFlag
from refmodels.errors import LogitLockError
from refmodels.terminal import new_console
from trt_runtime.inspect_bundle import inspect_bundle


def check(
    model: Annotated[
        str,
        typer.Argument(help="Family name (the bundled toy), Hugging Face directory, or hub id.", show_default=False),
    ],
    tokens: Annotated[
        int | None,
        typer.Option(help="Number of tokens in the cache whose size is shown.", show_default="the model's positions"),
    ] = None,
    json_output: JsonFlag = False,
) -> None:
    """Say what a model is, before anything of it runs.

    The verb shows which model it is and by which facts, its size and that of its cache, chat template and stop ids,
    which keys are left out, what is refused, and which back ends serve it.  It exits with 2 if anything is refused.

    Example: logitlock check qwen --tokens 4096
    """
    found = check_model(model, tokens=tokens)
    if json_output:
        print(json.dumps(found, ensure_ascii=False, indent=2))
    else:
        table = Table(show_header=False, box=None)
        table.add_column(no_wrap=True)
        table.add_column(overflow="fold")
        for name, text in rows(found):
            table.add_row(name, text, style="bold red" if name == "refused" else None)
        new_console().print(table, highlight=False)
    if found["refused"]:
        raise LogitLockError(f"{model} is refused: {'; '.join(found['refused'])}")


def inspect(
    path: Annotated[str, typer.Argument(help="Directory of a bundle, or a model, as for check.", show_default=False)],
    json_output: JsonFlag = False,
) -> None:
    """Show the contents of a bundle, or what a model is.

    Example: logitlock inspect engines/qwen-fp16
    """
    directory = Path(path)
    if (directory / "config.json").is_file() and not (directory / "bundle.json").is_file():
        check(path, json_output=json_output)
    else:
        inspect_bundle(directory, json_output=json_output)
