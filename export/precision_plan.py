"""Precision plans: modules with another precision than the rest.  `bisect` writes them, `export` and `quantize` read.

    {"schema": 1, "precision": "fp16", "float32": ["blocks.3.mlp.out", "logits"]}
    {"schema": 1, "precision": "int4-awq", "schemes": {"blocks.0.*": "int8", "blocks.*.mlp.out": null}}

A module is a linear layer, named by its tap.  In fp32 its weights are not rounded and its sums are taken in fp32; its
input and its output keep the working dtype, so that every tap does.  `schemes` gives layers another quantization, or
none (null), by patterns (* and ?); the last one that matches counts.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Collection
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path

from export.precision import SCHEMES
from refmodels.errors import LogitLockError
from refmodels.files import check_file_output, write_text
from refmodels.json_records import read_json, read_record
from refmodels.spec import ModelSpec
from trt_runtime.bundle import Precision

SCHEMA = 1
_WHAT, _MARK = "precision plan", '"float32": ['


@dataclass(frozen=True, kw_only=True)
class PrecisionPlan:
    """precision: of all other modules, a dtype or a scheme.  float32: taps of the linear layers that stay in fp32.
    schemes: of quantization, by pattern of taps."""

    schema: int = SCHEMA
    precision: str
    float32: list[str] = field(default_factory=list)
    schemes: dict[str, str | None] = field(default_factory=dict)


def linear_taps(spec: ModelSpec) -> list[str]:
    """The modules that a plan may name, in the order of execution; a tied head shares its weight and is not one."""
    own = set(spec.linears)
    return [tap.name for tap in spec.taps.values() if tap.kind == "linear" and tap.module in own]


def parameters_of(spec: ModelSpec, taps: Collection[str], names: Collection[str]) -> set[str]:
    """Those of the parameter `names` that the linear layers at `taps` own."""
    owners = {spec.taps[tap].module for tap in taps}
    return {name for name in names if name.rpartition(".")[0] in owners}


def check_plan_output(path: Path) -> None:
    """Raise LogitLockError if `write_plan` cannot write there."""
    check_file_output(path, _WHAT, _MARK)


def write_plan(plan: PrecisionPlan, path: Path) -> None:
    """Raises LogitLockError where `path` cannot be written."""
    content = {name: value for name, value in dataclasses.asdict(plan).items() if value or name != "schemes"}
    write_text(path, json.dumps(content, indent=1) + "\n", _WHAT, _MARK)


def read_plan(path: Path, spec: ModelSpec, precision: Precision) -> PrecisionPlan:
    """Read a plan and check it against the model and the precision of the export.

    Raises:
        LogitLockError: there is no such file, it is no plan, it has another schema or precision, or it names a module
            that the model does not have.
    """
    plan = _read(path)
    if plan.schemes or plan.precision in SCHEMES:
        raise LogitLockError(
            f"{path} is a plan for {plan.precision} that quantizes layers: it is for `logitlock quantize "
            f"--precision-plan`; a plan for export keeps layers in fp32 beside {precision}"
        )
    _check_precision(path, plan, precision)
    if plan.precision == "fp32" and plan.float32:
        raise LogitLockError(f"{path} keeps modules in fp32, but everything is fp32; export it with fp16 or bf16")
    known = set(linear_taps(spec))
    for name in plan.float32:
        if name not in known:
            raise LogitLockError(f"{path} names {name!r}, which is no linear layer of {spec.variant}")
    return plan


def read_schemes(path: Path, spec: ModelSpec, scheme: str | None) -> dict[str, str | None]:
    """The layers, by their names in `Decoder`, that a plan gives another scheme than `scheme`; None: no quantization.

    Raises:
        LogitLockError: as `read_plan`; the plan keeps layers in fp32; a pattern matches no layer.
    """
    plan = _read(path)
    _check_precision(path, plan, scheme)
    if plan.float32:
        raise LogitLockError(f"{path} keeps modules in fp32, which a quantized model cannot; give them null in schemes")
    found: dict[str, str | None] = {}
    for pattern, other in plan.schemes.items():
        matching = [name for name in linear_taps(spec) if fnmatchcase(name, pattern)]
        if not matching:
            raise LogitLockError(f"{path} names {pattern!r}, which matches no linear layer of {spec.variant}")
        found |= {spec.taps[name].module: other for name in matching}
    return found


def _read(path: Path) -> PrecisionPlan:
    data = read_json(path)
    if data.get("schema") != SCHEMA:
        raise LogitLockError(
            f"{path} has precision plan schema {data.get('schema')!r}, this version reads schema {SCHEMA}"
        )
    return read_record(PrecisionPlan, data, str(path))


def _check_precision(path: Path, plan: PrecisionPlan, precision: str | None) -> None:
    if plan.precision != precision:
        raise LogitLockError(f"{path} is a plan for {plan.precision}, but --precision is {precision}")
