"""The cost of each quantization scheme on the toys: task accuracy, KL and top-1 against their fp32 bundles.

python benchmarks/fidelity.py                       # all toys and schemes into results/fidelity.json
python benchmarks/fidelity.py --toys qwen --limit 100 --output /tmp/fidelity.json

Every scheme becomes a bundle, as `logitlock export` makes it with the bundled tasks as calibration data, and the bundle
is what is measured, on ONNX Runtime.  All that is not quantized stays in fp32, so that what is seen is the scheme's; it
is compared with the fp32 bundle, which runs several times as fast as the fp64 reference and is measured against that
as well (`baseline_kl`).
The file is written after each toy, and toys that are not named keep what it says of them.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import refmodels
from debug.evaluate.results import SideResult
from debug.evaluate.run import evaluate_model
from export.bundle import export_model
from export.quantization.schemes import QuantizeOptions
from refmodels.errors import LogitLockError
from refmodels.quantization.arithmetic import quantize_tokens, quantize_weight
from refmodels.quantization.formats import EightBit, LinearFormat
from refmodels.recorder import Recorder
from refmodels.toys import TOYS
from refmodels.toys.tasks import TASKS, toy_examples
from trt_runtime.torch_gpu.engine import TorchEngine

OUTPUT = Path(__file__).parent / "results" / "fidelity.json"
GROUP = 64
SUMS = 2000
SCHEMES: dict[str, str | QuantizeOptions] = {
    "fp16": "fp16",
    "bf16": "bf16",
    "int8": QuantizeOptions(scheme="int8"),
    f"int4, groups of {GROUP}": QuantizeOptions(scheme="int4", group=GROUP),
    f"int4-awq, groups of {GROUP}": QuantizeOptions(scheme="int4-awq", group=GROUP),
    f"int4-gptq, groups of {GROUP}": QuantizeOptions(scheme="int4-gptq", group=GROUP),
    "smoothquant, per token": QuantizeOptions(scheme="smoothquant", inputs="token"),
    "fp8, per token": QuantizeOptions(scheme="fp8", inputs="token"),
    "KV cache int8": QuantizeOptions(scheme=None, cache="int8"),
    "KV cache fp8": QuantizeOptions(scheme=None, cache="fp8"),
}
"""A dtype, or how the model is quantized."""


def export_scheme(toy: str, scheme: str | QuantizeOptions, output: Path) -> Path:
    """The bundle of a toy in one scheme."""
    if isinstance(scheme, str):
        return export_model(toy, precision=scheme, output=output)
    if scheme.scheme is None:
        return export_model(toy, precision="fp32", quantize=scheme, output=output)
    return export_model(toy, precision=scheme.scheme, dtype="fp32", quantize=scheme, output=output)


def measure(toy: str, names: list[str], *, limit: int, compared: int, batch_size: int) -> dict[str, Any]:
    """All schemes of a toy, by name, and the reference itself."""
    began = time.perf_counter()
    failed: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as made:
        bundles = {}
        baseline = export_model(toy, precision="fp32", output=Path(made) / f"{toy}-fp32")
        for name in names:
            try:
                bundles[name] = export_scheme(toy, SCHEMES[name], Path(made) / f"{toy}-{len(bundles)}")
            except LogitLockError as error:
                failed[name] = {"error": str(error)}
            print(f"{toy}: {name} exported, {time.perf_counter() - began:.0f} s", file=sys.stderr)
        result = evaluate_model(
            [str(path) for path in bundles.values()],
            model=toy,
            against=str(baseline),
            limit=limit,
            compared=compared,
            shapes=(),
            batch_size=batch_size,
            progress=lambda what, done, total: _log(what.replace(made, ""), done, total, began),
        )
        sums = measure_sums(toy, baseline, bundles, batch_size=batch_size)
        check = evaluate_model(
            [str(baseline)], model=toy, against="reference", limit=10, shapes=(), batch_size=batch_size
        )
    assert result.against is not None and check.sides[0].agreement is not None
    found = {name: _row(side) for name, side in zip(bundles, result.sides, strict=True)}
    return {
        "baseline": _row(result.against),
        "sums": sums,
        "input_errors": input_errors(toy),
        "baseline_kl": check.sides[0].agreement.kl_mean,
        "schemes": {name: found.get(name) or failed[name] for name in names},
        "seconds": round(time.perf_counter() - began),
    }


def measure_sums(toy: str, baseline: Path, bundles: dict[str, Path], *, batch_size: int) -> dict[str, Any]:
    """Addition again with more examples: the task in which most answers change."""
    result = evaluate_model(
        [str(path) for path in bundles.values()],
        model=toy,
        against=str(baseline),
        tasks=["addition"],
        limit=SUMS,
        compared=1,
        shapes=(),
        batch_size=batch_size,
    )
    return {name: dataclasses.asdict(side.tasks["addition"]) for name, side in zip(bundles, result.sides, strict=True)}


def rounding_errors() -> dict[str, float]:
    """Relative error of normal random rows of 128 numbers in each format: what rounding alone does to weights."""
    rows = torch.randn(4096, 128, generator=torch.Generator().manual_seed(0))
    formats = {
        "int8": LinearFormat(weight="int8"),
        "int4": LinearFormat(weight="int4", group=GROUP),
        "fp8": LinearFormat(weight="fp8"),
    }
    return {
        name: float((quantize_weight(rows, each).dequantized() - rows).norm() / rows.norm())
        for name, each in formats.items()
    }


def input_errors(toy: str, *, count: int = 4) -> dict[str, float]:
    """Relative error of a toy's linear inputs with one scale per token: root of the mean square over tokens."""
    source = refmodels.resolve(toy)
    tokenizer, engine = refmodels.load_tokenizer(source), TorchEngine(refmodels.load(source))
    squares: dict[EightBit, list[torch.Tensor]] = {"int8": [], "fp8": []}
    for example in (e for task in TASKS for e in toy_examples(task, split="held_out", count=count, seed=1)):
        ids = torch.tensor([tokenizer.encode(example.prompt + example.answer)])
        recorder = Recorder()
        engine.prefill(ids, engine.new_cache(batch=1, capacity=ids.shape[1]), recorder=recorder)
        for name, tensor in recorder.tensors.items():
            if name.endswith(("attn_norm", "attn.context", "mlp_norm", "mlp.act")):
                for code, found in squares.items():
                    codes, scale = quantize_tokens(tensor, code)
                    off = codes.float() * scale - tensor
                    found.append((off.square().sum(-1) / tensor.square().sum(-1)).flatten())
    return {code: float(torch.cat(found).mean().sqrt()) for code, found in squares.items()}


