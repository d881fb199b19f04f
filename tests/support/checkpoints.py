"""Model directories for tests: a golden case rewritten into another layout, with other names, dtypes or damage."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import refmodels
from refmodels.checkpoints.weights import to_checkpoint
from tests.support.goldens import GOLDENS

LAYOUTS = ("safetensors", "sharded safetensors", "bin", "sharded bin", "legacy bin")


def read_case(case: str) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, Any] | None]:
    """config.json, the stored tensors, and the variant."""
    folder = GOLDENS / case
    meta = json.loads((folder / "meta.json").read_text())
    return (
        json.loads((folder / "config.json").read_text()),
        load_file(folder / "model.safetensors"),
        meta.get("variant"),
    )


def write_model(
    folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor], layout: str = "safetensors", shards: int = 3
) -> Path:
    """A model directory in one of `LAYOUTS`; tensors go to the shards in turn."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    stem, suffix = ("pytorch_model", ".bin") if layout.endswith("bin") else ("model", ".safetensors")
    if not layout.startswith("sharded"):
        _write(folder / f"{stem}{suffix}", tensors, legacy=layout == "legacy bin")
        return folder
    weight_map = {name: f"{stem}-{i % shards + 1:05}-of-{shards:05}{suffix}" for i, name in enumerate(tensors)}
    for file in sorted(set(weight_map.values())):
        _write(folder / file, {n: t for n, t in tensors.items() if weight_map[n] == file})
    write_index(folder, weight_map, stem=f"{stem}{suffix}")
    return folder


def write_index(folder: Path, weight_map: object, stem: str = "model.safetensors") -> None:
    (folder / f"{stem}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def _write(file: Path, tensors: dict[str, Tensor], *, legacy: bool = False) -> None:
    if file.suffix == ".bin":
        torch.save(tensors, file, _use_new_zipfile_serialization=not legacy)
    else:
        save_file(tensors, file)


def stored_again(decoder: refmodels.Decoder) -> dict[str, Tensor]:
    """The parameters of a loaded model under their names upstream: what its checkpoint must have held."""
    table = refmodels.FAMILIES[decoder.spec.family].weights(decoder.spec)
    return to_checkpoint(table, dict(decoder.named_parameters()))
