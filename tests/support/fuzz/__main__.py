"""`python -m tests.support.fuzz --count 2000`: damaged inputs for every verb, and the rate of those that misbehave.

Case N of a seed is the same on every machine; `--only N` runs it alone and shows what it printed.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

from tests.support.fuzz.corpus import make_corpus
from tests.support.fuzz.runs import fuzz, fuzz_in_workers, rate, report


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.support.fuzz", description=__doc__)
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, action="append", help="number of a case; repeatable")
    options = parser.parse_args()
    start, verdicts = time.monotonic(), []
    with tempfile.TemporaryDirectory() as folder:
        corpus = make_corpus(Path(folder) / "corpus")
        run = fuzz if options.only else fuzz_in_workers
        numbers = options.only or list(range(options.count))
        for number, verdict in run(corpus, numbers, seed=options.seed, work=Path(folder)):
            verdicts.append(verdict)
            if verdict.faults or options.only:
                print(report(number, verdict), flush=True)
            if options.only:
                print(f"  stdout: {verdict.out[:500]}\n  stderr: {verdict.err[:1500]}")
    print(rate(verdicts, time.monotonic() - start))
    return int(any(verdict.faults for verdict in verdicts))


if __name__ == "__main__":
    sys.exit(main())
