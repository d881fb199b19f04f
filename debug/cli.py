"""The verbs verify, record, diff, trace, drift, bisect and env."""

from __future__ import annotations

import json
import shlex
import sys
from enum import Enum
from pathlib import Path
from typing import Annotated, Literal

import typer

from export.progress import progress_bar
from refmodels.command import JsonFlag
from refmodels.errors import LogitLockError
from refmodels.json_records import read_json
from refmodels.options import fields_in
from refmodels.text.prompts import read_prompts


class Half(str, Enum):
    """Half-precision dtypes (typer takes a list of an Enum, not of a Literal)."""

    bf16 = "bf16"
    fp16 = "fp16"


Junit = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Also write the result as JUnit XML, one test case per tensor.")
]


def verify(
    cases: Annotated[list[Path], typer.Argument(metavar="CASE_DIR...", help="Directories of golden cases.")],
    atol: Annotated[
        float | None, typer.Option(help="Largest allowed difference in any tensor, instead of the default tolerances.")
    ] = None,
    dtype: Annotated[
        Literal["fp32", "bf16", "fp16"],
        typer.Option(help="Dtype to compare in; bf16 and fp16 compare with io_<dtype>.safetensors."),
    ] = "fp32",
    junit: Junit = None,
    json_output: JsonFlag = False,
) -> None:
    """Compare the reference with what the upstream code computed.

    A golden case holds config.json, model.safetensors, io.safetensors and meta.json.  Prefill tensors are compared
    where attention_mask is 1; greedy tokens must be equal.  The default tolerance is 1e-4 for fp32.  For bf16 and fp16,
    ChatGLM2, Qwen and Baichuan must agree bit for bit, and the others to 2 units in the last place at the largest
    magnitude of each tensor.

    Example: logitlock verify tests/goldens/qwen tests/goldens/gpt2 --json
    """
    from debug.golden.verify import verify_case
    from debug.report.junit import cases_of_verify, check_junit, write_junit

    if junit is not None:
        check_junit(junit)
    if atol is not None and not atol >= 0:
        raise typer.BadParameter("must be a number of at least 0", param_hint="--atol")
    with progress_bar("verify", quiet=json_output) as progress:
        results = []
        for i, case in enumerate(cases):
            progress(case.name, i, len(cases))
            results.append(verify_case(case, dtype=dtype, atol=atol))
    if junit is not None:
        write_junit(cases_of_verify(results), junit)
    if json_output:
        _print_json([result.to_json() for result in results])
    else:
        from debug.report.tables import print_cases

        print_cases(results)
    if not all(result.passed for result in results):
        raise typer.Exit(1)


def record(
    hf: Annotated[
        Path, typer.Option("--hf", metavar="DIR", help="Model to record: a local directory in Hugging Face layout.")
    ],
    out: Annotated[
        Path, typer.Option("--out", metavar="CASE_DIR", help="Directory to create; it must be missing or empty.")
    ],
    prompt: Annotated[
        list[str] | None, typer.Option(help="Prompt text, encoded with the model's own tokenizer; repeatable.")
    ] = None,
    lengths: Annotated[
        str, typer.Option(help="Number of tokens of each random prompt; shorter prompts are padded on the left.")
    ] = "20,13",
    steps: Annotated[int, typer.Option(min=1, help="Number of greedy decode steps.")] = 12,
    seed: Annotated[int, typer.Option(help="Random seed for the prompts.")] = 0,
    half: Annotated[
        list[Half] | None,
        typer.Option(help="Also record the prefill in this dtype; repeatable."),
    ] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run the Python code in the model's directory.")
    ] = False,
    json_output: JsonFlag = False,
) -> None:
    """Record a golden case by running Hugging Face transformers.

    The verb writes config.json, model.safetensors (fp32), io.safetensors and meta.json for `logitlock verify`.  Prompts
    are random ids unless --prompt is given.  It needs transformers (pip install 'logitlock[record]').

    Example: logitlock record --hf ./my-model --out cases/my-model --lengths 20,13 --half bf16
    """
    from debug.record import record_case

    try:
        counts = [int(part) for part in lengths.split(",")]
    except ValueError:
        raise typer.BadParameter(f"{lengths!r} is not a list of numbers like 20,13", param_hint="--lengths") from None
    with progress_bar("record", quiet=json_output) as progress:
        meta = record_case(
            hf,
            out,
            prompts=prompt or (),
            lengths=counts,
            steps=steps,
            seed=seed,
            half=[h.value for h in half or ()],
            trust_remote_code=trust_remote_code,
            progress=progress,
        )
    if json_output:
        _print_json({"case": str(out), "meta": meta})
    else:
        print(
            f"wrote {out}: {meta['upstream']['class']}, prompts of {', '.join(map(str, meta['lengths']))} tokens, "
            f"{meta['steps']} greedy steps, smallest top-2 margin {meta['min_top2_margin_greedy']:.3g}"
        )


