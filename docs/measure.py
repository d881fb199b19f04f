"""Measure what the documentation says in numbers: `python docs/measure.py` writes docs/measured.json."""

from __future__ import annotations

import dataclasses
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from debug import diff, verify_case
from export import export_model
from refmodels import resolve, rope_table

HERE = Path(__file__).parent
GOLDENS = HERE.parent / "tests" / "goldens"
sys.path.insert(0, str(HERE.parent))
from tests.support.mutate import mutated, swapped  # noqa: E402

POSITIONS = (128, 1024, 2048, 8192)


def verify() -> dict[str, dict[str, Any]]:
    """By family: cases, how many pass in fp32, the largest difference, and half-precision files met bit for bit."""
    found: dict[str, dict[str, Any]] = {}
    for case in sorted(GOLDENS.glob("[a-z]*")):
        meta = json.loads((case / "meta.json").read_text(encoding="utf-8"))
        family = resolve(case, variant=meta.get("variant")).spec.family
        mine = found.setdefault(
            family,
            {"cases": 0, "passed": 0, "worst": 0.0, "bf16": 0, "bf16_exact": 0, "fp16": 0, "fp16_exact": 0},
        )
        result = verify_case(case)
        mine["cases"] += 1
        mine["passed"] += result.passed
        mine["worst"] = max(mine["worst"], *result.worst.values())
        for dtype in ("bf16", "fp16"):
            if (case / f"io_{dtype}.safetensors").is_file():
                mine[dtype] += 1
                mine[f"{dtype}_exact"] += max(verify_case(case, dtype=dtype).worst.values()) == 0.0
    return found


def rope_errors() -> dict[str, dict[str, float]]:
    """ChatGLM2's rope table as upstream makes it in half precision: largest |error| of cos and sin, real head_dim."""
    rope = resolve("chatglm2").spec.rope
    assert rope is not None
    rope = dataclasses.replace(rope, dim=64, table="working_arithmetic")
    truth = rope_table(rope, positions=max(POSITIONS), numerics="exact", dtype=torch.float64)
    errors: dict[str, dict[str, float]] = {}
    for name, dtype in (("fp16", torch.float16), ("bf16", torch.bfloat16)):
        upstream = rope_table(rope, positions=max(POSITIONS), numerics="upstream", dtype=dtype)
        off = torch.stack([(u.double() - t).abs().amax(1) for u, t in zip(upstream, truth, strict=True)]).amax(0)
        errors[name] = {str(n): float(off[:n].max()) for n in POSITIONS}
    return errors


def exchanged() -> dict[str, Any]:
    """The diff of a bundle with gate and up of block 2 exchanged: its JSON, with one tap and one culprit."""
    with tempfile.TemporaryDirectory() as directory:
        good = export_model("qwen", precision="fp16", output=Path(directory) / "good")
        bad = mutated(good, Path(directory) / "bad", swapped("blocks.2.mlp.gate.weight", "blocks.2.mlp.up.weight"))
        result = diff(str(bad))
    found = result.to_json()
    found["taps"] = [tap for tap in found["taps"] if tap["tap"] == result.first_wrong_tap][:1]
    found["culprits"] = found["culprits"][:1]
    found["settings"]["bundle"] = "qwen-fp16-swapped"
    return {"json": _rounded(found)}


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {k: _rounded(v) for k, v in value.items()}
    return [_rounded(v) for v in value] if isinstance(value, list) else value


def main() -> None:
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    measured = {
        "command": "python docs/measure.py",
        "torch": torch.__version__,
        "verify": verify(),
        "rope_table": rope_errors(),
        "swapped": exchanged(),
    }
    (HERE / "measured.json").write_text(json.dumps(measured, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
