"""Live: a moving band with the answers of the last 30 s. The browser connects to the service itself (``live.js``).

Sound does not pass through the page's process. For a service on this machine, the browser uses the host name of the
page, so that both are one site. The API key stays in the page's process; the browser gets a ticket for streams only,
which expires after one to two hours.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

import streamlit as st

from app_pages.palette import colour, ink
from app_pages.service import address, asked
from app_pages.words import NO_ANSWER, NOT_SURE_BELOW, SURE, UNCERTAIN, headline, spoken
from serve.schema import STREAM_PROTOCOL, checked_key, key_digest, stream_ticket

_SCRIPT = Path(__file__).with_name("live.js")
_TICKET_S = 3600.0
_HTML = """
<section class="ser-live" aria-label="Live">
  <div role="status"><h2 class="ser-answer"></h2></div>
  <p class="ser-sure"></p>
  <figure class="ser-time" aria-label="Answers of the last 30 seconds, the newest at the right">
    <div class="band"><div class="track"></div></div>
    <div class="axis" aria-hidden="true"><span>30 s ago</span><span>20</span><span>10</span><span>now</span></div>
    <ul class="legend"></ul>
  </figure>
  <div class="row">
    <button type="button" class="toggle">Start</button>
    <div class="level" aria-hidden="true"><i></i></div>
  </div>
  <p class="told" role="alert"></p>
</section>
"""


def view() -> None:
    """Draw the live view in place of a recording."""
    st.button("Back", key="end_live", on_click=_close, icon=":material/arrow_back:")
    model = asked(lambda client: client.model())
    if model is None:
        return
    labels = [*model.labels, UNCERTAIN, *NO_ANSWER]
    component = st.components.v2.component(
        "ser_live", html=_HTML, js=_SCRIPT.read_text(encoding="utf-8"), isolate_styles=False
    )
    data = {
        "service": address(),
        "protocols": _protocols(),
        "doubtBelow": NOT_SURE_BELOW,
        "labels": {label: _drawn(label) for label in labels},
        "sure": [list(step) for step in SURE],
    }
    component(key="live_band", data=data)
    st.caption(
        "The sound goes to the service, is analysed in parts of two seconds, and is not stored. "
        "Open at its end: may still change. Hatched: not sure. Empty: silent, or no speech."
    )


def _close() -> None:
    st.session_state["live"] = False


def _drawn(label: str) -> dict[str, str]:
    kind = "unsure" if label == UNCERTAIN else "empty" if label in NO_ANSWER else "emotion"
    told = "" if label == UNCERTAIN else headline(label, ())
    return {"word": spoken(label), "told": told, "kind": kind, "colour": colour(label), "ink": ink(colour(label))}


def _protocols() -> list[str]:
    """The WebSocket subprotocols for the browser: the protocol, and a ticket where the service has a key."""
    key = checked_key(os.environ.get("SER_API_KEY"))
    # constant for an hour, so that Streamlit does not restart a running band
    until_s = (time.time() // _TICKET_S + 2) * _TICKET_S
    tickets = [stream_ticket(key_digest(key), until_s)] if key else []
    return [STREAM_PROTOCOL, *tickets]
