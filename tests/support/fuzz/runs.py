"""Many cases: in this process, or in workers that may die of them; and the rate of those that misbehave."""

from __future__ import annotations

import multiprocessing
import os
import random
from collections import Counter
from collections.abc import Iterable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

from tests.support.fuzz.judge import Verdict, cases_of, play

_TURNS = {"arguments": 4, "config.json": 2, "quantized tensors": 2, "tokenizer": 2, "trace": 2}
"""How often a kind has its turn, where there is more to try than for the others."""


def fuzz(corpus: Path, numbers: Iterable[int], *, seed: int, work: Path) -> Iterator[tuple[int, Verdict]]:
    """Run cases in this process.  The kinds of files take turns, so that a few hundred cases reach all of them."""
    kinds = cases_of(corpus)
    turns = [kind for kind in sorted(kinds) for _ in range(_TURNS.get(kind, 1))]
    torch.set_num_threads(1)
    for number in numbers:
        rng = random.Random(f"{seed}:{number}")
        case = rng.choice(kinds[turns[number % len(turns)]])
        with torch.no_grad():
            yield number, play(rng, case, corpus, work / f"case-{number}")


def report(number: int, verdict: Verdict) -> str:
    """What a person needs to see the same."""
    faults = "\n".join(f"    {fault}" for fault in verdict.faults)
    return (
        f"case {number} ({verdict.kind}): {verdict.said}\n  logitlock {verdict.line}\n  code {verdict.code}\n{faults}"
    )


def rate(verdicts: list[Verdict], seconds: float) -> str:
    """Counts for each kind of file."""
    bad, ran = Counter(v.kind for v in verdicts if v.faults), Counter(v.kind for v in verdicts)
    codes = Counter(str(v.code) for v in verdicts)
    rows = [f"  {kind:20} {ran[kind]:5} cases {bad[kind]:4} misbehave" for kind in sorted(ran)]
    said = ", ".join(f"{n} with code {code}" for code, n in sorted(codes.items()))
    total = f"{len(verdicts)} cases in {seconds:.0f} s ({len(verdicts) / max(seconds, 1e-9):.1f} per second): {said}"
    return "\n".join([*rows, total, f"{sum(bad.values())} misbehave"])


def _worker(pipe: Connection, corpus: Path, numbers: list[int], seed: int, work: Path) -> None:
    for number, verdict in fuzz(corpus, numbers, seed=seed, work=work):
        pipe.send((number, verdict))


def fuzz_in_workers(corpus: Path, numbers: list[int], seed: int, work: Path) -> Iterator[tuple[int, Verdict]]:
    """A command that kills its process is one more case that misbehaves."""
    context = multiprocessing.get_context("spawn")
    while numbers:
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=_worker, args=(theirs, corpus, numbers, seed, work))
        process.start()
        theirs.close()
        try:
            while numbers:
                number, verdict = ours.recv()
                numbers = [n for n in numbers if n != number]
                yield number, verdict
        except EOFError:
            process.join()
            yield numbers[0], Verdict("crash", "", "", faults=[f"the process ended with code {process.exitcode}"])
            numbers = numbers[1:]
        process.join()
