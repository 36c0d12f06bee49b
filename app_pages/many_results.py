"""The results of many recordings: table with filter and order, the selected recording, failures, accuracy, CSV."""

from __future__ import annotations

import pandas as pd
import streamlit as st

from app_pages import verdict
from app_pages.bars import answer_html, scores_html
from app_pages.collection import Collection, as_told, chosen_rows, csv_bytes, failure_table, result_table
from app_pages.recordings import Recorded
from app_pages.words import plain
from serve.schema import ModelInfo, Recording

ORDERS = ("As added", "File name", "Most sure first", "Least sure first")
_SOUNDS_PX, _SURE_PX = 190, 130  # wide enough for "disgusted, 45 % of the time" beside a column of labels
_ROW_PX, _SHOWN_ROWS = 35, 10.5  # the half row shows that there are more


def show(collection: Collection, model: ModelInfo) -> None:
    """Draw the results."""
    table, failures = result_table(collection), failure_table(collection)
    _heading(collection, model, len(table), len(failures))
    if len(table):
        _browse(collection, table)
    if len(failures):
        st.header("Could not be used", anchor=False)
        st.table(failures.map(plain).rename(columns={"file": "File", "reason": "Why"}), hide_index=True)
    if collection.truth:
        _judge(collection, model)


def _heading(collection: Collection, model: ModelInfo, read: int, failed: int) -> None:
    told = f"{read} answered" + (f", {failed} could not be used" if failed else "")
    words, download, clear = st.columns([6, 2, 2], vertical_alignment="center")
    words.header(told, anchor=False)
    download.download_button(
        "Download CSV",
        csv_bytes(collection, model.labels),
        file_name="emotions.csv",
        mime="text/csv",
        on_click="ignore",
        icon=":material/download:",
        width="stretch",
    )
    clear.button("Clear the list", on_click=_clear, icon=":material/delete:", width="stretch")


def _clear() -> None:
    st.session_state["collection"] = Collection()


@st.fragment
def _browse(collection: Collection, table: pd.DataFrame) -> None:
    find, order = st.columns([3, 2], vertical_alignment="bottom")
    text = find.text_input("Find a file", placeholder="Part of its name", key="many_find")
    by = order.selectbox("Order", ORDERS, key="many_order")
    picked = st.pills("Only those that sound", sorted(table["word"].unique()), selection_mode="multi", key="many_words")
    only_wrong = "wrong" in table and st.toggle("Only wrong ones", key="many_wrong")
    found = chosen_rows(table, text, picked, by, only_wrong=only_wrong)
    row = _chosen(found)
    rows, details = st.columns([7, 4], gap="medium") if row is not None else (st.container(), None)
    with rows:
        _choose(found)
        st.caption(f"{len(found)} of {len(table)} shown. Select a row to play it and see all scores.")
    if details and row is not None:
        entry, answer = collection.read()[row]
        with details, st.container(border=True):
            _one(entry.recorded, as_told(answer))


def _chosen(found: pd.DataFrame) -> int | None:
    """The number of the recording in the selected row; None where no row is selected."""
    rows = st.session_state.get("many_table", {}).get("selection", {}).get("rows", [])
    return int(found.iloc[rows[0]]["row"]) if rows and rows[0] < len(found) else None


def _choose(found: pd.DataFrame) -> None:
    """Draw the table, with rows to select."""
    st.dataframe(
        found.drop(columns=["row", "word", "wrong"], errors="ignore").assign(confidence=100 * found["confidence"]),
        hide_index=True,
        height=round(_ROW_PX * (min(len(found), _SHOWN_ROWS) + 1)) + 2,
        on_select="rerun",
        selection_mode="single-row",
        key="many_table",
        alt="Table of the answers: file, what emotion it conveys, how sure the model is, length.",
        column_config={
            "file": st.column_config.TextColumn("File", width="medium"),
            "sounds": st.column_config.TextColumn("Sounds", width=_SOUNDS_PX),
            "confidence": st.column_config.ProgressColumn(
                "How sure", width=_SURE_PX, format="%.0f %%", min_value=0, max_value=100
            ),
            "label": st.column_config.TextColumn("Label"),
            "duration_s": st.column_config.NumberColumn("Length", format="%.1f s", width="small"),
        },
    )


def _one(recorded: Recorded, answer: Recording) -> None:
    """Draw one recording: answer, player, all classes."""
    st.html(answer_html(answer))
    st.caption(plain(recorded.name))
    if recorded.media_type:
        st.audio(recorded.data, format=recorded.media_type, alt=f"The recording {recorded.name}")
    else:
        st.caption("Browsers cannot play this kind of file.")
    if scores := scores_html(answer):
        st.html(scores)


def _judge(collection: Collection, model: ModelInfo) -> None:
    st.header("How many are right?", anchor=False)
    pairs = [(label, answer.label) for entry, answer in collection.read() if (label := collection.label_of(entry))]
    if not pairs:
        st.info("No recording in the list has the name of a file in your CSV.")
        return
    unread = sum(collection.label_of(entry) is not None for entry, _ in collection.failed())
    st.caption(
        f"{len(pairs)} of {len(collection.entries)} recordings have a label"
        + (f"; {unread} more could not be used and are not counted." if unread else ".")
    )
    verdict.show(verdict.agreement([a for a, _ in pairs], [b for _, b in pairs], model.labels))
