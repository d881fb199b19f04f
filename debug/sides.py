"""Executors, models and prompts of a comparison, opened and checked before anything runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from debug.capture.capture import Capture, capture_engine
from debug.capture.prompts import Prompts, default_prompts, text_prompts
from debug.capture.streaming import Reference, StreamedDecoder
from debug.capture.trace import read_trace, trace_origin, write_trace
from debug.comparison.compare import diff_capture, spec_difference
from debug.comparison.cut import cut_errors
from debug.comparison.logits import LogitComparison
from debug.comparison.metrics import token_errors
from debug.comparison.node_attributes import configuration_culprit, wrong_attributes
from debug.comparison.results import Between, Culprit, DiffResult, TapDistance
from debug.drift import DriftResult, measure_drift
from debug.environment import environment
from debug.executors.before_quantization import check_floats, folded_model, quantized_source
from debug.options import DiffOptions, RunOptions
from export.progress import Progress, silent
from refmodels.checkpoints.load import (
    ModelSource,
    checkpoint_hash,
    load,
    load_tokenizer,
    parameter_shapes,
    resolve,
    tokenizer_in,
    with_directory,
)
from refmodels.errors import LogitLockError, NoTokenizerError
from refmodels.options import with_fields
from refmodels.spec import ModelSpec, Numerics
from refmodels.taps import is_cache_tap
from refmodels.text.prompts import stop_ids_in
from refmodels.toys import TOYS
from trt_runtime.bundle import INFO_NAME, Bundle, read_bundle
from trt_runtime.engine import Engine
from trt_runtime.onnxruntime.engine import OnnxRuntimeEngine
from trt_runtime.open import EngineChoice, serves_tensorrt

if TYPE_CHECKING:
    from refmodels.text.tokenizer import Tokenizer

LEAST_TOKENS = 8
"""Minimum length of a prompt: with one token at position 0, faults of rotation, mask and scale have no effect."""
_IN_MEMORY = 50_000_000
"""Number of parameters up to which the whole reference stays in memory (0.4 GB in fp64)."""
TRUTH = "reference"


@dataclass(kw_only=True)
class Side:
    """An executor to run, or a trace of one; `context` goes into the result."""

    text: str
    executor: Engine | None
    trace: Capture | None
    numerics: Numerics
    context: dict[str, Any]
    longest_prompt: int | None = None
    bundle: Bundle | None = None

    cuts: dict[str, float] = field(default_factory=dict)
    folded: Mapping[str, Tensor] | None = None
    """The scales folded into the weights, if the reference is the model before quantization."""

    def capture(
        self, prompts: Prompts, steps: int, tokens: Tensor | None = None, *, progress: Progress = silent
    ) -> Capture:
        if self.trace is not None:
            same = torch.equal(self.trace.prompts.ids, prompts.ids) and self.trace.steps == steps
            if not same or (tokens is not None and not torch.equal(self.trace.tokens, tokens)):
                raise LogitLockError(
                    f"{self.text} was traced on other tokens than the other executor; trace both with the same "
                    "prompts, and the second with --tokens-of the first"
                )
            return self.trace
        assert self.executor is not None
        if isinstance(self.executor, OnnxRuntimeEngine):
            # All untapped forwards come before all tapped ones.
            self.executor.keep_both_sessions = False
        return capture_engine(self.executor, prompts, steps=steps, tokens=tokens, progress=progress)

    def cut(self, source: ModelSource, prompts: Prompts) -> None:
        """Run the modules by themselves, if the executor's graph can be cut."""
        if isinstance(self.executor, OnnxRuntimeEngine):
            rounded = reference_of(source, dtype=self.executor.dtype, numerics=self.numerics)
            self.cuts = cut_errors(self.executor, rounded, prompts)


def diff_bundle(bundle: Path, model: str | None = None, *, engine: EngineChoice = "auto", **fields: Any) -> DiffResult:
    """Compare a bundle with the reference of the model that it was made from.

    Args:
        bundle: its directory.
        model: the model that it was made from; None: the toy of the family that the bundle names.
        engine: see `trt_runtime.open.open_engine`.
        fields: fields of `DiffOptions`.
    Raises:
        LogitLockError: the bundle or model is missing or damaged, the bundle was made from another model or checkpoint,
            or a prompt is too short or too long.
    """
    return diff(bundle_side(bundle, engine), model=model, **fields)


def bundle_side(bundle: Path, engine: EngineChoice = "auto") -> str:
    """A bundle as an executor, with the requested engine; errors as `read_bundle`."""
    opened = read_bundle(bundle, verify_hashes=False)  # they are verified when the executor is opened
    tensorrt = engine == "tensorrt" or (engine == "auto" and serves_tensorrt(opened))
    return f"tensorrt:{bundle}" if tensorrt else str(bundle)


