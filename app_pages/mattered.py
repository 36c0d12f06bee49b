"""The section What mattered: on request, the cells of the spectrogram that support or oppose the answer."""

from __future__ import annotations

import numpy as np
import streamlit as st

from app_pages.drawing import mattered
from app_pages.recordings import Recorded
from app_pages.service import asked
from app_pages.words import NO_ANSWER, spoken
from serve.schema import Explanation, Recording

_LITTLE = 0.1  # fall of the log-odds: a probability of 50 % becomes 47.5 %


def button(recorded: Recorded, result: Recording) -> None:
    """Draw the button for the section, unless the answer is silence or no speech."""
    if result.label not in NO_ANSWER:
        where = " in one part" if result.segments else ""
        st.button(f"Show what mattered{where}", on_click=_want, args=(recorded.digest,), icon=":material/visibility:")


def _want(digest: str) -> None:
    st.session_state["explain"] = digest


def section(recorded: Recorded) -> None:
    """Draw the section, if it was asked for."""
    if st.session_state.get("explain") != recorded.digest:
        return
    st.header("What mattered", anchor=False)
    known = st.session_state.get("explained")
    if known is None or known[0] != recorded.digest:
        with st.spinner("Covering one patch after the other …"):
            answer = asked(lambda client: client.explain(recorded.source), about=recorded.name)
        if answer is None:
            return
        known = (recorded.digest, answer)
        st.session_state["explained"] = known
    _show(known[1])


def _show(explanation: Explanation) -> None:
    values = np.asarray(explanation.importance, dtype=float)
    answer = spoken(explanation.label)
    words, map_ = st.columns([5, 11], gap="large")
    if values.max() < _LITTLE:
        words.markdown(f"No single patch decided: covering any one of them hardly changes “{answer}”.")
    else:
        words.markdown(
            f"Each patch was covered in turn. Where it is **amber**, “{answer}” became less likely without it: the "
            "answer leans on it. Where it is **blue**, the answer became more likely: it speaks against it."
        )
    map_.altair_chart(mattered(explanation), alt=_alt(explanation, values, answer))


def _alt(explanation: Explanation, values: np.ndarray, answer: str) -> str:
    row, column = np.unravel_index(values.argmax(), values.shape)
    low_hz, high_hz = explanation.frequency_hz[row], explanation.frequency_hz[row + 1]
    start_s, end_s = explanation.time_s[column], explanation.time_s[column + 1]
    return (
        f"The sound picture with the patches that mattered for {answer}. The most important one lies between second "
        f"{start_s:.2f} and {end_s:.2f}, from {low_hz:,.0f} to {high_hz:,.0f} hertz."
    )
