"""What all pages share: navigation, style, the notice at the foot, and a last line of defence against tracebacks."""

from __future__ import annotations

import logging
from pathlib import Path

import streamlit as st

from app_pages import listen, many, model

_log = logging.getLogger(__name__)

STYLE = Path(__file__).with_name("style.css")
ICON = Path(__file__).with_name("icon.png")
FOOT = (
    '<footer class="ser-foot">For trying out and research. Learned from acted speech: it does not know what anybody '
    "feels. Do not use it to judge people, and tell people when it listens to them; at work and in schools the EU "
    "forbids it. More on the page The model.</footer>"
)


def run() -> None:
    """Draw the chosen page."""
    table = st.Page(many.page, title="Many recordings", icon=":material/queue_music:", url_path="many")
    pages = [
        st.Page(listen.page, title="Listen", icon=":material/hearing:", url_path="listen", default=True),
        table,
        st.Page(model.page, title="The model", icon=":material/info:", url_path="model"),
    ]
    chosen = st.navigation(pages, position="top")
    if st.session_state.pop("go_to_many", False):
        st.switch_page(table)
    st.html(STYLE)
    try:
        chosen.run()
    except Exception:  # people get a sentence, the terminal gets the details
        _log.exception("the page %s failed", chosen.title)
        st.error("Something went wrong on this page; reload it, please. What happened is in the page's terminal.")
    st.html(FOOT)
