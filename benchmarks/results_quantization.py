"""The sections of RESULTS.md on quantization: speed, what it costs to quantize, other implementations."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from results_table import table


def on_the_cpu(data: dict[str, Any]) -> Iterator[str]:
    yield "## Quantized bundles on the CPU"
    yield (
        "A random Qwen2 of 200 M parameters, every layer and the head quantized, on ONNX Runtime with 2 threads. "
        "Decode is 64 tokens after a prompt of 128; all in one run, in turns, as a ratio to the fp32 bundle (the "
        "median of the rounds). The goals are 3 × at int8 and 4 × at int4. `python benchmarks/cpu_quantized.py`."
    )
    columns = ("prefill tokens/s", "× fp32", "decode tokens/s", "× fp32", "bundle MB", "load s", "peak RSS MB")
    yield table(
        ("", *columns),
        (
            (
                name,
                f"{row['prefill_tokens_per_s']:.0f}",
                f"{row['prefill_ratio']:.2f}",
                f"{row['decode_tokens_per_s']:.0f}",
                f"{row['decode_ratio']:.2f}",
                f"{row['bundle_mb']:.0f}",
                f"{row['load_s']:.2f}",
                f"{row['peak_rss_mb_above_imports']:.0f}",
            )
            for name, row in data["rows"].items()
        ),
    )
    yield (
        "Weight-only int8 has no fast kernel on the CPU (MatMulNBits without int8 inputs dequantizes the whole matrix "
        "in every call), so that it runs as fp32; what is fast multiplies int8 by int8, and so does the reference."
    )


def on_a_gpu(data: dict[str, Any]) -> Iterator[str]:
    yield "## Quantized layers on a GPU"
    yield (
        "The shapes of Qwen-7B with random codes, fp16; every table in one run with this project's own fp16. "
        "`python benchmarks/gpu_quantized.py`."
    )
    decode, batches, codes, products = (data[part] for part in ("decode", "batches", "codes", "products"))
    yield (
        f"Whole decode steps of one row by `TorchEngine(kernels=True)`, {_machine(decode)}: steps in a loop, and "
        "128 tokens after 128 by `generate`, with what it does beside them on a host that other machines share. int4 "
        "in groups of 128; int8 with one scale per row. The goal is 3 × at int4, on an H200."
    )
    yield table(_STEP_COLUMNS, _steps(decode["rows"]))
    yield f"The same of 64 rows, {_machine(batches)}; int8 and fp8 with one scale per row."
    yield table(_STEP_COLUMNS, _steps(batches["rows"]))
    yield (
        "Products of int8 or fp8 inputs with int8 or fp8 weights, in microseconds, with silu and product in gate and "
        "up, with the residual in out and down. Ratios to fp16: of the product, and with the quantizing of its input, "
        "which only out and down need in a model (the norm's kernel makes the codes of the others). The goal is 1.5 × "
        f"for the products of a block; {_machine(codes)}."
    )
    rows = codes["rows"]
    yield table(
        ("product", "tokens", "fp16", "int8", "×", "× with quantizing", "fp8", "×", "× with quantizing"),
        (_coded(name, tokens, rows) for name in _products(rows) for tokens in rows[name]["fp16"]),
    )
    yield table(
        ("a block", "tokens", "×", "× with quantizing"),
        (
            (name.removeprefix("a block, "), tokens, f"{row['ratio']:.2f}", f"{row['ratio_with_quantizing']:.2f}")
            for name, ratios in rows.items()
            if name.startswith("a block")
            for tokens, row in ratios.items()
        ),
    )
    yield (
        "Weight-only products by themselves, each a launch, at 1 and 16 tokens: microseconds, and in brackets the time "
        f"to read the weights; {_machine(products)}."
    )
    kinds = list(next(iter(products["rows"].values())))
    yield table(("product", "tokens", *kinds), _weight_only(products["rows"]))


_STEP_COLUMNS = ("weights", "ms/step in a loop", "× fp16", "tokens/s", "× fp16", "first token ms", "weights GB")


def _machine(part: dict[str, Any]) -> str:
    machine = part["machine"]
    return f"one {machine['device']}, torch {machine['torch']}, Triton {machine['triton']}"


def _steps(rows: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    base = rows["fp16"]
    for name, row in rows.items():
        yield (
            name,
            f"{row['loop']['step_ms']:.3f}",
            f"{base['loop']['step_ms'] / row['loop']['step_ms']:.2f}",
            f"{row['tokens_per_second']:.0f}",
            f"{row['tokens_per_second'] / base['tokens_per_second']:.2f}",
            f"{row['first_token_ms']:.1f}",
            f"{row['held_gb']:.2f}",
        )


def _weight_only(rows: dict[str, Any]) -> Iterator[tuple[Any, ...]]:
    for name, kinds in rows.items():
        for tokens in (1, 16):
            yield (name, tokens, *(f"{row[f'us_{tokens}']:.1f} ({row['floor_us']:.1f})" for row in kinds.values()))


def _products(codes: dict[str, Any]) -> list[str]:
    return [name for name in codes if not name.startswith("a block")]


def _coded(name: str, tokens: str, codes: dict[str, Any]) -> tuple[str, ...]:
    entry = codes[name]
    cells = [name, tokens, f"{entry['fp16'][tokens]:.1f}"]
    for code in ("int8", "fp8"):
        row = entry[code][tokens]
        cells += [f"{row['us']:.1f}", f"{row['ratio']:.2f}", f"{row['ratio_with_quantizing']:.2f}"]
    return tuple(cells)


def seconds_a_layer(data: dict[str, Any]) -> Iterator[str]:
    yield "## Quantizing a layer of Qwen-7B on a GPU"
    yield (
        f"One layer's weights in groups of {data['group']}, on an {data['gpu']}, torch {data['torch']}; seconds. The "
        f"Hessian is that of 8192 tokens. `{data['command']}`."
    )
    parts = ("gptq", "gptq_act_order", "awq_scale", "awq_clip", "hessian_of_8192_tokens")
    yield table(
        ("layer", "out × in", "GPTQ", "with act-order", "AWQ scale", "AWQ clip", "Hessian", "peak GiB"),
        (
            (
                row["layer"],
                f"{row['out']} × {row['in']}",
                *(f"{row[part]['seconds']:.3f}" for part in parts),
                f"{row['peak_gib']:.1f}",
            )
            for row in data["rows"]
        ),
    )


def memory(data: dict[str, Any]) -> Iterator[str]:
    settings = data["settings"]
    yield "## Memory of quantizing"
    yield (
        f"A random Qwen2 of {settings['layers']} layers of {settings['hidden']}, {settings['rows']} rows of "
        f"{settings['tokens']} tokens, 2 threads: peak memory above the imports, against the size of the model in fp32 "
        "and of one layer's activations. `python benchmarks/quantize_memory.py`."
    )
    yield table(
        ("scheme", "extra GB", "model GB", "activations GB", "seconds"),
        (
            (
                row["scheme"],
                f"{row['extra_bytes'] / 1e9:.2f}",
                f"{row['model_bytes'] / 1e9:.2f}",
                f"{row['activation_bytes'] / 1e9:.2f}",
                row["seconds"],
            )
            for row in data["results"]
        ),
    )
    yield (
        "The goal is model and activations, and all keep it. GPTQ holds, beside them, two fp64 matrices of the widest "
        "input squared for one layer at a time."
        if all(row["passed"] for row in data["results"])
        else "The goal is model and activations, and "
        + ", ".join(row["scheme"] for row in data["results"] if not row["passed"])
        + " misses it."
    )


def peers(data: dict[str, Any]) -> Iterator[str]:
    yield "## The methods against other implementations"
    yield (
        f"On the same weights and inputs: all linear layers of the toys, groups of {data['group']}, {data['tokens']} "
        "tokens. The error of our output over theirs (below 1: ours is smaller), and the share of equal weights: "
        f"least, median, largest. `{data['command']}`, in an environment of its own: the packages want other "
        "versions of torch and transformers."
    )
    yield table(
        ("package", "what", "format", "layers", "error, ours / theirs", "equal weights"),
        (
            (
                f"{row['package']} {row['version']}",
                row["what"],
                row["format"],
                row["layers"],
                _spread(row["results"], "error_ratio"),
                _spread(row["results"], "same"),
            )
            for row in data["rows"]
        ),
    )


def _spread(results: dict[str, Any], name: str) -> str:
    found = results.get(name)
    return "" if found is None else " / ".join(f"{found[part]:.3f}" for part in ("min", "median", "max"))
