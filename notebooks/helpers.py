"""Common helpers of the notebooks: a scratch directory, the command line, planting a fault in a bundle, figures."""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import matplotlib.pyplot as plt
import onnx

from trt_runtime import read_bundle

GOLDENS = Path(__file__).parent.parent / "tests" / "goldens"
"""Recorded inputs and outputs of the upstream code (see their README)."""

COLORS = {"ours": "#2f6f9f", "wrong": "#c0392b", "floor": "#7f8c8d", "other": "#e08e0b"}


def scratch() -> None:
    """Go to a new, empty directory, so that `engines/...` means the same on every machine."""
    os.chdir(tempfile.mkdtemp(prefix="logitlock-notebook-"))


def style() -> None:
    """Figures that can be read on a white page without a zoom."""
    plt.rcParams.update(
        {
            "figure.dpi": 100,
            "figure.facecolor": "white",
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "grid.alpha": 0.3,
            "axes.axisbelow": True,
            "font.size": 10,
            "legend.frameon": False,
        }
    )


def logitlock(arguments: str, *, start: str = "", end: str | None = None) -> int:
    """Run `logitlock ...` as a shell would, print what it says, and return its exit code.

    Only a part is printed where the rest was shown before: from the first line that begins with `start` to before the
    next one that begins with `end`.
    """
    print(f"$ logitlock {arguments}")
    # A Jupyter kernel asks every program for colours; plain text is wanted here.
    environment = {name: value for name, value in os.environ.items() if "COLOR" not in name}
    done = subprocess.run(
        [Path(sys.executable).with_name("logitlock"), *shlex.split(arguments)],
        env=environment | {"COLUMNS": "110", "TERM": "dumb", "PYTHONIOENCODING": "utf-8", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        encoding="utf-8",
    )
    lines = [line.rstrip() for line in done.stdout.splitlines()]
    first = next(i for i, line in enumerate(lines) if line.startswith(start))
    last = next((i for i in range(first + 1, len(lines)) if end and lines[i].startswith(end)), len(lines))
    print(*lines[first:last], sep="\n")
    return done.returncode


def edited(bundle: Path | str, target: Path | str, change: Callable[[onnx.ModelProto], None]) -> Path:
    """A copy of a bundle with a change in its graph, and a manifest that vouches for it: a faulty exporter's output."""
    bundle, target = Path(bundle), Path(target)
    shutil.copytree(bundle, target)
    model = onnx.load(target / "model.onnx", load_external_data=False)
    change(model)
    onnx.save(model, target / "model.onnx")
    reseal(target)
    return target


def reseal(bundle: Path | str) -> None:
    """Write the sizes and hashes of a bundle's files into its manifest anew."""
    bundle = Path(bundle)
    manifest = json.loads((bundle / "bundle.json").read_text(encoding="utf-8"))
    for name in manifest["files"]:
        content = (bundle / name).read_bytes()
        manifest["files"][name] = {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
    (bundle / "bundle.json").write_text(json.dumps(manifest, ensure_ascii=False), encoding="utf-8")
    read_bundle(bundle)


def node(model: onnx.ModelProto, name: str) -> onnx.NodeProto:
    """The node of that name in the graph."""
    return next(n for n in model.graph.node if n.name == name)
