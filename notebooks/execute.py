"""Run notebooks top to bottom and save them with their outputs: `python notebooks/execute.py [NUMBER...]`.

The committed notebooks are made by this script.  It notes in each a digest of its cells, so that a test can tell a
notebook that was edited and not run again.
"""

from __future__ import annotations

import argparse
import hashlib
import re
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient

HERE = Path(__file__).parent
KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}


def notebooks() -> list[Path]:
    return sorted(HERE.glob("[0-9]_*.ipynb"))


def digest(notebook: nbformat.NotebookNode) -> str:
    """The digest of the sources of all cells."""
    return hashlib.sha256("\n\0".join(f"{c.cell_type} {c.source}" for c in notebook.cells).encode()).hexdigest()


def execute(path: Path, *, timeout: int = 300) -> nbformat.NotebookNode:
    """The notebook with new outputs.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell failed.
    """
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        cell.metadata = {}
    client = NotebookClient(
        notebook, timeout=timeout, kernel_name="python3", record_timing=False,
        resources={"metadata": {"path": str(HERE)}},
    )  # fmt: skip
    client.execute()
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number}"
        _tidy(cell)
    notebook.metadata = {
        "kernelspec": KERNEL,
        "language_info": {"name": "python"},
        "logitlock": {"cells_sha256": digest(notebook)},
    }
    return notebook


def _tidy(cell: nbformat.NotebookNode) -> None:
    """Leave out what differs from run to run and means nothing: where a stream was cut, ids of styled tables, addresses
    of objects."""
    whole: list[nbformat.NotebookNode] = []
    for output in cell.get("outputs", []):
        if whole and output.output_type == whole[-1].output_type == "stream" and output.name == whole[-1].name:
            whole[-1].text += output.text
        else:
            whole.append(output)
    if "outputs" in cell:
        cell.outputs = whole
    for output in whole:
        data = output.get("data", {})
        if "text/html" in data:
            for number, found in enumerate(dict.fromkeys(re.findall(r"T_([0-9a-f]{5})\b", data["text/html"]))):
                data["text/html"] = data["text/html"].replace(f"T_{found}", f"T_{cell.id.replace('-', '_')}_{number}")
        if "text/plain" in data:
            data["text/plain"] = re.sub(r" at 0x[0-9a-f]+", "", data["text/plain"])


def main() -> None:
    known = {path.name[0]: path for path in notebooks()}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("numbers", nargs="*", choices=known, metavar="NUMBER", help="1 for 1_*.ipynb; default: all")
    for number in parser.parse_args().numbers or known:
        path, start = known[number], time.perf_counter()
        nbformat.write(execute(path), path)
        print(f"{path.name}: {time.perf_counter() - start:.1f} s, {path.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
