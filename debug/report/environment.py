"""The environment section of a report; it has no names of machines, users or directories."""

from __future__ import annotations

import os
import platform
import time
from importlib import metadata

import torch

_PACKAGES = ("logitlock", "torch", "numpy", "onnx", "onnxruntime", "tensorrt", "tensorrt_rtx", "triton", "transformers")


def environment() -> dict[str, str]:
    """Versions of the libraries that compute, and the machine, in the order in which to show them."""
    found = {"date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()), "python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    found["system"] = f"{platform.system()} {platform.release()}, {platform.machine()}"
    found["processor"] = f"{_processor()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"
    if torch.cuda.is_available():
        found["gpu"] = ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
    return found


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            named = next((line for line in lines if line.startswith("model name")), "")
    except OSError:
        named = ""
    return named.partition(":")[2].strip() or platform.processor() or platform.machine()
