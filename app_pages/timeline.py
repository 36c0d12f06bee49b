"""A recording over time: its parts as a table, in a sentence, and as coloured bands."""

from __future__ import annotations

import math
from collections.abc import Sequence

import altair as alt
import pandas as pd

from app_pages.drawing import framed
from app_pages.palette import colour, ink
from app_pages.words import SILENCE, UNCERTAIN, channel_name, clock, percent, spoken, unsure
from serve.schema import Segment

_LANE_PX, _REST_PX = 46, 116  # a lane; axis and legend
_WORD_PX = 66  # a part that is narrower has no room for its word
_COLUMNS = alt.ExprRef("width < 500 ? 4 : 10")  # of the legend: a phone's width has room for four words


def as_table(segments: Sequence[Segment], channels: int) -> pd.DataFrame:
    """Columns ``lane start_s end_s drawn_s until_s middle_s label word sounds confidence ink from to``; a row a part.

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
            "ink": ink(colour(part.label)),
            "from": clock(part.start_s),
            "to": clock(part.end_s),
        }
        for part in segments
    )
    lanes = table.groupby("lane", sort=False)
    before, after = lanes["end_s"].shift(), lanes["start_s"].shift(-1)
    table["drawn_s"] = table["start_s"].where(~(before > table["start_s"]), (before + table["start_s"]) / 2)
    table["until_s"] = table["end_s"].where(~(after < table["end_s"]), (after + table["end_s"]) / 2)
    table["middle_s"] = (table["drawn_s"] + table["until_s"]) / 2
    return table


def _sounds(part: Segment) -> str:
    if part.label == UNCERTAIN:
        return unsure(part.scores[0].label)
    return spoken(part.label)


def summary(table: pd.DataFrame) -> str:
    """What the recording mostly sounds like, by time; silence does not count."""
    heard = table[table["label"] != SILENCE]
    if heard.empty:
        return "It is silent from beginning to end."
    lengths = (heard["until_s"] - heard["drawn_s"]).groupby(heard["label"], sort=False).sum()
    shares = (lengths / lengths.sum()).sort_values(ascending=False, kind="stable")
    unsure = shares.get(UNCERTAIN, 0.0)
    named = [f"{spoken(str(label))} for {percent(share)}" for label, share in shares.items() if label != UNCERTAIN]
    if not named:
        return "The model is not sure of any part."
    rest = f"; for {percent(unsure)} the model is not sure" if unsure else ""
    return f"It sounds {named[0]} of the time" + "".join(f", {more}" for more in named[1:3]) + f"{rest}."


def timeline(table: pd.DataFrame, duration_s: float) -> alt.LayerChart:
    """Coloured bands, a lane for each channel, with their words where there is room."""
    parts = table.drop_duplicates("word")
    lanes = list(dict.fromkeys(table["lane"]))
    colours = alt.Scale(domain=list(parts["word"]), range=[colour(label) for label in parts["label"]])
    base = alt.Chart(table).encode(
        x=_clock_axis(duration_s),
        y=alt.Y("lane:N", sort=lanes, axis=_lane_axis(lanes), title=None),
        tooltip=[
            alt.Tooltip("sounds:N", title="sounds"),
            alt.Tooltip("confidence:Q", title="how sure", format=".0%"),
            alt.Tooltip("from:N", title="from"),
            alt.Tooltip("to:N", title="to"),
            alt.Tooltip("lane:N", title="channel"),
        ],
    )
    bands = base.mark_rect(stroke="#ffffff", strokeWidth=1, strokeOpacity=0.5).encode(
        x2="until_s:Q",
        color=alt.Color(
            "word:N",
            scale=colours,
            legend=alt.Legend(title=None, orient="bottom", columns=_COLUMNS, symbolType="square", symbolStrokeWidth=0),
        ),
    )
    room = alt.expr(f"width / {len(table) / len(lanes):g} < {_WORD_PX} ? 0 : 1")
    words = base.mark_text(fontSize=12, opacity=room).encode(
        x="middle_s:Q", text="word:N", color=alt.Color("ink:N", scale=None)
    )
    return framed(_LANE_PX * len(lanes) + _REST_PX, bands, words)


def _clock_axis(duration_s: float) -> alt.X:
    expression = "floor(datum.value / 60) + ':' + format(datum.value % 60, '02')"
    axis = alt.Axis(labelExpr=expression, grid=False, tickMinStep=1, labelOverlap=True, labelFlush=False)
    scale = alt.Scale(domain=[0, duration_s], nice=False)
    return alt.X("drawn_s:Q", scale=scale, axis=axis, title="minutes : seconds")


def _lane_axis(lanes: Sequence[str]) -> alt.Axis | None:
    return None if len(lanes) == 1 else alt.Axis(title=None, domain=False, ticks=False, labelPadding=8)
