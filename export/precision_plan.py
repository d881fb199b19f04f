"""Which modules of a half-precision engine stay in fp32: what `logitlock bisect` writes and `export` takes.

    {"schema": 1, "precision": "fp16", "float32": ["blocks.3.mlp.out", "logits"]}

A module is a linear layer, named by its tap.  In fp32 its weights are not rounded and its sums are taken in fp32; its
input and its output keep the working dtype, so that every tap does.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path

from refmodels.errors import LogitLockError
from refmodels.records import read_json, read_record
from refmodels.spec import ModelSpec
from refmodels.taps import tap_names
from trt_runtime.bundle import Precision

SCHEMA = 1
_LINEAR = ("attn.qkv", "attn.out", "mlp.gate", "mlp.up", "mlp.out")


@dataclass(frozen=True, kw_only=True)
class PrecisionPlan:
    """precision: of all other modules.  float32: taps of the linear layers that stay in fp32."""

    schema: int = SCHEMA
    precision: Precision
    float32: list[str] = field(default_factory=list)


def linear_taps(spec: ModelSpec) -> list[str]:
    """The modules that a plan may name, in the order of execution; a tied head shares its weight and is not one."""
    names = [n for n in tap_names(spec) if n.split(".", 2)[-1] in _LINEAR]
    return names if spec.tied_head else [*names, "logits"]


def parameters_of(taps: Collection[str], names: Collection[str]) -> set[str]:
    """Those of the parameter `names` that the linear layers at `taps` own."""
    owners = {"head" if tap == "logits" else tap for tap in taps}
    return {name for name in names if name.rpartition(".")[0] in owners}


def write_plan(plan: PrecisionPlan, path: Path) -> None:
    """Raises LogitLockError where `path` cannot be written."""
    try:
        path.write_text(json.dumps(dataclasses.asdict(plan), indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise LogitLockError(f"the precision plan {path} cannot be written: {error.strerror}") from None


def read_plan(path: Path, spec: ModelSpec, precision: Precision) -> PrecisionPlan:
    """Read a plan and check it against the model and the precision of the export.

    Raises:
        LogitLockError: no such file, no plan, another schema or precision, or a module that the model does not have.
    """
    data = read_json(path)
    if data.get("schema") != SCHEMA:
        raise LogitLockError(
            f"{path} has precision plan schema {data.get('schema')!r}, this version reads schema {SCHEMA}"
        )
    plan = read_record(PrecisionPlan, data, str(path))
    if plan.precision != precision:
        raise LogitLockError(f"{path} is a plan for {plan.precision}, but --precision is {precision}")
    if plan.precision == "fp32" and plan.float32:
        raise LogitLockError(f"{path} keeps modules in fp32, but everything is fp32; export it with fp16 or bf16")
    known = set(linear_taps(spec))
    for name in plan.float32:
        if name not in known:
            raise LogitLockError(f"{path} names {name!r}, which is no linear layer of {spec.variant}")
    return plan
