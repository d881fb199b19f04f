"""The section of RESULTS.md on a real published model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from results_table import table


def real_model(data: dict[str, Any]) -> Iterator[str]:
    versions = data["versions"]
    yield "## A real model"
    yield (
        "Qwen2.5-Coder-0.5B-Instruct, as its published Q4_K_M file dequantizes to bf16, on a CPU with "
        f"{data['threads']} threads. Quantized bundles keep in fp32 what is not quantized. torch {versions['torch']}, "
        f"transformers {versions['transformers']}, ONNX Runtime {versions['onnxruntime']}; `{data['command']}`. The "
        "machine was shared with other work, so that seconds are upper limits; ratios are of one run."
    )
    if "logits" in data:
        yield from _logits(data["logits"], data.get("greedy"))
    if "export" in data:
        yield from _schemes(data)
    if "diff" in data:
        yield from _diffs(data["diff"])
    if "speed" in data:
        yield from _speed(data["speed"])


def _logits(logits: dict[str, Any], greedy: dict[str, Any] | None) -> Iterator[str]:
    lengths = [row["tokens"] for row in logits["rows"]]
    yield (
        f"Logits of the reference in fp32 against transformers: largest difference {logits['max_abs']:.1e} over "
        f"{len(lengths)} prompts of {min(lengths)} to {max(lengths)} tokens (bound 1e-4; the largest logit is "
        f"{max(row['largest_logit'] for row in logits['rows']):.1f})."
    )
    if greedy is not None:
        same = ", ".join(
            f"{row['same_tokens']} of {greedy['prompts']} by the {name}" for name, row in greedy["executors"].items()
        )
        yield (
            f"Greedy answers with the tokens of transformers: {same} ({greedy['tokens']} tokens; {greedy['ended']} "
            f"answers end with a stop id). Prompt ids equal, half of them by the chat template: "
            f"{greedy['same_prompt_ids']} of {greedy['prompts']}."
        )
    yield "Outliers: of each kind of tensor the one with the largest entry, over the longest prompt."
    yield table(
        ("tensor", "largest entry", "token", "channel", "largest / token's rms", "largest rms / median rms"),
        (
            (
                row["tap"],
                f"{row['largest']:.1f}",
                row["token"],
                row["channel"],
                f"{row['over_token_rms']:.0f}",
                f"{row['rms_largest_over_median']:.1f}",
            )
            for row in logits["outliers"].values()
        ),
    )


def _schemes(data: dict[str, Any]) -> Iterator[str]:
    code = data.get("code", {})
    rows = []
    exports = data["export"]
    for scheme in {**exports, **code}:
        row, found = exports.get(scheme, {}), code.get(scheme, {})
        agreement = found.get("agreement")
        rows.append(
            (
                scheme,
                f"{row['bytes'] / 1e6:.0f}" if row else "",
                f"{row['seconds']:.0f}" if row else "",
                f"{row['peak_bytes'] / 1e9:.1f}" if row else "",
                f"{agreement['kl_mean']:.1e}" if agreement else "",
                f"{agreement['top1']:.1%}" if agreement else "",
                f"{found['perplexity']:.3f}" if found else "",
                f"{found['passed']} of {found['tasks']}" if found else "",
            )
        )
    calibrated = {row["calibration_tokens"] for row in exports.values() if "calibration_tokens" in row}
    tokens = next((row["text_tokens"] for row in code.values()), 0)
    yield (
        f"Bundles: KL (nats) and top-1 against the fp32 bundle and perplexity over {tokens} tokens of Python, and how "
        "many of small Python functions greedy completion makes pass their asserts."
        + "".join(f" The calibration of int4 is modest: {count} tokens of source code." for count in calibrated)
    )
    columns = ("bundle MB", "export s", "peak GB", "mean KL", "same top-1", "perplexity", "functions right")
    yield table(("", *columns), rows)


def _diffs(diffs: dict[str, Any]) -> Iterator[str]:
    first = next(iter(diffs.values()))
    yield (
        f"`logitlock diff` of each bundle: the largest local error in noise floors (alarm at {first['multiple']:g}), "
        "of the norms as well, and the KL of the logits beside that of the reference in the same dtype."
    )
    rows = []
    for scheme, row in diffs.items():
        norm = max((kind for name, kind in row["kinds"].items() if "norm" in name), key=lambda kind: kind["ratio"])
        rows.append(
            (
                scheme,
                row["verdict"],
                f"{row['worst']['ratio']:.2f} ({row['worst']['tap']})",
                f"{norm['ratio']:.2f} ({norm['tap']})",
                f"{row['logits']['kl_mean']:.1e}",
                f"{row['logits']['floor_kl_mean']:.1e}",
                f"{row['seconds']:.0f}",
                f"{row['peak_bytes'] / 1e9:.1f}",
            )
        )
    yield table(("", "verdict", "largest", "norms", "mean KL", "floor's KL", "s", "peak GB"), rows)


def _speed(speed: dict[str, Any]) -> Iterator[str]:
    absent = "".join(f" {name} was absent ({what})." for name, what in speed["absent"].items())
    versions = ", ".join(f"{name} {version}" for name, version in sorted(speed["versions"].items()))
    bands = [value for group in speed["groups"].values() for value in group["bandwidth_gb_s"]]
    loads = [value for group in speed["groups"].values() for value in group["load_average"]]
    yield (
        "Tokens per second at batch 1 beside other runtimes, each with its own conversion and defaults: prefill of "
        f"128 tokens, 32 decode steps, {speed['rounds']} rounds in turns. Ratios are medians of those within a "
        f"round; the machine's bandwidth moved from {min(bands):.0f} to {max(bands):.0f} GB/s and its load average "
        f"from {min(loads):.1f} to {max(loads):.1f} in the run. {versions}; {speed['processor']}.{absent}"
    )
    rows = []
    for precision, group in speed["groups"].items():
        for name, row in group["rows"].items():
            over = group["ours_over"].get(name)
            rows.append(
                (
                    precision,
                    name,
                    f"{row['prefill_tokens_per_s']:.0f}",
                    f"{row['decode_tokens_per_s']:.1f}",
                    f"{over['prefill']:.2f} x" if over else "",
                    f"{over['decode']:.2f} x" if over else "",
                    f"{row['load_s']:.1f}",
                    f"{row['peak_bytes'] / 1e9:.1f}",
                    "yes" if row["same_tokens_as_logitlock"] else "no",
                )
            )
    columns = ("prefill tokens/s", "decode tokens/s", "ours / it, prefill", "ours / it, decode", "load s", "peak GB")
    yield table(("", "", *columns, "our tokens"), rows)
