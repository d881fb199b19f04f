"""Propose a name map, by running the graph once and searching for the reference's tensors among its values.

All float values of the graph whose shape fits a tap are captured on a short prompt.  The reference then runs on the
same tokens.  Each of its tensors is matched with the most similar value (cosine over all tokens, in any layout) among
those computed after the tap that it reads, and **the graph's value replaces it in the reference**.  So every module is
matched on the graph's own inputs: after a fault, all healthy tensors still match to the last digits, and only the
faulty tensor itself is less similar.  If even the best value is not similar, each candidate is tried, and the one after
which the next module matches is chosen.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from debug.executors.candidates import Candidate, Captured, capture, joined
from debug.executors.name_map import NameMap, Source, write_json
from debug.executors.onnx_file import OnnxFileEngine
from refmodels.model import Decoder
from refmodels.recorder import Recorder, recording
from refmodels.taps import is_cache_tap, tap_names

_WINDOW = 64
"""Maximum number of values of the right width to compare with one tap: a block has a few dozen of them."""
_ALIKE = 0.02
"""Distance up to which a value is accepted at once: a wrong tensor is farther away than this, and a tensor with a small
fault is nearer."""
_SURE = 0.999
"""Cosine below which a person should check the match."""
_LEAST_COSINE = 0.5
"""A key or value with a lower cosine is left out of the map; no module after it can confirm the match."""
_TRIALS = 24
"""Number of candidates to try for a tap without a similar value."""


@dataclass(frozen=True, kw_only=True)
class Proposal:
    """A name map and its confidence.

    Attributes:
        names: the map.
        confidence: by tap, the cosine between the graph's value and the reference's output for the graph's own inputs.
        ambiguous: by tap, other values that fit as well.
        unmatched: taps without a fitting value.
    """

    names: NameMap
    confidence: dict[str, float]
    ambiguous: dict[str, list[str]]
    unmatched: list[str]

    def to_json(self) -> dict[str, Any]:
        confidence = {tap: round(value, 6) for tap, value in self.confidence.items()}
        return {
            **self.names.to_json(),
            "confidence": confidence,
            "ambiguous": self.ambiguous,
            "unmatched": self.unmatched,
        }

    def summary(self) -> str:
        """One phrase that says what to know before trusting the map.

        A guessed tap is unlike the reference's, but the module that reads it computes the graph's next tap from it.
        """
        unlike = [tap for tap, cosine in self.confidence.items() if cosine < _SURE]
        parts = [f"{len(self.names.taps)} taps by a proposed map"]
        for what, taps in (("not found", self.unmatched), ("ambiguous", [*self.ambiguous]), ("guessed", unlike)):
            if taps:
                parts.append(f"{what}: {', '.join(taps[:4])}" + (f" and {len(taps) - 4} more" if len(taps) > 4 else ""))
        return ", ".join(parts)

    def write(self, file: Path) -> None:
        """Write the map as JSON, which `read_name_map` reads and a person can correct.

        Raises:
            LogitLockError: the file cannot be written.
        """
        write_json(file, self.to_json())


def propose_map(
    path: Path | str, reference: Decoder, *, names: NameMap | None = None, seed: int = 0, threads: int | None = None
) -> Proposal:
    """Find our taps in a third party's graph.

    Args:
        path: an ONNX file as for `OnnxFileEngine`.
        reference: the same model in fp32 or fp64.
        names: known inputs and outputs; its taps are kept unchanged.
        seed: random seed for the prompt's ids.
        threads: number of ONNX Runtime's threads.
    Memory: the candidates' values for at most 58 tokens.
    Raises:
        LogitLockError: as `OnnxFileEngine`.
    """
    names = NameMap() if names is None else names
    engine = OnnxFileEngine(path, reference.spec, names, threads=threads)
    with torch.no_grad():
        return _Search(engine, reference, capture(engine, seed)).result(names)


@dataclass(frozen=True, kw_only=True)
class _Match:
    """A candidate, compared with the reference's tensor.

    distance: relative L2 after the best scaling, so that a tensor with a wrong factor is still found; error: relative
    L2 without scaling.  others: sources of other tensors at the same distance.
    """

    found: Candidate
    distance: float
    error: float
    others: tuple[Source, ...] = ()

    @property
    def cosine(self) -> float:
        return math.sqrt(max(0.0, 1.0 - self.distance**2))


class _Search:
    """Runs the reference along the graph's values."""

    def __init__(self, engine: OnnxFileEngine, reference: Decoder, captured: Captured) -> None:
        self.engine, self.reference, self.captured = engine, reference, captured
        self.spec = reference.spec
        self.floor = 4 * torch.finfo(engine.dtype).eps
        self.matches: dict[str, _Match] = {}
        self.logits = float("nan")

    def result(self, names: NameMap) -> Proposal:
        self.run(_Walk(self))
        taps = {tap: match.found.source for tap, match in self.matches.items()}
        known = {*taps, *names.taps, *self.engine.roles.present, "logits"}
        others = {tap: match.others for tap, match in self.matches.items() if match.others}
        return Proposal(
            names=replace(names, taps={**taps, **names.taps}),
            confidence={tap: match.cosine for tap, match in self.matches.items()} | {"logits": self.logits},
            ambiguous={tap: [_text(source) for source in sources] for tap, sources in others.items()},
            unmatched=[tap for tap in tap_names(self.spec) if tap not in known],
        )

    def run(self, recorder: Recorder) -> None:
        ids = self.captured.ids
        cache = self.reference.new_cache(batch=ids.shape[0], capacity=ids.shape[1])
        with recording(recorder):
            self.reference.run(cache.next_step(ids), cache)

    def best(self, tap: str, expected: Tensor, matches: Mapping[str, _Match]) -> _Match | None:
        """The nearest value, or the joined parts of qkv."""
        if tap == "logits":
            found = self.captured.logits
            logits = Candidate(source=Source(value=tap), rows=_rows(found), nodes=())
            if found.shape[1] == 1:
                expected = expected.unflatten(0, (len(found), -1))[:, -1]
            return _compared(logits, expected)
        whole = self._nearest(self._candidates(tap, expected.shape[1], matches), expected)
        parts = self._parts(tap, expected, matches)
        if not parts:
            return whole
        match = _compared(joined([part.found for part in parts]), expected)
        match = replace(match, others=tuple(source for part in parts for source in part.others))
        return match if whole is None or match.distance < whole.distance else whole

    def by_trial(self, tap: str, expected: Tensor) -> _Match | None:
        """The value with which the output of the module that reads the tap matches."""
        tried = self._candidates(tap, expected.shape[1], self.matches)
        parts = self._parts(tap, expected, self.matches)
        if parts:
            # One wrong part: the others are known.
            i = max(range(3), key=lambda i: parts[i].distance)
            found = [part.found for part in parts]
            width = found[i].rows.shape[1]
            tried += [joined([*found[:i], c, *found[i + 1 :]]) for c in self._window(tap, width, self.matches)]
        matches = [_compared(candidate, expected) for candidate in _distinct(tried)]
        trials = [(self._trial(tap, {tap: match}).distance, match) for match in matches]
        limit = 2 * max(min((distance for distance, _ in trials), default=1.0), self.floor)
        near = [match for distance, match in trials if distance <= min(limit, _ALIKE)]
        # Take the first of them: a norm changes nothing in an input that is already normalized.
        return replace(near[0], others=tuple(match.found.source for match in near[1:])) if near else None

    def by_exchange(self, tap: str) -> _Match | None:
        """The activation's output, if gate and up are swapped in the graph; they are then exchanged.

        If the graph's fault is that these two are swapped, the value similar to `gate` is the graph's up.
        """
        made = self.spec.taps[tap]
        if made.kind != "activation" or len(made.reads) < 2 or not all(name in self.matches for name in made.reads):
            return None
        gate, up = made.reads
        first, second = self.matches[gate], self.matches[up]
        exchanged = {
            gate: _compared(second.found, first.found.rows.double()),
            up: _compared(first.found, second.found.rows.double()),
        }
        trial = self._trial(up, exchanged)
        if trial.distance > _ALIKE or tap not in trial.matches:
            return None
        self.matches |= exchanged
        return trial.matches[tap]

    def _trial(self, tap: str, matches: Mapping[str, _Match]) -> _Trial:
        """Distance of the output of the module that reads the tap from the nearest value, given these matches."""
        trial = _Trial(self, tap, {**self.matches, **matches})
        with contextlib.suppress(_Done):
            self.run(trial)
        return trial

    def _parts(self, tap: str, expected: Tensor, matches: Mapping[str, _Match]) -> list[_Match]:
        """Query, key and value, each searched for by itself; nothing if one is not found, or for another tap."""
        if self.spec.taps[tap].part != "attn.qkv":
            return []
        a = self.spec.attention
        query, kv = a.heads * a.head_dim, a.kv_heads * a.head_dim
        split = expected.split([query, kv, kv], 1)
        parts = [self._nearest(self._window(tap, part.shape[1], matches), part) for part in split]
        found = [part for part in parts if part is not None]
        return found if len(found) == len(parts) else []

    def _candidates(self, tap: str, width: int, matches: Mapping[str, _Match]) -> list[Candidate]:
        found = self._window(tap, width, matches)
        a, ffn, part = self.spec.attention, self.spec.mlp.width, self.spec.taps[tap].part
        if part == "attn.qkv" and a.heads == a.kv_heads:
            found = found + [c.regrouped(a.heads) for c in found]
        if part in ("mlp.gate", "mlp.up"):
            fused = self._window(tap, 2 * ffn, matches)
            found = found + [c.cut(start, start + ffn) for c in fused for start in (0, ffn)]
        return found

    def _window(self, tap: str, width: int, matches: Mapping[str, _Match]) -> list[Candidate]:
        """The first values of this width that are computed from the previous tap and are no other tap."""
        name = self._before(tap)
        while name is not None and name not in matches:
            name = self._before(name)
        after = sum(1 << node for node in matches[name].found.nodes) if name is not None else -1
        before = self.captured.before
        # A value serves one tap: twice a residual would otherwise be the residual and its branch.
        used = [match.found.source for match in matches.values()]
        later = (c for c in self.captured.by_width[width] if before[c.nodes[0]] & after and c.source not in used)
        return list(islice(later, _WINDOW))

    def _before(self, tap: str) -> str | None:
        """The last of the taps from which this one is computed."""
        reads = self.spec.taps[tap].reads
        return reads[-1] if reads else None

    def _nearest(self, candidates: Sequence[Candidate], expected: Tensor) -> _Match | None:
        matches = [_compared(candidate, expected) for candidate in candidates]
        if not matches:
            return None
        # Among equally near values, the factor decides, then the order of execution.
        limit = 2 * max(min(m.distance for m in matches), self.floor)
        best = min((m for m in matches if m.distance <= limit), key=lambda m: max(m.error, self.floor))
        others = [
            m.found.source
            for m in matches
            if m.distance <= limit and m.error <= 2 * max(best.error, self.floor)
            and float((m.found.rows - best.found.rows).norm()) > self.floor * float(best.found.rows.norm())
        ]  # fmt: skip
        return replace(best, others=tuple(others))


