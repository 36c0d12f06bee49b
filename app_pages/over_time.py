"""Over time: recordings longer than four seconds, heard in parts of two seconds, each channel for itself."""

from __future__ import annotations

import pandas as pd
import streamlit as st

from app_pages.recordings import Recorded
from app_pages.service import asked
from app_pages.timeline import as_table, summary, timeline
from app_pages.words import NOT_SURE_BELOW
from serve.schema import Recording, Segment

LONGER_THAN_S = 4.0
_WINDOW_S = 2.0
_ROW_PX, _SHOWN_ROWS = 35, 8.5  # half a row says that there are more


def section(recorded: Recorded, heard: Recording) -> None:
    """The time line of a long recording; nothing for a short one."""
    if heard.duration_s <= LONGER_THAN_S:
        return
    st.header("Over time", anchor=False)
    segments = _segments(recorded, heard)
    if not segments:
        return
    table = as_table(segments, heard.channels)
    told = summary(table)
    st.markdown(told)
    st.altair_chart(timeline(table, heard.duration_s), alt=f"Time line of {len(table)} parts. {told}")
    _listen_to_a_part(recorded, table)


def _segments(recorded: Recorded, heard: Recording) -> list[Segment] | None:
    """Its parts, asked for once a recording."""
    known = st.session_state.get("followed")
    if known is None or known[0] != recorded.digest:
        channels = "each" if heard.channels > 1 else "mix"
        with st.spinner("Listening to all of it …"):
            window_s = min(_WINDOW_S, heard.picture.window_s) if heard.picture else _WINDOW_S
            answer = asked(
                lambda client: client.predict(
                    recorded.source, window_s=window_s, channels=channels, min_confidence=NOT_SURE_BELOW
                )
            )
        if answer is None:
            return None
        known = (recorded.digest, answer.segments or [])
        st.session_state["followed"] = known
    found: list[Segment] = known[1]
    return found


@st.fragment
def _listen_to_a_part(recorded: Recorded, table: pd.DataFrame) -> None:
    shown = table[["lane", "from", "to", "sounds", "confidence"]].assign(confidence=100 * table["confidence"])
    chosen = st.dataframe(
        shown if table["lane"].nunique() > 1 else shown.drop(columns="lane"),
        hide_index=True,
        height=round(_ROW_PX * (min(len(table), _SHOWN_ROWS) + 1)) + 2,
        on_select="rerun",
        selection_mode="single-row",
        key="part",
        alt="Table of the parts: from, to, what it sounds like, how sure the model is.",
        column_config={
            "lane": st.column_config.TextColumn("Channel"),
            "from": st.column_config.TextColumn("From"),
            "to": st.column_config.TextColumn("To"),
            "sounds": st.column_config.TextColumn("Sounds"),
            "confidence": st.column_config.ProgressColumn("How sure", format="%.0f %%", min_value=0, max_value=100),
        },
    )
    rows = chosen.selection.rows
    if rows and rows[0] < len(table) and recorded.media_type:
        part = table.iloc[rows[0]]
        st.markdown(f"From {part['from']} to {part['to']}:")
        st.audio(recorded.data, format=recorded.media_type, start_time=part["start_s"], end_time=part["end_s"])
    elif recorded.media_type:
        st.caption("Tick a row to hear that part.")
