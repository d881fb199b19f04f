"""The fenced blocks of Markdown pages."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

_FENCE = re.compile(
    r"(?P<why><!-- not run: (?P<reason>[^>]*) -->\n\s*)?"
    r"^(?P<indent> *)```(?P<kind>\w*)[^\n]*\n(?P<code>.*?)^(?P=indent)```",
    re.S | re.M,
)


@dataclass(frozen=True)
class Block:
    page: str
    line: int
    kind: str
    code: str
    reason: str | None
    """Why it is not run, of the comment before it."""
    after: str
    """The kind of the block before, where nothing but white space is between the two."""

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks(path: Path) -> list[Block]:
    return blocks_in(path.read_text(encoding="utf-8"), path.name)


def blocks_in(text: str, page: str) -> list[Block]:
    found, end, before = [], 0, ""
    for match in _FENCE.finditer(text):
        code = re.sub(rf"^{match['indent']}", "", match["code"], flags=re.M)
        line = text[: match.start("code")].count("\n")
        after = before if not text[end : match.start()].strip() else ""
        found.append(Block(page, line, match["kind"], code, match["reason"], after))
        end, before = match.end(), match["kind"]
    return found
