"""Tokens per second of a real model on a CPU, beside other runtimes; a part of benchmarks/real_model.py.

Every runtime has a process of its own in every round, and only one runs at a time: it loads, warms up, and is timed on
a prefill of 128 tokens (one token generated) and on 32 decode steps after another one (33 tokens generated, less that).
The two prompts differ, because some runtimes keep what they have seen.  Each round begins with another runtime, and
ratios are medians over rounds of the quotient within a round, because the speed of shared machines drifts.

As a script it is the worker: `PYTHON real_speed.py RUNTIME FOLDER IDS_JSON THREADS` prints one line of JSON; it imports
nothing of LogitLock but for the runtime "logitlock", so that an interpreter with only the peers can run it.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from child import Run, peak_rss, timed

PROMPT, STEPS, WARM = 128, 32, 2
OURS = "logitlock"
GROUPS: dict[str, dict[str, str]] = {
    "fp32": {
        OURS: "fp32",
        "transformers": "model",
        "onnxruntime-genai": "onnxruntime-genai-fp32",
        "openvino": "openvino-fp32",
    },
    "int8": {OURS: "int8", "openvino": "openvino-int8"},
    "int4": {OURS: "int4-awq", "onnxruntime-genai": "onnxruntime-genai-int4", "openvino": "openvino-int4"},
}
"""The folder of every runtime, by precision."""


def transformers(folder: Path, threads: int) -> Run:
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(threads)
    network: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    network.generation_config.eos_token_id = None

    def run(prompt: list[int], count: int) -> list[int]:
        with torch.inference_mode():
            ids = network.generate(
                torch.tensor([prompt]), max_new_tokens=count, do_sample=False, repetition_penalty=1.0
            )
        found: list[int] = ids[0, len(prompt) :].tolist()
        return found

    return run


def logitlock(folder: Path, threads: int) -> Run:
    import torch

    from trt_runtime.generation import GenerationConfig, generate
    from trt_runtime.onnxruntime.engine import OnnxRuntimeEngine

    torch.set_num_threads(threads)
    engine = OnnxRuntimeEngine(folder, threads=threads)

    def run(prompt: list[int], count: int) -> list[int]:
        return generate(engine, None, [prompt], GenerationConfig(max_new_tokens=count))[0].token_ids

    return run


def onnxruntime_genai(folder: Path, threads: int) -> Run:
    import numpy as np
    import onnxruntime_genai as og

    config = og.Config(str(folder))
    config.overlay(json.dumps({"model": {"decoder": {"session_options": {"intra_op_num_threads": threads}}}}))
    model = og.Model(config)

    def run(prompt: list[int], count: int) -> list[int]:
        options = og.GeneratorParams(model)
        length = len(prompt) + count
        options.set_search_options(
            do_sample=False, min_length=length, max_length=length, repetition_penalty=1.0, top_k=1, temperature=1.0
        )
        generator = og.Generator(model, options)
        generator.append_tokens(np.array(prompt, np.int32))
        for _ in range(count):
            generator.generate_next_token()
        found: list[int] = generator.get_sequence(0)[len(prompt) :].tolist()
        return found

    return run


def openvino(folder: Path, threads: int) -> Run:
    import numpy as np
    import openvino
    import openvino_genai

    options: dict[str, Any] = {"INFERENCE_NUM_THREADS": threads}
    if folder.name.endswith("fp32"):
        options |= {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"}
    pipeline = openvino_genai.LLMPipeline(str(folder), "CPU", **options)

    def run(prompt: list[int], count: int) -> list[int]:
        config = openvino_genai.GenerationConfig(max_new_tokens=count, ignore_eos=True, do_sample=False)
        result = pipeline.generate(openvino.Tensor(np.array([prompt], np.int64)), config)
        return [int(token) for token in result.tokens[0]]

    return run


RUNTIMES = {
    OURS: logitlock,
    "transformers": transformers,
    "onnxruntime-genai": onnxruntime_genai,
    "openvino": openvino,
}
PACKAGES = {"onnxruntime-genai": ("onnxruntime_genai",), "openvino": ("openvino_genai", "optimum.intel", "nncf")}
"""Modules that an interpreter must be able to import for a peer."""


def work(runtime: str, folder: Path, ids: list[int], threads: int) -> dict[str, Any]:
    """In the worker: load, warm up, and time."""
    start = time.perf_counter()
    run = RUNTIMES[runtime](folder, threads)
    load = time.perf_counter() - start
    first, second, third = (ids[i * PROMPT : (i + 1) * PROMPT] for i in range(3))
    run(first, WARM)
    return {**timed(run, second, third, STEPS), "load_s": load, "peak_bytes": peak_rss()}


def prepare(runtime: str, folder: Path, model: Path, python: str) -> None:
    """Convert the checkpoint for a peer, with its own tools and their defaults."""
    precision = folder.name.rpartition("-")[2]
    if runtime == "onnxruntime-genai":
        command = ["-m", "onnxruntime_genai.models.builder", "-i", model, "-o", folder, "-p", precision, "-e", "cpu"]
        command += ["-c", folder.parent / "cache"]
    else:
        command = ["-m", "optimum.commands.optimum_cli", "export", "openvino", "--model", model]
        command += ["--task", "text-generation-with-past", "--weight-format", precision, folder]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    environment.pop("PYTHONPATH", None)
    subprocess.run([python, *map(str, command)], check=True, env=environment, stdout=sys.stderr)


def measure(folder: Path, peers: str, threads: int, rounds: int, schemes: list[str]) -> dict[str, Any]:
    """The groups of our bundles in some schemes, with whatever runtimes the interpreter `peers` has; what it lacks is
    said in "absent"."""
    from cpu_generate import _processor, bandwidth
    from real_tasks import PASSAGE

    import refmodels

    ids = refmodels.load_tokenizer(refmodels.resolve(folder / "model")).encode(PASSAGE)[: 3 * PROMPT]
    absent = {name: missing for name, needed in PACKAGES.items() if (missing := lacks(peers, needed))}
    for name, missing in absent.items():
        print(f"left out: {name} ({peers} has no {missing})", file=sys.stderr)
    found: dict[str, Any] = {}
    for precision, members in GROUPS.items():
        if members[OURS] not in schemes:
            continue
        present = {name: folder / place for name, place in members.items() if name not in absent}
        for name, place in present.items():
            if name in PACKAGES and not place.is_dir():
                prepare(name, place, folder / "model", peers)
        samples = []
        for number in range(rounds):
            sample: dict[str, Any] = {"bandwidth_gb_s": bandwidth(), "load_average": os.getloadavg()[0]}
            names = list(present)
            for name in names[number % len(names) :] + names[: number % len(names)]:
                sample[name] = ask(peers if name in PACKAGES else sys.executable, name, present[name], ids, threads)
            samples.append(sample)
            speeds = ", ".join(f"{name} {STEPS / sample[name]['decode_s']:.1f}" for name in names)
            print(f"{precision} round {number + 1}/{rounds}: decode tokens/s {speeds}", file=sys.stderr, flush=True)
        found[precision] = summarized(list(present), samples)
    return {
        "groups": found,
        "absent": absent,
        "rounds": rounds,
        "processor": _processor(),
        "cores": os.cpu_count(),
        "versions": versions(peers),
    }


def ask(python: str, runtime: str, folder: Path, ids: list[int], threads: int) -> dict[str, Any]:
    environment = {**os.environ, "TRANSFORMERS_VERBOSITY": "error", "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""}
    if runtime == OURS:
        environment["PYTHONPATH"] = str(Path(__file__).parents[1])
    environment["OMP_NUM_THREADS"] = str(threads)
    command = [python, __file__, runtime, str(folder), json.dumps(ids), str(threads)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{runtime} failed on {folder}:\n{done.stderr[-2000:]}")
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def lacks(python: str, modules: tuple[str, ...]) -> str | None:
    """The first module that an interpreter cannot import."""
    for module in modules:
        if subprocess.run([python, "-c", f"import {module}"], capture_output=True, check=False).returncode:
            return module
    return None


def versions(python: str) -> dict[str, str]:
    """Versions of the packages in the interpreter of the peers."""
    names = ("onnxruntime-genai", "openvino", "openvino-genai", "optimum-intel", "nncf")
    code = (
        "import importlib.metadata as m, json; "
        f"print(json.dumps({{d.name: d.version for d in m.distributions() if d.name in {names!r}}}))"
    )
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True)
    said: dict[str, str] = json.loads(done.stdout)
    return said


def summarized(names: list[str], samples: list[dict[str, Any]]) -> dict[str, Any]:
    def median(name: str, what: str) -> float:
        return statistics.median(sample[name][what] for sample in samples)

    rows = {
        name: {
            "prefill_tokens_per_s": PROMPT / median(name, "prefill_s"),
            "decode_tokens_per_s": STEPS / median(name, "decode_s"),
            "load_s": median(name, "load_s"),
            "peak_bytes": max(sample[name]["peak_bytes"] for sample in samples),
            "same_tokens_as_logitlock": samples[0][name]["tokens"] == samples[0][OURS]["tokens"],
        }
        for name in names
    }
    ratios = {
        name: {
            phase: [round(sample[name][f"{phase}_s"] / sample[OURS][f"{phase}_s"], 3) for sample in samples]
            for phase in ("prefill", "decode")
        }
        for name in names
        if name != OURS
    }
    return {
        "rows": rows,
        "ours_over": {
            name: {phase: statistics.median(values) for phase, values in phases.items()}
            for name, phases in ratios.items()
        },
        "ratios_by_round": ratios,
        "bandwidth_gb_s": [round(sample["bandwidth_gb_s"], 1) for sample in samples],
        "load_average": [sample["load_average"] for sample in samples],
    }


if __name__ == "__main__":
    runtime, folder, ids, threads = sys.argv[1:]
    print(json.dumps(work(runtime, Path(folder), json.loads(ids), int(threads))))