def diff(*sides: str, options: DiffOptions | None = None, progress: Progress = silent, **fields: Any) -> DiffResult:
    """Compare an executor with the fp64 reference, or two executors of one model: `diff(b)` or `diff(a, b)`.

    `b` is tested, and should match `a`.  Both are judged against the fp64 reference, so that the result says which of
    them is wrong; if `a` is the reference itself, only `b` is judged.

    Args:
        sides: as `logitlock diff` names them (forms of `debug.executors.open.forms_help`), or trace files.
        options: how they are opened, run and compared.
        progress: called with what runs, how much of it is done, and how much it is in all (forwards, taps).
        fields: fields of `DiffOptions`, instead of `options` or to change some of them: `diff(b, model="qwen")`.
    Raises:
        LogitLockError: there are not one or two executors, one cannot be opened, they are of different models, or the
            prompts do not fit.
        TypeError: a name is not a field of `DiffOptions`.
    """
    options = with_fields(DiffOptions, options, fields)
    if len(sides) not in (1, 2):
        raise LogitLockError(f"diff takes one or two executors, got {len(sides)}")
    a, b = sides if len(sides) == 2 else (TRUTH, sides[0])
    source = source_of(options.model, (b, a))
    if not options.floats:
        source = quantized_source(source, _bundles((b, a)))
    alone = a in (TRUTH, f"{TRUTH}:fp64", f"{TRUTH}:fp64:exact")
    opened = [open_side(text, source, options, floats=options.floats) for text in ([b] if alone else [b, a])]
    batch, steps, tokens = _input(opened, source, options)
    captures = []
    for side in opened:
        captures.append(side.capture(batch, steps, tokens, progress=progress))
        tokens = captures[0].tokens
        if options.cut:
            side.cut(source, batch)
        # An engine may be as large as the model, and it is no longer needed.
        side.executor = None
    results = [_judged(capture, side, source, progress) for capture, side in zip(captures, opened, strict=True)]
    result = results[0]
    rows = [ids[mask != 0].tolist() for ids, mask in zip(batch.ids, batch.mask, strict=True)]
    texts = {"texts": list(options.prompts)} if options.prompts else {}
    result.inputs = {"prompt_ids": rows, **texts, "seed": options.seed}
    result.environment = environment()
    if not alone:
        result.other = results[1]
        result.between = _between(captures[1], captures[0])
    return result


def trace_side(
    text: str, path: Path, options: RunOptions, *, tokens_of: Path | None = None, progress: Progress = silent
) -> Path:
    """Write a trace of an executor; errors and `progress` as `diff`.  `tokens_of`: another trace, whose prompts and
    tokens are used."""
    source = quantized_source(source_of(options.model, [text]), _bundles([text]))
    side = open_side(text, source, options)
    if side.executor is None:
        raise LogitLockError(f"{text} is a trace already")
    sides = [side]
    if tokens_of is not None:
        sides.append(open_side(str(tokens_of), source, options))
    batch, steps, tokens = _input(sides, source, options)
    write_trace(
        side.executor,
        batch,
        path,
        steps=steps,
        tokens=tokens,
        model=source.name,
        numerics=side.numerics,
        progress=progress,
    )
    return path


def drift_side(text: str, options: RunOptions, *, reset: bool = True, progress: Progress = silent) -> DriftResult:
    """`measure_drift` of an executor named by text; errors as `diff`."""
    source = quantized_source(source_of(options.model, [text]), _bundles([text]))
    side = open_side(text, source, options)
    if side.executor is None:
        raise LogitLockError(f"{text} is a trace; drift needs an executor that runs")
    batch, steps, _ = _input([side], source, options)
    truth = load(source, dtype=torch.float64)
    rounded = load(source, dtype=side.executor.dtype, numerics=side.numerics)
    return measure_drift(side.executor, truth, rounded, batch, steps=steps, reset=reset, progress=progress)


def open_side(text: str, source: ModelSource, options: RunOptions, *, floats: bool = False) -> Side:
    """Open one executor; errors as `diff`, `floats` as in `DiffOptions`."""
    from debug.executors.open import numerics_of, open_executor

    if text.endswith(".safetensors"):
        trace = read_trace(Path(text))
        _same_model(text, trace.spec, source)
        _, numerics = trace_origin(Path(text))
        return Side(text=text, executor=None, trace=trace, numerics=numerics, context={"trace": Path(text).name})
    bundle = _bundle_of(text)
    context: dict[str, Any] = {"executor": text}
    longest = None
    folded = check_floats(bundle, source, text) if floats else None
    own = source
    if folded is not None:
        assert bundle is not None and bundle.quantized_path is not None
        own = with_directory(source, bundle.quantized_path)
    if bundle is not None:
        context = _check_bundle(bundle, own)
        if text.startswith("tensorrt:") and bundle.info.engine is not None:
            # The prompt is one step.
            longest = bundle.info.engine.max_input
    executor = open_executor(
        text,
        source=own,
        map=options.name_map,
        emulate_rounding=options.emulate_rounding,
        trust_remote_code=options.trust_remote_code,
    )
    _same_model(text, executor.spec, own)
    return Side(
        text=text,
        executor=executor,
        trace=None,
        numerics=numerics_of(executor),
        context=context,
        longest_prompt=longest,
        bundle=bundle,
        folded=folded,
    )


