"""The page's access to the service: its address, requests, and waiting while it does not answer.

``SER_API_URL`` and ``SER_API_KEY`` set address and key; without an address, the page starts its own service
(``own_service``). While the service is away, the page shows one sentence and tries again every second or two. The
user's input is kept.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import TypeVar

import streamlit as st

from app_pages.own_service import configured, own, starting_for_s
from app_pages.words import plain, trouble
from serve.client import BadRecording, Busy, Client, ClientError, Unreachable, WrongKey

Answer = TypeVar("Answer")
_LOOK_AGAIN_S = 2.0
_PATIENCE_S = 15.0  # a user is waiting: after this the page says that the service is busy, and tries again


def address() -> str:
    """The address of the service."""
    return configured() or own().url


def client() -> Client:
    """The client; all sessions of the page share it."""
    return _client(address(), os.environ.get("SER_API_KEY") or None)


@st.cache_resource(show_spinner=False)
def _client(url: str, key: str | None) -> Client:
    return Client(url, key, patience_s=_PATIENCE_S)


def asked(question: Callable[[Client], Answer], about: str | None = None) -> Answer | None:
    """The answer to a call of the client; None where it failed, after the page has shown the error and the remedy.

    ``about`` is the file name of the recording in question.
    """
    try:
        return question(client())
    except ClientError as error:
        tell(error, about)
        return None


def tell(error: ClientError, about: str | None = None) -> None:
    """Show an error in one sentence, with the file name ``about``; where waiting helps, try again by itself."""
    named = f"{plain(about)}: " if about else ""
    if isinstance(error, Unreachable):
        _unreachable()
    elif isinstance(error, Busy):
        _wait("The service is busy at the moment; this page asks again by itself.")
    elif isinstance(error, WrongKey) and error.code != "key_required":  # key_required: the service has no key
        st.error("The service needs its API key: start this page with SER_API_KEY set to it.", icon=":material/key:")
    else:
        st.error(named + plain(trouble(error)), icon=":material/error:")
        if not isinstance(error, BadRecording):
            st.button("Try again", key="try_again", icon=":material/refresh:")


def _unreachable() -> None:
    if configured() is None and own().ended:
        st.error("The model could not be started; the page's terminal shows the reason.", icon=":material/error:")
        st.button("Start it again", key="start_again", on_click=own().start, icon=":material/refresh:")
    elif starting_for_s() is not None:
        _starting()
    else:
        _wait(f"The service does not answer at {address()}; this page goes on by itself as soon as it does.")


def _wait(sentence: str) -> None:
    st.warning(sentence, icon=":material/hourglass_top:")
    st.session_state["waiting_since_s"] = time.monotonic()
    _look_again()


@st.fragment(run_every=1.0)
def _starting() -> None:
    """Show how long the model has been starting; draw the page again once it is ready or has ended."""
    passed_s = starting_for_s()
    if passed_s is None or (configured() is None and own().ended) or client().ready():
        st.rerun(scope="app")
    st.info(f"The model is starting … {passed_s:.0f} s", icon=":material/hourglass_top:")


@st.fragment(run_every=_LOOK_AGAIN_S)
def _look_again() -> None:
    """Draw the page again once the service is ready."""
    if time.monotonic() - st.session_state["waiting_since_s"] > _LOOK_AGAIN_S / 2 and client().ready():
        st.rerun(scope="app")
