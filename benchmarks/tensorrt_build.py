"""Time and peak memory of building a TensorRT plan, ours beside the plain parser's.

`python benchmarks/tensorrt_build.py`

Both build the same ONNX file with random fp16 weights for the same two profiles on a machine without a GPU.  "plain"
is what TensorRT's documentation shows: `parse_from_file`, `build_serialized_network`, and write the bytes; it gets a
copy of the graph with a fixed cache capacity, which ours fixes in memory.  Every build runs in a process of its own.
Peak memory is read every 20 ms: "anonymous" is memory that the process must have, "resident" counts pages of the
mapped weights file too, which the system may drop.  "load" is the machine's load average before the build: above the
number of cores another process took part of the time.  Results go to benchmarks/results/tensorrt_build.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from child import run_again

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "benchmarks" / "results" / "tensorrt_build.json"
COMMON = {"model_type": "qwen2", "rms_norm_eps": 1e-6, "hidden_act": "silu", "max_position_embeddings": 32768}
MODELS: dict[str, dict[str, Any]] = {
    "Qwen2-0.5B": {
        **COMMON,
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "vocab_size": 151936,
        "tie_word_embeddings": True,
    },
    "24 x 2048": {
        **COMMON,
        "hidden_size": 2048,
        "intermediate_size": 5504,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "vocab_size": 32000,
        "tie_word_embeddings": False,
    },
}
LIMITS = {"max_batch": 8, "max_input": 2048, "max_seq": 4096}
STATIC = "static.onnx"


class Memory(threading.Thread):
    """Peaks of this process's memory, in bytes, while it runs."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peaks = {"RssAnon": 0, "VmRSS": 0}
        self.stopped = threading.Event()

    def run(self) -> None:
        while not self.stopped.wait(0.02):
            self.read()

    def read(self) -> None:
        for line in Path("/proc/self/status").read_text().splitlines():
            name, _, value = line.partition(":")
            if name in self.peaks:
                self.peaks[name] = max(self.peaks[name], int(value.split()[0]) * 1024)


def prepare(directory: Path, model: str, attention: Any) -> None:
    """A bundle with random weights, and its graph with a fixed capacity."""
    import onnx

    from export.bundle import export_model
    from export.tensorrt.build import fix_capacity

    source = directory / "source"
    source.mkdir()
    (source / "config.json").write_text(json.dumps(MODELS[model]))
    bundle = export_model(
        source,
        precision="fp16",
        attention=attention,
        random_weights=True,
        max_seq=LIMITS["max_seq"],
        output=directory / "bundle",
    )
    graph = onnx.load(bundle / "model.onnx", load_external_data=False)
    fix_capacity(graph, LIMITS["max_seq"])
    (bundle / STATIC).write_bytes(graph.SerializeToString())


def measure(bundle: Path, how: str) -> dict[str, Any]:
    """Build in this process and say what it took."""
    import trt_runtime.tensorrt.plugins as plugins
    from export.tensorrt.build import build_plan
    from export.tensorrt.options import BuildOptions
    from trt_runtime.bundle import read_bundle

    spec = read_bundle(bundle, verify_hashes=False).spec
    plugins.register_plugins()
    memory = Memory()
    memory.read()
    baseline = dict(memory.peaks)
    load = os.getloadavg()[0]
    memory.start()
    start = time.perf_counter()
    cpu = time.process_time()
    plan = bundle / "engine.plan"
    if how == "ours":
        build_plan(bundle, spec, options=BuildOptions(**LIMITS))
    else:
        build_plainly(bundle / STATIC, plan)
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    memory.stopped.set()
    memory.read()
    return {
        "seconds": round(seconds, 2),
        "cpu_seconds": round(cpu, 2),
        "peak_anonymous_bytes": memory.peaks["RssAnon"] - baseline["RssAnon"],
        "peak_resident_bytes": memory.peaks["VmRSS"] - baseline["VmRSS"],
        "weights_bytes": (bundle / "model.onnx.data").stat().st_size,
        "plan_bytes": plan.stat().st_size,
        "load": round(load, 2),
    }


def build_plainly(graph: Path, plan: Path) -> None:
    from trt_runtime.tensorrt.api import LOGGER, trt

    builder = trt.Builder(LOGGER)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, LOGGER)
    assert parser.parse_from_file(str(graph))
    config = builder.create_builder_config()
    config.set_preview_feature(trt.PreviewFeature.ALIASED_PLUGIN_IO_10_03, True)
    for tokens in (LIMITS["max_input"], 1):
        profile = builder.create_optimization_profile()
        for i in range(network.num_inputs):
            tensor = network.get_input(i)
            last = {"attention_mask": LIMITS["max_seq"]}.get(tensor.name, tokens)
            free = (LIMITS["max_batch"], last)
            shape = tuple(tensor.shape)
            large = tuple(free[min(axis, 1)] if size < 0 else size for axis, size in enumerate(shape))
            small = tuple(1 if size < 0 else size for size in shape)
            middle = tuple((a + b) // 2 for a, b in zip(small, large, strict=True))
            profile.set_shape(tensor.name, small, middle, large)
        config.add_optimization_profile(profile)
    plan.write_bytes(builder.build_serialized_network(network, config))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=3, help="builds of each kind; the median time is reported")
    parser.add_argument("--prepare", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.prepare:
        directory, model, attention = arguments.prepare
        return prepare(Path(directory), model, attention)
    if arguments.measure:
        bundle, how = arguments.measure
        return print(json.dumps(measure(Path(bundle), how)))
    results = []
    for model in MODELS:
        for attention in ("plugin", "native"):
            with tempfile.TemporaryDirectory() as folder:
                run_again(__file__, "--prepare", folder, model, attention)
                measured: dict[str, list[dict[str, Any]]] = {"ours": [], "plain": []}
                for _ in range(arguments.runs):
                    # In turns, so that a busy minute of the machine meets both.
                    for how, runs in measured.items():
                        runs.append(json.loads(run_again(__file__, "--measure", f"{folder}/bundle", how)))
                for how, runs in measured.items():
                    runs.sort(key=lambda run: run["seconds"])
                    middle = runs[len(runs) // 2]
                    results.append({"model": model, "attention": attention, "build": how, **middle, "runs": runs})
                    print(
                        f"{model}, {attention}, {how}: {middle['seconds']} s, {middle['cpu_seconds']} s of CPU, peak "
                        f"{middle['peak_anonymous_bytes'] / 1e9:.2f} GB anonymous, "
                        f"{middle['peak_resident_bytes'] / 1e9:.2f} GB resident, "
                        f"{middle['weights_bytes'] / 1e9:.2f} GB of weights, load {middle['load']}",
                        flush=True,
                    )
    import tensorrt_rtx

    machine = {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count()}
    record = {"machine": machine, "tensorrt_rtx": tensorrt_rtx.__version__, "limits": LIMITS, "results": results}
    RESULT.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
