"""The common part of every command line: its verbs and their help, its exit codes, its one-line errors."""

from __future__ import annotations

import ast
import functools
import importlib
import importlib.util
import inspect
import io
import logging
import os
import signal
import sys
import threading
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import typer

from refmodels.errors import LogitLockError
from refmodels.files import reason
from refmodels.notices import LOGGER
from refmodels.shadowing import check_ours

JsonFlag = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of a table.")]
"""Type of the `--json` option of every verb."""
VerboseFlag = Annotated[
    bool, typer.Option("--verbose", "-v", help="Also say on stderr which step runs, and when.", show_default=False)
]
QuietFlag = Annotated[
    bool, typer.Option("--quiet", "-q", help="Print no warnings and no progress.", show_default=False)
]
"""Types of the options that every verb has without listing them."""
_SETTINGS = {"help_option_names": ["-h", "--help"]}


_LONGEST = 1200
"""Number of characters of an error message that are shown: it may quote a path or a value of any length."""


@dataclass(frozen=True)
class Verb:
    """Where the function of a verb is.  It is imported only when its verb is asked for: torch alone takes a second."""

    module: str
    function: str

    def load(self) -> Callable[..., None]:
        """The function: its parameters are the options, its docstring is the help."""
        check_ours(self.module)
        function: Callable[..., None] = getattr(importlib.import_module(self.module), self.function)
        return function

    @property
    def summary(self) -> str:
        """The first line of the docstring, from the source alone."""
        return _docstrings(self.module)[self.function].partition("\n")[0]


def help_of(function: Callable[..., None]) -> str:
    """The docstring, as text."""
    return inspect.getdoc(function) or ""


def main(
    verbs: Mapping[str, Verb],
    description: str,
    *,
    default: str | None = None,
    help_of: Callable[[Callable[..., None]], str] = help_of,
) -> None:
    """Run the command line of `sys.argv` and leave the process; exit codes: see `_run`.

    Args:
        verbs: its subcommands by name.
        description: what its help says of it as a whole.
        default: the verb that is meant where none is named, of a command that is known without.
        help_of: what the help of a verb says.
    """
    _run(lambda: _app(verbs, description, default, help_of))


def _app(
    verbs: Mapping[str, Verb], description: str, default: str | None, help_of: Callable[[Callable[..., None]], str]
) -> typer.Typer:
    # Before torch is loaded: threads that spin while they wait take the cores of whatever else runs.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    asked = _asked()
    app = typer.Typer(
        help=description,
        # Completion is installed per command name; `python -m` has none.
        add_completion=not _is_module(),
        # The boxes of rich cut the names of options at 80 columns.
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
    )
    if asked in verbs or default is None:
        # Also where there is one verb: without a callback typer would take it for the whole command.
        app.callback(context_settings=_SETTINGS, invoke_without_command=True)(_root)
    else:
        asked = default
    for verb in [asked] if asked in verbs else verbs:
        function = verbs[verb].load() if verb == asked else _not_loaded
        summary = verbs[verb].summary
        text = help_of(function) if verb == asked else summary
        # Without a short help, that of the list of verbs is the start of the summary.
        app.command(verb, help=text, short_help=summary, context_settings=_SETTINGS)(_with_levels(function))
    return app


def _run(make_app: Callable[[], typer.Typer]) -> None:
    """Make and run a command and leave the process.

    Exit codes: 0 fine, 1 ran and found a difference (a verb raises `typer.Exit(1)`), 2 bad input, described in one line
    on stderr, 130 interrupted, 141 the reader of standard output is gone, 143 terminated.  Errors of the operating
    system (no permission, a full disk, no memory) are bad input too.  Any other exception is a bug and shows its
    traceback.
    """
    _prepare()
    try:
        # Python's own guess is that of the process, which need not be this command.
        code = make_app()(prog_name=None if _is_module() else Path(sys.argv[0]).stem, standalone_mode=False)
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
        # click exits by itself, with code 1, at a broken pipe.
        code = 141 if isinstance(left.__context__, BrokenPipeError) else left.code
    except OSError as error:
        code = _fail(f"{error.filename}: {reason(error)}" if error.filename is not None else reason(error))
    except RuntimeError as error:
        # What torch's allocator raises has no class of its own.
        if "can't allocate memory" not in str(error):
            raise
        code = _fail("this needs more memory than is available")
    except MemoryError as error:
        code = _fail(f"this needs more memory than is available{f': {error}' if str(error) else ''}")
    try:
        sys.stdout.flush()
    except OSError:
        # Otherwise Python tries once more at exit, and reports an error.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(code if isinstance(code, int) else 0)


