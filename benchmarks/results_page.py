"""Write benchmarks/RESULTS.md from the JSON files in benchmarks/results: every number there comes from one of them.

python benchmarks/results_page.py            # write the page
python benchmarks/results_page.py --check    # exit code 1 if the page is not what the files say
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from results_quantization import memory, on_a_gpu, on_the_cpu, peers, seconds_a_layer
from results_real import real_model
from results_table import table

HERE = Path(__file__).parent
PAGE = HERE / "RESULTS.md"
INTRO = """# Results

Made by `python benchmarks/results_page.py` from `benchmarks/results/*.json`, which the scripts named below write,
and what was noted beside them (`results/*.md`). GPU numbers are medians of one run on an NVIDIA H200, in CUDA
graphs, with inputs rotated so that the L2 cache does not hold them.
"""


def attention(data: dict[str, Any]) -> Iterator[str]:
    yield "## Attention kernels"
    yield (
        "Ours includes the rotation of query and key and the cache write; SDPA is given rotated tensors and writes no "
        "cache. Shapes are batch x heads/kv_heads x slots, head_dim 128. 'of a read': a kernel that only reads the "
        f"same bytes, over ours. A long read runs at {data['read_bandwidth_tb_s']:.2f} TB/s in this run. "
        f"`{data['command']}`, torch {data['torch']}, triton {data['triton']}."
    )
    rows = []
    for r in data["rows"]:
        flash = r["sdpa_us"].get("flash")
        rows.append(
            (
                r["kind"],
                r["dtype"],
                r["shape"],
                f"{r['ours_us']:.1f}",
                f"{flash:.1f}" if isinstance(flash, float) else "–",
                f"{r['sdpa_us'][r['best']]:.1f} ({r['best']})",
                f"{r['flash_over_ours']:.2f} x",
                f"{r['best_over_ours']:.2f} x",
                f"{r['bandwidth_fraction']:.0%}" if r.get("bandwidth_fraction") else "",
                f"{r['read_over_ours']:.0%}" if r.get("read_over_ours") else "",
            )
        )
    yield table(
        ("", "dtype", "shape", "ours µs", "SDPA flash µs", "SDPA best µs", "flash / ours", "best / ours",
         "of a long read", "of a read"),
        rows,
    )  # fmt: skip


def rms_norm(data: dict[str, Any]) -> Iterator[str]:
    yield "## RMSNorm kernel"
    yield (
        f'{data["width"]} wide; "of bandwidth": bytes read and written over the best bandwidth of the run '
        f"({max(data['bytes_per_second'].values()) / 1e12:.2f} TB/s). `{data['command']}`, torch {data['torch']}, "
        f"triton {data['triton']}."
    )
    rows = []
    for r in data["results"]:
        us = {name: values[0] for name, values in r["microseconds"].items()}
        rows.append(
            (
                r["rows"],
                r["dtype"],
                f"{us['F.rms_norm']:.2f}",
                f"{us['eager']:.2f}",
                f"{us['ours']:.2f}",
                f"{us['ours, int8 as well']:.2f}",
                f"{us['ours, fp8 as well']:.2f}",
                f"{r['ratio']:.2f}",
                f"{r['of_bandwidth']:.0%}",
            )
        )
    yield table(
        ("rows", "dtype", "F.rms_norm µs", "eager µs", "ours µs", "+ int8 µs", "+ fp8 µs", "ours / F.rms_norm",
         "of bandwidth"),
        rows,
    )  # fmt: skip


def generation(data: dict[str, Any]) -> Iterator[str]:
    versions = data["versions"]
    yield "## Generation on a GPU"
    yield (
        "Random fp16 weights in the shapes of Qwen-7B and ChatGLM2-6B, prompts of 128 tokens, greedy, against "
        f'transformers {versions["transformers"]}. "of the limit": of reading every weight and live cache entry once a '
        f"step. `python benchmarks/gpu_generate.py`, torch {versions['torch']}; where the rest goes is in "
        "`results/gpu_generate_profile.json`."
    )
    rows = []
    for name, entry in data.items():
        if name == "versions":
            continue
        for batch, ours in entry["ours"].items():
            rows.append(
                (
                    name, batch, "ours", f"{ours['tokens_per_second']:.0f}", f"{ours['step_ms']:.2f}",
                    f"{ours['fraction_of_limit']:.0%} of {ours['limit_tokens_per_second']:.0f}",
                    f"{ours['first_token_ms']:.1f}", f"{ours['peak_gb']:.1f}",
                )
            )  # fmt: skip
            for mode in ("compiled", "eager"):
                peer = entry.get(mode, {}).get(batch)
                if peer is None:
                    continue
                if "error" in peer:
                    rows.append((name, batch, f"transformers {mode}", "failed", "", "", "", ""))
                    continue
                rows.append(
                    (
                        name, batch, f"transformers {mode}", f"{peer['tokens_per_second']:.0f}",
                        f"{peer['step_ms']:.2f}", "", f"{peer['first_token_ms']:.1f}", f"{peer['peak_gb']:.1f}",
                    )
                )  # fmt: skip
    yield table(("shape", "batch", "", "tokens/s", "ms/step", "of the limit", "first token ms", "peak GB"), rows)


def builds(data: dict[str, Any]) -> Iterator[str]:
    limits = data["limits"]
    yield "## Building TensorRT plans without a GPU"
    yield (
        f"TensorRT-RTX {data['tensorrt_rtx']}, {data['machine']['cores']} cores, random fp16 weights, batch "
        f'{limits["max_batch"]}, input {limits["max_input"]}, cache {limits["max_seq"]}; "plain" is the ONNX parser on '
        "the same file without our options. CPU seconds, because the machine was shared. "
        "`python benchmarks/tensorrt_build.py`."
    )
    yield table(
        ("model", "attention", "build", "CPU s", "wall s", "load", "peak GB", "weights GB", "plan GB"),
        (
            (
                r["model"], r["attention"], r["build"], f"{r['cpu_seconds']:.1f}", f"{r['seconds']:.1f}",
                f"{r['load']:.1f}", f"{r['peak_resident_bytes'] / 1e9:.2f}", f"{r['weights_bytes'] / 1e9:.2f}",
                f"{r['plan_bytes'] / 1e9:.2f}",
            )
            for r in data["results"]
        ),
    )  # fmt: skip


def mutations(data: dict[str, Any]) -> Iterator[str]:
    mutants = data["mutants"]
    yield "## Planted faults"
    yield (
        f"Every fault of `tests/support/mutations.py` at a random layer of an exported graph: {len(mutants)} mutants, "
        f"the right tap first in {data['rates']['tap']:.1%}, the right fault first in {data['rates']['name']:.1%}. "
        f"`python benchmarks/diff_mutations.py --seed {data['seed']}`."
    )
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for m in mutants:
        groups.setdefault((m["model"], m["precision"]), []).append(m)
    yield table(
        ("model", "precision", "mutants", "right tap", "right name", "missed"),
        (
            (
                *key, len(found), f"{sum(m['tap'] for m in found) / len(found):.1%}",
                f"{sum(m['name'] for m in found) / len(found):.1%}",
                ", ".join(m["mutation"] for m in found if not m["name"]),
            )
            for key, found in groups.items()
        ),
    )  # fmt: skip


def noise(data: dict[str, Any]) -> Iterator[str]:
    rows = data["rows"]
    yield "## Clean engines"
    yield (
        f"{data['prompts']} prompts for each of {len(rows)} combinations of toy, precision, numerics and rounding: "
        f"{sum(r['alarms'] for r in rows)} false alarms; the largest local error is "
        f"{max(r['local_floors'] for r in rows):.2f} noise floors (alarm at {data['multiple']:g}). "
        "`python benchmarks/diff_noise.py --batches 17`."
    )


def cost(data: dict[str, Any]) -> Iterator[str]:
    diff, plain = data["diff"], data["plain"]
    yield "## What a diff costs"
    yield (
        f"A 200 M-parameter fp16 bundle, {data['tokens']} + {data['steps']} tokens, 2 threads: {diff['seconds']:.1f} "
        f"s, {data['ratio']:.2f} x the plain forwards that it needs (engine {plain['engine']:.2f} s, fp64 reference "
        f"{plain['reference']:.2f} s), {diff['taps']} taps compared, peak memory {diff['peak_bytes'] / 1e9:.2f} GB "
        f"({data['peak_models']:.2f} x the weights). `python benchmarks/diff_cost.py --polygraphy`."
    )
    if "polygraphy" in data:
        peer = data["polygraphy"]
        yield (
            f"Polygraphy's mark-all on the same file: {peer['seconds']:.2f} s, {peer['peak_bytes'] / 1e9:.2f} GB for "
            f"one prefill of the engine alone, {peer['values']} values, with nothing to compare them with, no decode "
            "step and no cache."
        )


GOALS = {
    "int8": 0.5,
    "int4-awq, groups of 64": 2.0,
    "int4-gptq, groups of 64": 2.0,
    "smoothquant, per token": 0.5,
    "fp8, per token": 0.5,
    "KV cache int8": 0.5,
}
"""Points of accuracy that a scheme may lose, of the mean over the tasks of each toy."""


def fidelity(data: dict[str, Any]) -> Iterator[str]:
    settings, toys = data["settings"], data["toys"]
    names = list(next(iter(toys.values()))["schemes"])
    yield "## Fidelity of the schemes of quantization"
    yield (
        f"The bundled toys, up to {settings['limit']} held-out examples a task (the finite tasks whole), against their "
        "fp32 bundles on the same examples: points of accuracy lost as the mean over the eight tasks, with its "
        f"interval of 95 %, and KL in nats and top-1 over every token of {settings['compared']} examples a task. KL "
        f"of the fp32 bundles to the fp64 reference is at most {max(t['baseline_kl'] for t in toys.values()):.0e}. "
        "What is not quantized is fp32; embedding and head are not quantized. Bundles on ONNX Runtime "
        f"{data['versions']['onnxruntime']}; `{data['command']}`."
    )
    rows = []
    for name in names:
        found = {toy: entry["schemes"][name] for toy, entry in toys.items()}
        losses = [_interval(each["loss"]) for each in found.values()]
        rows.append((name, *losses, f"≤ {GOALS[name]:g}" if name in GOALS else "", _goal(found, GOALS.get(name))))
    yield table(("points lost", *toys, "goal", "met"), rows)
    yield table(
        ("mean KL", *toys, "top-1 %, least", "weights MB"),
        (
            (
                name,
                *(f"{entry['schemes'][name]['agreement']['kl_mean']:.2e}" for entry in toys.values()),
                f"{100 * min(entry['schemes'][name]['agreement']['top1'] for entry in toys.values()):.2f}",
                f"{sum(entry['schemes'][name]['weight_bytes'] for entry in toys.values()) / len(toys) / 1e6:.2f}",
            )
            for name in names
        ),
    )
    yield _theory(toys, data["rounding_errors"])
    yield "Addition again, the task in which most answers change, with more examples; points lost:"
    yield table(
        (f"{next(iter(next(iter(toys.values()))['sums'].values()))['count']} sums", *toys),
        (
            (name, *(_interval(entry["sums"][name]["loss"]) for entry in toys.values()))
            for name in names
            if name.startswith("int")
        ),
    )
    worst = [
        (100 * task["loss"]["value"], toy, name, kind, task)
        for toy, entry in toys.items()
        for name, side in entry["schemes"].items()
        for kind, task in side["tasks"].items()
    ]
    yield "The tasks that lose most:"
    yield table(
        ("toy", "scheme", "task", "right before", "right", "of"),
        (
            (toy, name, kind, toys[toy]["baseline"]["tasks"][kind]["correct"], task["correct"], task["count"])
            for _, toy, name, kind, task in sorted(worst, key=lambda row: -row[0])[:8]
        ),
    )


def _theory(toys: dict[str, Any], errors: dict[str, float]) -> str:
    """KL grows with the square of the relative error of what is rounded."""

    def ratios(above: str, below: str) -> str:
        kl = [[entry["schemes"][name]["agreement"]["kl_mean"] for name in (above, below)] for entry in toys.values()]
        return ", ".join(f"{a / b:.3g}" for a, b in kl)

    def inputs(code: str) -> str:
        found = [entry["input_errors"][code] for entry in toys.values()]
        return f"{min(found):.1%} to {max(found):.1%}"

    int4, fp8 = ((errors[code] / errors["int8"]) ** 2 for code in ("int4", "fp8"))
    both = [
        sum(e["fp8"] ** 2 for e in (errors, entry["input_errors"]))
        / sum(e["int8"] ** 2 for e in (errors, entry["input_errors"]))
        for entry in toys.values()
    ]
    gptq, awq = (ratios("int4, groups of 64", f"int4-{method}, groups of 64") for method in ("gptq", "awq"))
    return (
        "Against theory: KL is of second order in the logits' error, so it should grow with the square of what "
        "rounding does to weights and inputs. Normal random rows of 128 numbers have a relative error of "
        f"{errors['int8']:.2%} in int8, {errors['int4']:.1%} in int4 (groups of 64), {errors['fp8']:.2%} in fp8, "
        f"the toys' inputs, with outliers that cost int8 but not fp8, {inputs('int8')} in int8 and {inputs('fp8')} in "
        f"fp8. So int4 should have {int4:.0f} x the KL of int8: measured {ratios('int4, groups of 64', 'int8')} "
        f"({', '.join(toys)}). fp8 should have {min(both):.1f} to {max(both):.1f} x that of int8 weights and inputs, "
        f"and up to {fp8:.0f} x where SmoothQuant takes the outliers away: measured "
        f"{ratios('fp8, per token', 'smoothquant, per token')}. Rounding to nearest has {awq} x the KL of AWQ, and "
        f"{gptq} x that of GPTQ."
    )


def _interval(loss: dict[str, float]) -> str:
    value, low, high = (100 * loss[part] for part in ("value", "low", "high"))
    return f"{value:+.2f} ({low:+.2f} to {high:+.2f})"


def _goal(found: dict[str, dict[str, Any]], goal: float | None) -> str:
    """Whether every toy meets a goal, and which do not."""
    if goal is None:
        return ""
    missed = [toy for toy, each in found.items() if 100 * each["loss"]["value"] > goal]
    return "yes" if not missed else f"not {', '.join(missed)}"


SECTIONS = {
    "gpu_attention": attention,
    "gpu_rms_norm": rms_norm,
    "gpu_generate": generation,
    "tensorrt_build": builds,
    "diff_mutations": mutations,
    "diff_noise": noise,
    "diff_cost": cost,
    "fidelity": fidelity,
    "cpu_quantized": on_the_cpu,
    "gpu_quantized": on_a_gpu,
    "quantization_time": seconds_a_layer,
    "quantize_memory": memory,
    "quantization_peers": peers,
    "real_model": real_model,
}


def page() -> str:
    parts = [INTRO.strip()]
    for name, section in SECTIONS.items():
        parts += section(json.loads((HERE / "results" / f"{name}.json").read_text()))
        notes = HERE / "results" / f"{name}.md"
        if notes.is_file():
            parts.append(notes.read_text(encoding="utf-8").strip())
    return "\n\n".join(parts) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    if not parser.parse_args().check:
        PAGE.write_text(page(), encoding="utf-8")
    elif PAGE.read_text(encoding="utf-8") != page():
        sys.exit(f"{PAGE} is not what the results say; run python {Path(__file__).name}")


if __name__ == "__main__":
    main()
