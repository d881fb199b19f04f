"""The format of a golden case: the results of the upstream code for given inputs and weights."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from refmodels.errors import LogitLockError
from refmodels.json_records import read_json
from refmodels.path_kinds import hint
from refmodels.spec import ModelSpec

_PAST = re.compile(r"past\.(\d+)\.(key|value)")


_INPUTS = ("input_ids", "attention_mask", "position_ids", "decode_ids", "decode_position_ids")


@dataclass(frozen=True, kw_only=True)
class GoldenCase:
    """One case as read from disk: `inputs` (fp32 file) and `expected` (the file of the dtype), by upstream names."""

    directory: Path
    meta: dict[str, Any]
    inputs: dict[str, Tensor]
    expected: dict[str, Tensor]
    file: str


def read_case(directory: Path, dtype: str) -> GoldenCase:
    """Read the files of a case, and check that the required tensors exist."""
    if not directory.is_dir():
        raise LogitLockError(
            f"{directory} is not a directory; a golden case is one with config.json and io.safetensors{hint(directory)}"
        )
    for name in ("config.json", "meta.json", "io.safetensors"):
        if not (directory / name).is_file():
            raise LogitLockError(f"{directory} lacks {name}; a golden case holds config.json, meta.json, "
                                 f"model.safetensors and io.safetensors{hint(directory)}")  # fmt: skip
    file = "io.safetensors" if dtype == "fp32" else f"io_{dtype}.safetensors"
    inputs = _tensors(directory / "io.safetensors")
    if "input_ids" not in inputs:
        raise LogitLockError(f"{directory / 'io.safetensors'} lacks the tensor input_ids")
    if not (directory / file).is_file():
        raise LogitLockError(f"{directory} has no {file}: this case was not recorded in {dtype}")
    expected = inputs if dtype == "fp32" else _tensors(directory / file)
    if "logits" not in expected:
        raise LogitLockError(f"{directory / file} lacks the tensor logits")
    return GoldenCase(
        directory=directory,
        meta=read_json(directory / "meta.json"),
        inputs=inputs | {n: t for n, t in expected.items() if n in _INPUTS},
        expected={n: t for n, t in expected.items() if n not in _INPUTS or n.endswith("position_ids")},
        file=file,
    )


def past_layout(meta: Mapping[str, Any], spec: ModelSpec) -> tuple[str, str, str, str]:
    """Axes of upstream's cache tensors, as letters B, S, H (kv heads), D, in their order.

    From the first bracket of meta's `past_layout`, such as "[S, B, groups, channels]"; without it, the layout that
    the family's upstream code uses.
    """
    text = meta.get("past_layout")
    if text is None:
        if spec.family == "chatglm2":
            return ("S", "B", "H", "D")
        return ("B", "S", "H", "D") if spec.variant == "qwen" else ("B", "H", "S", "D")
    found = re.match(r"\[([^\]]*)\]", str(text))
    axes = [re.sub(r"\(.*?\)", "", part).strip() for part in found[1].split(",")] if found else []
    if len(axes) != 4 or axes.count("B") != 1 or axes.count("S") != 1:
        raise LogitLockError(
            f"meta.json: past_layout {text!r} is not understood; it must begin like '[B, heads, S, head_dim]'"
        )
    rest = iter(("H", "D"))
    order = [axis if axis in ("B", "S") else next(rest) for axis in axes]
    return (order[0], order[1], order[2], order[3])


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]


def _tensors(path: Path) -> dict[str, Tensor]:
    try:
        tensors: dict[str, Tensor] = load_file(path)
    except (SafetensorError, OSError) as error:
        raise LogitLockError(f"{path} cannot be read as safetensors: {error}") from error
    return tensors
