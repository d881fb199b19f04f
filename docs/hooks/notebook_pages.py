"""The executed notebooks as pages."""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path

from markdown_of import fenced


def pages(path: Path) -> dict[str, str | bytes]:
    """A page and its figures, by their paths in the site."""
    notebook = json.loads(path.read_text(encoding="utf-8"))
    made: dict[str, str | bytes] = {}
    parts = []
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(re.sub(r"\]\((\d_\w+)\.ipynb\)", r"](\1.md)", source))
            continue
        parts.append(fenced(source, "python"))
        for output in cell["outputs"]:
            data = output.get("data", {})
            if output["output_type"] == "stream":
                parts.append(fenced("".join(output["text"])))
            elif "image/png" in data:
                name = f"notebooks/{path.stem}_{len(made)}.png"
                made[name] = base64.b64decode("".join(data["image/png"]))
                parts.append(f"![figure]({Path(name).name})")
            elif "text/html" in data:
                html = re.sub(r"<style.*?</style>", "", "".join(data["text/html"]), flags=re.S)
                # An empty line would end the block of HTML.
                parts.append(f'<div class="md-typeset__table">{re.sub(chr(10) + "+", chr(10), html)}</div>')
            elif "text/plain" in data:
                parts.append(fenced("".join(data["text/plain"])))
    note = f"*`notebooks/{path.name}`, executed by `python notebooks/execute.py`.*"
    title, *rest = "\n\n".join(parts).split("\n", 1)
    made[f"notebooks/{path.stem}.md"] = "\n".join([title, "", note, *rest]) + "\n"
    return made
