"""The plots of a report, as plotly.js reads them: {"data": […], "layout": {…}}.

Colours are names that begin with "@"; the page replaces them for its light and its dark theme (`plots.js`).
"""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from debug.comparison.results import DiffResult, LogitToken, Phase, TapError
from debug.drift import DriftResult
from refmodels.taps import split_name

Figure = dict[str, Any]
_LEAST_RATIO = 0.1
_ROW_PIXELS = 26
_MOST_TICKS = 24


def label(text: str) -> str:
    """Escape a label: plotly.js would interpret tags in it."""
    return html.escape(text, quote=False)


def rank(tap: TapError) -> float:
    """Sort key of taps: local error in noise floors; NaN and Inf come first."""
    return math.inf if tap.nonfinite else tap.ratio if tap.ratio == tap.ratio else -1.0


def floor(tap: TapError) -> float:
    """The noise floor of the local error, over all tokens."""
    return max(tap.floor, tap.floor_bound) if math.isfinite(tap.floor) else tap.floor_bound


def step_name(step: int) -> str:
    return f"+{step}" if step else "prefill"


def heat_map(result: DiffResult) -> Figure:
    """Taps along the depth of the model, by step: local error in noise floors."""
    names = list(dict.fromkeys(t.tap for t in result.taps))
    column = {name: i for i, name in enumerate(names)}
    steps = result.steps + 1
    cells: list[list[float | None]] = [[None] * len(names) for _ in range(steps)]
    notes: list[list[list[str]]] = [[[label(name), "", "", ""] for name in names] for _ in range(steps)]
    for tap in result.taps:
        at = column[tap.tap]
        if math.isfinite(tap.ratio):
            cells[tap.step][at] = math.log10(max(tap.ratio, _LEAST_RATIO))
        notes[tap.step][at][1:] = [f"{tap.ratio:.3g}", f"{tap.local:.3g}", f"{floor(tap):.3g}"]
    low, alarm = math.log10(_LEAST_RATIO), math.log10(result.multiple)
    high = max([2.0, *(value for row in cells for value in row if value is not None)])
    decades = [d for d in range(math.ceil(low), math.floor(high) + 1) if abs(d - alarm) > 0.12 * (high - low)]
    heat: Figure = {
        "type": "heatmap",
        "z": cells,
        "x": list(range(len(names))),
        "y": [step_name(s) for s in range(steps)],
        "customdata": notes,
        "hovertemplate": "<b>%{customdata[0]}</b>, %{y}<br>%{customdata[1]} noise floors<br>"
        "local %{customdata[2]}, floor %{customdata[3]}<extra></extra>",
        "zmin": low,
        "zmax": high,
        "colorscale": _scale((alarm - low) / (high - low)),
        "xgap": 1 if len(names) < 200 else 0,
        "ygap": 1,
        "hoverongaps": False,
        "colorbar": {
            "orientation": "h",
            "y": 1.03,
            "yanchor": "bottom",
            "thickness": 12,
            "tickvals": [*decades, alarm],
            "ticktext": [*(f"{10.0**d:g}" if d < 4 else f"10<sup>{d}</sup>" for d in decades),
                         f"<b>{result.multiple:g} alarm</b>"],
            "title": {"text": "local error of the worst token, in noise floors", "side": "top"},
            "outlinewidth": 0,
        },
    }  # fmt: skip
    culprits = [(column[c.tap], c.step, c.tap) for c in result.culprits]
    spoiled = [(column[t.tap], t.step, t.tap) for t in result.taps if t.nonfinite]
    data = [heat]
    # In dark red cells, only a mark with an outline in the other colour is visible.
    for name, symbol, size, marked in (("NaN or Inf", "x", 6, spoiled), ("culprit", "diamond", 11, culprits)):
        if marked:
            data.append(
                {
                    "type": "scatter",
                    "mode": "markers",
                    "name": name,
                    "x": [x for x, _, _ in marked],
                    "y": [step_name(step) for _, step, _ in marked],
                    "text": [label(tap) for _, _, tap in marked],
                    "hovertemplate": f"<b>%{{text}}</b>, %{{y}}: {name}<extra></extra>",
                    "marker": {
                        "symbol": symbol,
                        "size": size,
                        "color": "@text",
                        "line": {"width": 1.5, "color": "@page"},
                    },
                }
            )
    layout = _layout(height=min(190 + _ROW_PIXELS * steps, 900), x=_depth(names, grid=False))
    layout["yaxis"] = {"autorange": "reversed", "automargin": True, "type": "category", "showgrid": False}
    layout["legend"] = {"orientation": "h", "y": 0, "yref": "container", "yanchor": "bottom", "x": 0}
    layout["showlegend"] = len(data) > 1
    layout["margin"]["b"] = 76 if len(data) > 1 else 48
    return {"data": data, "layout": layout}


def _scale(alarm: float) -> list[list[object]]:
    middle = alarm + (1 - alarm) / 2
    return [[0, "@calm0"], [alarm, "@calm1"], [alarm, "@wrong0"], [middle, "@wrong1"], [1, "@wrong2"]]


