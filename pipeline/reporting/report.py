"""Writes the report of labelled predictions: ``metrics.json``, CSV tables, drawings and one page, ``report.html``.

``reporting.REPORT`` lists the files.

The pages are Jinja2 templates with autoescape, filled from what the JSON file holds. A page is one file that loads
nothing (its content security policy allows only inline styles and data URIs) and runs no script. Control characters
and characters that change the text direction are shown as escapes.
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
    """Fill one of the templates in the folder ``templates``."""
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
    """``0.8612`` as ``86.1 %``; with more decimals if it would otherwise look like a ``target`` that it misses."""
    return "n/a" if value is None else f"{value * 100:.{decimals(value, target)}f}{_NARROW}%"


def span(bounds: Sequence[float] | None) -> str:
    """``[0.801, 0.902]`` as ``80.1–90.2`` (per cent)."""
    return "n/a" if bounds is None else f"{bounds[0] * 100:.1f}–{bounds[1] * 100:.1f}"


def points(value: float | None) -> str:
    """A difference of two shares in percentage points, with its sign."""
    if value is None:
        return "n/a"
    text = f"{value * 100:+.1f}".replace("-", "−")
    return "0.0" if text[1:] == "0.0" else text


def points_span(bounds: Sequence[float] | None) -> str:
    """The interval of a difference, in percentage points."""
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
    """Make the folder ``out``; turn an OSError while writing into a SerError."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise SerError(
            f"cannot write the report in {out}: {error.strerror or error}; "
            "free some space, then run the same command again"
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
    """Evaluate ``predictions`` and write the report into ``out`` (made if missing), replacing an earlier report.

    Args:
        predictions: a table of scores; without labels the page has no metrics and says so.
        meta: how the predictions were made, shown on the page; ``model`` and ``data`` also at its top.
        targets, resamples, seed: as for ``metrics.evaluate``.
        embed_audio: how many of the most confident mistakes can be played on the page.
        leak_check: the result of ``leaks.describe``.

    Returns:
        The content of ``metrics.json``.

    Raises:
        LabelError: a label that is not in ``labels``.
        SerError: the disk is full or not writable.
    """
    evaluation = evaluate(predictions, labels, targets=targets, resamples=resamples, seed=seed)
    evaluation |= {"meta": dict(meta), "leak_check": leak_check, "embed_audio": embed_audio, "mistakes": []}
    with _writing(out):
        return _write(evaluation, predictions, labels, out, embed_audio)


def rerender(before: Mapping[str, Any], predictions: pd.DataFrame, out: Path, note: str | None) -> dict[str, Any]:
    """Write an earlier report, ``before`` (the content of ``metrics.json``), again with another ``note``.

    Targets, leak check, audio players and the record of how it was made stay the same.
    """
    bootstrap = before.get("bootstrap", {})
    return write_report(
        predictions,
        before["labels"],
        out,
        meta=before["meta"] | {"note": note},
        targets=Targets(**before["verdict"]["targets"]) if before["labelled"] else None,
        embed_audio=before["embed_audio"],
        leak_check=before["leak_check"],
        **{name: bootstrap[name] for name in ("resamples", "seed") if name in bootstrap},
    )


def _write(
    evaluation: dict[str, Any], predictions: pd.DataFrame, labels: Sequence[str], out: Path, embed_audio: int
) -> dict[str, Any]:
    """Write tables, drawings and page; adds failures and mistakes to ``evaluation``, and returns it."""
    for name in REPORT:  # remove all files of an earlier report
        (out / name).unlink(missing_ok=True)
    failures = predictions[failed_rows(predictions)]
    place = [name for name in (START, END) if name in failures]
    failures = failures.reindex(columns=["speech", *place, "status", "error"])
    codes = failures["status"].fillna("unknown").value_counts()
    evaluation["failures"] = {
        "n": len(failures),
        "by_code": [{"code": str(code), "n": int(n)} for code, n in codes.items()],
        "first": _records(failures.head(SHOWN_FAILURES)),
    }
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
    players = _players(evaluation["mistakes"][:embed_audio])
    write_page(out / "report.html", out / "metrics.json", evaluation, pictures=pictures, audio=players)
    return evaluation


def write_page(page: Path, data: Path, values: Mapping[str, Any], **more: Any) -> None:
    """Write ``values`` as JSON into ``data``, and the page of them, from the template of that name, into ``page``."""
    text = json.dumps(values, indent=1, allow_nan=False, default=str)
    data.write_text(text + "\n", encoding="utf-8")
    html = render(f"{page.name}.j2", e=json.loads(text), meta_rows=meta_rows(values["meta"]), **more)
    page.write_text(html, encoding="utf-8", errors="backslashreplace")


def _mistakes(predictions: pd.DataFrame, labels: Sequence[str]) -> pd.DataFrame:
    """A table of the wrong answers, the most confident first."""
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
    return [{str(name): cell for name, cell in row.items()} for row in rows]


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
    """Position in ``mistakes`` -> WAV data URI, for the recordings that can still be read."""
    players = {}
    for position, row in enumerate(mistakes):
        try:
            players[position] = _wav_uri(source_at(row["speech"], *(row.get(START) or 0.0, row.get(END) or math.inf)))
        except AudioError:
            continue
    return players


def _wav_uri(source: AudioSource) -> str:
    """At most 10 s from the middle of a recording as a data URI: WAV, mono, 16 bit, 22.05 kHz."""
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
    """Compare two tables of scores of the same recordings and write the result into ``out``.

    Writes ``comparison.json``, ``comparison.csv``, ``disagreements.csv`` and ``comparison.html``. Arguments and errors
    are those of ``compare.compare``; ``meta`` is as in ``write_report``; ``leak_checks``: the result of
    ``leaks.describe`` for each model, with its ``name``.
    """
    found = compare(first, second, labels, names=names) | {"meta": dict(meta), "leak_checks": list(leak_checks)}
    with _writing(out):
        write_csv(pd.DataFrame(found["figures"]), out / "comparison.csv")
        write_csv(disagreements(first, second, labels), out / "disagreements.csv")
        write_page(out / "comparison.html", out / "comparison.json", found)
    return found
