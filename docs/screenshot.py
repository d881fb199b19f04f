"""Draw docs/images/diff-terminal.svg: a real `logitlock diff` of a bundle with a fault in it, as a terminal shows it.

python docs/screenshot.py
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.text import Text

from export import export_model

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
from tests.support.mutate import mutated, swapped  # noqa: E402

COMMAND = "logitlock diff --model qwen --bundle engines/qwen-fp16"
WIDTH = 104


def main() -> None:
    with tempfile.TemporaryDirectory() as directory:
        good = export_model("qwen", precision="fp16", output=Path(directory) / "good")
        fault = swapped("blocks.2.mlp.gate.weight", "blocks.2.mlp.up.weight")
        mutated(good, Path(directory) / "engines" / "qwen-fp16", fault)
        done = subprocess.run(
            [Path(sys.executable).with_name("logitlock"), *COMMAND.split()[1:]],
            cwd=directory,
            env=os.environ | {"COLUMNS": str(WIDTH), "FORCE_COLOR": "1", "TERM": "xterm-256color"},
            stdout=subprocess.PIPE,
            text=True,
            encoding="utf-8",
        )
    assert done.returncode == 1, "the diff did not find the fault"
    with open(os.devnull, "w", encoding="utf-8") as nowhere:
        console = Console(record=True, width=WIDTH, file=nowhere, force_terminal=True)
        console.print(Text.assemble(("$ ", "bold green"), (COMMAND, "bold")))
        console.print(Text.from_ansi(done.stdout))
        svg = console.export_svg(title="logitlock diff", unique_id="logitlock")
    # Nothing is fetched from elsewhere when the picture is shown.
    svg = re.sub(r"@font-face \{.*?\}\s*", "", svg, flags=re.S).replace(
        "Fira Code", "DejaVu Sans Mono, Menlo, Consolas"
    )
    (HERE / "images" / "diff-terminal.svg").write_text(svg, encoding="utf-8")


if __name__ == "__main__":
    main()
