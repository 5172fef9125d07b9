"""Charts as SVG, drawn by hand: readable on a light and on a dark page, without scripts and fonts of their own."""

from __future__ import annotations

import math
from html import escape
from typing import Any

from bench.figures import Chart

WIDTH, LEFT, RIGHT, TOP, ROW = 720, 130, 90, 56, 30
OURS, THEIRS, INK, FAINT = "#2f7ed8", "#9aa5b1", "#57606a", "#d0d7de"
COLOURS = (OURS, "#d9822b", "#5b9e3d", "#a34fb5")


def draw(chart: Chart, machine: dict[str, Any]) -> str:
    below = (
        f"{machine['cpu']}, {machine['cores']} cores, Linux {machine['kernel']}, {machine['python']}, "
        f"commit {machine['commit']}{' with changes' if machine['changed_since'] else ''}"
    )
    body, height = _bars(chart) if chart.bars else _lines(chart)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" '
        f'font-family="system-ui, sans-serif" font-size="13" role="img">\n'
        f"<title>{escape(chart.title)}</title>\n"
        f'<rect width="100%" height="100%" fill="#ffffff" rx="6"/>\n'
        f'<text x="16" y="26" font-size="16" font-weight="600" fill="#1f2328">{escape(chart.title)}</text>\n'
        f'<text x="16" y="44" fill="{INK}" font-size="11">{escape(below)}</text>\n'
        f"{body}</svg>\n"
    )


def figure(value: float) -> str:
    """Three digits."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:.{min(digits, 3)}f}"


def _bars(chart: Chart) -> tuple[str, int]:
    most = max(p90 for _, _, _, p90 in chart.bars) or 1
    scale = (WIDTH - LEFT - RIGHT) / most
    parts = []
    for number, (label, p50, p10, p90) in enumerate(chart.bars):
        y = TOP + 8 + number * ROW
        middle = y + 10
        width = max(1.0, p50 * scale)
        first, last = LEFT + p10 * scale, LEFT + p90 * scale
        beside = max(LEFT + width, last) + 6
        colour = THEIRS if number else OURS
        parts.append(
            f'<text x="{LEFT - 10}" y="{y + 15}" text-anchor="end" fill="#1f2328">{escape(label)}</text>\n'
            f'<rect x="{LEFT}" y="{y}" width="{width:.1f}" height="20" rx="2" fill="{colour}"/>\n'
            f'<path d="M{first:.1f} {middle}H{last:.1f}" stroke="{INK}" stroke-width="1.5"/>\n'
            f'<text x="{beside:.1f}" y="{y + 15}" fill="#1f2328">{figure(p50)} {chart.unit}</text>\n'
        )
    height = TOP + 8 + len(chart.bars) * ROW + 14
    note = f'<text x="16" y="{height - 6}" fill="{INK}" font-size="11">{chart.legend}</text>\n'
    return "".join(parts) + note, height + 6


def _lines(chart: Chart) -> tuple[str, int]:
    height, bottom = 340, 50
    points = [point for line in chart.lines.values() for point in line]
    low, high = (math.log2(bound(x for x, _ in points)) for bound in (min, max))
    most = max(y for _, y in points) * 1.1 or 1

    def at(x: float, y: float) -> tuple[float, float]:
        along = (math.log2(x) - low) / max(high - low, 1e-9)
        return 70 + along * (WIDTH - 110), height - bottom - y / most * (height - bottom - TOP - 10)

    parts = []
    for step in range(5):
        y = most * step / 4
        _, v = at(2**low, y)
        parts.append(f'<path d="M70 {v:.1f}H{WIDTH - 40}" stroke="{FAINT}"/>\n')
        parts.append(f'<text x="62" y="{v + 4:.1f}" text-anchor="end" fill="{INK}">{figure(y)}</text>\n')
    for x in sorted({x for x, _ in points}):
        h, _ = at(x, 0)
        parts.append(f'<text x="{h:.1f}" y="{height - bottom + 18}" text-anchor="middle" fill="{INK}">{x:g}</text>\n')
    for number, (label, line) in enumerate(chart.lines.items()):
        colour = COLOURS[number % len(COLOURS)]
        places = [at(x, y) for x, y in line]
        path = "L".join(f"{h:.1f} {v:.1f}" for h, v in places)
        parts.append(f'<path d="M{path}" fill="none" stroke="{colour}" stroke-width="2"/>\n')
        parts += [f'<circle cx="{h:.1f}" cy="{v:.1f}" r="3" fill="{colour}"/>\n' for h, v in places]
        if len(chart.lines) > 1:
            h, v = places[-1]
            where = f'x="{h - 4:.1f}" y="{v - 8:.1f}" text-anchor="end"'
            parts.append(f'<text {where} fill="{colour}">{escape(label)}</text>\n')
    axes = f"{chart.unit} by {escape(chart.x_title)}"
    parts.append(f'<text x="70" y="{height - 12}" fill="{INK}" font-size="11">{axes}</text>\n')
    return "".join(parts), height
