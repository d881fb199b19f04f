"""Reference of bundle.json and of every JSON document that a verb prints, from the dataclasses that make them."""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
from pathlib import Path
from typing import Any

from markdown_of import cell, fenced, table

from debug import bisect, drift
from debug.comparison import baseline, results
from debug.evaluate import results as evaluation
from debug.evaluate import speed, statistics
from debug.golden import verify
from export import precision_plan
from refmodels import spec
from refmodels.quantization import formats
from trt_runtime import bundle
from trt_runtime import plan_layers as layers

MEASURED = Path(__file__).parent.parent / "measured.json"

SECTIONS: dict[str, tuple[str, tuple[type, ...]]] = {
    "The bundle: bundle.json": (
        f"Schema {bundle.SCHEMA}. A bundle is a directory; `bundle.json` lists every other file with its size and "
        "SHA-256. Reading one with another schema, an unknown or missing key, or a file that is missing, changed or "
        "outside the directory is an error before anything runs.",
        (bundle.BundleInfo, bundle.EngineInfo, bundle.Profile, bundle.TensorInfo, bundle.FileInfo),
    ),
    "The architecture: spec": (
        "`spec` in bundle.json; what a family file makes of `config.json`.",
        (
            spec.ModelSpec,
            spec.NormSpec,
            spec.RopeSpec,
            spec.AttentionSpec,
            spec.MlpSpec,
            formats.QuantizationSpec,
            formats.LinearFormat,
        ),
    ),
    "Layers of a plan: engine.layers.json": (
        "What TensorRT's builder said of each plan in a bundle, readable without a GPU.",
        (layers.EngineLayers, layers.PlanLayers, layers.Layer),
    ),
    "logitlock diff --json": (
        f"Schema {results.SCHEMA}. The document has the keys `schema`, `verdict`, `first_wrong_tap`, `culprits`, "
        "`repeats` (faults that several layers share: part, fault, taps, layers, layers without it), `logits`, "
        "`observer_effect`, `taps`, `settings`, and for two executors `other` (side a, the same document) "
        "and `between`. `inputs` has the token ids of the prompts and the seed, `environment` has date, versions "
        "and commit; `baseline` is there with --baseline. NaN and Inf are null.",
        (
            baseline.Changes,
            baseline.TapChange,
            results.Culprit,
            results.Diagnosis,
            results.Evidence,
            results.TokenView,
            results.TapError,
            results.LogitError,
            results.ObserverEffect,
            results.Between,
            results.TapDistance,
        ),
    ),
    "logitlock drift --json": (
        f"Schema {drift.SCHEMA}: `schema`, `steps`, `differences`, `settings`.",
        (drift.DriftStep, drift.FirstDifference),
    ),
    "logitlock eval --json": (
        f"Schema {evaluation.SCHEMA}: `schema`, `model`, `against`, `sides`, `settings`, `notes`.",
        (
            evaluation.SideResult,
            evaluation.TaskResult,
            evaluation.TextResult,
            evaluation.Agreement,
            statistics.Estimate,
            speed.Speed,
        ),
    ),
    "logitlock bisect: precision-plan.json": (
        "What `bisect` writes and `export --precision-plan` reads; `bisect --json` prints the result around it.",
        (precision_plan.PrecisionPlan, bisect.BisectResult),
    ),
    "logitlock verify --json": ("A list with one entry per case.", (verify.CaseResult,)),
}


def schemas_page() -> str:
    """One section a document, one table a dataclass."""
    parts = [
        "# Bundle and JSON schemas",
        "Generated from the dataclasses that write and read these documents, at every build of this page. A document "
        "carries its `schema` number; a change that a reader would notice raises it.",
    ]
    for title, (text, classes) in SECTIONS.items():
        parts += [f"## {title}", text, *(_class(c) for c in classes)]
        if title == "logitlock diff --json":
            parts += ["### An example", *_example()]
    return "\n\n".join(parts) + "\n"


def _example() -> list[str]:
    measured = json.loads(MEASURED.read_text(encoding="utf-8"))["swapped"]
    text = json.dumps(measured["json"], indent=2, ensure_ascii=False)
    return [
        "Gate and up of block 2 exchanged in the Qwen toy's bundle; one of the taps, one of the culprits.",
        fenced(text, "json"),
    ]


def _class(described: type) -> str:
    prose, attributes = split_docstring(inspect.getdoc(described) or "")
    rows = []
    for field in dataclasses.fields(described):  # type: ignore[arg-type]
        meaning = attributes.get(field.name, "")
        rows.append((f"`{field.name}`", f"`{_type(field)}`", cell(meaning)))
    if not any(meaning for _, _, meaning in rows):
        rows = [row[:2] for row in rows]
    columns = ("field", "type", "meaning")[: len(rows[0])]
    text = "\n\n".join(cell(p).replace("`", "`") for p in prose if p and not p.startswith(f"{described.__name__}("))
    return "\n\n".join(part for part in (f"### {described.__name__}", text, table(columns, rows)) if part)


def _type(field: dataclasses.Field[Any]) -> str:
    return field.type if isinstance(field.type, str) else getattr(field.type, "__name__", str(field.type))


def split_docstring(text: str) -> tuple[list[str], dict[str, str]]:
    """Paragraphs, and what is said of each attribute: in an `Attributes:` section or in `name, name: text` sentences.

    A line may describe several attributes, 'tap, phase, step: where'; each of them gets the text.
    """
    prose, _, section = text.partition("\nAttributes:\n")
    found: dict[str, str] = {}
    names: list[str] = []
    for line in inspect.cleandoc(section).splitlines() if section else []:
        entry = re.match(r"^([a-z_0-9]+(?:, [a-z_0-9]+)*): (.*)$", line)
        if entry and not line.startswith(" "):
            names = entry[1].split(", ")
            found |= dict.fromkeys(names, entry[2])
        elif names and line.strip():
            for name in names:
                found[name] += " " + line.strip()
    return [" ".join(p.split()) for p in prose.split("\n\n")], found
