"""Peak memory and time of exporting 1.5 GB of weights: `python benchmarks/export_memory.py`.

Every export runs in a process of its own.  "extra" is the peak resident memory above the baseline (everything imported
and a tiny model exported); the limits are 0.3 GB and 15 s, hashing included.  Mapped pages count as resident.  "write
probe" is what this disk needs for the same bytes alone, written and flushed.  Exit code 1 if an export is over a
limit.  Results go to benchmarks/results/export_memory.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
import time
from pathlib import Path
from typing import Any

from child import peak_rss, run_again

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "benchmarks" / "results" / "export_memory.json"
EXTRA_LIMIT = 0.3e9
SECONDS_LIMIT = 15.0


def make(directory: Path, layers: int, dtype: str, hidden: int) -> None:
    """Write a Qwen2 checkpoint with random weights."""
    import torch
    from safetensors.torch import save_file

    import refmodels

    config: dict[str, Any] = {
        "model_type": "qwen2",
        "vocab_size": 32 * hidden,
        "hidden_size": hidden,
        "intermediate_size": 4 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": 16,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
    }
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config))
    spec = refmodels.spec_from_config(config)
    names = [part for parts in refmodels.FAMILIES["qwen"].weights(spec).values() for part in parts]
    torch.manual_seed(0)
    tensors = {p.name: torch.randn(p.shape).mul_(0.02).to(getattr(torch, dtype)) for p in names}
    save_file(tensors, directory / "model.safetensors")


def measure(directory: Path, tiny: Path, precision: Any, attention: Any) -> dict[str, Any]:
    """Export in this process and say what it took."""
    import torch

    from export.bundle import export_model

    torch.set_num_threads(2)
    with tempfile.TemporaryDirectory(dir=directory.parent) as folder:
        export_model(tiny, precision=precision, attention=attention, output=Path(folder) / "tiny")
        baseline = peak_rss()
        start = time.perf_counter()
        bundle = export_model(directory, precision=precision, attention=attention, output=Path(folder) / "bundle")
        seconds = time.perf_counter() - start
        return {
            "baseline_bytes": baseline,
            "extra_bytes": peak_rss() - baseline,
            "weights_bytes": (bundle / "model.onnx.data").stat().st_size,
            "graph_bytes": (bundle / "model.onnx").stat().st_size,
            "seconds": round(seconds, 2),
        }


def write_probe(folder: Path, size: int) -> float:
    """Seconds to write `size` bytes and flush them to this disk."""
    block = os.urandom(1 << 24)
    start = time.perf_counter()
    with (folder / "probe").open("wb") as stream:
        for _ in range(size // len(block)):
            stream.write(block)
        stream.flush()
        os.fsync(stream.fileno())
    seconds = time.perf_counter() - start
    (folder / "probe").unlink()
    return round(seconds, 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--make", nargs=4, help=argparse.SUPPRESS)
    parser.add_argument("--measure", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.make:
        directory, layers, dtype, hidden = arguments.make
        return make(Path(directory), int(layers), dtype, int(hidden))
    if arguments.measure:
        directory, tiny, precision, attention = arguments.measure
        return print(json.dumps(measure(Path(directory), Path(tiny), precision, attention)))
    results = []
    with tempfile.TemporaryDirectory() as folder:
        run_again(__file__, "--make", f"{folder}/tiny", "1", "float32", "64")
        for dtype, layers, precision in (("float32", 19, "fp32"), ("bfloat16", 42, "bf16")):
            checkpoint = Path(folder) / dtype
            run_again(__file__, "--make", str(checkpoint), str(layers), dtype, "1024")
            for attention in ("plugin", "decomposed") if precision == "fp32" else ("plugin",):
                done = json.loads(
                    run_again(__file__, "--measure", str(checkpoint), f"{folder}/tiny", precision, attention)
                )
                probe = write_probe(Path(folder), done["weights_bytes"])
                passed = done["extra_bytes"] <= EXTRA_LIMIT and done["seconds"] <= SECONDS_LIMIT
                case = {"source": dtype, "precision": precision, "attention": attention, "write_probe_seconds": probe}
                results.append({**case, **done, "passed": passed})
                print(
                    f"{dtype} -> {precision} {attention}: {done['weights_bytes'] / 1e9:.2f} GB of weights, extra "
                    f"{done['extra_bytes'] / 1e9:.3f} GB, {done['seconds']} s (write probe {probe} s)"
                    f"{'' if passed else '  OVER THE LIMIT'}",
                    flush=True,
                )
            (checkpoint / "model.safetensors").unlink()
    machine = {"python": platform.python_version(), "cpus": os.cpu_count(), "platform": platform.platform()}
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps({"machine": machine, "results": results}, indent=1) + "\n")
    if not all(result["passed"] for result in results):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
