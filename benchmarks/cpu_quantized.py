"""Speed of quantized bundles on the CPU engine: `python benchmarks/cpu_quantized.py [--rounds N]`.

The Qwen2 of about 200 M parameters of benchmarks/cpu_generate.py, random, is exported in fp32 and in quantized
formats; all linear layers are quantized, the head too.  Every bundle runs in a process of its own, with the same number
of threads, one after another in each round: a prefill of 128 tokens and 64 decode steps after it.  Ratios are medians
over rounds of the quotient within a round, because the speed of shared machines drifts.  Results go to
benchmarks/results/cpu_quantized.json; exit code 1 if a goal is missed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from cpu_generate import PROMPT, ROOT, STEPS, _processor, _versions, bandwidth, make_model

RESULT = ROOT / "benchmarks" / "results" / "cpu_quantized.json"
BASE = "fp32"
# By name: weight, group, input scale (None: the input is not quantized), cache.
FORMATS: dict[str, tuple[str | None, int | None, str | None, str | None]] = {
    BASE: (None, None, None, None),
    "int8, int8 inputs by token": ("int8", None, "token", None),
    "int8 g128, int8 inputs by group": ("int8", 128, "group", None),
    "int4 g32, int8 inputs by group": ("int4", 32, "group", None),
    "int4 g64, int8 inputs by group": ("int4", 64, "group", None),
    "int4 g128, int8 inputs by group": ("int4", 128, "group", None),
    "int4 g64": ("int4", 64, None, None),
    "int8": ("int8", None, None, None),
    "fp32, int8 cache": (None, None, None, "int8"),
}
GOALS = {"int8 g128, int8 inputs by group": 3.0, "int4 g128, int8 inputs by group": 4.0}
"""Decode speed against fp32, through MatMulNBits."""


def make_bundle(model: Path, name: str, bundle: Path) -> None:
    import refmodels
    from export.bundle import export_model
    from refmodels.quantization.formats import LinearFormat, group_formats

    source = refmodels.resolve(model)
    weight, group, scale, cache = FORMATS[name]
    formats = {}
    if weight is not None:
        given: Any = {"weight": weight, "group": group}
        given |= {} if scale is None else {"input": "int8", "input_scale": scale}
        formats = dict.fromkeys(source.spec.linears, LinearFormat(**given))
    spec = replace(source.spec, quantization=group_formats(formats, cache=cache))  # type: ignore[arg-type]
    export_model(
        replace(source, spec=spec), precision="fp32", backend="onnxruntime", output=bundle, random_weights=True
    )


def work(bundle: Path, threads: int) -> None:
    """A worker: loads, then for each line on stdin prints times and peak memory as a line of JSON."""
    import torch

    from trt_runtime.generation import GenerationConfig, generate
    from trt_runtime.onnxruntime.engine import OnnxRuntimeEngine

    torch.set_num_threads(threads)
    prompt = torch.randint(0, 32000, (PROMPT,), generator=torch.Generator().manual_seed(0)).tolist()
    baseline = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    engine = OnnxRuntimeEngine(bundle, threads=threads)
    print(json.dumps({"load_s": time.perf_counter() - start}), flush=True)
    for _ in sys.stdin:
        times = [time.perf_counter()]
        for count in (1, STEPS + 1):
            generate(engine, None, [prompt], GenerationConfig(max_new_tokens=count))
            times.append(time.perf_counter())
        prefill = times[1] - times[0]
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        result = {"prefill_s": prefill, "decode_s": times[2] - times[1] - prefill, "rss_mb": (peak - baseline) / 1024}
        print(json.dumps(result), flush=True)


def child(*arguments: object, **options: Any) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TRANSFORMERS_VERBOSITY": "error", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, __file__, *map(str, arguments)]
    return subprocess.Popen(command, text=True, env=environment, stderr=subprocess.DEVNULL, **options)


def measure(folder: Path, names: list[str], threads: int, rounds: int) -> tuple[dict[str, float], list[dict[str, Any]]]:
    workers: dict[str, subprocess.Popen[str]] = {}
    loads: dict[str, float] = {}

    def ask(name: str) -> dict[str, Any]:
        worker = workers[name]
        assert worker.stdin is not None and worker.stdout is not None
        worker.stdin.write("run\n")
        worker.stdin.flush()
        answer: dict[str, Any] = json.loads(worker.stdout.readline())
        return answer

    try:
        for number, name in enumerate(names):
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
            workers[name] = worker = child("--work", folder / str(number), "--threads", threads, **pipes)
            assert worker.stdout is not None
            loads[name] = json.loads(worker.stdout.readline())["load_s"]
            ask(name)
        samples: list[dict[str, Any]] = []
        for number in range(rounds):
            sample: dict[str, Any] = {"bandwidth_gb_s": bandwidth(), "load_average": os.getloadavg()[0]}
            samples.append(sample | {name: ask(name) for name in names})
            speeds = ", ".join(f"{STEPS / samples[-1][name]['decode_s']:.0f}" for name in names)
            print(f"round {number + 1}/{rounds}: decode tok/s {speeds}; {sample['bandwidth_gb_s']:.0f} GB/s")
    finally:
        for worker in workers.values():
            worker.kill()
    return loads, samples


def summarize(names: list[str], sizes: dict[str, int], loads: dict[str, float], samples: list[Any]) -> dict[str, Any]:
    def ratio(name: str, phase: str) -> float:
        return float(statistics.median(s[BASE][f"{phase}_s"] / s[name][f"{phase}_s"] for s in samples))

    rows = {
        name: {
            "prefill_tokens_per_s": PROMPT / statistics.median(s[name]["prefill_s"] for s in samples),
            "decode_tokens_per_s": STEPS / statistics.median(s[name]["decode_s"] for s in samples),
            "prefill_ratio": ratio(name, "prefill"),
            "decode_ratio": ratio(name, "decode"),
            "bundle_mb": sizes[name] / 2**20,
            "load_s": loads[name],
            "peak_rss_mb_above_imports": max(s[name]["rss_mb"] for s in samples),
        }
        for name in names
    }
    return {"rows": rows, "goals": {name: goal for name, goal in GOALS.items() if name in names}}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", nargs="+", choices=list(FORMATS), help="besides fp32; nothing is written")
    parser.add_argument("--make-model", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--make-bundle", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.make_model:
        make_model(options.make_model)
        return 0
    if options.make_bundle:
        make_bundle(Path(options.make_bundle[0]), options.make_bundle[1], Path(options.make_bundle[2]))
        return 0
    if options.work:
        work(options.work, options.threads)
        return 0
    names = [BASE, *options.only] if options.only else list(FORMATS)
    with tempfile.TemporaryDirectory() as directory:
        folder = Path(directory)
        steps: list[tuple[object, ...]] = [("--make-model", folder / "model")]
        steps += [("--make-bundle", folder / "model", name, folder / str(i)) for i, name in enumerate(names)]
        for step in steps:
            if child(*step).wait():
                raise SystemExit(f"{step} failed")
        sizes = {name: (folder / str(i) / "model.onnx.data").stat().st_size for i, name in enumerate(names)}
        loads, samples = measure(folder, names, options.threads, options.rounds)
    found = summarize(names, sizes, loads, samples)
    found |= {
        "threads": options.threads,
        "machine": {"processor": _processor(), "cores": os.cpu_count(), "python": platform.python_version()},
        "versions": _versions(),
        "samples": samples,
    }
    if not options.only:
        RESULT.parent.mkdir(exist_ok=True)
        RESULT.write_text(json.dumps(found, indent=1) + "\n")
    heads = ("prefill/s", "x fp32", "decode/s", "x fp32", "MB", "load s", "RSS MB")
    print(f"{'':34}" + "".join(f"{h:>10}" for h in heads))
    keys = ("prefill_tokens_per_s", "prefill_ratio", "decode_tokens_per_s", "decode_ratio")
    for name, row in found["rows"].items():
        numbers = [row[k] for k in (*keys, "bundle_mb", "load_s", "peak_rss_mb_above_imports")]
        print(f"{name:34}" + "".join(f"{n:10.2f}" if n < 10 else f"{n:10.0f}" for n in numbers))
    missed = False
    for name, goal in found["goals"].items():
        ratio = found["rows"][name]["decode_ratio"]
        missed |= ratio < goal
        print(f"decode, {name}: {ratio:.2f} x fp32 (goal {goal}): {'met' if ratio >= goal else 'MISSED'}")
    return int(missed)


if __name__ == "__main__":
    sys.exit(main())
