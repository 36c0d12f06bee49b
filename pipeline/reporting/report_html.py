"""The pages: Jinja2 templates with autoescape, filled from the very dict that ``metrics.json`` holds.

A page is one file that loads nothing (its content security policy allows inline styles and data URIs only)
and runs no script. Text that comes from tables is escaped, and control and direction-changing characters are
made visible.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from pipeline.evaluation.verdict import CROSSES, MET, NOT_DECIDABLE, NOT_MET, decimals

_TONES = {MET: ("good", "✓"), CROSSES: ("near", "≈"), NOT_DECIDABLE: ("none", "?"), NOT_MET: ("bad", "✗")}
_NARROW = "\N{NARROW NO-BREAK SPACE}"


def render(template: str, **values: Any) -> str:
    """One of the templates beside this module, filled."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "pct": percent,
        "span": span,
        "points": points,
        "points_span": points_span,
        "target": lambda value: f"{value * 100:g}{_NARROW}%",
        "three": lambda value: f"{value:.3f}",
        "count": lambda value: f"{value:,}",
        "visible": visible,
        "tone": lambda outcome: _TONES[outcome][0],
        "mark": lambda outcome: _TONES[outcome][1],
    }
    return environment.get_template(template).render(values)


def meta_rows(meta: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested ``meta`` as flat (name, text) rows, in order."""
    rows: list[tuple[str, str]] = []
    for key, value in meta.items():
        name = f"{prefix}{str(key).replace('_', ' ')}"
        if isinstance(value, Mapping):
            rows += meta_rows(value, f"{name}: ")
        elif isinstance(value, (list, tuple)):
            rows.append((name, " ".join(map(str, value))))
        elif value is not None:
            rows.append((name, str(value)))
    return rows


def percent(value: float | None, target: float | None = None) -> str:
    """``0.8612`` as ``86.1 %``; with so many decimals that it does not look like a ``target`` that it misses."""
    return "n/a" if value is None else f"{value * 100:.{decimals(value, target)}f}{_NARROW}%"


def span(bounds: Sequence[float] | None) -> str:
    """``[0.801, 0.902]`` as ``80.1–90.2``, per cent."""
    return "n/a" if bounds is None else f"{bounds[0] * 100:.1f}–{bounds[1] * 100:.1f}"


def points(value: float | None) -> str:
    """A difference of shares in percentage points, with its sign."""
    if value is None:
        return "n/a"
    text = f"{value * 100:+.1f}".replace("-", "−")
    return "0.0" if text[1:] == "0.0" else text


def points_span(bounds: Sequence[float] | None) -> str:
    """An interval of such a difference."""
    return "" if bounds is None else f"{points(bounds[0])}…{points(bounds[1])}"


def visible(text: object) -> str:
    """The text with control, format and surrogate characters written as escapes."""
    if text is None:
        return ""
    return "".join(
        char if unicodedata.category(char)[0] != "C" else char.encode("unicode_escape").decode("ascii")
        for char in str(text)
    )
