"""Where a result was made: versions, commit and machine, without names of machines, users or directories."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import subprocess
import time
from importlib import metadata
from pathlib import Path

import torch

from refmodels.errors import LogitLockError

_PACKAGES = ("logitlock", "torch", "numpy", "onnx", "onnxruntime", "tensorrt", "tensorrt_rtx", "triton", "transformers")
_GIB = 2**30
_NO_GPU = "no: torch finds no CUDA GPU"


def environment() -> dict[str, str]:
    """Versions of the libraries that compute, and the machine, in the order in which to show them."""
    found = {"date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()), "python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    # The metadata of a wheel do not say for which CUDA it was built.
    found["torch"] = torch.__version__
    if (commit := _commit()) is not None:
        found["commit"] = commit
    found["system"] = f"{platform.system()} {platform.release()}, {platform.machine()}"
    found["processor"] = f"{_processor()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"
    if torch.cuda.is_available():
        found["gpu"] = ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
    return found


def abilities() -> dict[str, str]:
    """The back ends and optional parts that this machine can run, with the reason for each that it cannot."""
    import onnxruntime as ort

    cuda = torch.cuda.is_available()
    triton = importlib.util.find_spec("triton") is not None
    return {
        "reference (torch)": "yes" + (", on the CPU and on CUDA" if cuda else ", on the CPU"),
        "kernels (torch on a GPU)": _NO_GPU if not cuda else "yes" if triton else "no: pip install triton",
        "ONNX Runtime": f"yes, with {', '.join(ort.get_available_providers())}",
        "TensorRT plans: build": _tensorrt(run=False),
        "TensorRT plans: run": _tensorrt(run=True),
        "transformers (hf, record)": _installed("transformers", "record"),
        "HTML report": _installed("plotly", "report"),
        "free memory": f"{_free_memory() / _GIB:.1f} GiB",
        "free disk here": f"{shutil.disk_usage('.').free / _GIB:.1f} GiB",
    }


def _installed(package: str, extra: str) -> str:
    return "yes" if importlib.util.find_spec(package) is not None else f"no: pip install 'logitlock[{extra}]'"


def _tensorrt(*, run: bool) -> str:
    try:
        from trt_runtime.tensorrt import api
    except LogitLockError as error:
        return f"no: {error}"
    if not (torch.cuda.is_available() if run else api.can_build()):
        return _NO_GPU
    return f"yes, with {api.package_version()}"


def _commit() -> str | None:
    """The commit of the checkout that this code runs from, if it runs from one."""
    root = Path(__file__).parents[1]
    if not (root / ".git").exists() or shutil.which("git") is None:
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() or None


def _free_memory() -> int:
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):
        return 0


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            named = next((line for line in lines if line.startswith("model name")), "")
    except OSError:
        named = ""
    return named.partition(":")[2].strip() or platform.processor() or platform.machine()
