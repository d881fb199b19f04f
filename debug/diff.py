"""`logitlock diff`: an engine against the reference, tap by tap, with the noise that its dtype explains beside it.

Every forward (one prefill, then teacher-forced decode steps) is run several times:

1. the engine without taps, as it ships, and with taps;
2. `truth`, the reference in fp64 with `exact` numerics, on the same token ids: **accumulated** error;
3. `rounded`, the reference in the engine's dtype and numerics, on the same token ids: the floor of 2;
4. `truth` with the engine's captured tensors put in place of its own, and its cache filled with the engine's: every
   module then runs on the engine's own inputs, and what it makes is compared with what the engine made: **local**
   error.  A healthy module after a broken one has accumulated but no local error;
5. `rounded` in the same way: the floor of 4, on the same inputs.

The first tap whose local error exceeds `MULTIPLE` floors is the culprit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from debug.diagnose import diagnose
from debug.metrics import ErrorStats, compare, kl_divergence, nonfinite_count, top_margin
from debug.modules import Forward
from debug.prompts import Prompts, default_prompts, text_prompts
from debug.results import Culprit, Diagnosis, DiffResult, LogitError, ObserverEffect, Phase, TapError
from refmodels.cache import KVCache, StepInputs
from refmodels.checkpoint import ModelSource, checkpoint_hash, load, load_tokenizer_for, resolve
from refmodels.errors import LogitLockError
from refmodels.families import FAMILIES
from refmodels.model import Decoder
from refmodels.positions import wide_dtype
from refmodels.spec import ModelSpec
from refmodels.taps import Recorder, is_cache_tap, recording
from trt_runtime.bundle import read_bundle
from trt_runtime.engine import Engine
from trt_runtime.engines import EngineChoice, open_engine, serves_tensorrt

if TYPE_CHECKING:
    from refmodels.tokenizer import Tokenizer

MULTIPLE = 8.0
"""How many floors of local error are a fault.

The floor is what one particular order of rounding costs.  Another correct implementation may round its intermediate
results where the reference rounds once: r independent roundings give sqrt(r) floors.  The longest chain inside one
tapped module is attention with every step stored in the working dtype (scale, two products and a sum of the rotation,
logn, score, bias, maximum, exponential, sum, quotient, product with V: r = 12), so sqrt(12) = 3.5.  Both errors are
norms of n random roundings a token; for the narrowest tensors (n of a few dozen) and the worst of some 10^4 tokens, the
ratio of two such norms reaches about 2.  3.5 x 2 = 7, taken up to the next power of two.

