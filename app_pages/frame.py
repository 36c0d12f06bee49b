"""Parts shared by all pages: navigation, style, the footer, and a handler for unexpected errors.

A page is imported when it is drawn, so that the first one appears quickly. The libraries for tables and charts are
imported in the background.
"""

from __future__ import annotations

import logging
import threading
from importlib import import_module
from pathlib import Path

import streamlit as st

_log = logging.getLogger(__name__)

STYLE = Path(__file__).with_name("style.css")
PLAYHEAD = Path(__file__).with_name("playhead.js")
ICON = Path(__file__).with_name("icon.png")
FOOT = (
    '<footer class="ser-foot">For trying out and research. Learned from acted speech: it does not know what anybody '
    "feels. Do not use it to judge people, and tell people when it listens to them; at work and in schools the EU "
    "forbids it. More on the page The model.</footer>"
)
_LATER = ("serve.client", "pandas", "altair", "app_pages.drawing", "app_pages.many")


def run() -> None:
    """Draw the chosen page."""
    many = _page("many", "Many recordings", "queue_music")
    pages = [_page("listen", "Listen", "hearing", default=True), many, _page("model", "The model", "info")]
    chosen = st.navigation(pages, position="hidden")  # its own menu hides on a phone
    if st.session_state.pop("go_to_many", False):
        st.switch_page(many)
    st.html(STYLE)
    with st.container(horizontal=True, key="ser-navigation"):
        for page in pages:
            st.page_link(page)
    try:
        chosen.run()
    except Exception:  # the user sees one sentence, the terminal the details
        _log.exception("the page %s failed", chosen.title)
        st.error("Something went wrong on this page; please reload it. The page's terminal shows the error.")
    st.html(FOOT)
    st.html(f"<script>{PLAYHEAD.read_text(encoding='utf-8')}</script>", unsafe_allow_javascript=True)
    _prepare()


def _page(module: str, title: str, icon: str, *, default: bool = False) -> st.Page:
    def draw() -> None:
        import_module(f"app_pages.{module}").page()

    return st.Page(draw, title=title, icon=f":material/{icon}:", url_path=module, default=default)


@st.cache_resource(show_spinner=False)
def _prepare() -> None:
    """Once a process, in the background: start the page's own service if none is configured; import what pages need."""

    def prepare() -> None:
        from app_pages import own_service

        if own_service.configured() is None:
            own_service.own()
        for name in _LATER:
            import_module(name)

    threading.Thread(target=prepare, daemon=True).start()
