"""How far clean engines stay from the diff's alarm: every toy, precision, numerics and rounding, over many prompts.

    python benchmarks/diff_noise.py --batches 17

Prints, and writes to benchmarks/results/diff_noise.json, the largest local error in noise floors (the alarm is at
`debug.comparison.compare.MULTIPLE`), the largest accumulated error in its floors, and the number of false alarms.  Each
batch has three random prompts of 8 to 69 tokens and 8 decode steps.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import torch

import refmodels
from debug.capture.prompts import random_prompts
from debug.comparison.compare import MULTIPLE, diff_engine
from export.bundle import export_model
from refmodels.toys import TOYS
from trt_runtime.onnxruntime.engine import OnnxRuntimeEngine

RESULTS = Path(__file__).parent / "results" / "diff_noise.json"


def measure(model: str, precision: str, numerics: str, batches: int, directory: Path) -> list[dict[str, object]]:
    source = refmodels.resolve(model)
    bundle = export_model(source, precision=precision, numerics=numerics, output=directory / "bundle", overwrite=True)
    truth = refmodels.load(source, dtype=torch.float64)
    rows = []
    for emulated in (True, False) if precision != "fp32" else (False,):
        engine = OnnxRuntimeEngine(bundle, emulate_rounding=emulated)
        rounded = refmodels.load(source, dtype=engine.dtype, numerics=numerics)
        local, accumulated, alarms = 0.0, 0.0, 0
        for seed in range(batches):
            lengths = torch.randint(8, 70, (3,), generator=torch.Generator().manual_seed(seed)).tolist()
            result = diff_engine(engine, truth, rounded, random_prompts(source.spec.vocab_size, lengths, seed))
            local = max(local, *(e.ratio for e in result.taps))
            accumulated = max(accumulated, *(e.accumulated_ratio for e in result.taps))
            alarms += result.verdict != "aligned"
        rows.append(
            {
                "model": model,
                "precision": precision,
                "numerics": numerics,
                "emulated": emulated,
                "local_floors": round(local, 2),
                "accumulated_floors": round(accumulated, 2),
                "alarms": alarms,
            }
        )
        print(rows[-1], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, default=17, help="batches of three prompts (default 17: 51 prompts)")
    batches = parser.parse_args().batches
    rows: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory() as directory:
        for model in TOYS:
            for precision in ("fp32", "fp16", "bf16"):
                for numerics in ("exact", "upstream"):
                    rows += measure(model, precision, numerics, batches, Path(directory))
    RESULTS.parent.mkdir(exist_ok=True)
    summary = {"multiple": MULTIPLE, "prompts": 3 * batches, "torch": torch.__version__, "rows": rows}
    RESULTS.write_text(json.dumps(summary, indent=1) + "\n")
    print(
        f"{sum(int(str(r['alarms'])) for r in rows)} alarms; worst {max(float(str(r['local_floors'])) for r in rows)}"
    )


if __name__ == "__main__":
    main()
