"""Peak memory of loading a 1 GB checkpoint: `python benchmarks/load_memory.py [--quick]`.

Every load runs in a process of its own.  "extra" is the peak resident memory above the baseline (everything imported
and a tiny tensor cast); the limit is 1.15 times the model in its target dtype plus the largest stored tensor.  Mapped
pages count as resident.  Exit code 1 if a load is over its limit.  Results go to benchmarks/results/load_memory.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from child import peak_rss, run_again

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "benchmarks" / "results" / "load_memory.json"
LAYERS = {"float32": 12, "float16": 28}
LAYOUTS = ("single .safetensors", "sharded .safetensors", "single .bin", "sharded .bin")
SHARDS = 4


def config(layers: int) -> dict[str, Any]:
    return {
        "model_type": "qwen2",
        "vocab_size": 32000,
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": layers,
        "num_attention_heads": 16,
        "max_position_embeddings": 1024,
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
    }


def make(directory: Path, source: str, layout: str) -> None:
    """Write a checkpoint of about 1 GB with random weights."""
    import torch
    from safetensors.torch import save_file

    import refmodels

    spec = refmodels.spec_from_config(config(LAYERS[source]))
    torch.manual_seed(0)
    names = [part for parts in refmodels.FAMILIES["qwen"].weights(spec).values() for part in parts]
    (directory / "config.json").write_text(json.dumps(config(LAYERS[source])))
    count = SHARDS if layout.startswith("sharded") else 1
    stem, suffix = ("pytorch_model", ".bin") if layout.endswith(".bin") else ("model", ".safetensors")
    weight_map = {}
    for shard in range(count):
        mine = names[shard * len(names) // count : (shard + 1) * len(names) // count]
        tensors = {p.name: torch.randn(p.shape).mul_(0.02).to(getattr(torch, source)) for p in mine}
        file = directory / (f"{stem}-{shard + 1:05}-of-{count:05}{suffix}" if count > 1 else f"{stem}{suffix}")
        weight_map.update({name: file.name for name in tensors})
        if suffix == ".bin":
            torch.save(tensors, file)
        else:
            save_file(tensors, file)
    if count > 1:
        (directory / f"{stem}{suffix}.index.json").write_text(json.dumps({"weight_map": weight_map}))


def measure(directory: Path, target: str) -> dict[str, Any]:
    """Load in this process and say what it took."""
    import safetensors.torch  # noqa: F401
    import torch

    import refmodels
    from refmodels.checkpoints.shards import WeightFiles

    torch.set_num_threads(2)
    torch.aminmax(torch.empty(100, dtype=torch.float16).copy_(torch.ones(100)))
    largest = max(
        torch.Size(t.shape).numel() * (t.dtype.itemsize if t.dtype else 0)
        for t in WeightFiles(directory).tensors.values()
    )
    baseline = peak_rss()
    start = time.perf_counter()
    decoder = refmodels.load(directory, dtype=getattr(torch, target))
    seconds = time.perf_counter() - start
    model = sum(p.nbytes for p in decoder.parameters())
    return {
        "baseline_bytes": baseline,
        "peak_bytes": peak_rss(),
        "model_bytes": model,
        "largest_stored_tensor_bytes": largest,
        "seconds": round(seconds, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="only fp32 and fp16 single files, cast to fp16")
    parser.add_argument("--make", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.make:
        make(Path(arguments.make[0]), *arguments.make[1:])
        return
    if arguments.measure:
        print(json.dumps(measure(Path(arguments.measure[0]), arguments.measure[1])))
        return
    rows = []
    print("source   layout                 target    model MB  extra MB  limit MB  /model      s")
    for source in LAYERS:
        for layout in LAYOUTS[:1] if arguments.quick else LAYOUTS:
            with tempfile.TemporaryDirectory(prefix="load_memory_") as directory:
                run_again(__file__, "--make", directory, source, layout)
                for target in ("float16",) if arguments.quick else ("float32", "float16"):
                    row = {"source": source, "layout": layout, "target": target}
                    row |= json.loads(run_again(__file__, "--measure", directory, target))
                    extra = row["peak_bytes"] - row["baseline_bytes"]
                    limit = round(1.15 * row["model_bytes"] + row["largest_stored_tensor_bytes"])
                    row |= {"extra_bytes": extra, "limit_bytes": limit, "within_limit": extra <= limit}
                    rows.append(row)
                    sizes = " ".join(f"{row[k] / 1e6:9.0f}" for k in ("model_bytes", "extra_bytes", "limit_bytes"))
                    print(
                        f"{source:8} {layout:22} {target:8} {sizes} {extra / row['model_bytes']:7.3f} "
                        f"{row['seconds']:6.2f}{'' if row['within_limit'] else '  OVER'}",
                        flush=True,
                    )
    if not arguments.quick:
        from importlib.metadata import version

        machine = {"cpus": os.cpu_count(), "system": platform.system(), "python": platform.python_version()}
        tools = {name: version(name) for name in ("torch", "safetensors")}
        RESULT.parent.mkdir(parents=True, exist_ok=True)
        RESULT.write_text(json.dumps({"machine": machine, "tools": tools, "rows": rows}, indent=1) + "\n")
    sys.exit(0 if all(row["within_limit"] for row in rows) else 1)


if __name__ == "__main__":
    main()
