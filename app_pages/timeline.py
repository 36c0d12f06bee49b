"""A recording over time: its parts as a table, in a sentence, and as bands that a click plays.

Bands are plain HTML: they stand at once, can be reached by keyboard, and tell apart what is no emotion: not sure is
hatched, silent is empty. Neighbours of one answer are one run; where even the runs are too many, columns are stacked.
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

MOST_RUNS = 60  # of a lane; more cannot be told apart
_WORD_SHARE = 0.09  # a run that is a smaller part of the lane has no room for its word


def as_table(segments: Sequence[Segment], channels: int) -> pd.DataFrame:
    """Columns ``lane start_s end_s drawn_s until_s label word sounds confidence from to``; a row a part.

    ``drawn_s`` to ``until_s`` is what is drawn of a part: where two of a channel overlap, as the last two do when the
    length is no multiple of theirs, the border is in the middle.
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
    """Which share of the time each answer has, largest first; what is no speech does not count, unless all is none."""
    table = as_table(segments, 1)
    heard = table[~table["label"].isin(list(NO_ANSWER))]
    heard = table if heard.empty else heard
    lengths = (heard["until_s"] - heard["drawn_s"]).groupby(heard["label"], sort=False).sum()
    found = (lengths / lengths.sum()).sort_values(ascending=False, kind="stable")
    return {str(label): float(share) for label, share in found.items()}


def runs(table: pd.DataFrame) -> pd.DataFrame:
    """Neighbours of one lane and one word as one row: ``lane label word start_s end_s parts confidence``, its mean."""
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
    """Bands, a lane for each channel; stacked columns where a lane has more than ``MOST_RUNS`` runs."""
    merged = runs(table)
    many = merged.groupby("lane").size().max() > MOST_RUNS
    lanes = list(dict.fromkeys(table["lane"]))
    drawn = "".join(
        f'<div class="lane"><span class="name">{escape(lane) if len(lanes) > 1 else ""}</span><div class="band">'
        + (_columns(table[table["lane"] == lane], duration_s) if many else _bands(merged, lane, duration_s))
        + '<i class="head"></i></div></div>'
        for lane in lanes
    )
    told = "Each column is a share of the time" if many else "Over time"
    return (
        f'<figure class="ser-time" data-duration="{duration_s:.3f}" aria-label="{told}: what was heard, click to play">'
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
    """``MOST_RUNS`` columns of equal time, each filled by what was heard in it, silence left empty at the top."""
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
    return "unsure" if label == UNCERTAIN else "empty" if label in NO_ANSWER else "heard"


def _paint(label: str) -> str:
    """Colours of an answer that is an emotion; the others have theirs in the style sheet."""
    if _kind(label) != "heard":
        return ""
    return f"background-color:{colour(label)};color:{ink(colour(label))}"


def _legend(table: pd.DataFrame) -> str:
    labels = table.groupby("label", sort=False)["word"].size().sort_values(ascending=False).index
    entries = "".join(
        f'<li><i class="{_kind(str(label))}" style="{_paint(str(label))}"></i>{escape(spoken(str(label)))}</li>'
        for label in labels
    )
    return f'<ul class="legend">{entries}</ul>'
