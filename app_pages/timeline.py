"""A recording over time: its windows as a table, as shares of the time, and as bands; a click on a band plays it.

Bands are plain HTML: quick to draw, and usable by keyboard. "Not sure" is hatched, silence is empty. Neighbouring
windows with the same answer form one run. Where there are too many runs, stacked columns are drawn instead.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from html import escape
from typing import Any

import pandas as pd

from app_pages.palette import colour, ink
from app_pages.words import NO_ANSWER, UNCERTAIN, channel_name, clock, percent, spoken, unsure
from serve.schema import Segment

MOST_RUNS = 60  # in a lane; more would be too narrow
_WORD_SHARE = 0.09  # a run with a smaller share of the lane is too narrow for its word


def as_table(segments: Sequence[Segment], channels: int) -> pd.DataFrame:
    """Columns ``lane start_s end_s drawn_s until_s label word sounds confidence from to``; one row per window.

    A window is drawn from ``drawn_s`` to ``until_s``. Where two windows of a channel overlap, the border is in the
    middle; the last two overlap where the recording's length is not a multiple of the window's.
    """
    table = pd.DataFrame(
        {
            "lane": channel_name(part.channel, channels),
            "start_s": part.start_s,
            "end_s": part.end_s,
            "label": part.label,
            "word": spoken(part.label),
            "sounds": _sounds(part),
            "confidence": math.nan if part.confidence is None else part.confidence,
            "from": clock(part.start_s),
            "to": clock(part.end_s),
        }
        for part in segments
    )
    lanes = table.groupby("lane", sort=False)
    before, after = lanes["end_s"].shift(), lanes["start_s"].shift(-1)
    table["drawn_s"] = table["start_s"].where(~(before > table["start_s"]), (before + table["start_s"]) / 2)
    table["until_s"] = table["end_s"].where(~(after < table["end_s"]), (after + table["end_s"]) / 2)
    return table


def _sounds(part: Segment) -> str:
    if part.label == UNCERTAIN and part.scores:
        return unsure(part.scores[0].label)
    return spoken(part.label)


def shares(segments: Sequence[Segment]) -> dict[str, float]:
    """Answer -> share of the time, largest first; silence and no speech count only if there is nothing else."""
    table = as_table(segments, 1)
    rows = table[~table["label"].isin(list(NO_ANSWER))]
    rows = table if rows.empty else rows
    lengths = (rows["until_s"] - rows["drawn_s"]).groupby(rows["label"], sort=False).sum()
    found = (lengths / lengths.sum()).sort_values(ascending=False, kind="stable")
    return {str(label): float(share) for label, share in found.items()}


def runs(table: pd.DataFrame) -> pd.DataFrame:
    """Neighbours with the same lane and word as one row: ``lane label word start_s end_s parts confidence`` (mean)."""
    changed = (table["word"] != table["word"].shift()) | (table["lane"] != table["lane"].shift())
    return table.groupby(changed.cumsum(), sort=False).agg(
        lane=("lane", "first"),
        label=("label", "first"),
        word=("word", "first"),
        start_s=("drawn_s", "first"),
        end_s=("until_s", "last"),
        parts=("word", "size"),
        confidence=("confidence", "mean"),
    )


def timeline_html(table: pd.DataFrame, duration_s: float) -> str:
    """The time line as HTML, a lane per channel: bands, or stacked columns above ``MOST_RUNS`` runs in a lane."""
    merged = runs(table)
    many = merged.groupby("lane").size().max() > MOST_RUNS
    lanes = list(dict.fromkeys(table["lane"]))
    drawn = "".join(
        f'<div class="lane"><span class="name">{escape(lane) if len(lanes) > 1 else ""}</span><div class="band">'
        + (_columns(table[table["lane"] == lane], duration_s) if many else _bands(merged, lane, duration_s))
        + '<i class="head"></i></div></div>'
        for lane in lanes
    )
    told = "Shares of the emotions over time" if many else "Emotions over time"
    return (
        f'<figure class="ser-time" data-duration="{duration_s:.3f}" aria-label="{told}, click to play">'
        f"{drawn}{_legend(table)}</figure>"
    )


def _bands(merged: pd.DataFrame, lane: str, duration_s: float) -> str:
    return "".join(_band(run, duration_s) for run in merged[merged["lane"] == lane].to_dict("records"))


def _band(run: Mapping[Hashable, Any], duration_s: float) -> str:
    start_s, end_s, label, confidence = run["start_s"], run["end_s"], str(run["label"]), run["confidence"]
    share = (end_s - start_s) / duration_s
    sure = "" if math.isnan(confidence) else f", {percent(confidence)}"
    told = escape(f"{run['word']}{sure}, {clock(start_s)} to {clock(end_s)}; play", quote=True)
    word = f"<span>{escape(run['word'])}</span>" if share >= _WORD_SHARE else ""
    return (
        f'<button type="button" class="run {_kind(label)}" data-start="{start_s:.3f}" title="{told}" '
        f'aria-label="{told}" style="left:{100 * start_s / duration_s:.3f}%;width:{100 * share:.3f}%;'
        f'{_paint(label)}">{word}</button>'
    )


def _columns(table: pd.DataFrame, duration_s: float) -> str:
    """``MOST_RUNS`` columns of equal time, each filled by the shares of its answers; silence stays empty at the top."""
    step_s = duration_s / MOST_RUNS
    order = list(table.groupby("label")["word"].size().sort_values(ascending=False).index)
    shown = []
    for number in range(MOST_RUNS):
        begin_s, end_s = number * step_s, (number + 1) * step_s
        inside = (table["until_s"].clip(upper=end_s) - table["drawn_s"].clip(lower=begin_s)).clip(lower=0)
        lengths = (inside.groupby(table["label"]).sum() / step_s).to_dict()
        stacked = [label for label in order if lengths[label] > 0.001 and label not in NO_ANSWER]
        parts = "".join(
            f'<i class="{_kind(label)}" style="height:{100 * lengths[label]:.1f}%;{_paint(label)}"></i>'
            for label in stacked
        )
        words = ", ".join(f"{spoken(label)} {percent(min(lengths[label], 1.0))}" for label in stacked) or "silent"
        told = escape(f"{words}, {clock(begin_s)} to {clock(end_s)}; play", quote=True)
        shown.append(
            f'<button type="button" class="column" data-start="{begin_s:.3f}" title="{told}" aria-label="{told}" '
            f'style="left:{100 * number / MOST_RUNS:.3f}%;width:{100 / MOST_RUNS:.3f}%">{parts}</button>'
        )
    return "".join(shown)


def _kind(label: str) -> str:
    return "unsure" if label == UNCERTAIN else "empty" if label in NO_ANSWER else "emotion"


def _paint(label: str) -> str:
    """CSS colours of an emotion; other answers have theirs in the style sheet."""
    if _kind(label) != "emotion":
        return ""
    return f"background-color:{colour(label)};color:{ink(colour(label))}"


def _legend(table: pd.DataFrame) -> str:
    labels = table.groupby("label", sort=False)["word"].size().sort_values(ascending=False).index
    entries = "".join(
        f'<li><i class="{_kind(str(label))}" style="{_paint(str(label))}"></i>{escape(spoken(str(label)))}</li>'
        for label in labels
    )
    return f'<ul class="legend">{entries}</ul>'
