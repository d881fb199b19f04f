"""Peak memory and time of quantizing a random Qwen2 of 270 M parameters: `python benchmarks/quantize_memory.py`.

Every run is a process of its own.  "extra" is the peak resident memory above the baseline (all imported and a tiny
model quantized).  The goal is the size of the model and of one layer's activations: the model in fp32, and the residual
stream and the widest activation of all calibration tokens in fp32.  Exit code 1 if a run is over it.  Results go to
benchmarks/results/quantize_memory.json.
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

from child import ROOT, peak_rss, run_again

RESULT = ROOT / "benchmarks" / "results" / "quantize_memory.json"
LAYERS, HIDDEN = 12, 1024
ROWS, TOKENS = 4, 256
SAMPLE = 256
"""Tokens that AWQ searches with: enough for memory, and a search of minutes instead of a quarter of an hour."""
SCHEMES = ("int8", "int4-awq", "int4-gptq", "smoothquant")


def measure(directory: Path, tiny: Path, scheme: str) -> dict[str, Any]:
    """Quantize in this process and say what it took."""
    import torch

    import refmodels
    from export.quantization.calibrate import quantize_model
    from export.quantization.data import CalibrationData
    from export.quantization.method import MethodOptions
    from export.quantization.schemes import QuantizeOptions
    from refmodels.checkpoints.load import parameter_bytes

    torch.set_num_threads(2)
    method = MethodOptions(sample=SAMPLE)
    options = QuantizeOptions(scheme=scheme, group=64 if "int4" in scheme else None, method=method)
    with tempfile.TemporaryDirectory(dir=directory.parent) as folder:
        rows = torch.randint(0, 2048, (ROWS, TOKENS), generator=torch.Generator().manual_seed(0)).tolist()
        small = CalibrationData(rows=[row[:8] for row in rows[:2]], origin="random ids")
        quantize_model(refmodels.resolve(tiny), Path(folder) / "tiny", options, data=small)
        baseline = peak_rss()
        source = refmodels.resolve(directory)
        start = time.perf_counter()
        data = CalibrationData(rows=rows, origin="random ids")
        quantize_model(source, Path(folder) / "quantized", options, data=data)
        spec = source.spec
        return {
            "baseline_bytes": baseline,
            "extra_bytes": peak_rss() - baseline,
            "model_bytes": parameter_bytes(spec, torch.float32),
            "activation_bytes": ROWS * TOKENS * (spec.hidden_size + spec.mlp.width) * 4,
            "seconds": round(time.perf_counter() - start, 1),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        directory, tiny, scheme = arguments.measure
        return print(json.dumps(measure(Path(directory), Path(tiny), scheme)))
    results = []
    maker = str(Path(__file__).with_name("export_memory.py"))
    with tempfile.TemporaryDirectory() as folder:
        run_again(maker, "--make", f"{folder}/tiny", "1", "float32", "64")
        run_again(maker, "--make", f"{folder}/model", str(LAYERS), "bfloat16", str(HIDDEN))
        for scheme in SCHEMES:
            done = json.loads(run_again(__file__, "--measure", f"{folder}/model", f"{folder}/tiny", scheme))
            passed = done["extra_bytes"] <= done["model_bytes"] + done["activation_bytes"]
            results.append({"scheme": scheme, **done, "passed": passed})
            print(
                f"{scheme}: extra {done['extra_bytes'] / 1e9:.2f} GB of {done['model_bytes'] / 1e9:.2f} (model) + "
                f"{done['activation_bytes'] / 1e9:.2f} (activations), {done['seconds']} s"
                f"{'' if passed else '  OVER THE LIMIT'}",
                flush=True,
            )
    machine = {"python": platform.python_version(), "cpus": os.cpu_count(), "platform": platform.platform()}
    settings = {"layers": LAYERS, "hidden": HIDDEN, "rows": ROWS, "tokens": TOKENS}
    RESULT.write_text(json.dumps({"machine": machine, "settings": settings, "results": results}, indent=1) + "\n")
    if not all(result["passed"] for result in results):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