def _with_levels(function: Callable[..., None]) -> Callable[..., None]:
    """The function of a verb, with the options that all verbs have."""

    @functools.wraps(function)
    def run(*args: Any, verbose: bool, quiet: bool, **options: Any) -> None:
        LOGGER.setLevel(logging.ERROR if quiet else logging.INFO if verbose else logging.WARNING)
        for name, value in options.items():
            if isinstance(value, int) and not -(2**63) <= value < 2**63:
                raise LogitLockError(f"--{name.replace('_', '-')} is {value}; it must fit into 64 bits")
        function(*args, **options)

    signature = inspect.signature(function, eval_str=True)
    added = {"verbose": VerboseFlag, "quiet": QuietFlag}
    parameters = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=False, annotation=kind)
        for name, kind in added.items()
    ]
    run.__signature__ = signature.replace(parameters=[*signature.parameters.values(), *parameters])  # type: ignore[attr-defined]
    run.__annotations__ = {**function.__annotations__, **added}
    return run


def _asked() -> str:
    """The first word after the command; during shell completion, of the line that is being completed."""
    line = os.environ.get("COMP_WORDS") or os.environ.get("_TYPER_COMPLETE_ARGS")
    words = sys.argv if line is None else line.split()
    return words[1] if len(words) > 1 else ""


def _is_module() -> bool:
    return Path(sys.argv[0]).name == "__main__.py"


@functools.lru_cache
def _docstrings(module: str) -> dict[str, str]:
    """The docstrings of a module's functions, without importing it."""
    spec = importlib.util.find_spec(module)
    assert spec is not None and spec.origin is not None, f"there is no module {module}"
    body = ast.parse(Path(spec.origin).read_text(encoding="utf-8")).body
    return {node.name: ast.get_docstring(node) or "" for node in body if isinstance(node, ast.FunctionDef)}


def _not_loaded() -> None:
    raise AssertionError("the verb was not loaded")


def _version(asked: bool) -> None:
    if asked:
        print(f"logitlock {metadata.version('logitlock')}")
        raise typer.Exit


def _root(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    if context.invoked_subcommand is None:
        print(context.get_help())
        raise typer.Exit(2)


def _prepare() -> None:
    """Escape text that a terminal or pipe cannot show, mark notices as warnings, and clean up at termination as at an
    interruption."""
    for name in ("stdin", "stdout", "stderr"):
        # Python has None for a stream that is closed, and prints errors on standard output if it is stderr.
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "r" if name == "stdin" else "w", encoding="utf-8"))  # noqa: SIM115
    handler = logging.StreamHandler()
    handler.setFormatter(_Prefixed())
    LOGGER.handlers = [handler]
    LOGGER.propagate = False
    LOGGER.setLevel(logging.WARNING)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    if threading.current_thread() is threading.main_thread():
        for number in ("SIGTERM", "SIGHUP"):
            if hasattr(signal, number):  # Windows has no SIGHUP
                signal.signal(getattr(signal, number), _terminated)


class _Prefixed(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        return f"warning: {text}" if record.levelno >= logging.WARNING else text


def _terminated(number: int, frame: types.FrameType | None) -> None:
    raise SystemExit(128 + number)


def _fail(message: str) -> int:
    sentence = " ".join(message.split())
    if len(sentence) > _LONGEST:
        sentence = f"{sentence[: _LONGEST // 2]} … {sentence[-_LONGEST // 2 :]}"
    print(f"error: {sentence}", file=sys.stderr)
    return 2
