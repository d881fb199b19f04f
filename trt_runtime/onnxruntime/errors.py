"""Errors of ONNX Runtime, onnx_ir and protobuf about a graph, as one sentence without paths of their sources; and the
options of a session that raises them instead of printing them."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import onnxruntime as ort

from refmodels.errors import LogitLockError

_PREFIX = re.compile(r"^\[ONNXRuntimeError\] : \d+ : \w+ : ")
_SOURCE = re.compile(r"\S+\.(?:cc|cpp|hpp|h):\d+ (?:[\w:~<>]+\([^)]*\)(?: const)?|[\w:~]+) ?")
# Fatal errors only: others are exceptions too, and would be reported twice.
_LOG_SEVERITY = 4


@contextmanager
def graph_errors(what: str) -> Iterator[None]:
    """Raise a `LogitLockError` that begins with `what` for any error of the libraries except files, memory and bugs.

    For a broken graph they raise anything from TypeError to their own classes, so every Exception counts.
    """
    with quiet():
        try:
            yield
        except (LogitLockError, OSError, MemoryError, AssertionError):
            raise
        except Exception as error:
            raise LogitLockError(f"{what}: {said(error)}") from error


@contextmanager
def quiet() -> Iterator[None]:
    """Nothing of what onnx_ir logs, in many lines and with tracebacks, is printed."""
    logger = logging.getLogger("onnx_ir")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


def said(error: Exception) -> str:
    """The first line of an error's text, without its number and without file names of C++."""
    text = _SOURCE.sub("", _PREFIX.sub("", str(error))).strip()
    return next(iter(text.splitlines()), "").strip() or type(error).__name__


def cannot_run(path: Path) -> str:
    """The start of a sentence about a graph that fails."""
    return f"ONNX Runtime cannot run {path}"


def cannot_read(path: Path) -> str:
    """The start of a sentence about a file that holds no graph."""
    return f"{path} cannot be read as an ONNX model"


def session_options(folder: Path, threads: int) -> ort.SessionOptions:
    """The options of every session: external weights are in `folder`, and errors are raised, not printed."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = _LOG_SEVERITY
    # Spinning threads gain 3 % on idle cores and lose half on shared ones (another process, or torch in this one).
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
    return options
