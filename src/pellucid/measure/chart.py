"""Pictures of measurements: a chart is a JSON value, drawn as one small SVG that needs neither script nor font.

A chart holds `title`, `x`, `y` (labels) and either `lines` (name, x, y, and low/high for a band or whiskers; `points`:
marks instead of a line), or `heat` (values [rows][columns]) with `rows` and `columns` (names). `log_x`, `log_y`;
`level`: [name, y], a dashed line. A line without a name is not in the legend; `colour` is the number of the line whose
colour it shares. Colours: Okabe & Ito 2008, told apart by the colour-blind too.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from html import escape
from typing import Any

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#777777")
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 640, 320, 62, 14, 34, 46
INK, FAINT = "#222", "#ddd"


def draw(chart: dict[str, Any]) -> str:
    """The chart as SVG text."""
    height = _heat_height(chart) if "heat" in chart else HEIGHT
    body = _heat(chart) if "heat" in chart else _lines(chart)
    title = _text(LEFT - 48, 20, chart["title"], size=13, weight="bold")
    return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" '
            f'font-family="system-ui, sans-serif" role="img" aria-label="{escape(chart["title"])}">'
            f'<rect width="{WIDTH}" height="{height}" rx="6" fill="#fff"/>{title}{body}</svg>\n')


# ------------------------------------------------------------------------------------------- lines


def _lines(chart: dict[str, Any]) -> str:
    lines = chart["lines"]
    columns = lambda *names: [v for line in lines for name in names for v in line.get(name) or [] if _finite(v)]
    level = [chart["level"][1]] if chart.get("level") else []
    place_x, ticks_x = _axis(columns("x"), bool(chart.get("log_x")), LEFT, WIDTH - RIGHT)
    place_y, ticks_y = _axis(columns("y", "low", "high") + level, bool(chart.get("log_y")), HEIGHT - BOTTOM, TOP)
    parts = [_grid(chart, place_x, ticks_x, place_y, ticks_y)]
    marks = [(place_x(x), place_y(high), place_y(low)) for line in lines for x, low, high in
             zip(line["x"], line.get("low") or line["y"], line.get("high") or line["y"], strict=True)
             if _finite(x) and _finite(low) and _finite(high)]  # x, top and bottom of points, whiskers, bands
    if level:
        y, wide = place_y(level[0]), 6.2 * len(chart["level"][0])
        places = (WIDTH - RIGHT - 4 - wide, LEFT + 4, (LEFT + WIDTH - RIGHT - wide) / 2)
        left = min(places, key=lambda left: _met(marks, left, y - 16, wide, 14))
        parts.append(f'<path d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}" stroke="#777" stroke-dasharray="5 4"/>')
        parts.append(_text(left, y - 5, chart["level"][0], fill="#555"))
        marks += [(left + share * wide, y - 14, y - 4) for share in (0.1, 0.5, 0.9)]
    for number, line in enumerate(lines):
        parts.append(_line(line, COLOURS[line.get("colour", number) % len(COLOURS)], place_x, place_y))
    parts.append(_legend([line.get("name", "") for line in lines], marks))
    return "".join(parts)


def _line(line: dict[str, Any], colour: str, place_x: Callable, place_y: Callable) -> str:
    points = [(place_x(x), place_y(y)) for x, y in zip(line["x"], line["y"], strict=True) if _finite(x) and _finite(y)]
    parts = []
    if line.get("low"):
        spans = [(place_x(x), place_y(a), place_y(b)) for x, a, b in zip(line["x"], line["low"], line["high"], strict=True)
                 if _finite(a) and _finite(b)]
        if line.get("points"):
            parts += [f'<path d="M{x:.1f} {a:.1f}V{b:.1f}" stroke="{colour}" stroke-width="1.5"/>' for x, a, b in spans]
        else:
            edge = [f"{x:.1f} {b:.1f}" for x, _, b in spans] + [f"{x:.1f} {a:.1f}" for x, a, _ in reversed(spans)]
            parts.append(f'<path d="M{"L".join(edge)}Z" fill="{colour}" opacity="0.16"/>')
    if not line.get("points") and points:
        path = "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
        dashes = ' stroke-dasharray="6 3"' if line.get("dashed") else ""
        parts.append(f'<path d="M{path}" fill="none" stroke="{colour}" stroke-width="1.8"{dashes}/>')
    if line.get("points") or (len(points) <= 24 and not line.get("dashed")):
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>' for x, y in points]
    return "".join(parts)


def _grid(chart: dict[str, Any], place_x: Callable, ticks_x: list, place_y: Callable, ticks_y: list) -> str:
    bottom, right = HEIGHT - BOTTOM, WIDTH - RIGHT
    parts = [f'<path d="M{LEFT} {place_y(v):.1f}H{right}" stroke="{FAINT}"/>'
             + _text(LEFT - 6, place_y(v) + 4, _number(v), anchor="end") for v in ticks_y]
    parts += [f'<path d="M{place_x(v):.1f} {bottom}v4" stroke="{INK}"/>'
              + _text(place_x(v), bottom + 17, _number(v), anchor="middle") for v in ticks_x]
    parts.append(f'<path d="M{LEFT} {bottom}H{right}" stroke="{INK}"/>')
    parts.append(_text((LEFT + right) / 2, HEIGHT - 10, chart["x"], anchor="middle"))
    middle = (TOP + bottom) / 2
    parts.append(_text(14, middle, chart["y"], anchor="middle", turn=f' transform="rotate(-90 14 {middle})"'))
    return "".join(parts)


def _met(marks: list[tuple[float, float, float]], left: float, top: float, wide: float, high: float) -> int:
    """How many marks a box would hide."""
    return sum(left - 6 <= x <= left + wide + 6 and y0 <= top + high + 6 and y1 >= top - 6 for x, y0, y1 in marks)


def _legend(names: list[str], marks: list[tuple[float, float, float]]) -> str:
    """Names below each other, in the corner where they hide the fewest marks."""
    shown = [(number, name) for number, name in enumerate(names) if name]
    if not shown:
        return ""
    wide, high = max(len(name) for _, name in shown) * 6.2 + 22, 15 * len(shown) + 6
    corners = [(x, y) for x in (WIDTH - RIGHT - wide - 4, LEFT + 4) for y in (TOP + 2, HEIGHT - BOTTOM - high - 2)]
    left, top = min(corners, key=lambda corner: _met(marks, *corner, wide, high))
    parts = [f'<rect x="{left:.0f}" y="{top}" width="{wide:.0f}" height="{high}" fill="#fff" opacity="0.75"/>']
    for row, (number, name) in enumerate(shown):
        y = top + 14 + 15 * row
        parts.append(f'<rect x="{left + 4:.0f}" y="{y - 8}" width="12" height="8" fill="{COLOURS[number % len(COLOURS)]}"/>')
        parts.append(_text(left + 21, y, name))
    return "".join(parts)


# ------------------------------------------------------------------------------------------- heat map


def _heat_height(chart: dict[str, Any]) -> int:
    return TOP + 18 * len(chart["rows"]) + 66


def _heat(chart: dict[str, Any]) -> str:
    """Blue below the middle (`centre`, default 0), orange above; each cell has its value where there is room."""
    rows, columns, values = chart["rows"], chart["columns"], chart["heat"]
    label = 12 + 6.2 * max(len(str(name)) for name in rows)
    wide = (WIDTH - RIGHT - label) / max(1, len(columns))
    centre = chart.get("centre", 0.0)
    reach = max((abs(v - centre) for row in values for v in row if _finite(v)), default=1.0) or 1.0
    parts = []
    for r, row in enumerate(values):
        y = TOP + 18 * r
        parts.append(_text(label - 6, y + 13, str(rows[r]), anchor="end"))
        for c, value in enumerate(row):
            x, known = label + wide * c, _finite(value)
            strength = min(1.0, abs(value - centre) / reach) if known else 0.0
            colour = COLOURS[1] if known and value >= centre else COLOURS[0]
            parts.append(f'<rect x="{x:.1f}" y="{y}" width="{wide - 1:.1f}" height="17" fill="{colour}" '
                         f'fill-opacity="{0.9 * strength:.2f}" stroke="{FAINT}" stroke-width="0.5"/>')
            if known and wide >= 30:
                ink = "#fff" if strength > 0.6 else INK
                parts.append(_text(x + wide / 2, y + 13, f"{value:.2f}", anchor="middle", size=10, fill=ink))
    bottom = TOP + 18 * len(rows)
    every = max(1, math.ceil(6.2 * max(len(str(name)) for name in columns) / wide))
    parts += [_text(label + wide * (c + 0.5), bottom + 15, str(columns[c]), anchor="middle")
              for c in range(0, len(columns), every)]
    parts.append(_text((label + WIDTH) / 2, bottom + 38, chart["x"], anchor="middle"))
    return "".join(parts)


# ------------------------------------------------------------------------------------------- axes, text


def _axis(values: list[float], log: bool, start: float, end: float) -> tuple[Callable, list[float]]:
    """(value -> place, ticks) of an axis that holds all values with a little room."""
    values = [v for v in values if v > 0] if log else values
    low, high = (min(values), max(values)) if values else (0.1, 1.0)
    if log:
        low, high = math.log10(low), math.log10(high)
    room = (high - low) * 0.04 or abs(high) * 0.05 or 0.5
    low, high = low - room, high + room
    if log:
        decades = range(math.floor(low), math.ceil(high) + 1)
        ticks = [m * 10.0**d for d in decades for m in ((1, 2, 5) if high - low < 3 else (1,))]
        inside = [t for t in ticks if low <= math.log10(t) <= high]
        place = lambda v: start + (end - start) * ((math.log10(v) if v > 0 else low) - low) / (high - low)
        return place, inside
    step = _nice((high - low) / 6)
    ticks = [n * step for n in range(math.ceil(low / step), math.floor(high / step) + 1)]
    return (lambda v: start + (end - start) * (v - low) / (high - low)), ticks


def _nice(rough: float) -> float:
    size = 10.0 ** math.floor(math.log10(rough))
    return next((m * size for m in (1, 2, 5) if m * size >= rough), 10 * size)


def _number(value: float) -> str:
    if value and (abs(value) >= 1e5 or abs(value) < 1e-3):
        digits, exponent = f"{value:.1e}".split("e")
        return f"{digits.removesuffix('.0')}e{int(exponent)}"
    return f"{value:,.10g}" if abs(value) >= 1000 else f"{value:.4g}"


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _text(x: float, y: float, text: str, *, anchor="start", size=11, weight="", fill=INK, turn="") -> str:
    bold = f' font-weight="{weight}"' if weight else ""
    return (f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" text-anchor="{anchor}" fill="{fill}"{bold}{turn}>'
            f"{escape(str(text))}</text>")
