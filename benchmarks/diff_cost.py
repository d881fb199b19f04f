"""The cost of a full diff of a large bundle on a CPU, beside the plain forwards that it needs.

    python benchmarks/diff_cost.py
    python benchmarks/diff_cost.py --polygraphy   # also Polygraphy's mark-all on the same file (pip install polygraphy)

A random Qwen2 of 200 M parameters as an fp16 bundle; 128 prompt tokens and 16 decode steps.  "Plain forwards" are what
any comparison of this engine with a reference must run: the engine's prefill and decode steps without taps, and the
same of the fp64 reference.  Each of both is one process that does nothing else; memory is its peak above its imports,
in units of the model's fp16 weights.  Writes benchmarks/results/diff_cost.json; exit code 1 beyond 6 x.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from child import peak_rss, run_again

RESULTS = Path(__file__).parent / "results" / "diff_cost.json"
TOKENS, STEPS, GOAL = 128, 16, 6.0


def prompts() -> Any:
    from debug.capture.prompts import random_prompts

    return random_prompts(32000, [TOKENS], seed=0)


def plain(model: Path, bundle: Path) -> dict[str, float]:
    import torch

    import refmodels
    from trt_runtime.onnxruntime.engine import OnnxRuntimeEngine
    from trt_runtime.torch_gpu.engine import TorchEngine

    seconds = {}
    for name in ("engine", "reference"):
        if name == "engine":
            runner: Any = OnnxRuntimeEngine(bundle, emulate_rounding=True)
        else:
            runner = TorchEngine(refmodels.load(model, dtype=torch.float64))
        for _ in range(2):  # the first run warms up
            start = time.perf_counter()
            cache = runner.new_cache(batch=1, capacity=TOKENS + STEPS)
            logits = runner.prefill(prompts().ids, cache)
            for _ in range(STEPS):
                logits = runner.decode(logits[:, -1].argmax(-1), cache)
            seconds[name] = time.perf_counter() - start
        del runner
    return seconds


def diff(model: Path, bundle: Path) -> dict[str, float]:
    import torch

    from debug.capture.capture import capture_engine
    from debug.comparison.compare import diff_capture
    from debug.sides import reference_of
    from refmodels.checkpoints.load import resolve
    from trt_runtime.onnxruntime.engine import OnnxRuntimeEngine

    imports = peak_rss()
    source = resolve(model)
    started = time.perf_counter()
    engine = OnnxRuntimeEngine(bundle, emulate_rounding=True)
    truth = reference_of(source, dtype=torch.float64)
    rounded = reference_of(source, dtype=torch.float16)
    loaded = time.perf_counter()
    with torch.inference_mode():
        engine.keep_both_sessions = False  # as `logitlock diff` does
        capture = capture_engine(engine, prompts(), steps=STEPS)
        del engine
    captured = time.perf_counter()
    result = diff_capture(capture, truth, rounded)
    done = time.perf_counter()
    assert result.verdict == "aligned", result.culprits
    return {
        "seconds": done - loaded,
        "capture_seconds": captured - loaded,
        "load_seconds": loaded - started,
        "peak_bytes": peak_rss() - imports,
        "taps": len(result.taps),
    }


def polygraphy(model: Path, bundle: Path) -> dict[str, float]:
    """Mark all, as `polygraphy run --onnxrt --onnx-outputs mark all` does: one prefill, all values as numpy arrays."""
    import numpy as np
    from polygraphy import constants
    from polygraphy.backend.onnx import BytesFromOnnx, ModifyOutputs, OnnxFromPath
    from polygraphy.backend.onnxrt import OnnxrtRunner, SessionFromOnnx

    imports = peak_rss()
    started = time.perf_counter()
    session = SessionFromOnnx(
        BytesFromOnnx(ModifyOutputs(OnnxFromPath(str(bundle / "model.onnx")), constants.MARK_ALL))
    )
    ids = prompts().ids.numpy()
    feed = {
        "input_ids": ids,
        "position_ids": np.arange(TOKENS)[None],
        "cache_lengths": np.zeros(1, np.int64),
        "attention_mask": np.ones((1, TOKENS), np.int64),
        "logit_index": np.arange(TOKENS)[None],
    }
    with OnnxrtRunner(session) as runner:
        for name, spec in runner.get_input_metadata().items():
            if name.startswith("past."):
                feed[name] = np.zeros((1, spec.shape[1], TOKENS + STEPS, spec.shape[3]), np.float16)
        ready = time.perf_counter()
        outputs = runner.infer(feed)
        done = time.perf_counter()
    return {
        "seconds": done - ready,
        "load_seconds": ready - started,
        "peak_bytes": peak_rss() - imports,
        "values": len(outputs),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--polygraphy", action="store_true")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        import torch

        torch.set_num_threads(arguments.threads)
        kind, model, bundle = arguments.worker
        print(json.dumps({"plain": plain, "diff": diff, "polygraphy": polygraphy}[kind](Path(model), Path(bundle))))
        return
    with tempfile.TemporaryDirectory() as directory:
        model, bundle = Path(directory) / "model", Path(directory) / "bundle"
        prepare = f"from cpu_generate import make_model; from pathlib import Path; make_model(Path({str(model)!r}))"
        import subprocess

        subprocess.run([sys.executable, "-c", prepare], cwd=Path(__file__).parent, check=True)
        from export.bundle import export_model

        export_model(model, precision="fp16", output=bundle, backend="onnxruntime")
        weights = (bundle / "model.onnx.data").stat().st_size
        found: dict[str, Any] = {"tokens": TOKENS, "steps": STEPS, "weight_bytes": weights}
        for kind in ("plain", "diff", *(["polygraphy"] if arguments.polygraphy else [])):
            worker = ["--worker", kind, str(model), str(bundle), "--threads", str(arguments.threads)]
            found[kind] = json.loads(run_again(__file__, *worker).splitlines()[-1])
            print(kind, found[kind], flush=True)
    found["ratio"] = found["diff"]["seconds"] / sum(found["plain"].values())
    found["peak_models"] = found["diff"]["peak_bytes"] / weights
    print(
        f"a diff costs {found['ratio']:.2f} x its plain forwards and {found['peak_models']:.2f} x the model's weights"
    )
    RESULTS.write_text(json.dumps(found, indent=1) + "\n")
    sys.exit(int(found["ratio"] > GOAL))


if __name__ == "__main__":
    main()
