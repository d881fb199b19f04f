"""What ONNX Runtime, onnx_ir and protobuf raise about a graph, as one sentence without paths of their sources."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from refmodels.errors import LogitLockError

_PREFIX = re.compile(r"^\[ONNXRuntimeError\] : \d+ : \w+ : ")
_SOURCE = re.compile(r"\S+\.(?:cc|cpp|hpp|h):\d+ (?:[\w:~<>]+\([^)]*\)(?: const)?|[\w:~]+) ?")


@contextmanager
def graph_errors(what: str) -> Iterator[None]:
    """Raise a `LogitLockError` that begins with `what` for whatever the libraries raise; of files, memory and bugs not.

    They raise what they like for a graph that is none, from TypeError to their own classes, so every Exception counts.
    """
    try:
        yield
    except (LogitLockError, OSError, MemoryError, AssertionError):
        raise
    except Exception as error:
        raise LogitLockError(f"{what}: {said(error)}") from error


def said(error: Exception) -> str:
    """The first line of an error's text, without its number and without file names of C++."""
    text = _SOURCE.sub("", _PREFIX.sub("", str(error))).strip()
    return next(iter(text.splitlines()), "").strip() or type(error).__name__


def cannot_run(path: Path) -> str:
    """How a sentence about a graph that fails begins."""
    return f"ONNX Runtime cannot run {path}"
