"""Predictions (and what was true) -> ``metrics.json``, CSV tables, figures, and one self-contained ``report.html``.

The page shows nothing that is not in ``metrics.json``: it is rendered from the same dict. What a folder
holds afterwards: ``metrics.json verdict.csv per_class.csv confusion_counts.csv confusion_normalised.csv
breakdowns.csv reliability.csv risk_coverage.csv mistakes.csv failures.csv``, ``confusion_matrix per_class
reliability risk_coverage`` as PNG and SVG.

The pages: Jinja2 templates with autoescape, filled from the very dict that ``metrics.json`` holds.

A page is one file that loads nothing (its content security policy allows inline styles and data URIs only)
and runs no script. Text that comes from tables is escaped, and control and direction-changing characters are
made visible.
"""

from __future__ import annotations

import base64
import io
import json
import math
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import soundfile
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from pipeline.audio.load import AudioError, load, probe
from pipeline.audio.source import AudioSource
from pipeline.data.segments import END, START, source_at
from pipeline.data.tables import write_csv
from pipeline.evaluation.breakdowns import GROUP_FIGURES
from pipeline.evaluation.compare import compare, disagreements
from pipeline.evaluation.metrics import evaluate
from pipeline.evaluation.outcomes import failed_rows, outcomes
from pipeline.evaluation.verdict import CROSSES, MET, NOT_DECIDABLE, NOT_MET, Targets, decimals
from pipeline.reporting import REPORT, figures
from pipeline.reporting.terminal import terminal_summary
from pipeline.storage.errors import SerError

__all__ = ["Targets", "rerender", "terminal_summary", "write_comparison", "write_report"]

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


SHOWN_MISTAKES = 20
SHOWN_FAILURES = 50
_CLIP_RATE_HZ = 22_050
_CLIP_LIMIT_S = 10.0
_MISTAKE_COLUMNS = ("speech", "speaker", "label_name", "predicted", "confidence", "p_true", "duration_s", START, END)