A fault below that, such as a wrong epsilon in half precision, changes the engine less than rounding may: it shows in a
diff of the same model's fp32 bundle, whose floor is four orders of magnitude lower.
"""


_BLOCK_TOKENS = 32
LEAST_TOKENS = 8
"""A prompt needs this many: on one token at position 0 faults of rotation, mask and scale give a difference of 0."""


@dataclass(frozen=True)
class _Pass:
    """One executor of the reference with its own cache."""

    model: Decoder
    cache: KVCache

    def run(self, plan: StepInputs, recorder: Recorder) -> Tensor:
        with recording(recorder):
            return self.model.run(plan, self.cache)


def diff_engine(
    engine: Engine, truth: Decoder, rounded: Decoder, prompts: Prompts, *, steps: int = 8, multiple: float = MULTIPLE
) -> DiffResult:
    """Compare an engine with the reference over one prefill and `steps` decode steps.

    Args:
        engine: what is tested.
        truth: the reference in fp64, `exact`.
        rounded: the reference in the engine's dtype and numerics; it gives the noise floor.
        prompts: at least 8 real tokens a row, if position and mask faults are to show.
        steps: decode steps; every executor is fed the greedy tokens of `truth`.
        multiple: floors of local error that are a fault.
    Raises:
        LogitLockError: engine and reference of different specs, or prompts longer than the engine's cache.
    """
    if engine.spec != truth.spec or truth.spec != rounded.spec:
        differing = _spec_difference(truth.spec, engine.spec)
        raise LogitLockError(f"the engine and the reference are not the same model: they differ in {differing}")
    if not bool((prompts.mask != 0).any(1).all()):
        raise LogitLockError("a prompt is empty: it has no tokens")
    with torch.inference_mode():
        return _Diff(engine, truth, rounded, prompts, steps, multiple).result()


def _spec_difference(model: ModelSpec, engine: ModelSpec) -> str:
    ours, theirs = _flat(model.to_dict()), _flat(engine.to_dict())
    differing = [k for k in {**ours, **theirs} if ours.get(k) != theirs.get(k)]
    named = [f"{k} (model {ours.get(k)!r}, engine {theirs.get(k)!r})" for k in differing[:3]]
    return ", ".join(named) + (f" and {len(differing) - 3} more" if len(differing) > 3 else "")


def _flat(facts: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in facts.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


class _Diff:
    def __init__(
        self, engine: Engine, truth: Decoder, rounded: Decoder, prompts: Prompts, steps: int, multiple: float
    ) -> None:
        self.engine, self.prompts, self.steps, self.multiple = engine, prompts, steps, multiple
        self.unit = torch.finfo(engine.dtype).eps / 2
        self.taps: list[TapError] = []
        self.forwards: list[Forward] = []
        self.logits = _Logits()
        batch, tokens = prompts.ids.shape
        size = {"batch": batch, "capacity": tokens + steps}
        self.untapped, self.tapped = engine.new_cache(**size), engine.new_cache(**size)
        self.truth, self.rounded = (_Pass(m, m.new_cache(**size)) for m in (truth, rounded))
        self.local_truth, self.local_rounded = (_Pass(m, m.new_cache(**size)) for m in (truth, rounded))

    def result(self) -> DiffResult:
        ids, mask = self.prompts.ids, self.prompts.mask
        for step in range(self.steps + 1):
            ids, mask = self._forward(ids, mask, step)
        logits = self.logits.result()
        culprits = self._culprits(logits)
        spoiled = logits.nonfinite or any(t.nonfinite for t in self.taps)
        name = str(self.engine.dtype).removeprefix("torch.")
        return DiffResult(
            verdict="nonfinite" if spoiled else "diverged" if culprits else "aligned",
            culprits=culprits,
            taps=self.taps,
            logits=logits,
            observer_effect=self.logits.observer_effect(),
            reference="PyTorch reference in float64, exact numerics",
            floor=f"PyTorch reference in {name}, {self.rounded.model.numerics} numerics, on the same inputs",
            engine=self.engine.arithmetic,
            multiple=self.multiple,
            unit_roundoff=self.unit,
            prompts=self.prompts.origin,
            prompt_lengths=self.prompts.mask.sum(1).tolist(),
            steps=self.steps,
        )

    def _forward(self, ids: Tensor, mask: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """One forward of everything; returns the next tokens and their mask."""
        plan = self.truth.cache.plan(ids, mask)
        # The engine updates its cache in place, so its state before the step is taken first.
        for executor in (self.local_truth, self.local_rounded):
            _copy_cache(self.tapped, executor.cache)
        untapped = self.engine.run(plan, self.untapped)
        captured = Recorder()
        tapped = self.engine.run(plan, self.tapped, recorder=captured)
        captured.tensors = {name: tensor.cpu() for name, tensor in captured.tensors.items()}
        floor = Recorder()
        rounded = self.rounded.run(plan, floor)
        stats: dict[str, list[ErrorStats]] = {}
        sink = self._sink(plan, stats, captured.tensors, floor.tensors)
        truth = self.truth.run(plan, Recorder(self.engine.tap_names, sink=sink))
        floor = Recorder(substitutes=captured.tensors)
        self.local_rounded.run(plan, floor)
        sink = self._sink(plan, stats, captured.tensors, floor.tensors)
        self.local_truth.run(plan, Recorder(self.engine.tap_names, substitutes=captured.tensors, sink=sink))
        for tap, found in stats.items():
            bound = lower_bound(self.engine.spec, tap, self.engine.dtype, slots=plan.attention_mask.shape[1])
            self.taps.append(self._tap_error(tap, step, bound, *found))
        self.forwards.append(Forward(step=step, plan=plan, tensors=captured.tensors, before=self._cache_before(step)))
        real = plan.new_mask
        self.logits.add(truth[real], rounded[real], untapped[real], tapped[real])
        token = truth[:, -1:].argmax(-1)
        return token, torch.ones_like(token)

    def _cache_before(self, step: int) -> dict[str, Tensor]:
        """The engine's cache taps before a step: those after the last one, or none."""
        if step:
            return {n: t for n, t in self.forwards[step - 1].tensors.items() if is_cache_tap(n)}
        cache = self.tapped
        return {
            f"blocks.{i}.{part}": tensors[i][:, :, :0].cpu()
            for part, tensors in (("key", cache.key), ("value", cache.value))
            for i in range(len(tensors))
        }

    def _sink(
        self,
        plan: StepInputs,
        stats: dict[str, list[ErrorStats]],
        engine: dict[str, Tensor],
        floor: dict[str, Tensor],
    ) -> Callable[[str, Tensor], None]:
        """Compare engine and floor with each tensor of the fp64 run as it comes, so that none is kept."""
        slots = plan.attention_mask != 0

        def compare_both(name: str, expected: Tensor) -> None:
            real = slots if is_cache_tap(name) else plan.new_mask
            for actual in (engine[name], floor[name]):
                # A cache tensor counts by slot: [batch, slots, kv_heads, head_dim].
                pair = [t.transpose(1, 2) if is_cache_tap(name) else t for t in (actual, expected)]
                stats.setdefault(name, []).append(compare(pair[0], pair[1], real, self.engine.dtype))

        return compare_both

    def _tap_error(
        self,
        tap: str,
        step: int,
        bound: float,
        accumulated: ErrorStats,
        accumulated_floor: ErrorStats,
        local: ErrorStats,
        local_floor: ErrorStats,
    ) -> TapError:
        # A token whose floor is small by luck counts with the floor of the whole tensor.  Where the dtype overflows in
        # the floor's run but not in the engine, nothing but the bound is known.
        whole = local_floor.rel_l2 if math.isfinite(local_floor.rel_l2) else 0.0
        floor = local_floor.token_rel.nan_to_num(nan=0.0, posinf=0.0).clamp(min=max(whole, bound))
        ratios = local.token_rel / floor
        worst = int(ratios.nan_to_num(nan=float("inf")).argmax())
        phase: Phase = "decode" if step else "prefill"
        row, position = local.token_of[worst].tolist()
        return TapError(
            tap=tap,
            phase=phase,
            step=step,
            accumulated=accumulated.rel_l2,
            max_abs=accumulated.max_abs,
            cosine=accumulated.cosine,
            ulp=accumulated.ulp,
            snr_db=accumulated.snr_db,
            accumulated_floor=accumulated_floor.rel_l2,
            local=local.rel_l2,
            local_max_abs=local.max_abs,
            floor=local_floor.rel_l2,
            floor_spread=float(local_floor.token_rel.max()) / local_floor.rel_l2 if local_floor.rel_l2 else 1.0,
            floor_bound=bound,
            ratio=float(ratios[worst]),
            accumulated_ratio=accumulated.rel_l2 / max(accumulated_floor.rel_l2, bound),
            worst=(row, position),
            nonfinite=accumulated.nonfinite,
            floor_nonfinite=accumulated_floor.nonfinite,
        )

    def _culprits(self, logits: LogitError) -> list[Culprit]:
        """Faulty taps, each at its first occurrence, in the order of execution."""
        found: dict[str, list[TapError]] = {}
        for error in self.taps:
            # Not greater-or-equal: a NaN, from inputs that are NaN, is a consequence; the first one has nonfinite set.
            if error.ratio > self.multiple:
                found.setdefault(error.tap, []).append(error)
        spoiled = next((error for error in self.taps if error.nonfinite), None)
        if spoiled is not None:
            found.setdefault(spoiled.tap, []).append(spoiled)
        culprits = [self._culprit(errors) for errors in found.values()]
        if not culprits:
            # Modules that are each within R floors of their own let about R accumulated floors pass on.
            explained = max(1.0, *(e.local / max(e.floor, self.unit) for e in self.taps))
            limit = self.multiple * explained
            if logits.rel_l2 > limit * max(logits.floor_rel_l2, self.unit) or logits.nonfinite:
                beyond = (e for e in self.taps if e.accumulated_ratio > limit)
                first = next(beyond, next(e for e in self.taps if e.tap == "logits"))
                culprits.append(self._culprit([first], accumulated=True))
        order = {tap: i for i, tap in enumerate(self.engine.tap_names)}
        return sorted(culprits, key=lambda c: (c.step, order[c.tap]))

    def _culprit(self, errors: list[TapError], *, accumulated: bool = False) -> Culprit:
        first = errors[0]
        local = not accumulated and not first.nonfinite
        return Culprit(
            tap=first.tap,
            phase=first.phase,
            step=first.step,
            kind="accumulated" if accumulated else "nonfinite" if first.nonfinite else "local",
            local=first.local,
            floor=first.floor,
            ratio=first.accumulated_ratio if accumulated else first.ratio,
            worst=first.worst,
            occurrences=len(errors),
            diagnosis=self._diagnose(first) if local else [],
        )

    def _diagnose(self, error: TapError) -> list[Diagnosis]:
        return diagnose(
            error.tap,
            self.forwards[error.step],
            self.truth.model,
            self.rounded.model,
            bound=error.floor_bound,
            multiple=self.multiple,
            dtype=self.engine.dtype,
        )


