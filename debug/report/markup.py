"""Pieces of HTML.  Texts are escaped here; titles and bodies of sections and cells of tables are HTML already."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Mapping, Sequence


def escape(text: object) -> str:
    return html.escape(str(text))


def mono(text: str) -> str:
    return f'<span class="mono">{escape(text)}</span>'


def number(value: float) -> str:
    if not math.isfinite(value):
        return "NaN" if value != value else "∞"
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e6 else f"{value:.3g}"


def bar(value: float, most: float) -> str:
    share = value / most if most and math.isfinite(value) else 0.0
    return f'<span class="bar" style="width:{max(1.0, 110 * share):.0f}px"></span>'


def section(title: str, body: str, *, kind: str = "") -> str:
    classes = f' class="{kind}"' if kind else ""
    return f"<section{classes}><h2>{title}</h2>{body}</section>"


def pair(parts: Iterable[str]) -> str:
    """Side by side if there is room."""
    return '<div class="pair">' + "".join(f"<div>{part}</div>" for part in parts) + "</div>"


def plot(name: str, caption: str) -> str:
    return (
        f'<figure><figcaption>{escape(caption)}</figcaption><div class="plot" data-figure="{name}" role="img" '
        f'aria-label="{escape(caption)}"></div></figure>'
    )


def facts(values: Mapping[str, object]) -> str:
    pairs = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in values.items())
    return f'<dl class="facts">{pairs}</dl>'


def table(
    caption: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    numbers: Sequence[int] = (),
    wrong: Sequence[bool] = (),
) -> str:
    """Cells are HTML already."""

    def cells(tag: str, values: Sequence[str]) -> str:
        return "".join(
            f"<{tag}{' class=number' if i in numbers else ''}{' scope=col' if tag == 'th' else ''}>{v}</{tag}>"
            for i, v in enumerate(values)
        )

    head = f"<thead><tr>{cells('th', [escape(c) for c in columns])}</tr></thead>"
    lines = "".join(
        f"<tr{' class=wrong' if i < len(wrong) and wrong[i] else ''}>{cells('td', row)}</tr>"
        for i, row in enumerate(rows)
    )
    title = f"<caption>{escape(caption)}</caption>" if caption else ""
    return f'<div class="scroll"><table>{title}{head}<tbody>{lines}</tbody></table></div>'