def _bundle_of(text: str) -> Bundle | None:
    """The bundle that a text names; its files are hashed only when its executor is opened."""
    directory = Path(text.removeprefix("tensorrt:"))
    if text.startswith("tensorrt:") or (directory / INFO_NAME).is_file():
        return read_bundle(directory, verify_hashes=False)
    return None


def _bundles(texts: Sequence[str]) -> list[Bundle]:
    found = (None if text.endswith(".safetensors") else _bundle_of(text) for text in texts)
    return [bundle for bundle in found if bundle is not None]


def _check_bundle(bundle: Bundle, source: ModelSource) -> dict[str, Any]:
    info = bundle.info
    _same_model(str(bundle.directory), bundle.spec, source)
    checkpoint = checkpoint_hash(source)
    if checkpoint != info.checkpoint_hash:
        raise LogitLockError(
            f"{bundle.directory} was made from another checkpoint than {source.name}: its weights have SHA-256 "
            f"{info.checkpoint_hash[:12]}…, those of the model {checkpoint[:12]}…; export it again"
        )
    return {
        "model": source.name,
        "bundle": bundle.directory.name,
        "precision": info.precision,
        "numerics": info.numerics,
        "attention": info.attention,
        **({} if bundle.spec.quantization is None else {"quantization": bundle.spec.quantization.describe()}),
        "checkpoint_hash": checkpoint,
    }


def _same_model(text: str, spec: ModelSpec, source: ModelSource) -> None:
    if spec == source.spec:
        return
    if replace(spec, quantization=None) == replace(source.spec, quantization=None):
        facts = (s.quantization for s in (spec, source.spec))
        theirs, ours = ("not quantized" if q is None else q.describe() for q in facts)
        raise LogitLockError(
            f"{text} is quantized otherwise than {source.name} ({theirs}; the model: {ours}); name with --model the "
            "checkpoint that it was made from"
        )
    differing = spec_difference(source.spec, spec)
    raise LogitLockError(f"{text} is of another model than {source.name}: the architecture differs in {differing}")


def source_of(model: str | None, texts: Sequence[str]) -> ModelSource:
    """The model to compare with: the one of `--model`, or the one that an executor was made from.

    An executor knows a family, a hub id or the name of a directory; the directory is looked for here, and beside the
    executor and the folder that it is in.  (Its weights are compared with the executor's hash as any other's.)
    """
    if model is not None:
        return resolve(model)
    for text in texts:
        said = ""
        parts = [Path(part) for part in text.split(":")]
        path = next((part for part in parts if (part / "config.json").is_file()), parts[-1])
        if text.endswith(".safetensors"):
            read_trace(Path(text))
            said, _ = trace_origin(Path(text))
        elif (bundle := _bundle_of(text)) is not None:
            said = bundle.info.model
        elif (path / "config.json").is_file():
            return resolve(path)
        if said in TOYS or "/" in said:
            return resolve(said)
        if said:
            near = (Path(), path.parent, path.parent.parent)
            found = next((p / said for p in near if (p / said / "config.json").is_file() and p / said != path), None)
            if found is None:
                raise LogitLockError(f"{text} was made from {said!r}; say with --model where that model is")
            return resolve(found)
    raise LogitLockError("nothing says which model this is; name it with --model (family name, directory or hub id)")


def _input(sides: Sequence[Side], source: ModelSource, options: RunOptions) -> tuple[Prompts, int, Tensor | None]:
    """Prompts, decode steps and the tokens to feed; a trace or a recorded case brings its own."""
    for side in sides:
        if side.trace is not None:
            return side.trace.prompts, side.trace.steps, side.trace.tokens
    for side in sides:
        recorded = getattr(side.executor, "prompts", None)
        if isinstance(recorded, Prompts):
            return recorded, 0, None
    steps = options.steps
    executors = [side.executor for side in sides if side.executor is not None]
    room = min(executor.max_positions for executor in executors) - steps
    room = min([room, *(side.longest_prompt for side in sides if side.longest_prompt is not None)])
    if room < LEAST_TOKENS:
        raise LogitLockError(
            f"{sides[0].text} serves {room + steps} positions, but a diff needs {LEAST_TOKENS} prompt tokens "
            f"and {steps} decode steps"
        )
    return _prompts(source, options.prompts, room=room, seed=options.seed), steps, None


