"""The report's drawings, by matplotlib: confusion matrix, per-class bars, reliability, risk-coverage.

Colours are those of Okabe & Ito (2008), which people with common forms of colour blindness can tell apart, and nothing
is shown by colour alone. Sizes are chosen so that text of 8 pt is readable when a drawing fills a phone's width.

Class names may be in any script. For characters that matplotlib's own font lacks, fonts of the machine are added.
Limits: matplotlib places characters one by one, without ligatures or joined Arabic letters.
"""

from __future__ import annotations

import base64
import io
import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, findSystemFonts, fontManager, get_font

from pipeline.reporting.terminal import percent
from pipeline.storage.errors import SerWarning

OWN = "DejaVu Sans"


@cache
def families(text: str) -> tuple[str, ...]:
    """The font families that together have every character of ``text``, matplotlib's own first.

    Warns:
        SerWarning: no font on this machine has some of the characters; they are drawn as boxes.
    """
    missing = {ord(sign) for sign in text if not sign.isspace()} - _signs(findfont(OWN))
    found = [OWN]
    if not missing:
        return (OWN,)
    logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)  # hide warnings about missing bold fonts
    others = {path: _signs(path) for path in sorted(findSystemFonts())}
    while best := max(others, key=lambda path: len(missing & others[path]), default=None):
        if not missing & others[best]:
            break
        fontManager.addfont(best)
        found.append(FontProperties(fname=best).get_name())
        missing -= others.pop(best)
    if missing:
        signs = "".join(chr(code) for code in sorted(missing)[:8])
        warnings.warn(
            f"no font on this machine has the characters {signs}: they are drawn as boxes in pictures; install a font "
            "that has them, for example the package fonts-noto-cjk",
            SerWarning,
            stacklevel=2,
        )
    return tuple(found)


def _signs(path: str) -> set[int]:
    """The code points that the font file ``path`` has; empty if it cannot be read."""
    if "lastresort" in path.lower():  # a macOS font that has a box for every code point
        return set()
    try:
        font = get_font(path)
        return set(font.get_charmap()) if font.scalable else set()  # matplotlib cannot draw bitmap fonts
    except (OSError, RuntimeError):
        return set()


PNG_DPI = 250
_HALF_PAGE_IN = 5.5


@dataclass(frozen=True)
class Theme:
    """Colours of the light or of the dark version."""

    paper: str
    ink: str
    faint: str
    blue: str
    orange: str
    low: str
    high: str


LIGHT = Theme("#ffffff", "#1b1f24", "#c9ced6", "#0072b2", "#d55e00", "#f7fafd", "#003f66")
DARK = Theme("#171b21", "#e6e9ee", "#434b57", "#56b4e9", "#e69f00", "#1d242d", "#1f6fa8")


@dataclass(frozen=True)
class Drawing:
    """One drawing: file stem, heading, its content in words (alt text), and the function that draws it."""

    name: str
    title: str
    alt: str
    draw: Callable[[Mapping[str, Any], Theme], Figure]


def drawings(evaluation: Mapping[str, Any]) -> list[Drawing]:
    """The drawings that an evaluation has data for."""
    found = [
        Drawing("confusion_matrix", "Confusion matrix", _confusion_alt(evaluation["confusion"]), confusion_matrix),
        Drawing("per_class", "Accuracy by class", _per_class_alt(evaluation), per_class),
    ]
    if evaluation["reliability"] is not None:
        found += [
            Drawing("reliability", "Reliability", _reliability_alt(evaluation), reliability),
            Drawing("risk_coverage", "Risk and coverage", _risk_alt(evaluation), risk_coverage),
        ]
    return found


