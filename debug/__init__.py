"""Say which layer differs, by how much, and why.

    from debug import diff

    result = diff("engines/qwen-fp16")                        # against the fp64 reference
    result = diff("hf:fp16", "my.onnx", model="./my-qwen2")   # any two executors
    assert result.aligned, result.culprits                    # .verdict, .taps, .to_frame(), .to_json()

    sides.py     executors, models and prompts named by text, opened and compared; `diff` itself
    options.py   options of opening, running and comparing
    executors/   models of others as engines: transformers, any ONNX decoder, golden cases
    capture/     runs of an engine with every tap recorded, in memory or as trace files
    comparison/  errors tap by tap, noise floors, diagnosis by the catalogue of faults
    drift.py     errors per decode step                 bisect.py   the fewest layers to keep in fp32
    golden/      golden cases and checking them         record.py   recording a golden case
    evaluate/    accuracy, perplexity, KL, ROUGE, speed; the verb eval
    check/       the facts of a checkpoint before any run; the verb check
    report/      results as tables and as one HTML page that works offline
    environment.py    versions, devices and abilities of this machine
    pytest_plugin.py  the fixture assert_aligned for tests of other projects
    command.py   the whole `logitlock` command
    cli.py       the verbs verify, record, diff, trace, drift, bisect and env

May import at module level: the standard library, torch, safetensors, typer, rich, onnx_ir, onnxruntime, and the
packages refmodels, trt_runtime and export; transformers, plotly and pandas only inside functions.  Nothing imports
debug.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from refmodels.lazy import public_names

if TYPE_CHECKING:
    from debug.bisect import BisectResult as BisectResult
    from debug.bisect import find_precision_plan as find_precision_plan
    from debug.capture.prompts import Prompts as Prompts
    from debug.capture.prompts import left_padded as left_padded
    from debug.comparison.metrics import kl_divergence as kl_divergence
    from debug.comparison.metrics import top_margin as top_margin
    from debug.comparison.results import DiffResult as DiffResult
    from debug.comparison.results import verdict_line as verdict_line
    from debug.drift import DriftResult as DriftResult
    from debug.drift import measure_drift as measure_drift
    from debug.evaluate.options import EvaluateOptions as EvaluateOptions
    from debug.evaluate.results import EvaluationResult as EvaluationResult
    from debug.evaluate.run import evaluate_model as evaluate_model
    from debug.evaluate.toys import toy_accuracies as toy_accuracies
    from debug.evaluate.toys import without_long_context as without_long_context
    from debug.golden.verify import CaseResult as CaseResult
    from debug.golden.verify import add_up_as_recorded as add_up_as_recorded
    from debug.golden.verify import has_recorded_order as has_recorded_order
    from debug.golden.verify import verify_case as verify_case
    from debug.options import DiffOptions as DiffOptions
    from debug.record import record_case as record_case
    from debug.report.report import write_report as write_report
    from debug.report.tables import print_diff as print_diff
    from debug.sides import diff as diff
else:
    __all__, __getattr__, __dir__ = public_names(globals())