def _row(side: SideResult) -> dict[str, Any]:
    """The kept results of an executor; `texts` and `speeds` were not measured, and its path was temporary."""
    row = dataclasses.asdict(side)
    return {key: value for key, value in row.items() if key not in ("side", "texts", "speeds")}


def _log(what: str, done: int, total: int, began: float) -> None:
    if done == total:
        print(f"{what}, {time.perf_counter() - began:.0f} s", file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--toys", nargs="+", choices=TOYS, default=list(TOYS))
    parser.add_argument("--schemes", nargs="+", choices=list(SCHEMES), default=list(SCHEMES))
    parser.add_argument("--limit", type=int, default=500, help="examples a task, of those that are generated")
    parser.add_argument("--compared", type=int, default=100, help="examples a task for KL and top-1")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--output", type=Path, default=OUTPUT)
    given = parser.parse_args()
    data: dict[str, Any] = json.loads(given.output.read_text()) if given.output.is_file() else {"toys": {}}
    settings = {"limit": given.limit, "compared": given.compared}
    if data.get("settings", settings) != settings:
        sys.exit(f"{given.output} was measured with {data['settings']}; give another --output, or delete it")
    for toy in given.toys:
        measured = measure(toy, given.schemes, limit=given.limit, compared=given.compared, batch_size=given.batch_size)
        known = data["toys"].get(toy, {}).get("schemes", {})
        measured["schemes"] = known | measured["schemes"]
        data["toys"][toy] = measured
        data |= {
            "command": "python benchmarks/fidelity.py",
            "settings": settings,
            "rounding_errors": rounding_errors(),
            "versions": {
                "torch": torch.__version__,
                "onnxruntime": importlib.metadata.version("onnxruntime"),
            },
        }
        given.output.write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
