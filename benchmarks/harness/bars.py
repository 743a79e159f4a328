"""Bars as SVG: written here and not by a plotting library, so that the same rows give the same file everywhere."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

_LABEL, _WIDTH, _BAR, _GAP, _TOP = 110, 520, 16, 10, 56
_STYLE = (
    "text{font:13px system-ui,sans-serif;fill:#1f2328}.t{font-weight:600}.n{fill:#59636e;font-size:12px}"
    ".a{fill:#0969da}.b{fill:#8250df}.g{stroke:#d1d9e0}"
    "@media(prefers-color-scheme:dark){text{fill:#f0f6fc}.n{fill:#9198a1}"
    ".a{fill:#4493f8}.b{fill:#ab7df8}.g{stroke:#3d444d}}"
)
_CLASSES = "ab"


@dataclass(frozen=True)
class Group:
    """A label, and a value for every series; None where there is none."""

    label: str
    values: Sequence[float | None]


def bars(title: str, series: Sequence[str], groups: Sequence[Group], line_at: float | None = None) -> str:
    """Horizontal bars of up to two series, with a line at a value that matters."""
    largest = max(value for group in groups for value in group.values if value is not None)
    scale = _WIDTH / (1.05 * largest)
    parts, y = [f'<text x="0" y="16" class="t">{escape(title)}</text>'], _TOP
    for place, name in enumerate(series):
        x = _LABEL + 150 * place
        parts.append(f'<rect x="{x}" y="28" width="12" height="12" class="{_CLASSES[place]}"/>')
        parts.append(f'<text x="{x + 18}" y="39">{escape(name)}</text>')
    for group in groups:
        middle = y + len(series) * _BAR / 2 + 5
        parts.append(f'<text x="{_LABEL - 8}" y="{middle:.0f}" text-anchor="end">{escape(group.label)}</text>')
        for place, value in enumerate(group.values):
            if value is not None:
                parts += _bar(y + place * _BAR, value, scale, _CLASSES[place])
        y += len(series) * _BAR + _GAP
    if line_at is not None:
        x = _LABEL + line_at * scale
        parts.append(f'<line x1="{x:.1f}" y1="{_TOP - 6}" x2="{x:.1f}" y2="{y}" class="g"/>')
    frame = f'viewBox="0 0 {_LABEL + _WIDTH + 50} {y + 4}" role="img"'
    body = "\n".join(parts)
    return f'<svg xmlns="http://www.w3.org/2000/svg" {frame}><style>{_STYLE}</style>\n{body}\n</svg>\n'


def _bar(y: int, value: float, scale: float, kind: str) -> list[str]:
    width = value * scale
    return [
        f'<rect x="{_LABEL}" y="{y}" width="{width:.1f}" height="{_BAR - 2}" class="{kind}"/>',
        f'<text x="{_LABEL + width + 6:.1f}" y="{y + _BAR - 4}" class="n">{value:.1f}</text>',
    ]
