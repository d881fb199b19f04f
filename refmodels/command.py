"""The frame of every command line: the app, its exit codes, its one-line errors."""

from __future__ import annotations

import io
import logging
import os
import signal
import sys
import threading
import types
from collections.abc import Callable, Iterable
from typing import Annotated

import typer

from refmodels.errors import LogitLockError
from refmodels.files import reason
from refmodels.notices import LOGGER

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
    stderr, 130 interrupted, 141 the reader of standard output has gone, 143 terminated.  What the operating system
    refuses (no permission, a full disk, no memory) is bad input too.  Anything else is a bug and shows its traceback.
    """
    _prepare()
    try:
        code = app(standalone_mode=False)
        sys.stdout.flush()
    except LogitLockError as error:
        code = _fail(str(error))
    except typer.TyperException as error:
        code = _fail(error.format_message())
    except (KeyboardInterrupt, typer.Abort):
        code = 130
    except BrokenPipeError:
        code = 141
    except SystemExit as left:
        # click leaves by itself, with 1, where it meets a broken pipe.
        code = 141 if isinstance(left.__context__, BrokenPipeError) else left.code
    except OSError as error:
        code = _fail(f"{error.filename}: {reason(error)}" if error.filename is not None else reason(error))
    except MemoryError as error:
        code = _fail(f"this needs more memory than there is{f': {error}' if str(error) else ''}")
    try:
        sys.stdout.flush()
    except OSError:
        # Or Python tries once more at its exit, and complains.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(code if isinstance(code, int) else 0)


def _prepare() -> None:
    """Text that a terminal or pipe cannot show is escaped, notices say what they are, and a termination cleans up as an
    interruption does."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("warning: %(message)s"))
    LOGGER.addHandler(handler)
    LOGGER.propagate = False
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _terminated)


def _terminated(number: int, frame: types.FrameType | None) -> None:
    raise SystemExit(128 + number)


def _fail(message: str) -> int:
    # An empty message: typer has already shown the help, because no verb was given.
    if message:
        print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return 2