def curves(result: DiffResult, phase: Phase) -> Figure:
    """Local and accumulated error along the depth, each with its floor; each tap is shown at its worst step."""
    worst: dict[str, TapError] = {}
    for tap in result.taps:
        if tap.phase == phase and (tap.tap not in worst or rank(tap) > rank(worst[tap.tap])):
            worst[tap.tap] = tap
    taps = list(worst.values())
    lines: list[tuple[str, str, str, Callable[[TapError], float]]] = [
        ("accumulated", "@accumulated", "solid", lambda t: t.accumulated),
        ("its floor", "@accumulated", "dot", lambda t: t.accumulated_floor),
        ("local", "@local", "solid", lambda t: t.local),
        ("its floor", "@local", "dot", floor),
    ]
    names = [label(f"{t.tap} ({step_name(t.step)})") for t in taps]
    data: list[Figure] = [
        {
            **_line(name, color, range(len(taps)), [value(t) for t in taps], dash=dash),
            "text": names,
            "hovertemplate": f"<b>%{{text}}</b><br>{name} %{{y:.3g}}<extra></extra>",
            "legendgroup": color,
        }
        for name, color, dash, value in lines
    ]
    wrong = [(i, t) for i, t in enumerate(taps) if t.ratio > result.multiple and positive(t.local) is not None]
    if wrong:
        data.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": f"wrong by itself (above {result.multiple:g} floors)",
                "x": [i for i, _ in wrong],
                "y": [t.local for _, t in wrong],
                "text": [label(f"{t.tap}: {t.ratio:.3g} floors") for _, t in wrong],
                "hovertemplate": "<b>%{text}</b><extra></extra>",
                "marker": {
                    "symbol": "diamond",
                    "size": 10,
                    "color": "@local",
                    "line": {"width": 1.5, "color": "@text"},
                },
            }
        )
    return {
        "data": data,
        "layout": _layout(
            height=380,
            x=_depth([t.tap for t in taps]),
            y=_log(data, "y", "relative L2 error"),
        ),
    }


def kl_by_position(result: DiffResult) -> Figure:
    """KL of the shipped engine's logits by position in the text: mean and maximum over the rows, floors, and flips."""
    at: dict[int, list[LogitToken]] = {}
    for token in result.logit_tokens:
        at.setdefault(token.index, []).append(token)
    x = sorted(at)
    data = [
        _line("largest", "@local", x, [max(t.kl for t in at[i]) for i in x]),
        _line("mean over the rows", "@accumulated", x, [sum(t.kl for t in at[i]) / len(at[i]) for i in x]),
        _line("largest of the floor", "@muted", x, [max(t.floor_kl for t in at[i]) for i in x], dash="dot"),
        *_flips(result, lambda t: (t.index, t.kl)),
    ]
    return {
        "data": data,
        "layout": _layout(
            height=340,
            x={"title": {"text": "position in the text (prompt, then decoded tokens)"}},
            y=_log(data, "y", "KL, nats"),
        ),
    }


def margins(result: DiffResult) -> Figure:
    """Each token's logit error against the reference's lead, which shows the flips that rounding could explain."""
    tokens = result.logit_tokens
    kept = [t for t in tokens if not t.flip]
    data: list[Figure] = [
        {
            "type": "scatter",
            "mode": "markers",
            "name": "same token",
            "x": [positive(t.margin) for t in kept],
            "y": [positive(t.error) for t in kept],
            "text": [_describe(result, t) for t in kept],
            "hovertemplate": "%{text}<extra></extra>",
            "marker": {"size": 5, "color": "@accumulated", "opacity": 0.65},
        },
        *_flips(result, lambda t: (t.margin, t.error)),
    ]
    leads = [value for t in tokens if (value := positive(t.margin)) is not None]
    if leads:
        ends = [min(leads), max(leads)]
        data.append(
            {**_line("half the lead: less cannot flip", "@muted", ends, [m / 2 for m in ends]), "hoverinfo": "skip"}
        )
    layout = _layout(
        height=340,
        x=_log(data, "x", "the reference's lead of its token, in logits"),
        y=_log(data, "y", "largest logit error"),
    )
    limit = positive(2 * max((t.floor_error for t in tokens), default=0.0))
    if limit is not None:
        line = {"color": "@muted", "width": 1, "dash": "dot"}
        layout["shapes"] = [{"type": "line", "x0": limit, "x1": limit, "yref": "paper", "y0": 0, "y1": 1, "line": line}]
        layout["annotations"] = [
            {
                "x": math.log10(limit),
                "yref": "paper",
                "y": 1,
                "text": "← rounding can flip ",
                "showarrow": False,
                "xanchor": "right",
                "yanchor": "top",
            }
        ]
    return {"data": data, "layout": layout}