def lower_bound(spec: ModelSpec, tap: str, dtype: torch.dtype, *, slots: int) -> float:
    """The relative error that every engine of this dtype may have in a tap, whatever the floor happens to be.

    One rounding to the dtype; and, for a product that sums K terms one after the other in fp32 (fp64 for fp64), the
    error of these sums: a random walk of K roundings gives sqrt(K / 6) units of them.  The floor's own BLAS may sum in
    blocks and be several times better, which is no reason to call the engine wrong.
    """
    terms = {
        "attn.qkv": spec.hidden_size,
        "attn.context": max(slots, spec.attention.head_dim),
        "attn.out": spec.attention.heads * spec.attention.head_dim,
        "mlp.gate": spec.hidden_size,
        "mlp.up": spec.hidden_size,
        "mlp.out": spec.mlp.width,
        "logits": spec.hidden_size,
    }.get(tap.split(".", 2)[-1], 0)
    unit, sum_unit = torch.finfo(dtype).eps / 2, torch.finfo(wide_dtype(dtype)).eps / 2
    return float(max(unit, sum_unit * math.sqrt(terms / 6)))


def _copy_cache(source: KVCache, target: KVCache) -> None:
    live = int(source.lengths.max())
    for ours, theirs in ((target.key, source.key), (target.value, source.value)):
        for mine, other in zip(ours, theirs, strict=True):
            mine[:, :, :live] = other[:, :, :live].to(device=mine.device, dtype=mine.dtype)


