"""Say which layer differs, by how much, and why.

    from debug import diff

    result = diff("engines/qwen-fp16")                   # against the fp64 reference
    result = diff("hf:fp16", "my.onnx", model="./my-qwen2")   # any two executors
    assert result.aligned, result.culprits                # .verdict, .taps, .to_frame(), .to_json()

    verify.py   the reference against golden cases of the upstream code      record.py   make such a case
    compare.py  an engine against the fp64 reference, tap by tap             metrics.py  the distances
    cli.py      the whole `logitlock` command and the verbs verify, record, diff
    executors/  models that are not ours as engines: transformers, any ONNX decoder, golden cases; open.py opens all
    evaluate/   what models can do: accuracy, perplexity, KL, ROUGE, speed; the verb eval
    report/     a diff as one HTML file that works offline; results.py has to_frame() for pandas

May import at module level: the standard library, torch, safetensors, typer, rich, onnx_ir, onnxruntime, and the
packages refmodels, trt_runtime and export; transformers, plotly and pandas only inside functions.  Nothing imports
debug.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from debug.comparison.results import DiffResult

__all__ = ["diff"]


def diff(*sides: str, model: str | None = None, **options: Any) -> DiffResult:
    """Compare an executor with the fp64 reference, or two executors of one model: `diff(b)` or `diff(a, b)`.

    Args:
        sides: as `logitlock diff` names them (`debug.executors.open.forms_help`).
        model: what they were made from; None: what a side says of itself.
        options: prompts, steps, seed, name_map, emulate_rounding, trust_remote_code (see `debug.sides.diff_sides`).
    Raises:
        LogitLockError: as `debug.sides.diff_sides`; not one or two sides.
    """
    from debug.sides import TRUTH, diff_sides
    from refmodels.errors import LogitLockError

    if len(sides) not in (1, 2):
        raise LogitLockError(f"diff takes one or two sides, got {len(sides)}")
    a, b = sides if len(sides) == 2 else (TRUTH, sides[0])
    return diff_sides(a, b, model=model, **options)
