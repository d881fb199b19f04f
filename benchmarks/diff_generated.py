"""How often the diff finds and names faults that are drawn at random: sites x operators x parameters.

    python benchmarks/diff_generated.py
    python benchmarks/diff_generated.py --models chatglm2 qwen --precisions fp32 --draws 2
    python benchmarks/diff_generated.py --sites norm cache --show        # what was drawn and said, shown kinds
    python benchmarks/diff_generated.py --reveal                         # of hidden kinds too: for a final reading

Draws faults of every kind of `tests/support/fault_generator`, plants them in an exported graph and diffs it.  Half of
the kinds are hidden by `--split`: who works on the diagnosis sees only how many of them were named.  Prints, for both
halves, the shares of mutants with the right first tap, the right name, no name and a wrong name, and writes
benchmarks/results/diff_generated.json.  Draws that change nothing are drawn again; those that change less than rounding
may are counted by themselves.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from tests.support.fault_generator.kinds import KINDS, hidden_kinds  # noqa: E402
from tests.support.fault_generator.run import Result, rates, results  # noqa: E402
from tests.support.mutants import MODELS  # noqa: E402

RESULTS = Path(__file__).parent / "results" / "diff_generated.json"
TOYS = ("qwen", "gpt")


def summary(found: Sequence[Result]) -> str:
    r = rates(found)
    shares = ", ".join(f"{name} {r[name]:.1%}" for name in ("tap", "right", "partly", "unknown", "wrong"))
    return f"{r['mutants']:4.0f} mutants: {shares}; {r['below']:.0f} below the floor"


def line(r: Result) -> str:
    where = f"{r.model} {r.precision}: {r.kind} ({r.numbers}) at {r.planted}, {r.change:.3g} floors"
    return f"{r.outcome.upper():8} {where} -> {r.first_tap}: {r.diagnosis}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=[*MODELS, *TOYS])
    parser.add_argument("--precisions", nargs="+", default=["fp32", "fp16", "bf16"])
    parser.add_argument("--sites", nargs="+", help="sites of faults; default: all")
    parser.add_argument("--draws", type=int, default=1, help="of each kind in each model and precision")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--split", type=int, default=0, help="seed that chooses the hidden kinds")
    parser.add_argument("--show", action="store_true", help="print every mutant of a shown kind that has no right name")
    parser.add_argument("--reveal", action="store_true", help="and of hidden kinds")
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    hidden = hidden_kinds(arguments.split)
    kinds = [name for name, kind in KINDS.items() if not arguments.sites or kind.site in arguments.sites]
    engines: list[bool] = []

    def clean(model: str, precision: str, aligned: bool) -> None:
        engines.append(aligned)
        if not aligned:
            print(f"FALSE ALARM: {model} {precision}", flush=True)

    found: list[Result] = []
    start = time.process_time()
    for result in results(arguments.models, arguments.precisions, kinds, draws=arguments.draws, seed=arguments.seed,
                          clean=clean):  # fmt: skip
        found.append(result)
        if result.outcome != "right" and (arguments.reveal or (arguments.show and result.kind not in hidden)):
            print(line(result), flush=True)
    seconds = time.process_time() - start
    halves = {
        "shown": [r for r in found if r.kind not in hidden],
        "hidden": [r for r in found if r.kind in hidden],
    }
    sites = sorted({r.site for r in found})
    table = {half: {site: rates([r for r in rs if r.site == site]) for site in sites} for half, rs in halves.items()}
    for half, rs in halves.items():
        for site in sites:
            print(f"{half:6} {site:10} {summary([r for r in rs if r.site == site])}")
        print(f"{half:6} {'all':10} {summary(rs)}")
    print(f"       {'all':10} {summary(found)}")
    print(
        f"{sum(engines)} of {len(engines)} clean engines aligned; {1000 * seconds / max(len(found), 1):.0f} ms CPU each"
    )
    document = {
        "command": shlex.join(["python", "benchmarks/diff_generated.py", *sys.argv[1:]]),
        "seed": arguments.seed, "draws": arguments.draws, "split": arguments.split, "models": arguments.models,
        "precisions": arguments.precisions, "kinds": {half: len({r.kind for r in rs}) for half, rs in halves.items()},
        "clean": {"engines": len(engines), "aligned": sum(engines)}, "cpu_seconds": round(seconds, 1),
        "rates": {"shown": rates(halves["shown"]), "hidden": rates(halves["hidden"]), "all": rates(found)},
        "sites": table, "mutants": [asdict(r) for r in (found if arguments.reveal else halves["shown"])],
    }  # fmt: skip
    arguments.output.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
