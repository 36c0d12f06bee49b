"""The time line of recordings over 6 s, which are analysed in windows; different channels have a lane each."""

from __future__ import annotations

import streamlit as st

from app_pages.timeline import as_table, timeline_html
from serve.schema import Recording

_ROW_PX, _SHOWN_ROWS = 35, 8.5  # the half row shows that there are more


def section(result: Recording, caption: str) -> None:
    """Draw the time line and a table of the windows; only the ``caption`` where there are no windows."""
    if not result.segments:
        st.caption(caption)
        return
    table = as_table(result.segments, result.channels)
    st.html(timeline_html(table, result.duration_s))
    st.caption(f"{caption} Click a part to play it from there.")
    with st.expander(f"All {len(table)} parts as a table"):
        shown = table[["lane", "from", "to", "sounds", "confidence"]].assign(confidence=100 * table["confidence"])
        st.dataframe(
            shown if table["lane"].nunique() > 1 else shown.drop(columns="lane"),
            hide_index=True,
            height=round(_ROW_PX * (min(len(table), _SHOWN_ROWS) + 1)) + 2,
            key="parts",
            alt="Table of the parts: from, to, what emotion it conveys, how sure the model is.",
            column_config={
                "lane": st.column_config.TextColumn("Channel"),
                "from": st.column_config.TextColumn("From"),
                "to": st.column_config.TextColumn("To"),
                "sounds": st.column_config.TextColumn("Sounds"),
                "confidence": st.column_config.ProgressColumn("How sure", format="%.0f %%", min_value=0, max_value=100),
            },
        )
