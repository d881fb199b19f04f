"""The verb `models`."""

from __future__ import annotations

import json
from typing import Any

from rich.table import Table

from refmodels import toys
from refmodels.checkpoints.load import TOYS, parameter_shapes, resolve
from refmodels.command import JsonFlag
from refmodels.families import FAMILIES
from refmodels.terminal import new_console


def models(json_output: JsonFlag = False) -> None:
    """List the model families, the published models they cover, and the bundled toys.

    Example: logitlock models --json
    """
    rows = [_describe(name) for name in FAMILIES]
    if json_output:
        print(json.dumps({"families": rows}, ensure_ascii=False, indent=2))
        return
    table = Table("family", "covers", "model_type", "bundled toy")
    for row in rows:
        toy = row["toy"]
        table.add_row(
            row["name"],
            row["covers"],
            ", ".join(row["model_types"]),
            f"{toy['parameters']:,} parameters, {toy['layers']} layers, vocabulary {toy['vocab_size']:,}, "
            f"{toy['max_positions']:,} positions"
            if toy
            else ("not in this installation" if row["name"] in toys.TOYS else "none"),
        )
    new_console().print(table)


def _describe(name: str) -> dict[str, Any]:
    family = FAMILIES[name]
    toy = None
    if (TOYS / name / "config.json").is_file():
        spec = resolve(name).spec
        toy = {
            "variant": spec.variant,
            "parameters": sum(shape.numel() for shape in parameter_shapes(spec).values()),
            "layers": spec.layers,
            "hidden_size": spec.hidden_size,
            "vocab_size": spec.vocab_size,
            "max_positions": spec.max_positions,
        }
    return {"name": name, "covers": family.describes, "model_types": list(family.model_types), "toy": toy}
