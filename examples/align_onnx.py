"""Which layer of somebody else's ONNX file differs from its checkpoint?

python examples/align_onnx.py ./my-qwen2 model.onnx names.json

The first run proposes names.json: which values of the graph are which taps.  Correct it by hand where it is wrong, and
run again.  Exit code 1 if the file computes something else than the checkpoint.
"""

import sys
from pathlib import Path

from debug import diff, print_diff


def align(model: str, onnx_file: str, names: str) -> bool:
    """Compare, say which taps were found and what is wrong, and return whether nothing is."""
    proposed = not Path(names).exists()
    result = diff(onnx_file, model=model, name_map=Path(names), steps=4)
    compared = {tap.tap for tap in result.taps}
    print(f"{len(compared)} taps compared; {names} {'was proposed: look at it' if proposed else 'was used'}")
    print_diff(result)
    for culprit in result.culprits:
        faults = " or ".join(found.fault for found in culprit.diagnosis) or "unknown"
        print(f"-> {culprit.tap}: {faults} ({culprit.ratio:.0f} noise floors, tokens {culprit.worst})")
    return result.aligned


if __name__ == "__main__":
    sys.exit(0 if align(*sys.argv[1:4]) else 1)