class _Logits:
    """Logits of the real tokens of all forwards: numbers a token, never the logits themselves."""

    def __init__(self) -> None:
        self.rows: list[Tensor] = []
        self.squares = torch.zeros(3, dtype=torch.float64)
        self.nonfinite = 0
        self.changed = False

    def add(self, truth: Tensor, rounded: Tensor, untapped: Tensor, tapped: Tensor) -> None:
        """Each [tokens, vocab]; taken a block of tokens at a time, since a float64 vocabulary is large."""
        for start in range(0, len(truth), _BLOCK_TOKENS):
            block = slice(start, start + _BLOCK_TOKENS)
            self._add(*(t[block].to("cpu", torch.float64) for t in (truth, rounded, untapped, tapped)))

    def _add(self, truth: Tensor, rounded: Tensor, untapped: Tensor, tapped: Tensor) -> None:
        self.nonfinite += nonfinite_count(untapped)
        # Unlike torch.equal this counts NaN in the same place as equal.
        self.changed |= not torch.allclose(untapped, tapped, rtol=0.0, atol=0.0, equal_nan=True)
        best = truth.argmax(-1)
        self.squares += torch.stack(
            [(t - o).square().sum() for t, o in ((truth, 0), (untapped, truth), (rounded, truth))]
        )
        self.rows.append(
            torch.stack(
                [
                    kl_divergence(truth, untapped),
                    kl_divergence(truth, rounded),
                    untapped.argmax(-1) != best,
                    rounded.argmax(-1) != best,
                    top_margin(truth),
                    (untapped - truth).abs().amax(-1),
                    (rounded - truth).abs().amax(-1),
                    (untapped - tapped).abs().amax(-1),
                    untapped.argmax(-1) != tapped.argmax(-1),
                ],
                1,
            )
        )

    def result(self) -> LogitError:
        kl, floor_kl, flips, floor_flips, margin, error, floor_error, _, _ = torch.cat(self.rows).unbind(1)
        size, off, floor_off = self.squares.sqrt().tolist()
        return LogitError(
            tokens=len(kl),
            kl_mean=float(kl.mean()),
            kl_max=float(kl.max()),
            top1=float(1 - flips.mean()),
            flips=int(flips.sum()),
            margin_flips=int(((flips > 0) & (margin > 2 * floor_error.max())).sum()),
            max_abs=float(error.max()),
            rel_l2=off / size if size else off,
            floor_kl_mean=float(floor_kl.mean()),
            floor_kl_max=float(floor_kl.max()),
            floor_top1=float(1 - floor_flips.mean()),
            floor_max_abs=float(floor_error.max()),
            floor_rel_l2=floor_off / size if size else floor_off,
            nonfinite=self.nonfinite,
        )

    def observer_effect(self) -> ObserverEffect:
        rows = torch.cat(self.rows)
        return ObserverEffect(changed=self.changed, max_abs=float(rows[:, 7].max()), top1_changed=int(rows[:, 8].sum()))


