"""Speed of the CPU engine against transformers: `python benchmarks/cpu_generate.py [--rounds N]`.

A Qwen2 of about 200 M parameters with random weights is exported in fp32.  transformers' `generate` (PyTorch eager
mode, its default SDPA attention), the reference and the engine run in processes of their own, with the same number of
threads, one after another in each round: a prefill of 128 tokens (`generate` of one token) and 64 decode steps after
it (`generate` of 65 tokens less that).  Ratios are medians over rounds of the quotient within a round, because the
speed of shared machines drifts; the memory bandwidth that is printed shows how much.  Exit code 1 if a goal is missed
or the tokens differ.  Results go to benchmarks/results/cpu_generate.json.
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
from pathlib import Path
from typing import Any

from child import timed, versions

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "benchmarks" / "results" / "cpu_generate.json"
GOALS = {"decode": 2.0, "prefill": 1.05}
PROMPT, STEPS = 128, 64
WORKERS = ("transformers", "reference", "engine")


def make_model(directory: Path) -> None:
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=32000,
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=12,
        num_attention_heads=16,
        num_key_value_heads=4,
        max_position_embeddings=1024,
        tie_word_embeddings=False,
    )
    Qwen2ForCausalLM(config).save_pretrained(directory)


def make_bundle(model: Path, bundle: Path) -> None:
    from export.bundle import export_model

    export_model(model, precision="fp32", output=bundle)


def work(kind: str, model: Path, bundle: Path, threads: int) -> None:
    """A worker: loads, then for each line "run" on stdin prints times, tokens and peak memory as a line of JSON."""
    import torch

    torch.set_num_threads(threads)
    prompt = torch.randint(0, 32000, (PROMPT,), generator=torch.Generator().manual_seed(0)).tolist()
    generate = {"transformers": _transformers, "reference": _reference, "engine": _engine}[kind]
    baseline = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    run, load = generate(model, bundle, threads)
    print(json.dumps({"load_s": load}), flush=True)
    for _ in sys.stdin:
        result = timed(run, prompt, prompt, STEPS)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        print(json.dumps({**result, "rss_mb": (peak - baseline) / 1024}), flush=True)


def _transformers(model: Path, bundle: Path, threads: int) -> Any:
    import torch
    from transformers import Qwen2ForCausalLM

    start = time.perf_counter()
    network: Any = Qwen2ForCausalLM.from_pretrained(model, dtype=torch.float32)
    load = time.perf_counter() - start
    network.generation_config.eos_token_id = None

    def run(prompt: list[int], count: int) -> list[int]:
        with torch.no_grad():
            ids = network.generate(torch.tensor([prompt]), max_new_tokens=count, do_sample=False)
        found: list[int] = ids[0, len(prompt) :].tolist()
        return found

    return run, load


def _reference(model: Path, bundle: Path, threads: int) -> Any:
    import refmodels
    from trt_runtime.torch_gpu.engine import TorchEngine

    start = time.perf_counter()
    engine = TorchEngine(refmodels.load(model))
    return _ours(engine), time.perf_counter() - start


def _engine(model: Path, bundle: Path, threads: int) -> Any:
    from trt_runtime.onnxruntime.engine import OnnxRuntimeEngine

    start = time.perf_counter()
    engine = OnnxRuntimeEngine(bundle, threads=threads)
    return _ours(engine), time.perf_counter() - start


def _ours(engine: Any) -> Any:
    from trt_runtime.generation import GenerationConfig, generate

    def run(prompt: list[int], count: int) -> list[int]:
        return generate(engine, None, [prompt], GenerationConfig(max_new_tokens=count))[0].token_ids

    return run


def bandwidth() -> float:
    """Memory bandwidth of one thread reading 256 MB, in GB/s (best of three)."""
    import torch

    data = torch.ones(64 << 20)
    torch.set_num_threads(1)
    best = float("inf")
    for _ in range(3):
        start = time.perf_counter()
        data.sum()
        best = min(best, time.perf_counter() - start)
    return data.nbytes / best / 1e9


def child(*arguments: object, **options: Any) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TRANSFORMERS_VERBOSITY": "error", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, __file__, *map(str, arguments)]
    return subprocess.Popen(command, text=True, env=environment, stderr=subprocess.DEVNULL, **options)


def measure(model: Path, bundle: Path, threads: int, rounds: int) -> dict[str, Any]:
    workers: dict[str, subprocess.Popen[str]] = {}
    loads: dict[str, float] = {}
    for kind in WORKERS:
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        workers[kind] = worker = child("--work", kind, model, bundle, "--threads", threads, **pipes)
        assert worker.stdout is not None
        loads[kind] = json.loads(worker.stdout.readline())["load_s"]

    def ask(kind: str) -> dict[str, Any]:
        worker = workers[kind]
        assert worker.stdin is not None and worker.stdout is not None
        worker.stdin.write("run\n")
        worker.stdin.flush()
        answer: dict[str, Any] = json.loads(worker.stdout.readline())
        return answer

    try:
        for kind in WORKERS:
            ask(kind)
        samples: list[dict[str, Any]] = []
        for number in range(rounds):
            sample: dict[str, Any] = {"bandwidth_gb_s": bandwidth(), "load_average": os.getloadavg()[0]}
            sample |= {kind: ask(kind) for kind in WORKERS}
            samples.append(sample)
            speeds = ", ".join(f"{k} {STEPS / sample[k]['decode_s']:.1f}" for k in WORKERS)
            print(
                f"round {number + 1}/{rounds}: decode tok/s {speeds}, {sample['bandwidth_gb_s']:.0f} GB/s", flush=True
            )
    finally:
        for worker in workers.values():
            worker.kill()
    return {"loads": loads, "samples": samples}


def summarize(loads: dict[str, float], samples: list[dict[str, Any]]) -> dict[str, Any]:
    rows = {}
    for kind in WORKERS:
        rows[kind] = {
            "prefill_tokens_per_s": PROMPT / statistics.median(s[kind]["prefill_s"] for s in samples),
            "decode_tokens_per_s": STEPS / statistics.median(s[kind]["decode_s"] for s in samples),
            "load_s": loads[kind],
            "peak_rss_mb_above_imports": max(s[kind]["rss_mb"] for s in samples),
        }
    ratios = {
        phase: statistics.median(s["transformers"][f"{phase}_s"] / s["engine"][f"{phase}_s"] for s in samples)
        for phase in GOALS
    }
    same = all(s[kind]["tokens"] == samples[0]["transformers"]["tokens"] for s in samples for kind in WORKERS)
    return {"rows": rows, "ratios": ratios, "same_tokens": same}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--make-model", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--make-bundle", nargs=2, type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--work", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.make_model:
        make_model(options.make_model)
        return 0
    if options.make_bundle:
        make_bundle(*options.make_bundle)
        return 0
    if options.work:
        work(options.work[0], Path(options.work[1]), Path(options.work[2]), options.threads)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        model, bundle = Path(folder, "model"), Path(folder, "bundle")
        for step in (("--make-model", model), ("--make-bundle", model, bundle)):
            if child(*step).wait():
                raise SystemExit(f"{step[0]} failed")
        measured = measure(model, bundle, options.threads, options.rounds)
    found = summarize(**measured)
    found |= {
        "goals": GOALS,
        "threads": options.threads,
        "machine": {"processor": _processor(), "cores": os.cpu_count(), "python": platform.python_version()},
        "versions": versions(),
        "samples": [{k: v for k, v in s.items() if k not in WORKERS} for s in measured["samples"]],
    }
    for sample, measured_sample in zip(found["samples"], measured["samples"], strict=True):
        for kind in WORKERS:
            sample[kind] = {k: v for k, v in measured_sample[kind].items() if k != "tokens"}
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(found, indent=1) + "\n")
    print(f"{'':14}{'prefill tok/s':>15}{'decode tok/s':>15}{'load s':>9}{'peak RSS MB':>13}")
    for kind, row in found["rows"].items():
        print(
            f"{kind:14}{row['prefill_tokens_per_s']:15.0f}{row['decode_tokens_per_s']:15.1f}{row['load_s']:9.2f}"
            f"{row['peak_rss_mb_above_imports']:13.0f}"
        )
    missed = not found["same_tokens"]
    for phase, goal in GOALS.items():
        ratio = found["ratios"][phase]
        missed |= ratio < goal
        print(f"{phase}: {ratio:.2f} x transformers (goal {goal}): {'met' if ratio >= goal else 'MISSED'}")
    print(f"greedy tokens equal: {found['same_tokens']}")
    return int(missed)


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


if __name__ == "__main__":
    sys.exit(main())