class _Walk(Recorder):
    """Matches every tap of a run of the reference, which continues with the graph's values."""

    def __init__(self, search: _Search) -> None:
        super().__init__(names=())
        self.search = search

    def __call__(self, name: str, tensor: Tensor) -> Tensor:
        search = self.search
        if name == "logits":
            logits = search.best(name, _rows(tensor), search.matches)
            assert logits is not None
            search.logits = logits.cosine
            return tensor
        if name in search.engine.roles.present:
            return tensor
        if is_cache_tap(name):
            tensor = tensor[:, :, : self.live_slots].transpose(1, 2).flatten(2)
        expected = _rows(tensor)
        match = search.best(name, expected, search.matches)
        if match is None or match.distance > _ALIKE:
            if not is_cache_tap(name):
                match = search.by_exchange(name) or search.by_trial(name, expected)
            elif match is not None and match.cosine < _LEAST_COSINE:
                match = None
        if match is None:
            return tensor
        search.matches[name] = match
        return tensor if is_cache_tap(name) else _in_place_of(tensor, match)


class _Done(Exception):
    """Raised when a trial has reached its last tap."""


class _Trial(Recorder):
    """A run with the matches so far and one candidate, up to the module that reads it.

    If that module's own output is not in the graph, the run goes up to the next module.
    """

    def __init__(self, search: _Search, tap: str, matches: dict[str, _Match]) -> None:
        super().__init__(names=())
        self.search, self.tap, self.matches = search, tap, matches
        self.distance, self.modules = float("inf"), 2

    def __call__(self, name: str, tensor: Tensor) -> Tensor:
        if is_cache_tap(name):
            return tensor
        if name in self.matches:
            return _in_place_of(tensor, self.matches[name])
        match = self.search.best(name, _rows(tensor), self.matches)
        distance = float("inf") if match is None else match.distance
        if match is not None and distance <= _ALIKE:
            self.matches[name] = match
        if self.tap in self.search.spec.taps[name].reads:
            self.distance, self.tap, self.modules = min(self.distance, distance), name, self.modules - 1
            if distance <= _ALIKE or not self.modules or name == "logits":
                raise _Done
        # The reference's own output is what has to match.
        return tensor


def _in_place_of(tensor: Tensor, match: _Match) -> Tensor:
    return match.found.rows.reshape(tensor.shape).to(tensor.dtype)


def _rows(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1, tensor.shape[-1]).double()


def _compared(candidate: Candidate, expected: Tensor) -> _Match:
    rows = candidate.rows.double()
    size, square = float(expected.norm()), float(rows.square().sum())
    if not size or not square or not math.isfinite(square):
        return _Match(found=candidate, distance=1.0, error=1.0)
    factor = max(0.0, float((rows * expected).sum()) / square)
    return _Match(
        found=candidate,
        distance=float((expected - factor * rows).norm()) / size,
        error=float((expected - rows).norm()) / size,
    )


def _distinct(candidates: Sequence[Candidate]) -> list[Candidate]:
    """The first few candidates that are different tensors."""
    found: list[Candidate] = []
    for candidate in candidates:
        if len(found) == _TRIALS:
            break
        if not any(torch.equal(candidate.rows, other.rows) for other in found):
            found.append(candidate)
    return found


def _text(source: Source) -> str:
    written = source.to_json()
    return written if isinstance(written, str) else json.dumps(written)