def diff_bundle(
    bundle: Path,
    model: str | None = None,
    *,
    prompts: Sequence[str] = (),
    steps: int = 8,
    seed: int = 0,
    engine: EngineChoice = "auto",
    emulate_rounding: bool = True,
) -> DiffResult:
    """Compare a bundle's engine with the reference of the model that it was made from.

    Args:
        bundle: its directory.
        model: family name, directory or hub id; None: the family toy that the bundle names.
        prompts: texts of at least 8 tokens; none: default texts, or random ids for a model without a tokenizer.
        steps, seed: decode steps; seed of random ids.
        engine: see `trt_runtime.engines.open_engine`.
        emulate_rounding: on ONNX Runtime: round every node of a half-precision bundle to its dtype (see
            `OnnxRuntimeEngine`).
    Raises:
        LogitLockError: no or a damaged bundle or model, a bundle of another model or checkpoint, a prompt too short or
            too long.
    """
    opened = read_bundle(bundle)
    info = opened.info
    if model is None and info.model not in FAMILIES:
        raise LogitLockError(f"{bundle} was made from {info.model!r}; say with --model where that model is")
    source = resolve(info.model if model is None else model)
    if source.spec != opened.spec:
        differing = _spec_difference(source.spec, opened.spec)
        raise LogitLockError(f"{bundle} is not a bundle of {source.name}: the architecture differs in {differing}")
    checkpoint = checkpoint_hash(source)
    if checkpoint != info.checkpoint_hash:
        raise LogitLockError(
            f"{bundle} was made from another checkpoint than {source.name}: its weights have SHA-256 "
            f"{info.checkpoint_hash[:12]}…, those of the model {checkpoint[:12]}…; export it again"
        )
    chosen: EngineChoice = "tensorrt" if engine == "auto" and serves_tensorrt(opened) else engine
    executor = open_engine(opened, engine=chosen, emulate_rounding=emulate_rounding and chosen != "tensorrt")
    room = executor.max_positions - steps
    if chosen == "tensorrt" and info.engine is not None:
        # The prompt is one step.
        room = min(room, info.engine.max_input)
    if room < LEAST_TOKENS:
        raise LogitLockError(
            f"{bundle} serves {executor.max_positions} positions, but a diff needs {LEAST_TOKENS} prompt tokens "
            f"and {steps} decode steps"
        )
    if prompts:
        batch = text_prompts(prompts, load_tokenizer_for(source), least=LEAST_TOKENS)
    else:
        batch = default_prompts(source.spec, _tokenizer(source), room=room, seed=seed)
    truth = load(source, dtype=torch.float64)
    rounded = load(source, dtype=executor.dtype, numerics=info.numerics)
    result = diff_engine(executor, truth, rounded, batch, steps=steps)
    result.context = {
        "model": source.name,
        "bundle": bundle.name,
        "precision": info.precision,
        "numerics": info.numerics,
        "attention": info.attention,
        "checkpoint_hash": checkpoint,
    }
    return result


def _tokenizer(source: ModelSource) -> Tokenizer | None:
    try:
        return load_tokenizer_for(source)
    except LogitLockError:
        # Default prompts are random ids then; a prompt that the user gave needs one and says so.
        return None