def save(drawing: Drawing, evaluation: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Write the light version as ``NAME.png`` and ``NAME.svg``; returns data URIs of both SVGs, ``light`` and ``dark``.

    Also ``large``: whether its text is too small on half a page; ``readable_px``: the least width to read it at.
    """
    found: dict[str, Any] = {}
    fonts = {"font.family": families("".join(evaluation["labels"]))}  # warns of missing characters, instead of savefig
    for mode, theme in (("light", LIGHT), ("dark", DARK)):
        with mpl.rc_context(_style(theme) | fonts), warnings.catch_warnings():
            warnings.filterwarnings("ignore", r"Glyph \d+ .* missing from font", UserWarning)
            figure = drawing.draw(evaluation, theme)
            buffer = io.BytesIO()
            figure.savefig(buffer, format="svg", metadata={"Date": None, "Title": drawing.title})
            found[mode] = "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
            if mode == "light":
                (folder / f"{drawing.name}.svg").write_bytes(buffer.getvalue())
                figure.set_layout_engine("none")  # keeps the layout, which takes as long as drawing
                figure.set_dpi(PNG_DPI)
                FigureCanvasAgg(figure).print_png(
                    folder / f"{drawing.name}.png", metadata={"Title": drawing.title}, pil_kwargs={"compress_level": 3}
                )
    width_in = figure.get_figwidth()
    return found | {"large": width_in > _HALF_PAGE_IN, "readable_px": round(100 * width_in)}


def confusion_matrix(evaluation: Mapping[str, Any], theme: Theme) -> Figure:
    """Draw the confusion matrix: rows are true classes; a cell's colour and per cent are its share of the row."""
    confusion = evaluation["confusion"]
    names = confusion["labels"]
    shares = np.array(confusion["row_normalised"], dtype=np.float64)  # None becomes NaN
    width = max(4.2, 1.0 + 0.42 * len(names))
    figure, axes = _axes(width, width)
    colours = LinearSegmentedColormap.from_list("shares", [theme.low, theme.high])
    cells = np.ma.masked_invalid(shares)
    axes.pcolormesh(cells, vmin=0, vmax=1, cmap=colours, linewidths=0.6, edgecolor=theme.paper)
    axes.set(aspect="equal", xlim=(0, len(names)), ylim=(len(names), 0))
    middles = np.arange(len(names)) + 0.5
    axes.set_xticks(middles, names, rotation=45, ha="right", rotation_mode="anchor")
    support = [f"{name}\n(n={sum(row)})" for name, row in zip(names, confusion["counts"], strict=True)]
    axes.set_yticks(middles, support, va="center")
    _despine(axes, "top", "right", "left", "bottom")
    for i, row in enumerate(confusion["counts"]):
        for j, count in enumerate(row):
            if count:
                text = f"{shares[i, j] * 100:.0f} %\n{count:,}"
                ink = _ink_on(colours(shares[i, j]))
                axes.text(j + 0.5, i + 0.5, text, ha="center", va="center", size=6.5, linespacing=1.15, color=ink)
    overall, n = evaluation["overall"], evaluation["n"]
    unread = f", {n['labelled_failed']:,} more not read" if n["labelled_failed"] else ""
    title = f"{n['read']:,} recordings{unread}: accuracy {percent(overall['accuracy']['value'])}"
    figure.suptitle(f"{title}, UAR {percent(overall['uar']['value'])}", size=7.5)
    axes.set_xlabel("answered")
    axes.set_ylabel("true")
    axes.tick_params(length=0)
    return figure


def per_class(evaluation: Mapping[str, Any], theme: Theme) -> Figure:
    """Draw the recall of every class as a bar with its 95 % Wilson interval; recalls below the target are hatched."""
    rows = evaluation["per_class"]
    target = evaluation["verdict"]["targets"]["class_recall"]
    figure, axes = _axes(4.2, max(2.2, 0.42 * len(rows) + 0.8))
    for y, row in enumerate(rows):
        value, bounds = row["recall"]["value"], row["recall"]["over_recordings"]
        if value is None:
            axes.text(1, y, "n/a (no recordings)", va="center")
            continue
        below = value < target
        colour = theme.orange if below else theme.blue
        axes.barh(y, value * 100, height=0.62, color=colour, hatch="////" if below else None, lw=0)
        if bounds is not None:
            error = [[max(0.0, value - bounds[0]) * 100], [max(0.0, bounds[1] - value) * 100]]
            axes.errorbar(value * 100, y, xerr=error, color=theme.ink, capsize=2.5, lw=1)
        plate = {"facecolor": colour, "edgecolor": "none", "pad": 1.2}
        axes.text(1.5, y, f"{value * 100:.0f} %", va="center", color=theme.paper, weight="bold", bbox=plate)
    axes.axvline(target * 100, color=theme.ink, lw=1, ls=(0, (4, 3)))
    axes.text(target * 100, -0.75, f"target {target * 100:g} %", ha="center", va="bottom", size=7)
    axes.set_yticks(range(len(rows)), [row["label"] for row in rows])
    axes.set_ylim(len(rows) - 0.45, -0.65)
    axes.set_xlim(0, 100)
    unread = ", of those answered" if evaluation["n"]["labelled_failed"] else ""
    figure.supxlabel(f"accuracy of the class (recall), %{unread}", size=8)
    axes.tick_params(axis="y", length=0)
    _despine(axes, "top", "right", "left")
    return figure


def reliability(evaluation: Mapping[str, Any], theme: Theme) -> Figure:
    """Draw accuracy against confidence, one point per bin; its area grows with the number of recordings."""
    bins = [row for row in evaluation["reliability"] if row["n"]]
    figure, axes = _axes(4.2, 3.6)
    axes.plot([0, 100], [0, 100], color=theme.ink, lw=1, ls=(0, (4, 3)), label="perfectly calibrated")
    x = [row["confidence"] * 100 for row in bins]
    y = [row["accuracy"] * 100 for row in bins]
    largest = max(row["n"] for row in bins)
    axes.plot(x, y, color=theme.blue, lw=1.2, zorder=2)
    sizes = [12 + 150 * row["n"] / largest for row in bins]
    axes.scatter(x, y, s=sizes, color=theme.blue, edgecolor=theme.paper, zorder=3, label="recordings (area: how many)")
    axes.set(xlim=(0, 102), ylim=(0, 102), xlabel="confidence, %", ylabel="accuracy, %")
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, frameon=False, fontsize=7, borderpad=0)
    ece = evaluation["overall"]["ece"]
    axes.text(100, 3, f"ECE {ece * 100:.1f} points", ha="right", size=8)
    _despine(axes, "top", "right")
    return figure


