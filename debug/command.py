"""The `logitlock` command: every verb of the four packages, each imported only when it is asked for."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from typing import Annotated

import typer

HELP = """Say which layer of an engine differs from Hugging Face, by how much, and why.

A model is a family name (chatglm2, baichuan, qwen, gpt: the bundled toys), a local Hugging Face directory or a hub id.
Three commands lead to a verdict:

    logitlock export --model qwen --precision fp16

    logitlock generate --bundle engines/qwen-fp16 --prompt '世界上第二高的山峰是哪座？'

    logitlock diff --model qwen --bundle engines/qwen-fp16

Exit codes: 0 if all is fine, 1 if the command found a difference, 2 if the input is bad.
"""


@dataclass(frozen=True)
class Verb:
    """Where a verb's function is, and its help in one line (the first line of its docstring).

    The functions are imported only when their verb is asked for: torch alone takes a second to import.
    """

    module: str
    function: str
    summary: str


VERBS = {
    "export": Verb(
        "export.cli", "export", "Export a model to a bundle: graph, weights, tokenizer and TensorRT engine."
    ),
    "quantize": Verb(
        "export.quantization.cli",
        "quantize",
        "Quantize a model into a checkpoint that export, diff, eval and other programs read.",
    ),
    "generate": Verb("trt_runtime.cli", "generate", "Generate text with the reference or with an engine."),
    "verify": Verb("debug.cli", "verify", "Compare the reference with what the upstream code computed."),
    "record": Verb("debug.cli", "record", "Record a golden case by running Hugging Face transformers."),
    "diff": Verb(
        "debug.cli",
        "diff",
        "Compare an engine with the fp64 reference, tensor by tensor, or two executors of any kind.",
    ),
    "trace": Verb("debug.cli", "trace", "Save every tap of an executor, to be compared on another machine."),
    "drift": Verb(
        "debug.cli",
        "drift",
        "Show how an engine drifts from the reference while it decodes, and the first token that differs.",
    ),
    "bisect": Verb(
        "debug.cli",
        "bisect",
        "Find the smallest set of linear layers that must stay in fp32 to keep within a KL budget.",
    ),
    "eval": Verb(
        "debug.evaluate.cli",
        "evaluate",
        "Measure accuracy, perplexity, KL, ROUGE and speed, and the accuracy that an engine loses.",
    ),
    "inspect": Verb("trt_runtime.cli", "inspect", "Show the contents of a bundle."),
    "models": Verb(
        "refmodels.cli", "models", "List the model families, the published models they cover, and the bundled toys."
    ),
}


def main(name: str = "logitlock", *, package: str | None = None) -> None:
    """Run the command; `package` keeps only the verbs of one package (as `python -m debug` does)."""
    arguments = sys.argv[1:]
    verbs = {v: where for v, where in VERBS.items() if package is None or where.module.startswith(f"{package}.")}
    asked = next((a for a in arguments if a in verbs), None)
    app = typer.Typer(name=name, help=HELP, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
    app.callback()(_root)
    for verb, where in verbs.items():
        if verb == asked:
            function = getattr(importlib.import_module(where.module), where.function)
            app.command(verb, help=help_of(function))(function)
        else:
            app.command(verb, help=where.summary)(_not_loaded)
    if asked is None and (not arguments or arguments[0].startswith("-")):
        app(prog_name=name)
    from refmodels.command import run

    run(app)


def help_of(function: Callable[..., None]) -> str:
    """The docstring, with the ways to name an executor in the place of `{forms}`."""
    text = inspect.getdoc(function) or ""
    if "{forms}" not in text:
        return text
    from debug.executors.open import forms_help

    return text.replace("{forms}", forms_help())


def _not_loaded() -> None:
    raise AssertionError("the verb was not loaded")


def _version(asked: bool) -> None:
    if asked:
        print(f"logitlock {metadata.version('logitlock')}")
        raise typer.Exit


def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass
