"""Full TensorRT's Python bindings, importable without its libraries (2 GB) and without a GPU.

The bindings are a wheel of 1.3 MB, `tensorrt-cu13-bindings`.  They need three libraries; empty ones with the right
names are enough to import them, to construct what Python can construct, and to read every class and enum.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from tests.support.paths import ROOT

WHEEL = "tensorrt-cu13-bindings"
_LIBRARIES = ("libnvinfer.so.11", "libnvinfer_plugin.so.11", "libnvonnxparser.so.11")
_FUNCTIONS = (
    "createInferBuilder_INTERNAL",
    "createInferRefitter_INTERNAL",
    "createInferRuntime_INTERNAL",
    "createNvOnnxParserRefitter_INTERNAL",
    "createNvOnnxParser_INTERNAL",
    "getBuilderPluginRegistry",
    "getNvOnnxParserVersion",
    "getPluginRegistry",
    "initLibNvInferPlugins",
)


class Unavailable(Exception):
    """The bindings cannot be had here; the text says why."""


def install(directory: Path, version: str, *, python: str | None = None) -> None:
    """Install the bindings of `version` (a pip specifier such as "==11.0.*") into a directory.

    Args:
        python: for another Python on 64-bit x86 Linux, as "3.12"; None: this one.
    Raises:
        Unavailable: no compiler, or pip does not get the wheel.
    """
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        raise Unavailable("there is no C compiler for the stub libraries")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--only-binary", ":all:"]
    command += ["--disable-pip-version-check", "--no-input", "--timeout", "20", "--retries", "1", "--upgrade"]
    if python is not None:
        command += ["--python-version", python, "--implementation", "cp", "--platform", "manylinux_2_28_x86_64"]
    done = subprocess.run([*command, "--target", str(directory), WHEEL + version], capture_output=True, text=True)
    if done.returncode:
        raise Unavailable(f"pip does not install {WHEEL}{version}: {done.stderr.strip().splitlines()[-1:]}")
    stub = "".join(f"void *{name}(void) {{ return 0; }}\n" for name in _FUNCTIONS)
    for library in _LIBRARIES:
        options = ["-shared", "-fPIC", "-x", "c", "-", f"-Wl,-soname,{library}", "-o", str(directory / library)]
        subprocess.run([compiler, *options], input=stub, text=True, check=True)
    package = directory / "tensorrt"
    package.mkdir(exist_ok=True)
    # As in the real package: the module `tensorrt` is the bindings under another name.
    code = "from tensorrt_bindings import *\nfrom tensorrt_bindings import __version__\n"
    (package / "__init__.py").write_text(code)


def environment(directory: Path) -> dict[str, str]:
    """Environment of a process that sees these bindings as `tensorrt`."""
    return {
        **os.environ,
        "LOGITLOCK_TENSORRT": "tensorrt",
        "LD_LIBRARY_PATH": str(directory),
        "PYTHONPATH": os.pathsep.join((str(directory), str(ROOT))),
    }


if __name__ == "__main__":
    # python -m tests.support.full_tensorrt DIRECTORY [PYTHON]: for a machine that cannot reach the index.
    install(Path(sys.argv[1]), ">=11.0", python=(sys.argv[2:] or [None])[0])