Model = Annotated[
    str | None,
    typer.Option(
        help="Model that the executors were made from: a family name, a Hugging Face directory or a hub id.",
        show_default="as recorded in the executor",
    ),
]
Prompt = Annotated[list[str] | None, typer.Option(help="Prompt text of at least 8 tokens; repeatable.")]
PromptFile = Annotated[Path | None, typer.Option(help="UTF-8 file with one prompt per line; - is stdin.")]
Seed = Annotated[int, typer.Option(help="Random seed for the prompts of models without a tokenizer.")]
Rounding = Annotated[bool, typer.Option(help="Round every node of a half-precision graph to its dtype on the CPU.")]
NameMap = Annotated[
    Path | None,
    typer.Option(
        "--map",
        help="JSON file that maps values of an ONNX file to taps; if the file does not exist, a proposal "
        "is written to it.",
    ),
]
RemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run the Python code in a Hugging Face directory.")
]


def diff(
    sides: Annotated[
        list[str] | None,
        typer.Argument(metavar="A B", help="Executors to compare: B is tested; A, if given, is what B should match."),
    ] = None,
    bundle: Annotated[Path | None, typer.Option(metavar="DIR", help="Bundle to test, instead of B.")] = None,
    model: Model = None,
    prompt: Prompt = None,
    prompt_file: PromptFile = None,
    steps: Annotated[int, typer.Option(min=1, help="Number of decode steps, which are fed B's own greedy tokens.")] = 8,
    seed: Seed = 0,
    engine: Annotated[
        Literal["auto", "tensorrt", "onnxruntime"],
        typer.Option(
            help="Engine of --bundle: auto chooses TensorRT if the bundle has a plan that this machine can "
            "run, else ONNX Runtime."
        ),
    ] = "auto",
    emulate_rounding: Rounding = True,
    name_map: NameMap = None,
    trust_remote_code: RemoteCode = False,
    cut: Annotated[
        bool, typer.Option("--cut", help="Also run the bundle's modules on the reference's tensors (shown by --json).")
    ] = False,
    floats: Annotated[
        bool,
        typer.Option(
            "--floats",
            help="Compare a quantized bundle with the model before quantization, to show the error that "
            "quantization adds.",
        ),
    ] = False,
    every_tap: Annotated[bool, typer.Option("--every-tap", help="Show all taps, not only the worst.")] = False,
    html: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Also write a report that works offline to this file.")
    ] = None,
    junit: Junit = None,
    baseline: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Earlier --json output of a diff, to show which taps got better or worse."),
    ] = None,
    json_output: JsonFlag = False,
) -> None:
    """Compare an engine with the fp64 reference, tensor by tensor, or two executors of any kind.

    For every tap, the diff computes the accumulated error, the local error (the reference module run on the engine's
    own inputs), and the noise floor (the error that the engine's dtype alone explains).  The first tap whose local
    error is above 8 noise floors is the culprit; if a known fault explains it, the diff names the fault.  Given A and
    B, the diff judges both against the reference, so that the result says which of them is wrong.

    A and B are a trace (.safetensors, from `logitlock trace`) or one of:

    {forms}

    Exit code 0: aligned; 1: diverged, or NaN or Inf found.

    Example: logitlock diff --model qwen --bundle engines/qwen-fp16

    Example: logitlock diff --model ./my-qwen2 hf:fp16 engines/my-qwen2-fp16
    """
    from debug.comparison.baseline import changes
    from debug.comparison.results import DiffResult
    from debug.options import DiffOptions
    from debug.report.junit import cases_of_diff, check_junit, write_junit
    from debug.report.tables import print_changes, print_diff
    from debug.sides import bundle_side
    from debug.sides import diff as compare

    named = list(sides or ())
    if (bundle is None) == (not named) or len(named) > 2:
        raise LogitLockError("say what to test: --bundle DIR, or one or two executors ([A] B)")
    if html is not None:
        from debug.report import check_report, write_report

        # Options that would fail after the run fail before it.
        check_report(html)
    if junit is not None:
        check_junit(junit)
        if html is not None and html.resolve() == junit.resolve():
            raise LogitLockError(f"--html and --junit are one file, {html}; name two")
    earlier = None if baseline is None else DiffResult.from_json(read_json(baseline), str(baseline))
    if bundle is not None:
        named = [bundle_side(bundle, engine)]
    options = DiffOptions(prompts=read_prompts(prompt, prompt_file), **fields_in(DiffOptions, locals()))
    with progress_bar("diff", quiet=json_output) as progress:
        result = compare(*named, options=options, progress=progress)
    changed = None if earlier is None else changes(earlier, result)
    if junit is not None:
        write_junit(cases_of_diff(result), junit)
    if html is not None:
        write_report(result, html, command=shlex.join(["logitlock", *sys.argv[1:]]))
    if json_output:
        _print_json(result.to_json() | ({} if changed is None else {"baseline": changed.to_json()}))
    else:
        print_diff(result, every_tap=every_tap)
        if changed is not None:
            print_changes(changed)
    if not result.aligned:
        raise typer.Exit(1)