def _flips(result: DiffResult, at: Callable[[LogitToken], tuple[float, float]]) -> list[Figure]:
    found = []
    for name, symbol, color, beyond in (
        ("other token, within rounding", "circle-open", "@text", False),
        ("other token, beyond rounding", "x", "@local", True),
    ):
        tokens = [t for t in result.logit_tokens if t.flip and t.beyond_rounding == beyond]
        if tokens:
            found.append(
                {
                    "type": "scatter",
                    "mode": "markers",
                    "name": name,
                    "x": [at(t)[0] for t in tokens],
                    "y": [positive(at(t)[1]) for t in tokens],
                    "text": [_describe(result, t) for t in tokens],
                    "hovertemplate": "%{text}<extra></extra>",
                    "marker": {"symbol": symbol, "size": 9, "color": color},
                }
            )
    return found


def _describe(result: DiffResult, token: LogitToken) -> str:
    def text(i: int) -> str:
        return repr(result.token_texts[i]) if i in result.token_texts else str(i)

    greedy = text(token.expected)
    if token.flip:
        greedy += f", engine {text(token.chosen)}"
    return label(f"row {token.row}, token {token.index} {text(token.token)}: next {greedy}") + (
        f"<br>KL {token.kl:.3g}, lead {token.margin:.3g}, logit error {token.error:.3g}"
    )


def drift_kl(drift: DriftResult) -> Figure:
    """KL per decode step, with the cache carried along and with a new cache, and the floor."""
    x = [s.step for s in drift.steps]
    data = [_line("carried cache", "@local", x, [s.kl for s in drift.steps])]
    if any(s.reset_kl is not None for s in drift.steps):
        again = [math.nan if s.reset_kl is None else s.reset_kl for s in drift.steps]
        data.append(_line("cache made anew", "@accumulated", x, again, dash="dash"))
    data.append(_line("floor", "@muted", x, [s.floor_kl for s in drift.steps], dash="dot"))
    return {
        "data": data,
        "layout": _layout(height=320, x=_STEPS, y=_log(data, "y", "KL, nats, worst row")),
    }


def drift_cache(drift: DriftResult) -> Figure:
    """Relative error of the whole cache per decode step, with its floor."""
    x = [s.step for s in drift.steps]
    data = [
        _line("cache error", "@local", x, [s.cache_error for s in drift.steps]),
        _line("floor", "@muted", x, [s.floor_cache_error for s in drift.steps], dash="dot"),
    ]
    return {
        "data": data,
        "layout": _layout(height=320, x=_STEPS, y=_log(data, "y", "relative L2 error")),
    }


# Parts

_STEPS: Figure = {"title": {"text": "decode step (0: prefill)"}}


def positive(value: float) -> float | None:
    """The number, or None if a logarithmic axis cannot show it."""
    return value if math.isfinite(value) and value > 0 else None


def _line(name: str, color: str, x: Iterable[float], y: Sequence[float], *, dash: str = "solid") -> Figure:
    return {
        "type": "scatter",
        "mode": "lines+markers" if dash == "solid" else "lines",
        "name": name,
        "x": list(x),
        "y": [positive(v) for v in y],
        "line": {"color": color, "width": 1.5, "dash": dash},
        "marker": {"size": 4},
        "hovertemplate": f"{name}: %{{y:.3g}} at %{{x}}<extra></extra>",
    }


def _log(data: Sequence[Figure], key: str, title: str) -> Figure:
    """A logarithmic axis over whole decades, so that both ends have labels."""
    values = [v for trace in data for v in trace[key] if v is not None and positive(v) is not None]
    low, high = (math.log10(end) for end in (min(values, default=1.0), max(values, default=1.0)))
    low, high = math.floor(low), max(math.ceil(high), math.floor(low) + 1)
    return {
        "type": "log",
        "range": [low - 0.08, high + 0.08],
        "dtick": max(1, round((high - low) / 6)),
        "exponentformat": "power",
        "title": {"text": title, "standoff": 12},
    }


def _depth(names: Sequence[str], *, grid: bool = True) -> Figure:
    """The axis along the model, with ticks at the beginning of blocks, as many as fit."""
    starts: dict[str, int] = {}
    for i, name in enumerate(names):
        layer, part = split_name(name)
        starts.setdefault(part if layer is None else str(layer), i)
    every = -(-len(starts) // _MOST_TICKS)
    blocks = [(key, i) for key, i in starts.items() if key.isdigit()]
    # These leave no room for the other taps outside of blocks.
    kept = blocks[::every] + [(key, i) for key, i in starts.items() if key == "logits"]
    return {
        "tickvals": [i for _, i in kept],
        "ticktext": [label(key) for key, _ in kept],
        "tickangle": 0,
        "ticklabeloverflow": "allow",
        "title": {"text": "depth of the model (number of the block)"},
        "range": [-0.5, len(names) - 0.5],
        "showgrid": grid,
    }


def _layout(*, height: int, x: Figure, y: Figure | None = None) -> Figure:
    return {
        "height": height,
        "margin": {"l": 62, "r": 26, "t": 12, "b": 48},
        "xaxis": {"zeroline": False, **x},
        "yaxis": {"zeroline": False, "automargin": True, **(y or {})},
        "showlegend": True,
        "legend": {"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
        "hovermode": "closest",
    }