def model_prompts(model: str, texts: Sequence[str], *, seed: int) -> tuple[ModelSource, Prompts]:
    """A model and prompts for it, as `diff` chooses them."""
    source = resolve(model)
    return source, _prompts(source, texts, room=source.spec.max_positions, seed=seed)


def _prompts(source: ModelSource, texts: Sequence[str], *, room: int, seed: int) -> Prompts:
    """The given texts, or default prompts of at most `room` tokens."""
    if texts:
        return text_prompts(texts, load_tokenizer(source), least=LEAST_TOKENS, positions=source.spec.max_positions)
    return default_prompts(source.spec, _tokenizer(source), room=room, seed=seed)


def _judged(capture: Capture, side: Side, source: ModelSource, progress: Progress) -> DiffResult:
    truth: Reference
    rounded: Reference
    if side.folded is None:
        truth = reference_of(source, dtype=torch.float64)
        rounded = reference_of(source, dtype=capture.dtype, numerics=side.numerics)
    else:
        truth = folded_model(source, side.folded, dtype=torch.float64)
        rounded = folded_model(source, side.folded, dtype=capture.dtype, numerics=side.numerics)
    result = diff_capture(capture, truth, rounded, progress=progress)
    result.context = {"model": source.name, **side.context}
    if side.cuts:
        result.taps = [
            replace(error, cut=side.cuts.get(error.tap)) if error.step == 0 else error for error in result.taps
        ]
    if side.bundle is not None and (wrong := _wrong_settings(side.bundle, source)):
        result.culprits.extend(wrong)
        if result.verdict == "aligned":
            result.verdict = "diverged"
    tokenizer = _tokenizer(source)
    if tokenizer is not None:
        ids = {i for t in result.logit_tokens for i in (t.token, t.expected, t.chosen)}
        result.token_texts = {i: tokenizer.decode([i], skip_special=False) for i in ids}
    return result


def _wrong_settings(bundle: Bundle, source: ModelSource) -> list[Culprit]:
    stop = _wrong_stop_ids(bundle, source)
    return [*wrong_attributes(bundle, bundle.spec), *([] if stop is None else [stop])]


def _wrong_stop_ids(bundle: Bundle, source: ModelSource) -> Culprit | None:
    """The culprit if a bundle ends its answers at other tokens than the model, which no tensor shows."""
    try:
        ours, theirs = (_stop_ids(directory, source) for directory in (source.directory, bundle.directory))
    except NoTokenizerError:
        return None  # there are no stop ids then
    if ours == theirs:
        return None
    return configuration_culprit("stop_ids", f"wrong stop id: generation ends at {theirs} instead of {ours}")


def _stop_ids(directory: Path, source: ModelSource) -> list[int]:
    tokenizer = tokenizer_in(directory, source.spec)
    found = (stop_ids_in(directory, source.spec, tokenizer, chat=chat) for chat in (False, True))
    return sorted({stop for stops in found for stop in stops})


def _between(expected: Capture, actual: Capture) -> Between:
    """Executor b (`actual`) against executor a, tap by tap over all real tokens."""
    real = actual.whole().inputs.new_mask
    logits = LogitComparison()
    left, right = (torch.cat(list(c.untapped), 1) for c in (expected, actual))
    logits.add(left[real], left[real], right[real], right[real])
    found = logits.result()
    common = [n for n in actual.tap_names if n in expected.tap_names and not is_cache_tap(n)]
    taps = []
    mine, theirs = actual.whole().tensors, expected.whole().tensors
    for name in common:
        stats = token_errors(mine[name], theirs[name], real, actual.dtype).stats()
        taps.append(TapDistance(tap=name, rel_l2=stats.rel_l2, max_abs=stats.max_abs, cosine=stats.cosine))
    return Between(kl_mean=found.kl_mean, kl_max=found.kl_max, top1=found.top1, max_abs=found.max_abs, taps=taps)


def reference_of(source: ModelSource, *, dtype: torch.dtype, numerics: Numerics = "exact") -> Reference:
    """The reference model; a large one holds the weights of one part at a time."""
    size = sum(shape.numel() for shape in parameter_shapes(source.spec).values())
    if size > _IN_MEMORY:
        return StreamedDecoder(source, dtype=dtype, numerics=numerics)
    return load(source, dtype=dtype, numerics=numerics)


def _tokenizer(source: ModelSource) -> Tokenizer | None:
    try:
        return load_tokenizer(source)
    except NoTokenizerError:
        # Default prompts are then random ids; a prompt given by the user needs a tokenizer, and raises an error.
        return None
