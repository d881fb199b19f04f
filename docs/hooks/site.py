"""The pages that mkdocs builds beside the written ones: CLI reference, schemas, notebooks, tables of facts, results.

They are made from the code and from files that scripts wrote, at every build, so that they cannot be out of date.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import numbers_of
from cli import cli_page
from contract import attention_inputs
from mkdocs.structure.files import File
from notebook_pages import pages
from schemas import schemas_page

ROOT = Path(__file__).parent.parent.parent
_FILE = re.compile(r"<!-- file: (\S+) -->")
_TABLE = re.compile(r"<!-- table: (\w+) -->")
TABLES = {**numbers_of.TABLES, "attention_inputs": attention_inputs}


def on_files(files: Any, *, config: Any) -> Any:
    """Add the pages that are generated."""
    made: dict[str, str | bytes] = {"cli.md": cli_page(), "schemas.md": schemas_page()}
    for path in sorted((ROOT / "notebooks").glob("[0-9]_*.ipynb")):
        made |= pages(path)
    for uri, content in made.items():
        files.append(File.generated(config, uri, content=content))
    return files


def on_page_markdown(markdown: str, *, page: Any, config: Any, files: Any) -> str:
    """`<!-- file: PATH -->` stands for a file of the repository, `<!-- table: NAME -->` for one of `TABLES`."""
    markdown = _FILE.sub(lambda found: _listing(found[1]), markdown)
    return _TABLE.sub(lambda found: TABLES[found[1]](), markdown)


def _listing(name: str) -> str:
    kind = {".py": "python", ".json": "json", ".svg": "xml"}[Path(name).suffix]
    return f"```{kind}\n{(ROOT / name).read_text(encoding='utf-8').rstrip()}\n```"