def risk_coverage(evaluation: Mapping[str, Any], theme: Theme) -> Figure:
    """Draw the share of wrong answers among the most confident part of the recordings."""
    curve = evaluation["risk_coverage"]
    figure, axes = _axes(4.2, 3.6)
    x = [point["coverage"] * 100 for point in curve]
    y = [point["risk"] * 100 for point in curve]
    axes.plot(x, y, color=theme.blue, lw=1.6)
    axes.fill_between(x, y, color=theme.blue, alpha=0.15, lw=0)
    axes.set(xlim=(0, 100), ylim=(0, max(5.0, 1.15 * max(y))))
    axes.set(xlabel="coverage: most confident part, %", ylabel="risk: wrong answers, %")
    axes.text(3, axes.get_ylim()[1] * 0.93, f"AURC {evaluation['overall']['aurc']:.3f}", va="top", size=8)
    _despine(axes, "top", "right")
    return figure


def _axes(width_in: float, height_in: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width_in, height_in), layout="constrained")
    return figure, figure.add_subplot()


def _despine(axes: Axes, *sides: str) -> None:
    for side in sides:
        axes.spines[side].set_visible(False)


def _style(theme: Theme) -> Any:
    return {
        "font.size": 8,
        "figure.facecolor": theme.paper,
        "savefig.facecolor": theme.paper,
        "axes.facecolor": theme.paper,
        "axes.edgecolor": theme.faint,
        "axes.labelcolor": theme.ink,
        "text.color": theme.ink,
        "xtick.color": theme.ink,
        "ytick.color": theme.ink,
        "hatch.color": theme.paper,
        "hatch.linewidth": 0.8,
        "svg.hashsalt": "report",
    }


def _ink_on(rgba: Sequence[float]) -> str:
    """Black or white, whichever contrasts more with a colour (relative luminance of WCAG 2)."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in rgba[:3]]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return "#ffffff" if luminance < 0.179 else "#101418"


def _confusion_alt(confusion: Mapping[str, Any]) -> str:
    pairs = [
        (count, true, answer)
        for true, row in zip(confusion["labels"], confusion["counts"], strict=True)
        for answer, count in zip(confusion["labels"], row, strict=True)
        if true != answer and count
    ]
    pairs.sort(key=lambda pair: -pair[0])
    most = "; ".join(f"{true} answered as {answer}: {count}" for count, true, answer in pairs[:3])
    return f"Confusion matrix, rows true, columns answered. Most frequent confusions: {most or 'none'}."


def _per_class_alt(evaluation: Mapping[str, Any]) -> str:
    bars = ", ".join(f"{row['label']} {percent(row['recall']['value'])}" for row in evaluation["per_class"])
    return f"Bars of the accuracy of each class: {bars}."


def _reliability_alt(evaluation: Mapping[str, Any]) -> str:
    points = ", ".join(
        f"{percent(row['accuracy'])} right at confidence {percent(row['confidence'])}"
        for row in evaluation["reliability"]
        if row["n"]
    )
    return f"Reliability plot: {points}. Expected calibration error {percent(evaluation['overall']['ece'])}."


def _risk_alt(evaluation: Mapping[str, Any]) -> str:
    curve = evaluation["risk_coverage"]
    half = min(curve, key=lambda point: abs(point["coverage"] - 0.5))
    return (
        f"Risk-coverage curve: {percent(half['risk'])} wrong among the most confident {percent(half['coverage'])}, "
        f"{percent(curve[-1]['risk'])} wrong among all."
    )
