"""The frame of every command line: the app, its exit codes, its one-line errors."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from typing import Annotated

import typer

from refmodels.errors import LogitLockError

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
