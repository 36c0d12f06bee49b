"""Formats an evaluation as text: figures, confusion matrix, verdict. Lines have at most 80 columns, long words more."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.evaluation.verdict import NOT_MET, decimals

WIDTH = 80
_NAME_WIDTH = 16


def terminal_summary(evaluation: Mapping[str, Any]) -> str:
    """The figures of ``metrics.evaluate`` as text, without a newline at the end."""
    if not evaluation["labelled"]:
        return _answers(evaluation)
    parts = [
        classification_report(evaluation),
        _confusion(evaluation["confusion"]),
        _per_class(evaluation),
        *([_restricted(found)] if (found := evaluation["restricted"]) else []),
        _verdict(evaluation),
    ]
    notes = [_wrapped(f"note: {hint}") for hint in evaluation["hints"]]
    return "\n\n".join([*parts, *notes])


def classification_report(evaluation: Mapping[str, Any]) -> str:
    """A table in the layout of ``sklearn.metrics.classification_report``; n/a for classes without recordings."""
    rows = evaluation["per_class"]
    names = [_clip(row["label"]) for row in rows]
    width = max(len("weighted avg"), *map(len, names))
    present = [row for row in rows if row["support"]]
    total = sum(row["support"] for row in rows)

    def line(name: str, *cells: str | int) -> str:
        return f"{name:>{width}s} " + "".join(f" {cell:>9}" for cell in cells)

    def mean(metric: str, weighted: bool) -> float | None:
        weights = [row["support"] if weighted else 1 for row in present]
        pairs = zip(weights, present, strict=True)
        return sum(w * row[metric]["value"] for w, row in pairs) / sum(weights) if present else None

    metrics = ("precision", "recall", "f1")
    lines = [line("", "precision", "recall", "f1-score", "support"), ""]
    for name, row in zip(names, rows, strict=True):
        lines.append(line(name, *(_two(row[metric]["value"]) for metric in metrics), row["support"]))
    lines += ["", line("accuracy", "", "", _two(evaluation["overall"]["accuracy"]["value"]), total)]
    for name, weighted in (("macro avg", False), ("weighted avg", True)):
        lines.append(line(name, *(_two(mean(metric, weighted)) for metric in metrics), total))
    return "\n".join(lines)


def _confusion(confusion: Mapping[str, Any]) -> str:
    """The table of counts; headings are cut to the column width, and 12,345 becomes 12k if a line is too long."""
    names = [_clip(name, 10) for name in confusion["labels"]]
    heads, cells = list(confusion["labels"]), [list(row) for row in confusion["counts"]]
    if any(confusion["failed"]):
        heads.append("failed")
        cells = [[*row, failed] for row, failed in zip(cells, confusion["failed"], strict=True)]
    first = max(map(len, names))
    room = (WIDTH - first) // len(heads)
    if room < 4:
        return _wrapped(f"confusion matrix: too large to show here ({len(names)} classes), see confusion_counts.csv")
    texts = [[_count(cell, room - 1) for cell in row] for row in cells]
    column = min(room, 1 + max(len(text) for row in [*texts, heads] for text in row))
    lines = ["confusion matrix (rows: true, columns: predicted)"]
    lines.append(" " * first + "".join(f" {head[: column - 1]:>{column - 1}}" for head in heads))
    for name, row in zip(names, texts, strict=True):
        lines.append(f"{name:>{first}}" + "".join(f" {text:>{column - 1}}" for text in row))
    return "\n".join(lines)


def _per_class(evaluation: Mapping[str, Any]) -> str:
    level, confusion = evaluation["bootstrap"]["level"], evaluation["confusion"]
    lines = [f"per-class accuracy (recall) with a {level:.0%} interval over recordings"]
    for i, row in enumerate(evaluation["per_class"]):
        share = f"{confusion['counts'][i][i]}/{row['support']}"
        figure = row["recall"]
        lines.append(
            f"  {_clip(row['label']):<{_NAME_WIDTH}} {share:>15} {percent(figure['value']):>9}"
            f"  {_interval(figure['over_recordings'])}"
        )
    return "\n".join(lines)


def _restricted(found: Mapping[str, Any]) -> str:
    """Open and restricted figures, one line for each corpus."""
    missing = f"the data has no {', '.join(found['missing'])}; " if found["missing"] else ""
    lines = [_wrapped(f"{missing}open answers, and answers among the classes that each corpus has")]
    lines.append(f"  {'':<{_NAME_WIDTH}} {'n':>6} {'classes':>8}{'accuracy':>20}{'UAR':>20}")
    rows: list[dict[str, Any]] = [*found["corpora"], found["all"] | {"corpus": "all"}]
    if found["mean"]:
        rows.append(found["mean"] | {"corpus": "mean of corpora", "n": ""})
    for row in rows:
        cells = "".join(
            f"{percent(row[kind][of]):>10}" for of in ("accuracy", "uar") for kind in ("open", "restricted")
        )
        classes = len(row["classes"]) if "classes" in row else ""
        name = _clip(row["corpus"] or "(no corpus)")
        lines.append(f"  {name:<{_NAME_WIDTH}} {row['n']:>6} {classes:>8}{cells}")
    return "\n".join(lines)


def _verdict(evaluation: Mapping[str, Any]) -> str:
    found, n = evaluation["verdict"], evaluation["n"]
    lines = [_wrapped(f"verdict: {found['outcome'].upper()}" + _named(found))]
    for check in found["checks"]:
        name = check["metric"] if check["label"] is None else f"{check['metric']} {_clip(check['label'], 11)}"
        outcome = check["outcome"].upper() if check["outcome"] == NOT_MET else check["outcome"]
        outcome = outcome.replace("but the interval crosses the line", "interval crosses")
        lines.append(
            f"  {name:<18} >= {check['target'] * 100:>4.1f} % {percent(check['value'], check['target']):>8}"
            f"  {_interval(check['interval']):<16} {outcome}"
        )
    notes = _intervals(evaluation)
    if n["unlabelled"]:
        notes += f" {n['unlabelled']} of {n['rows']} rows have no label: scored, but not part of the figures."
    if n["labelled_failed"]:
        read = found["checks"][0]["value_read_only"]
        notes += (
            f" {n['labelled_failed']} of {n['labelled']} recordings got no emotion as answer and count as wrong"
            f" here; accuracy of the {n['read']} answered: {percent(read)}."
        )
    return "\n".join([*lines, _wrapped(notes, "  ")])


def _intervals(evaluation: Mapping[str, Any]) -> str:
    """A sentence on how the intervals of the verdict were computed."""
    checks, note = evaluation["verdict"]["checks"], evaluation["bootstrap"]["speakers_note"]
    if not evaluation["bootstrap"]["speakers"]:
        return "Intervals: over recordings" + (f" (over speakers: {note})." if note else ".")
    text = "Intervals: bootstrap over speakers"
    if any(check["interval_over"] == "recordings" for check in checks):
        text += "; over recordings for classes with few speakers"
    if any(check["value"] == 1.0 for check in checks):
        text += "; the exact bound where every recording is right"
    return text + "."


def _named(found: Mapping[str, Any]) -> str:
    parts = []
    if found["missed"]:
        parts.append(f"missed: {', '.join(found['missed'])}")
    if found["undecidable"]:
        parts.append(f"no recordings for: {', '.join(found['undecidable'])}")
    return f" ({'; '.join(parts)})" if parts else ""


def _answers(evaluation: Mapping[str, Any]) -> str:
    n = evaluation["n"]
    lines = [_wrapped(f"No labels were given: {n['rows']} rows, {n['failed']} failed, no metrics. Answers:")]
    for row in evaluation["answers"]:
        sure = "" if row["confidence"] is None else f"  mean confidence {row['confidence']:.2f}"
        lines.append(f"  {_clip(row['label']):<{_NAME_WIDTH}} {row['n']:>9}{sure}")
    return "\n".join(lines)


def _clip(name: str, width: int = _NAME_WIDTH) -> str:
    return name if len(name) <= width else name[: width - 1] + "…"


def _two(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.2f}"


def percent(value: float | None, target: float | None = None) -> str:
    """``0.8612`` as ``86.1 %``; with more decimals if it would otherwise look like a ``target`` that it misses."""
    return "n/a" if value is None else f"{value * 100:.{decimals(value, target)}f} %"


def _interval(bounds: Sequence[float] | None) -> str:
    return "[n/a]" if bounds is None else f"[{bounds[0] * 100:.1f}, {bounds[1] * 100:.1f}]"


def _count(value: int, width: int) -> str:
    """A count in at most ``width`` characters, as 12k or 3M if needed; ``#`` signs if even that is too long."""
    for text in (str(value), f"{value / 1e3:.0f}k", f"{value / 1e6:.0f}M"):
        if len(text) <= width:
            return text
    return "#" * width


def _wrapped(text: str, indent: str = "") -> str:
    """The text in lines of ``WIDTH``; words are never broken, so that commands in it can be copied."""
    return textwrap.fill(
        text,
        WIDTH,
        initial_indent=indent,
        subsequent_indent=indent or "  ",
        break_long_words=False,
        break_on_hyphens=False,
    )
