"""The results of a diff, as dataclasses; `DiffResult.to_json` is the versioned form (schema 1)."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, is_dataclass
from typing import TYPE_CHECKING, Any, Literal

from debug.comparison.metrics import json_number
from debug.comparison.repeats import Repeat, repeats_of
from refmodels.errors import LogitLockError
from refmodels.json_records import read_record

if TYPE_CHECKING:
    import pandas as pd

SCHEMA = 1
_SETTINGS = ("reference", "floor", "engine", "multiple", "unit_roundoff", "prompts", "prompt_lengths", "steps")
"""Fields of a `DiffResult` that its JSON has under "settings"."""
TRUTH_ARITHMETIC = "PyTorch reference in float64, exact numerics"
Phase = Literal["prefill", "decode"]
Verdict = Literal["aligned", "diverged", "nonfinite"]


def to_plain(value: object) -> Any:
    """JSON values of numbers, lists and dataclasses; NaN and infinities become None."""
    if isinstance(value, float):
        return json_number(value)
    if is_dataclass(value) and not isinstance(value, type):
        value = asdict(value)
    if isinstance(value, dict):
        return {k: to_plain(v) for k, v in value.items()}
    return [to_plain(v) for v in value] if isinstance(value, list | tuple) else value


def data_frame(rows: list[dict[str, Any]]) -> pd.DataFrame:
    """A table with one row per dict; pandas is imported only here."""
    try:
        import pandas as pd
    except ImportError as error:
        raise LogitLockError("a DataFrame needs pandas: pip install 'logitlock[report]'") from error
    return pd.DataFrame(rows)


@dataclass(frozen=True, kw_only=True)
class TapError:
    """One tap in one forward pass; errors are relative L2 over the real tokens unless said otherwise.

    Attributes:
        tap, phase, step: the place; step 0 is the prefill, step n the n-th decode step.
        accumulated, max_abs, cosine, ulp, snr_db: engine against the fp64 reference, both from the same token ids.
        accumulated_floor: the reference in the engine's dtype against the fp64 reference, likewise.
        local, local_max_abs: the engine's output against the fp64 reference module run on the engine's own inputs.
        floor, floor_spread: the reference module in the engine's dtype on the same inputs, against the fp64 module; the
            spread is the worst token of the batch over all tokens.
        floor_bound: lower bound of the floor (`debug.comparison.bounds.lower_bound`).
        ratio: local error over floor, of the worst token (see `debug.comparison.compare.MULTIPLE`).
        accumulated_ratio: accumulated over accumulated_floor.
        worst: row and position of the token with the largest ratio.
        cut: the engine's own module on the reference's inputs, against the reference's output (`debug.comparison.cut`);
            None if it was not requested or the executor cannot be cut.
        nonfinite: number of NaN and Inf in the engine's tensor; results that they spoil are None in JSON.
        floor_nonfinite: the reference in the engine's dtype has some as well, so the dtype's range is too small.
    """

    tap: str
    phase: Phase
    step: int
    accumulated: float
    max_abs: float
    cosine: float
    ulp: float
    snr_db: float
    accumulated_floor: float
    local: float
    local_max_abs: float
    floor: float
    floor_spread: float
    floor_bound: float
    ratio: float
    accumulated_ratio: float
    worst: tuple[int, int]
    nonfinite: int
    floor_nonfinite: int
    cut: float | None = None

    def to_json(self) -> dict[str, Any]:
        plain: dict[str, Any] = to_plain(self)
        return plain


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """A known fault with which the reference module gives the engine's output.

    local_before, local_after: local error without and with the fault; ratio_after: the latter in noise floors, at
    the worst token.  significance: for a deviation below the noise of single tokens (see
    `debug.comparison.systematic`), its size over all tokens in standard deviations of the noise; None for faults above
    the floor.

    words: the fault with {} in place of its fitted number.  value, low, high: this number, and the interval within
    which the fault explains the engine; None without one.  note: what would tell the fault from the first of the list,
    if it explains the engine as well.
    """

    fault: str
    local_before: float
    local_after: float
    ratio_after: float
    significance: float | None = None
    words: str = ""
    value: float | None = None
    low: float | None = None
    high: float | None = None
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class TokenView:
    """A token (or cache slot) of a wrong tap: row and position in its forward pass, local error, also in floors."""

    row: int
    position: int
    local: float
    ratio: float


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """The place of the local error within a wrong tap.

    tokens: the worst tokens.  heads: relative L2 error by head (query, then key, then value heads for attn.qkv), empty
    for taps without heads; head_names are their names.  channels: (index, share of the squared error) of the worst
    channels, if a few of them have most of it.
    """

    tokens: list[TokenView] = field(default_factory=list)
    heads: list[float] = field(default_factory=list)
    head_names: list[str] = field(default_factory=list)
    channels: list[tuple[int, float]] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Culprit:
    """A tap whose own module is wrong, at its first occurrence.

    kind: "local" (local error above the floor), "nonfinite" (NaN or Inf from finite inputs), "systematic" (below the
    floor of single tokens, but over all tokens exactly the effect of a known fault), "accumulated" (no module by
    itself, but the logits are off by more than the dtype explains), or "configuration" (no tensor: the tap is then
    the wrong setting, such as "stop_ids").  occurrences: number of forward passes that show it.  diagnosis:
    known faults that explain it, the best first; empty: unknown.  evidence: the place of the error within the tap.
    """

    tap: str
    phase: Phase
    step: int
    kind: Literal["local", "nonfinite", "systematic", "accumulated", "configuration"]
    local: float
    floor: float
    ratio: float
    worst: tuple[int, int]
    occurrences: int
    diagnosis: list[Diagnosis] = field(default_factory=list)
    evidence: Evidence = field(default_factory=Evidence)

    def to_json(self) -> dict[str, Any]:
        plain: dict[str, Any] = to_plain(self)
        return plain


@dataclass(frozen=True, kw_only=True)
class LogitError:
    """Logits of the engine as it ships (untapped) against the fp64 reference, over all real tokens.

    KL in nats, float64, reference first.  top1: share of tokens with the reference's greedy token.  flips: number of
    tokens where it differs; margin_flips: number of those where the reference's margin is more than twice the largest
    error of the floor, so that rounding does not explain them.  floor_*: the same for the reference in the engine's
    dtype.
    """

    tokens: int
    kl_mean: float
    kl_max: float
    top1: float
    flips: int
    margin_flips: int
    max_abs: float
    rel_l2: float
    floor_kl_mean: float
    floor_kl_max: float
    floor_top1: float
    floor_max_abs: float
    floor_rel_l2: float
    nonfinite: int

    def to_json(self) -> dict[str, Any]:
        plain: dict[str, Any] = to_plain(self)
        return plain


@dataclass(frozen=True, kw_only=True)
class LogitToken:
    """The logits after one token; `LogitError` is made of these.

    step, row, position: as in `TapError.worst`.  index: the token's place in the text of its row, without padding.
    token: the input token.  expected, chosen: greedy tokens of the reference and of the engine.  margin: the
    reference's lead of its token over the runner-up.  error, floor_error: largest absolute logit error of the engine
    and of the floor.  beyond_rounding: a flip that `LogitError.margin_flips` counts.
    """

    step: int
    row: int
    position: int
    index: int
    token: int
    expected: int
    chosen: int
    kl: float
    floor_kl: float
    margin: float
    error: float
    floor_error: float
    beyond_rounding: bool

    @property
    def flip(self) -> bool:
        return self.chosen != self.expected

    def to_json(self) -> dict[str, Any]:
        return {
            **to_plain(self),
            "flip": self.flip,
        }


@dataclass(frozen=True, kw_only=True)
class ObserverEffect:
    """Logits with taps against logits without.  top1_changed: number of tokens whose greedy token differs."""

    changed: bool
    max_abs: float
    top1_changed: int

    def to_json(self) -> dict[str, Any]:
        plain: dict[str, Any] = to_plain(self)
        return plain


@dataclass(frozen=True, kw_only=True)
class TapDistance:
    """One tap of executor b against executor a, over all real tokens."""

    tap: str
    rel_l2: float
    max_abs: float
    cosine: float


@dataclass(frozen=True, kw_only=True)
class Between:
    """Executor b directly against executor a, without the reference: logits (KL(a || b) in nats) and common taps."""

    kl_mean: float
    kl_max: float
    top1: float
    max_abs: float
    taps: list[TapDistance]

    def to_json(self) -> dict[str, Any]:
        plain: dict[str, Any] = to_plain(self)
        return plain


@dataclass(kw_only=True)
class DiffResult:
    """The result of a diff; `taps` are in the order of execution, step by step.

    logit_tokens: the logits token by token.  token_texts: texts of their ids, if there is a tokenizer.

    inputs: the prompts' token ids without padding ("prompt_ids"), their texts if they were given ("texts"), and the
    seed.  environment: date, versions and machine (`debug.environment`).

    other: in a comparison of two executors, the result of executor a; between: b directly against a.
    """

    verdict: Verdict
    culprits: list[Culprit]
    taps: list[TapError]
    logits: LogitError
    observer_effect: ObserverEffect
    reference: str
    floor: str
    engine: str
    multiple: float
    unit_roundoff: float
    prompts: str
    prompt_lengths: list[int]
    steps: int
    context: dict[str, Any] = field(default_factory=dict)
    logit_tokens: list[LogitToken] = field(default_factory=list)
    token_texts: dict[int, str] = field(default_factory=dict)
    other: DiffResult | None = None
    between: Between | None = None
    inputs: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)

    def __repr__(self) -> str:
        return f"<DiffResult of {len(self.taps)} taps. {verdict_line(self)}>"

    def _repr_html_(self) -> str:
        """The verdict and the culprits, for notebooks; `debug.write_report` has the whole."""
        from debug.report.markup import escape, number, table

        rows = [
            [
                escape(c.tap),
                c.phase,
                number(c.local),
                number(c.ratio),
                escape(c.diagnosis[0].fault if c.diagnosis else ""),
            ]
            for c in self.culprits
        ]
        columns = ("tap", "phase", "local error", "noise floors", "diagnosis")
        return f"<p>{escape(verdict_line(self))}</p>" + (table("Culprits", columns, rows) if rows else "")

    @property
    def aligned(self) -> bool:
        """Whether nothing is wrong, in either executor."""
        return self.verdict == "aligned" and (self.other is None or self.other.aligned)

    @property
    def first_wrong_tap(self) -> str | None:
        return self.culprits[0].tap if self.culprits else None

    @property
    def repeats(self) -> list[Repeat]:
        """The faults that several layers share; their culprits are among `culprits`."""
        return repeats_of(self.culprits, list(dict.fromkeys(e.tap for e in self.taps)))

    def to_frame(self) -> pd.DataFrame:
        """One row per tap and step, with the columns of `TapError`; worst_row and worst_position replace worst.

        Raises:
            LogitLockError: pandas is not installed.
        """
        rows = [asdict(tap) for tap in self.taps]
        for row in rows:
            row["worst_row"], row["worst_position"] = row.pop("worst")
        return data_frame(rows)

    def to_json(self, *, tokens: bool = False) -> dict[str, Any]:
        """Schema 1; `tokens` adds "logit_tokens" with one entry per token, which is long for long prompts."""
        return {
            "schema": SCHEMA,
            "verdict": self.verdict,
            "first_wrong_tap": self.first_wrong_tap,
            "culprits": [c.to_json() for c in self.culprits],
            "repeats": [r.to_json() for r in self.repeats],
            "logits": self.logits.to_json(),
            "observer_effect": self.observer_effect.to_json(),
            "taps": [t.to_json() for t in self.taps],
            "settings": {**{name: getattr(self, name) for name in _SETTINGS}, **self.context},
            **({"logit_tokens": [t.to_json() for t in self.logit_tokens]} if tokens else {}),
            **({} if self.other is None else {"other": self.other.to_json()}),
            **({} if self.between is None else {"between": self.between.to_json()}),
            **({"inputs": self.inputs} if self.inputs else {}),
            **({"environment": self.environment} if self.environment else {}),
        }

    @classmethod
    def from_json(cls, document: object, where: str = "the diff") -> DiffResult:
        """The inverse of `to_json`, but for NaN and Inf, which JSON does not have: they become NaN.

        Args:
            document: the parsed JSON of `to_json` or of `logitlock diff --json`.
            where: how errors name it.
        Raises:
            LogitLockError: it is not the JSON of a diff, or of another schema.
        """
        if not isinstance(document, dict) or "verdict" not in document:
            raise LogitLockError(f"{where} is not the JSON of a diff (logitlock diff --json)")
        if document.get("schema") != SCHEMA:
            raise LogitLockError(f"{where} has schema {document.get('schema')!r}; this version reads schema {SCHEMA}")
        settings = document.get("settings")
        if not isinstance(settings, dict):
            raise LogitLockError(f"{where} lacks the object 'settings'")
        own = {name: value for name, value in settings.items() if name in _SETTINGS}
        context = {name: value for name, value in settings.items() if name not in _SETTINGS}
        # Derived from the rest, or of an earlier diff.
        derived = ("schema", "settings", "first_wrong_tap", "repeats", "other", "baseline")
        record = {name: value for name, value in document.items() if name not in derived} | own | {"context": context}
        if isinstance(tokens := record.get("logit_tokens"), list):
            record["logit_tokens"] = [
                {k: v for k, v in t.items() if k != "flip"} if isinstance(t, dict) else t for t in tokens
            ]
        result = read_record(cls, record, where, null_is_nan=True)
        if "other" in document:
            result.other = cls.from_json(document["other"], f"{where}.other")
        return result


def verdict_line(result: DiffResult) -> str:
    """One sentence: the verdict, the first wrong tap, and by how much."""
    if result.verdict == "aligned":
        worst = max(result.taps, key=lambda e: e.ratio)
        return (
            f"ALIGNED: no tap's local error is above {result.multiple:g} noise floors; the largest is "
            f"{worst.ratio:.1f} at {worst.tap}"
        )
    first = result.culprits[0]
    where = "prefill" if first.phase == "prefill" else f"decode step {first.step}"
    where = f"{first.tap} ({where}, row {first.worst[0]}, position {first.worst[1]})"
    others = len(result.culprits) - 1
    also = "taps are wrong by themselves" if others > 1 else "tap is wrong by itself"
    more = f"; {others} more {also}" if others else ""
    if first.kind == "nonfinite":
        return f"NONFINITE: the first NaN or Inf is at {where}{more}"
    label = result.verdict.upper()
    if first.kind == "configuration":
        return f"{result.verdict.upper()}: every tensor is right, but {first.tap} is not: {first.diagnosis[0].fault}"
    if first.kind == "systematic":
        found = first.diagnosis[0]
        sure = "" if found.significance is None else f" ({found.significance:.3g} standard deviations)"
        return (
            f"{label}: {first.tap} is within its noise token by token, but over all tokens it deviates just as with "
            f"'{found.fault}'{sure}{more}"
        )
    if first.kind == "accumulated":
        return (
            f"{label}: no module is wrong by itself, but the logits are; accumulated error passes "
            f"{result.multiple:g} floors at {where}: {first.ratio:.3g} floors"
        )
    return (
        f"{label}: the first wrong tap is {where}: local error {first.local:.3g}, {first.ratio:.3g} noise floors{more}"
    )
