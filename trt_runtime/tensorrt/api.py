"""One import for both TensorRT packages: `tensorrt` (>= 11.0) and `tensorrt_rtx` (>= 1.5).

    from trt_runtime.tensorrt.api import trt

If neither is installed, importing this module raises a `LogitLockError` that names the install command, so import it
where TensorRT is needed, not at the top of a module that also serves the CPU.  `LOGITLOCK_TENSORRT=tensorrt_rtx` (or
`tensorrt`) chooses where both are installed; otherwise full TensorRT wins.  Neither import needs a GPU, and
TensorRT-RTX builds without one.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from refmodels.dtypes import DTYPE_TABLE
from refmodels.errors import LogitLockError

_MINIMUM = {"tensorrt": (11, 0), "tensorrt_rtx": (1, 5)}
_INSTALL = "pip install 'logitlock[tensorrt-rtx]' (RTX GPUs; builds without a GPU) or 'logitlock[tensorrt]'"
_NOISE = ("catchCudaError", "cudaErrorInsufficientDriver")
"""Follows every API error, and some successes, on a machine without a driver; it has no meaning."""


def _load() -> ModuleType:
    chosen = os.environ.get("LOGITLOCK_TENSORRT")
    if chosen is not None and chosen not in _MINIMUM:
        raise LogitLockError(f"LOGITLOCK_TENSORRT is {chosen!r}; it must be one of {', '.join(_MINIMUM)}")
    reasons = []
    for name, minimum in _MINIMUM.items():
        if chosen not in (None, name):
            continue
        try:
            module = importlib.import_module(name)
        except Exception as error:  # the full package raises whatever its loader meets when libnvinfer is missing
            reasons.append(f"{name}: {str(error).splitlines()[0] if str(error) else type(error).__name__}")
            continue
        version = tuple(int(part) for part in module.__version__.split(".")[:2])
        if version >= minimum:
            return module
        reasons.append(f"{name} {module.__version__} is older than {'.'.join(map(str, minimum))}")
    raise LogitLockError(f"no usable TensorRT is installed ({'; '.join(reasons)}); install one: {_INSTALL}")


trt: Any = _load()
IS_RTX: bool = trt.__name__ == "tensorrt_rtx"


def tensorrt_type(name: str) -> Any:
    """The `trt.DataType` of a dtype in `refmodels.dtypes.DTYPE_TABLE`, by its short name.  TensorRT has no fp64."""
    member = DTYPE_TABLE[name].tensorrt
    assert member is not None, f"TensorRT has no {name}"
    return getattr(trt.DataType, member)


def _mend_rtx_wheel() -> None:
    """TensorRT-RTX's parser opens `libtensorrt_rtx.so` when it meets a plugin; the wheel has only `.so.1`.

    Without the link the process aborts (std::terminate), so there is nothing to catch later.
    """
    import tensorrt_rtx_libs

    for directory in map(Path, tensorrt_rtx_libs.__path__):
        link = directory / "libtensorrt_rtx.so"
        for library in directory.glob("libtensorrt_rtx.so.1*"):
            if link.exists():
                return
            try:
                link.symlink_to(library.name)
            except FileExistsError:  # another process did it at the same time
                return
            except OSError as error:
                raise LogitLockError(
                    f"TensorRT-RTX cannot load plugins: its wheel lacks {link} and it could not be made ({error}); "
                    f"run: ln -s {library.name} {link}"
                ) from None


if IS_RTX:
    _mend_rtx_wheel()


class Logger(trt.ILogger):  # type: ignore[misc]
    """Keeps messages while `collect` is active.

    TensorRT has one logger in a process: the first one registered serves every builder and runtime that lives.  So
    there is one, `LOGGER`.
    """

    def __init__(self) -> None:
        trt.ILogger.__init__(self)
        self._collected: list[list[tuple[int, str]]] = []

    def log(self, severity: Any, message: str) -> None:
        for messages in self._collected:
            messages.append((int(severity), message))

    @contextmanager
    def collect(self) -> Iterator[list[tuple[int, str]]]:
        """Every message (severity, text) of the block; severities as `trt.ILogger.Severity`, 0 the worst."""
        messages: list[tuple[int, str]] = []
        self._collected.append(messages)
        try:
            yield messages
        finally:
            # Not remove(): nested lists are equal while both are empty.
            self._collected = [other for other in self._collected if other is not messages]


LOGGER = Logger()


def errors_of(messages: list[tuple[int, str]]) -> list[str]:
    """The texts of errors, without the noise of a machine that has no driver."""
    worst = int(trt.ILogger.Severity.ERROR)
    return [text for severity, text in messages if severity <= worst and not any(n in text for n in _NOISE)]


def warnings_of(messages: list[tuple[int, str]]) -> list[str]:
    """The texts of warnings."""
    level = int(trt.ILogger.Severity.WARNING)
    return [text for severity, text in messages if severity == level and not any(n in text for n in _NOISE)]


def can_build() -> bool:
    """Whether an engine can be built here: TensorRT-RTX compiles without a GPU, full TensorRT times kernels on one."""
    return IS_RTX or torch.cuda.is_available()


def package_version() -> str:
    """Name and version of the package, as recorded in a bundle: 'tensorrt_rtx 1.7.1.116'."""
    return f"{trt.__name__} {trt.__version__}"
