"""Tables of facts and numbers: from specs, from `docs/measured.json`, and from `benchmarks/results`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from markdown_of import table

import refmodels
from refmodels.toys import TOYS, toy_path

DOCS = Path(__file__).parent.parent
GOLDENS = DOCS.parent / "tests" / "goldens"
MEASURED = DOCS / "measured.json"

_VARIANTS = {
    "ChatGLM2": "chatglm2",
    "ChatGLM2-32k": "chatglm2_32k",
    "Baichuan 7B": "baichuan_7b",
    "Baichuan 13B": "baichuan_13b",
    "Baichuan2 7B": "baichuan2_7b",
    "Baichuan2 13B": "baichuan2_13b",
    "Qwen": "qwen_ntk",
    "Qwen2": "qwen2",
    "Qwen3": "qwen3_yarn_b1",
    "Llama 3": "llama3",
    "Mistral": "mistral",
    "GLM-4 (own class)": "glm_hf",
    "GLM-4-0414": "glm4_hf",
    "GPT-2": "gpt2",
    "GPTBigCode": "gpt_bigcode",
    "StarCoder2": "starcoder2_sliding",
}


def measured() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(MEASURED.read_text(encoding="utf-8"))
    return found


def facts() -> str:
    """The differences between the families, from the specs that their configs give."""
    rows = []
    for name, case in _VARIANTS.items():
        meta = json.loads((GOLDENS / case / "meta.json").read_text(encoding="utf-8"))
        spec = refmodels.resolve(GOLDENS / case, variant=meta.get("variant")).spec
        a, r = spec.attention, spec.rope
        position = spec.position
        if r is not None:
            share = "whole head" if r.dim == a.head_dim else "half of the head"
            position = f"rope, {share}, {'pairs' if r.interleaved else 'halves'}"
        table_of = {"float32": "fp32", "working": "fp32, then cast", "working_arithmetic": "all in half"}
        heads = "all" if a.kv_heads == a.heads else "one" if a.kv_heads == 1 else "groups"
        rows.append(
            (
                name,
                f"{'RMS' if spec.norm.kind == 'rms' else 'Layer'}"
                + (", weight before the cast" if spec.norm.weight_in_float else ""),
                position,
                table_of[r.table] if r is not None else "",
                heads,
                f"{'gated ' if spec.mlp.gated else ''}{spec.mlp.activation}",
                "tied" if spec.tied_head else "NormHead" if spec.head_normalized else "own",
                ", ".join(
                    fact
                    for fact, there in (
                        ("dynamic NTK", spec.uses_ntk),
                        ("norms of heads", a.head_norms),
                        ("norms of what is added", spec.sandwich_norms),
                        ("logn", a.logn_seq_length is not None),
                        ("window", a.window is not None),
                        ("qkv bias", a.qkv_bias),
                        ("positions by slot", spec.position_origin == "slot"),
                    )
                    if there
                ),
            )
        )
    return table(("model", "norm", "position", "upstream's table", "kv heads", "MLP", "head", "also"), rows)


def verified() -> str:
    """Fidelity to upstream, of `logitlock verify` on every golden case."""
    rows = []
    for family, found in measured()["verify"].items():
        rows.append(
            (
                family,
                f"{found['cases']}",
                f"{found['passed']}",
                f"{found['worst']:.1e}" if found["worst"] else "0",
                f"{found['bf16_exact']} of {found['bf16']}",
                f"{found['fp16_exact']} of {found['fp16']}" if found["fp16"] else "",
            )
        )
    head = ("family", "cases", "pass in fp32", "largest difference", "bf16 files bit for bit", "fp16")
    return table(head, rows)


def rope_tables() -> str:
    """How far ChatGLM2's half-precision rope table is from the right one."""
    found = measured()["rope_table"]
    rows = [(dtype, *(f"{error:.2g}" for error in errors.values())) for dtype, errors in found.items()]
    return table(("dtype", *(f"below {n}" for n in next(iter(found.values())))), rows)


def toys() -> str:
    """Exact match of the toys on held-out examples, from their reports."""
    reports = {n: json.loads((toy_path(n) / "report.json").read_text(encoding="utf-8")) for n in TOYS}
    tasks = next(iter(reports.values()))["accuracy"]
    rows = [(task, *(f"{100 * report['accuracy'][task]:.1f}" for report in reports.values())) for task in tasks]
    return table(("task", *reports), rows)


def results() -> str:
    """The sections of benchmarks/RESULTS.md, without its title."""
    text = (DOCS.parent / "benchmarks" / "RESULTS.md").read_text(encoding="utf-8")
    return text.removeprefix("# Results\n").strip()


TABLES: dict[str, Callable[[], str]] = {f.__name__: f for f in (facts, verified, rope_tables, toys, results)}
