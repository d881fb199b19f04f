"""Quantized layers on one GPU against fp16, in one run: `python benchmarks/gpu_quantized.py`.

The shapes of Qwen-7B, random codes.  Baselines are this project's own fp16 modules, in the same process: `gemv` at one
token, cuBLAS for more.

products   weight-only layers at 1 and 16 tokens: microseconds of a product that reads its weights from memory (a CUDA
           graph over enough different ones that L2 does not matter).
codes      layers whose inputs are quantized too (int8, fp8), at 64 tokens and more: the product alone, and with the
           quantization of its input; gate and up with silu and product, out and down with the residual.
decode     whole decode steps of one row by `TorchEngine(kernels=True)`: `generate` of 128 tokens after 128 (as
           benchmarks/gpu_generate.py), and steps in a loop; of int4 also with a launch for every product.
batches    the same, of 64 rows.

Writes gpu_quantized.json to $OUT, or beside this file in results/: what was there of other parts stays, and the machine
of every part is named.
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
import os
import sys
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.gpu_generate import (  # noqa: E402
    CONFIGS,
    PROMPT,
    STEPS,
    decode_loop,
    measure,
    random_decoder,
    read_bandwidth,
)
from benchmarks.gpu_linear import graph_time  # noqa: E402
from refmodels.checkpoints.load import empty_decoder  # noqa: E402
from refmodels.families import spec_from_config  # noqa: E402
from refmodels.model import Decoder  # noqa: E402
from refmodels.quantization.formats import LinearFormat, group_formats  # noqa: E402
from refmodels.quantization.linear import QuantizedLinear  # noqa: E402
from refmodels.spec import ModelSpec  # noqa: E402
from trt_runtime.generation import GenerationConfig, generate  # noqa: E402
from trt_runtime.torch_gpu import convert  # noqa: E402
from trt_runtime.torch_gpu.engine import TorchEngine  # noqa: E402
from trt_runtime.torch_gpu.kernel_choice import choose  # noqa: E402
from trt_runtime.torch_gpu.linear import FusedFloatLinear, FusedLinear  # noqa: E402
from trt_runtime.torch_gpu.quantized_linear import FusedQuantizedLinear  # noqa: E402
from trt_runtime.torch_gpu.weight_storage import arranged  # noqa: E402

RESULTS = Path(os.environ.get("OUT") or Path(__file__).parent / "results") / "gpu_quantized.json"
MODEL = "qwen-7b"
SHAPES = {"qkv": (12288, 4096), "out": (4096, 4096), "gate and up": (11008, 4096), "down": (4096, 11008)}
INT4, INT8 = LinearFormat(weight="int4", group=128), LinearFormat(weight="int8")
WEIGHT_ONLY = {"int4": INT4, "int8": INT8, "fp8": LinearFormat(weight="fp8")}
CODED = {"int8": LinearFormat(weight="int8", input="int8"), "fp8": LinearFormat(weight="fp8", input="fp8")}
APART = "int4, head too; a launch a product"
FEW, MANY = (1, 16), (64, 256, 1024, 4096)
ROTATED_BYTES = 6e8


def random_parameter(name: str, like: Tensor, linear: LinearFormat | None, generator: torch.Generator) -> Tensor:
    """Codes over the range of int4 or int8 (or the middle of fp8's), and floats, of weights that deviate by 0.02."""
    most = 7 if linear is not None and linear.weight == "int4" else 127
    shape = like.shape
    leaf = name.rpartition(".")[2]
    if like.dtype == torch.int8:
        return torch.randint(-most, most + 1, shape, device="cuda", dtype=torch.int8, generator=generator)
    if like.dtype == torch.float8_e4m3fn:
        x = torch.randn(shape, device="cuda", dtype=torch.float16, generator=generator)
        return x.to(torch.float8_e4m3fn)
    if leaf == "scale":
        deviation = 1.0 if linear is not None and linear.weight == "fp8" else most / 3**0.5
        return torch.full(shape, 0.02 / deviation, device="cuda", dtype=torch.float16)
    value = torch.empty(shape, device="cuda", dtype=torch.float16)
    return value.fill_(1.0) if name.endswith("norm.weight") else value.normal_(0, 0.02, generator=generator)


def quantized_decoder(linear: LinearFormat, *, head: bool) -> Decoder:
    spec = spec_from_config(CONFIGS[MODEL])
    formats = {module: linear for module in spec.linears if head or module != "head"}
    decoder = empty_decoder(replace(spec, quantization=group_formats(formats)))
    generator = torch.Generator("cuda").manual_seed(0)
    for name, parameter in list(decoder.named_parameters()):
        owner, _, leaf = name.rpartition(".")
        value = random_parameter(name, parameter, linear, generator)
        setattr(decoder.get_submodule(owner), leaf, nn.Parameter(value, requires_grad=False))
    return decoder.eval()


def fused_layers(name: str, linear: LinearFormat | None, bytes_a_weight: float) -> list[FusedLinear]:
    """So many layers of one shape that they do not fit in L2."""
    n, k = SHAPES[name]
    pair = name == "gate and up"
    count = max(2, int(ROTATED_BYTES // (n * k * (1 + pair) * bytes_a_weight)))
    generator = torch.Generator("cuda").manual_seed(0)
    made: list[FusedLinear] = []
    for _ in range(count):
        if linear is None:
            weight = torch.randn(n * (1 + pair), k, device="cuda", dtype=torch.float16) * k**-0.5
            made.append(FusedFloatLinear(weight, None, merged=pair))
            continue
        layers = []
        for _ in range(1 + pair):
            layer = QuantizedLinear(k, n, bias=False, linear=linear)
            for leaf, parameter in list(layer.named_parameters()):
                setattr(
                    layer, leaf, nn.Parameter(random_parameter(leaf, parameter, linear, generator), requires_grad=False)
                )
            layers.append(layer)
        made.append(FusedQuantizedLinear(*arranged(*layers)))
    return made


def microseconds(modules: list[Any], call: Callable[[Any], Any]) -> float:
    return graph_time(lambda: [call(module) for module in modules]) / len(modules) * 1e3


@torch.no_grad()
def products(bandwidth: float) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, (n, k) in SHAPES.items():
        row: dict[str, Any] = {}
        residual = name in ("out", "down")
        for kind, linear in {"fp16": None, **WEIGHT_ONLY}.items():
            size = 2.0 if linear is None else 0.5 if linear.weight == "int4" else 1.0
            modules = fused_layers(name, linear, size)
            weights = n * k * (1 + (name == "gate and up"))
            entry: dict[str, Any] = {
                "floor_us": weights * (size + (2 / 128 if kind == "int4" else 0)) / bandwidth * 1e6
            }
            for tokens in FEW:
                x = torch.randn(tokens, k, device="cuda", dtype=torch.float16)
                onto = torch.randn(tokens, n, device="cuda", dtype=torch.float16) if residual else None
                entry[f"us_{tokens}"] = microseconds(modules, functools.partial(_call, x=x, residual=onto))
            row[kind] = entry
            del modules
            free()
        found[name] = row
        print(
            f"{name:12s} "
            + "; ".join(f"{kind} " + " ".join(f"{v:.1f}" for v in e.values()) for kind, e in row.items()),
            flush=True,
        )
    return found


def _call(module: Any, *, x: Tensor, residual: Tensor | None) -> Tensor:
    y: Tensor = module(x, residual)
    return y


@torch.no_grad()
def codes() -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, (n, k) in SHAPES.items():
        baseline = fused_layers(name, None, 2)
        row: dict[str, Any] = {"fp16": {}}
        made = {code: fused_layers(name, linear, 1) for code, linear in CODED.items()}
        for tokens in MANY:
            x = torch.randn(tokens, k, device="cuda", dtype=torch.float16)
            onto = torch.randn(tokens, n, device="cuda", dtype=torch.float16) if name in ("out", "down") else None
            few = slice(None) if tokens < 1024 else slice(2)
            row["fp16"][tokens] = fp16 = microseconds(baseline[few], functools.partial(_call, x=x, residual=onto))
            for code, modules in made.items():
                quantized = modules[0]._quantized_input(x, tokens)
                alone = microseconds(
                    modules[few], functools.partial(_codes_only, quantized=quantized, x=x, residual=onto)
                )
                whole = microseconds(modules[few], functools.partial(_call, x=x, residual=onto))
                row.setdefault(code, {})[tokens] = {
                    "us": alone,
                    "with_quantizing_us": whole,
                    "ratio": fp16 / alone,
                    "ratio_with_quantizing": fp16 / whole,
                }
        found[name] = row
        line = " ".join(
            f"{t}: {row['fp16'][t]:.1f}"
            + "".join(
                f" {c} {row[c][t]['us']:.1f} ({row[c][t]['ratio']:.2f}x, {row[c][t]['ratio_with_quantizing']:.2f}x)"
                for c in CODED
            )
            for t in MANY
        )
        print(f"{name:12s} {line}", flush=True)
        del baseline, made
        free()
    for code in CODED:
        ratios = {}
        for tokens in MANY:
            fp16 = sum(found[name]["fp16"][tokens] for name in SHAPES)
            ratios[tokens] = {
                "ratio": fp16 / sum(found[name][code][tokens]["us"] for name in SHAPES),
                "ratio_with_quantizing": fp16 / sum(found[name][code][tokens]["with_quantizing_us"] for name in SHAPES),
            }
        found[f"a block, {code}"] = ratios
        print(
            f"a block, {code}: "
            + " ".join(f"{t}: {r['ratio']:.2f}x ({r['ratio_with_quantizing']:.2f}x)" for t, r in ratios.items())
        )
    return found


def _codes_only(module: Any, *, quantized: tuple[Tensor, Tensor], x: Tensor, residual: Tensor | None) -> Tensor:
    y: Tensor = module._quantized_gemm(choose(len(x), module.facts), *quantized, x, residual)
    return y


def decode(rounds: int) -> dict[str, Any]:
    return steps(
        {
            "fp16": lambda: random_decoder(_plain_spec()),
            "int4": lambda: quantized_decoder(INT4, head=False),
            "int4, head too": lambda: quantized_decoder(INT4, head=True),
            APART: lambda: quantized_decoder(INT4, head=True),
            "int8, head too": lambda: quantized_decoder(INT8, head=True),
        },
        1,
        rounds,
    )


def batches(rounds: int) -> dict[str, Any]:
    return steps(
        {
            "fp16": lambda: random_decoder(_plain_spec()),
            "int4, head too": lambda: quantized_decoder(INT4, head=True),
            "int8 inputs": lambda: quantized_decoder(CODED["int8"], head=False),
            "fp8 inputs": lambda: quantized_decoder(CODED["fp8"], head=False),
        },
        64,
        rounds,
    )


def steps(models: dict[str, Callable[[], Decoder]], batch: int, rounds: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    chain_runner = convert.chain_runner
    for name, make in models.items():
        try:
            convert.chain_runner = _no_chains if name == APART else chain_runner
            engine = TorchEngine(make(), kernels=True)
            free()
            held = torch.cuda.memory_allocated()
            ids = torch.randint(3, 150_000, (batch, PROMPT), generator=torch.Generator().manual_seed(1))

            def run(tokens: int, ids: Tensor = ids, engine: TorchEngine = engine) -> None:
                generate(engine, None, ids.tolist(), GenerationConfig(max_new_tokens=tokens))

            result = measure(run, batch, steps=STEPS, rounds=rounds)
            result["loop"], table = decode_loop(engine, ids)
            found[name] = result | {"held_gb": held / 1e9, "kernels": table[:8]}
            over = result["tokens_per_second"] / found["fp16"]["tokens_per_second"]
            gain = found["fp16"]["loop"]["step_ms"] / result["loop"]["step_ms"]
            print(
                f"{name:32s} batch {batch:2d}: {result['tokens_per_second']:7.1f} tok/s, {over:.2f} x fp16, "
                f"loop {result['loop']['step_ms']:.3f} ms ({gain:.2f} x), "
                f"first token {result['first_token_ms']:.1f} ms, weights {held / 1e9:.2f} GB",
                flush=True,
            )
            del run, engine
        except Exception as error:
            traceback.print_exc()
            found.setdefault(name, {})["error"] = repr(error)[:300]
        finally:
            convert.chain_runner = chain_runner
        free()
    return found


def _no_chains(decoder: Decoder) -> None:
    """A launch for every product, as on GPUs that `kernels.quantized_chain` does not serve."""


def _plain_spec() -> ModelSpec:
    return spec_from_config(CONFIGS[MODEL])


def free() -> None:
    gc.collect()
    torch.cuda.empty_cache()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--part",
        choices=("products", "codes", "decode", "batches"),
        action="append",
        help="repeat for several; default: all",
    )
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    known = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    bandwidth = read_bandwidth()
    free()
    print(f"{torch.cuda.get_device_name()}, reads {bandwidth / 1e12:.2f} TB/s", flush=True)
    machine = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "read_bytes_per_second": bandwidth,
    }
    runs: dict[str, Callable[[], dict[str, Any]]] = {
        "decode": lambda: decode(arguments.rounds),
        "batches": lambda: batches(arguments.rounds),
        "codes": codes,
        "products": lambda: products(bandwidth),
    }
    for part, run in runs.items():
        if arguments.part is None or part in arguments.part:
            known[part] = {"machine": machine, "rows": run()}
            RESULTS.parent.mkdir(exist_ok=True)
            RESULTS.write_text(json.dumps(known, indent=1) + "\n")


if __name__ == "__main__":
    main()