@contextmanager
def _writing(out: Path) -> Iterator[None]:
    """Make ``out``, and say in one line when it cannot be written."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise SerError(
            f"cannot write the report in {out}: {error.strerror or error}; "
            "free some space, then give the same command again"
        ) from error


def write_report(
    predictions: pd.DataFrame,
    labels: Sequence[str],
    out: Path,
    *,
    meta: Mapping[str, Any],
    targets: Targets | None = None,
    embed_audio: int = 0,
    leak_check: Mapping[str, Any] | None = None,
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """Evaluate ``predictions`` and write everything into ``out`` (made when missing), in place of an earlier report.

    Args:
        predictions: a scores table; without any ``label_name`` the page says so and has no metrics.
        labels: class names in index order.
        out: folder of the report.
        meta: how the predictions were made (model, sha256, versions, command ...), shown as it is; ``model`` and
            ``data`` also appear at the top of the page.
        targets: of the verdict.
        embed_audio: how many of the most confident mistakes can be played in the page.
        leak_check: what ``leaks.describe`` found.
        resamples: of the bootstrap.
        seed: of the bootstrap.

    Returns:
        The content of ``metrics.json``.

    Raises:
        LabelError: a label that is none of ``labels``.
        SerError: the disk is full or cannot be written.
    """
    evaluation = evaluate(predictions, labels, targets=targets, resamples=resamples, seed=seed)
    evaluation |= {"meta": dict(meta), "leak_check": leak_check, "embed_audio": embed_audio, "mistakes": []}
    with _writing(out):
        return _write(evaluation, predictions, labels, out, embed_audio)


def rerender(before: Mapping[str, Any], predictions: pd.DataFrame, out: Path, note: str | None) -> dict[str, Any]:
    """The report of ``before`` (the content of ``metrics.json``) once more, with ``note`` on it.

    Targets, leak check, players and the account of how it was made stay as the command that made it left them.
    """
    bootstrap = before.get("bootstrap", {})
    return write_report(
        predictions,
        before["labels"],
        out,
        meta=before["meta"] | {"note": note},
        targets=Targets(**before["verdict"]["targets"]) if before["labelled"] else None,
        embed_audio=before.get("embed_audio", 0),
        leak_check=before["leak_check"],
        **{name: bootstrap[name] for name in ("resamples", "seed") if name in bootstrap},
    )


def _write(
    evaluation: dict[str, Any], predictions: pd.DataFrame, labels: Sequence[str], out: Path, embed_audio: int
) -> dict[str, Any]:
    """The tables, figures and the page of an evaluation, which gets what the page shows beside the figures."""
    for name in REPORT:  # of a report with labels, or of another model, nothing may stay beside this one
        (out / name).unlink(missing_ok=True)
    failures = _failures(predictions)
    evaluation["failures"] = _failure_summary(failures)
    write_csv(failures, out / "failures.csv")
    pictures = []
    if evaluation["labelled"]:
        mistakes = _mistakes(predictions, labels)
        evaluation["mistakes"] = _records(mistakes.head(max(SHOWN_MISTAKES, embed_audio)))
        write_csv(mistakes, out / "mistakes.csv")
        _write_tables(evaluation, out)
        pictures = [
            {"title": drawing.title, "alt": drawing.alt} | figures.save(drawing, evaluation, out)
            for drawing in figures.drawings(evaluation)
        ]
    text = json.dumps(evaluation, indent=1, allow_nan=False, default=str)
    (out / "metrics.json").write_text(text + "\n", encoding="utf-8")
    page = render(
        "report.html.j2",
        e=json.loads(text),
        pictures=pictures,
        meta_rows=meta_rows(evaluation["meta"]),
        audio=_players(evaluation["mistakes"][:embed_audio]),
    )
    (out / "report.html").write_text(page, encoding="utf-8", errors="backslashreplace")
    return evaluation


def _failures(predictions: pd.DataFrame) -> pd.DataFrame:
    rows = predictions[failed_rows(predictions)]
    return rows.reindex(columns=["speech", *(name for name in (START, END) if name in rows), "status", "error"])


def _failure_summary(failures: pd.DataFrame) -> dict[str, Any]:
    counts = failures["status"].fillna("unknown").value_counts()
    by_code = [{"code": str(code), "n": int(n)} for code, n in counts.items()]
    return {"n": len(failures), "by_code": by_code, "first": _records(failures.head(SHOWN_FAILURES))}


def _mistakes(predictions: pd.DataFrame, labels: Sequence[str]) -> pd.DataFrame:
    """Wrong answers, the most confident first."""
    found = outcomes(predictions, labels)
    found = found.where(found.read & ~found.correct)
    table = found.table.assign(predicted=np.array(found.labels, dtype=object)[found.answer])
    table["confidence"] = np.nan if found.confidence is None else found.confidence
    if found.probabilities is not None:
        table["p_true"] = np.take_along_axis(found.probabilities, found.truth[:, None], axis=1)[:, 0]
    table = table.sort_values("confidence", ascending=False, kind="stable", na_position="last")
    return table[[name for name in _MISTAKE_COLUMNS if name in table.columns]]


def _records(table: pd.DataFrame) -> list[dict[str, Any]]:
    """Rows as dicts of plain Python values, missing ones as None."""
    rows = table.astype(object).where(table.notna(), None).to_dict("records")
    return [{str(name): _plain(cell) for name, cell in row.items()} for row in rows]


def _plain(cell: object) -> object:
    return cell.item() if isinstance(cell, np.generic) else cell


def _write_tables(evaluation: Mapping[str, Any], out: Path) -> None:
    confusion = evaluation["confusion"]
    for name, cells in (("counts", confusion["counts"]), ("normalised", confusion["row_normalised"])):
        table = pd.DataFrame(cells, columns=confusion["labels"])
        table.insert(0, "true", confusion["labels"])
        if name == "counts":
            table["failed"] = confusion["failed"]
        write_csv(table, out / f"confusion_{name}.csv")
    write_csv(pd.json_normalize(evaluation["per_class"]), out / "per_class.csv")
    write_csv(pd.DataFrame(evaluation["verdict"]["checks"]), out / "verdict.csv")
    groups = [{"column": part["column"], **row} for part in evaluation["breakdowns"] for row in part["groups"]]
    write_csv(pd.DataFrame(groups, columns=["column", *GROUP_FIGURES]), out / "breakdowns.csv")
    for name in ("reliability", "risk_coverage"):
        if evaluation[name] is not None:
            write_csv(pd.DataFrame(evaluation[name]), out / f"{name}.csv")


def _players(mistakes: Sequence[Mapping[str, Any]]) -> dict[int, str]:
    """WAV data URIs of the mistakes that can still be read, by their position."""
    players = {}
    for position, row in enumerate(mistakes):
        try:
            players[position] = _wav_uri(source_at(row["speech"], *(row.get(START) or 0.0, row.get(END) or math.inf)))
        except AudioError:
            continue
    return players


def _wav_uri(source: AudioSource) -> str:
    """At most 10 s from the middle of a recording, mono, 16 bit."""
    length_s = probe(source).duration_s
    clip = load(
        source,
        sample_rate_hz=_CLIP_RATE_HZ,
        start_s=max(0.0, (length_s - _CLIP_LIMIT_S) / 2),
        duration_s=min(length_s, _CLIP_LIMIT_S),
    )
    buffer = io.BytesIO()
    soundfile.write(buffer, np.clip(clip.samples, -1, 1), _CLIP_RATE_HZ, format="WAV", subtype="PCM_16")
    return "data:audio/wav;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def write_comparison(
    first: pd.DataFrame,
    second: pd.DataFrame,
    labels: Sequence[str],
    out: Path,
    *,
    names: tuple[str, str],
    meta: Mapping[str, Any],
    leak_checks: Sequence[Mapping[str, Any]] = (),
) -> dict[str, Any]:
    """Compare two scores tables of the same recordings into ``out``.

    Writes ``comparison.json``, ``comparison.csv``, ``disagreements.csv`` and ``comparison.html``; arguments and errors
    as ``compare.compare``, ``meta`` as in ``write_report``; ``leak_checks``: what ``leaks.describe`` found for each
    model, with its ``name``.
    """
    found = compare(first, second, labels, names=names) | {"meta": dict(meta), "leak_checks": list(leak_checks)}
    with _writing(out):
        write_csv(pd.DataFrame(found["figures"]), out / "comparison.csv")
        write_csv(disagreements(first, second, labels), out / "disagreements.csv")
        text = json.dumps(found, indent=1, allow_nan=False, default=str)
        (out / "comparison.json").write_text(text + "\n", encoding="utf-8")
        page = render("comparison.html.j2", c=json.loads(text), meta_rows=meta_rows(meta))
        (out / "comparison.html").write_text(page, encoding="utf-8", errors="backslashreplace")
    return found