def trace(
    side: Annotated[str, typer.Argument(help="An executor, named as for diff.")],
    out: Annotated[Path, typer.Option(metavar="FILE", help="Trace file to write (.safetensors).")],
    model: Model = None,
    prompt: Prompt = None,
    prompt_file: PromptFile = None,
    steps: Annotated[
        int, typer.Option(min=0, help="Number of decode steps, which are fed the executor's own greedy tokens.")
    ] = 8,
    tokens_of: Annotated[
        Path | None, typer.Option(metavar="TRACE", help="Run on the prompts and tokens of another trace.")
    ] = None,
    seed: Seed = 0,
    emulate_rounding: Rounding = True,
    name_map: NameMap = None,
    trust_remote_code: RemoteCode = False,
    json_output: JsonFlag = False,
) -> None:
    """Save every tap of an executor, to be compared on another machine.

    The file holds the logits of a run without taps and all taps of a second run, written one by one.  `logitlock diff`
    takes the file as an executor.

    Example: logitlock trace tensorrt:engines/qwen-fp16 --out qwen.safetensors && logitlock diff qwen.safetensors
    """
    from debug.options import RunOptions
    from debug.sides import trace_side

    if tokens_of is not None and tokens_of.resolve() == out.resolve():
        raise LogitLockError(f"--tokens-of and --out are one file, {out}; name another one to write")
    options = RunOptions(prompts=read_prompts(prompt, prompt_file), **fields_in(RunOptions, locals()))
    with progress_bar("trace", quiet=json_output) as progress:
        path = trace_side(side, out, options, tokens_of=tokens_of, progress=progress)
    size = path.stat().st_size
    if json_output:
        _print_json({"trace": str(path), "bytes": size})
    else:
        print(f"{path}: {size / 1e6:.1f} MB")


