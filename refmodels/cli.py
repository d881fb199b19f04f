"""What all command lines share, and the verb `models`."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from refmodels.checkpoint import TOYS, parameter_shapes, resolve
from refmodels.errors import LogitLockError
from refmodels.families import FAMILIES

JsonFlag = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of a table.")]
"""Type of the `--json` option of every verb."""


def make_app(description: str, verbs: Iterable[Callable[..., None]]) -> typer.Typer:
    """A command with one subcommand for each function; the function's name is the verb, its docstring the help."""
    app = typer.Typer(help=description, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
    # Without a callback typer would drop the verb of an app that has only one.
    app.callback()(lambda: None)
    for verb in verbs:
        app.command(verb.__name__.removesuffix("_"))(verb)
    return app


def run(app: typer.Typer) -> None:
    """Run a command and leave the process.

    Exit codes: 0 fine, 1 ran and found a difference (a verb raises `typer.Exit(1)`), 2 bad input, said in one line on
    stderr, 130 interrupted.  Anything else is a bug and shows its traceback.
    """
    try:
        code = app(standalone_mode=False)
    except LogitLockError as error:
        code = _fail(str(error))
    except typer.TyperException as error:
        code = _fail(error.format_message())
    except (KeyboardInterrupt, typer.Abort):
        code = 130
    sys.exit(code if isinstance(code, int) else 0)


def _fail(message: str) -> int:
    # An empty message: typer has already shown the help, because no verb was given.
    if message:
        print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return 2


def models(json_output: JsonFlag = False) -> None:
    """List the model families, the published models they cover, and the bundled toys.

    Example: logitlock models --json
    """
    rows = [_describe(name) for name in FAMILIES]
    if json_output:
        print(json.dumps({"families": rows}, ensure_ascii=False, indent=2))
        return
    table = Table("family", "covers", "model_type", "bundled toy")
    for row in rows:
        toy = row["toy"]
        table.add_row(
            row["name"],
            row["covers"],
            ", ".join(row["model_types"]),
            f"{toy['parameters']:,} parameters, {toy['layers']} layers, vocabulary {toy['vocab_size']:,}, "
            f"{toy['max_positions']:,} positions"
            if toy
            else "not in this installation",
        )
    Console().print(table)


def _describe(name: str) -> dict[str, Any]:
    family = FAMILIES[name]
    toy = None
    if (TOYS / name / "config.json").is_file():
        spec = resolve(name).spec
        toy = {
            "variant": spec.variant,
            "parameters": sum(shape.numel() for shape in parameter_shapes(spec).values()),
            "layers": spec.layers,
            "hidden_size": spec.hidden_size,
            "vocab_size": spec.vocab_size,
            "max_positions": spec.max_positions,
        }
    return {"name": name, "covers": family.describes, "model_types": list(family.model_types), "toy": toy}
