"""How often the diff names the right tap and the right fault: every mutation that applies, in every family.

    python benchmarks/diff_mutations.py
    python benchmarks/diff_mutations.py --models qwen gpt --precisions fp16

Plants each fault of `tests/support/mutations.py` at a random layer of an exported graph, diffs it, and prints for every
mutant whether the first culprit is the right tap (share "tap") and the first diagnosis the right fault (share "name");
writes benchmarks/results/diff_mutations.json.  Exit code 1 below 95 % and 85 %.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from tests.support.mutants import LEAST, MODELS, rates, run  # noqa: E402

RESULTS = Path(__file__).parent / "results" / "diff_mutations.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--precisions", nargs="+", default=["fp32", "fp16", "bf16"])
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    mutants = []
    for model in arguments.models:
        for precision in arguments.precisions:
            for mutant in run(model, precision, seed=arguments.seed):
                mutants.append(mutant)
                if not mutant.name:
                    print(
                        f"{model} {precision}: {mutant.mutation} at {mutant.planted} -> {mutant.first_tap} "
                        f"({mutant.ratio:.3g} floors), {mutant.first_diagnosis}",
                        flush=True,
                    )
    found = rates(mutants)
    print(f"{len(mutants)} mutants: right tap {found['tap']:.1%}, right name {found['name']:.1%}")
    result = {"seed": arguments.seed, "rates": found, "mutants": [asdict(m) for m in mutants]}
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    sys.exit(int(any(found[key] < least for key, least in LEAST.items())))


if __name__ == "__main__":
    main()