def drift(
    side: Annotated[str, typer.Argument(help="An executor, named as for diff (but not a trace).")],
    model: Model = None,
    prompt: Prompt = None,
    prompt_file: PromptFile = None,
    steps: Annotated[int, typer.Option(min=1, help="Number of decode steps.")] = 32,
    reset: Annotated[
        bool, typer.Option(help="Also prefill anew at each step, to separate the cache's part of the error.")
    ] = True,
    seed: Seed = 0,
    emulate_rounding: Rounding = True,
    name_map: NameMap = None,
    trust_remote_code: RemoteCode = False,
    json_output: JsonFlag = False,
) -> None:
    """Show how an engine drifts from the reference while it decodes, and the first token that differs.

    Teacher-forced steps measure KL, top-1 agreement and cache error per step, with the cache carried along and with a
    new one.  Free-running decoding finds the first token that differs, and whether the reference's margin there is
    small enough for rounding to have decided it.  The exit code is 1 if it is not.

    Example: logitlock drift engines/qwen-fp16 --steps 32
    """
    from debug.options import RunOptions
    from debug.report.tables import print_drift
    from debug.sides import drift_side

    options = RunOptions(prompts=read_prompts(prompt, prompt_file), **fields_in(RunOptions, locals()))
    with progress_bar("drift", quiet=json_output) as progress:
        result = drift_side(side, options, reset=reset, progress=progress)
    if json_output:
        _print_json(result.to_json())
    else:
        print_drift(result)
    if not result.explained:
        raise typer.Exit(1)


def bisect(
    model: Annotated[
        str,
        typer.Option(help="Model to bisect: a family name, a Hugging Face directory or a hub id.", show_default=False),
    ],
    budget_kl: Annotated[float, typer.Option(help="Largest allowed mean KL to the fp64 reference, in nats.")] = 1e-3,
    precision: Annotated[
        Literal["fp16", "bf16"], typer.Option(help="Precision of the layers that are not kept in fp32.")
    ] = "fp16",
    out: Annotated[Path, typer.Option(metavar="FILE", help="Precision plan to write.")] = Path("precision-plan.json"),
    prompt: Prompt = None,
    prompt_file: PromptFile = None,
    seed: Seed = 0,
    json_output: JsonFlag = False,
) -> None:
    """Find the smallest set of linear layers that must stay in fp32 to keep within a KL budget.

    The verb measures the cost of rounding in each layer, keeps the most expensive layers in fp32, and checks the plan
    by exporting and running it.  `logitlock export --precision-plan` takes the file.  The exit code is 1 if the
    exported engine misses the budget that the simulation met.

    Example: logitlock bisect --model qwen --precision bf16 --budget-kl 1e-4 --out plan.json
    """
    from debug.bisect import find_precision_plan
    from debug.report.tables import print_bisect
    from debug.sides import model_prompts
    from export.precision_plan import check_plan_output, write_plan

    check_plan_output(out)

    source, prompts = model_prompts(model, read_prompts(prompt, prompt_file), seed=seed)
    with progress_bar("bisect", quiet=json_output) as progress:
        result = find_precision_plan(source, precision=precision, budget=budget_kl, prompts=prompts, progress=progress)
    write_plan(result.plan, out)
    if json_output:
        _print_json(result.to_json())
    else:
        print_bisect(result, out)
    if not result.kl_engine <= budget_kl:
        raise typer.Exit(1)


def environment(json_output: JsonFlag = False) -> None:
    """Show versions, the machine, and which back ends and optional parts work here; put it into a bug report.

    Example: logitlock env --json
    """
    from debug.environment import abilities
    from debug.environment import environment as here
    from debug.report.tables import print_facts

    found = {"environment": here(), "abilities": abilities()}
    if json_output:
        _print_json(found)
    else:
        for facts in found.values():
            print_facts(facts)


def _print_json(value: object) -> None:
    print(json.dumps(value, ensure_ascii=False, allow_nan=False))
