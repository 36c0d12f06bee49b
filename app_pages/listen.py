"""The page Listen: one recording (spoken, dropped or an example), its answer, and the explanation of the answer.

Several files go to the page Many recordings. Live (``live``) replaces the page's content while it runs.

The recording is kept in the session, not in its widget, so that it survives a change of page and an outage of the
service. A new recording removes the answer for the previous one.
"""

from __future__ import annotations

import html
from typing import TYPE_CHECKING

import streamlit as st

from app_pages.recordings import Recorded, example, examples
from app_pages.words import NO_ANSWER, NOT_SURE_BELOW, clock, percent, spoken

if TYPE_CHECKING:
    from serve.schema import Recording

MICROPHONE_HZ = 48_000  # the widget's default of 16 kHz would leave the upper third of the picture empty
ABOUT = (
    "Record or drop speech: a model that learned from actors names the emotion that it conveys, says how sure it is, "
    "and shows the sound that it analysed."
)
_ANSWER_PX = 500  # height of the placeholder: that of an answer on a desktop, so that nothing moves


def page() -> None:
    """Draw the page."""
    st.title("What emotion does this voice convey?", anchor=False)
    if st.session_state.get("live"):
        from app_pages import live

        live.view()
        return
    recorded: Recorded | None = st.session_state.get("recorded")
    if recorded is None:
        st.markdown(ABOUT)
        _choose(large=True)
        return
    left, right = st.columns([5, 11], gap="large")
    with left, st.expander("Another recording", icon=":material/add:", key=f"another_{recorded.digest[:12]}"):
        _choose(large=False)
    player, answer = left.empty(), left.empty()
    pictures, below = right.empty(), st.empty()
    below.empty()
    pictures.skeleton(height=_ANSWER_PX)
    with player.container():
        _playback(recorded)
    with answer.container():
        result = _analysed(recorded)
    if result is None:
        player.empty()
        pictures.empty()
        return
    with answer.container():
        _show(recorded, result)
    with pictures.container():
        _pictures(result)
    with below.container():
        from app_pages import mattered

        mattered.section(recorded)


def _choose(*, large: bool) -> None:
    """Draw microphone, drop zone, live and examples: large and side by side, or small and one below the other."""
    speak, drop, now = st.columns(3, gap="small") if large else (st.container(), st.container(), st.container())
    with speak, st.container(border=large, height="stretch", key="ser-record"):
        if large:
            st.header("Record", anchor=False)
        st.audio_input(
            "Speak for a few seconds" if large else "Record",
            sample_rate=MICROPHONE_HZ,
            key="microphone",
            on_change=_take,
            args=("microphone",),
            help="Browsers give a page the microphone only on this computer (localhost) or over https.",
        )
        if large:
            st.caption("The microphone works on localhost and https addresses only.")
    with drop, st.container(border=large, height="stretch", key="ser-drop"):
        if large:
            st.header("Drop audio", anchor=False)
        key = f"upload_{st.session_state.setdefault('uploads', 0)}"  # a new key empties the widget
        st.file_uploader(
            "Drop one recording here, or several" if large else "Drop audio",
            accept_multiple_files=True,
            key=key,
            on_change=_take_files,
            args=(key,),
            help="WAV, FLAC, OGG, MP3 and more, up to 32 MB each; several become a table on the page Many recordings. "
            "They are sent to the service and not stored.",
        )
    with now, st.container(border=large, height="stretch", key="ser-live-choice"):
        if large:
            st.header("Live", anchor=False)
            st.markdown("Speak, and watch the answer change as you go.")
        st.button("Start live", key="start_live", on_click=_go_live, icon=":material/graphic_eq:", width="stretch")
    st.pills("Or try an example", list(examples()), key="example", on_change=_take, args=("example",))
    st.caption("Synthetic voices: nobody felt anything. The word is what the synthesiser was told to imitate.")


def _go_live() -> None:
    st.session_state["live"] = True


def _take_files(key: str) -> None:
    """Take the dropped files: one becomes the recording, several go to the page Many recordings."""
    files = [(file.name, file.getvalue()) for file in st.session_state[key]]
    if len(files) == 1:
        st.session_state["recorded"] = Recorded(*files[0])
    elif files:
        from app_pages import many

        many.add(files)
        st.session_state["go_to_many"] = True
    st.session_state["uploads"] += 1


def _take(origin: str) -> None:
    """Take the content of a widget as the recording; a deleted microphone recording leaves none."""
    given = st.session_state[origin]
    if origin == "example":
        if given:
            st.session_state["recorded"] = example(given)
        st.session_state["example"] = None  # so that it can be chosen again
    elif given is None:
        st.session_state["recorded"] = None
    else:
        st.session_state["recorded"] = Recorded("Your voice.wav", given.getvalue(), origin)


def _playback(recorded: Recorded) -> None:
    note = "An example, a synthetic voice: " if recorded.origin == "example" else ""
    st.html(f'<p class="ser-from">{note}<strong>{html.escape(recorded.name)}</strong></p>')
    if recorded.media_type is None:
        st.caption("Browsers cannot play this kind of file; the model can still analyse it.")
    elif recorded.data:
        st.audio(recorded.data, format=recorded.media_type, alt=f"The recording {recorded.name}")


def _analysed(recorded: Recorded) -> Recording | None:
    """The answer for the recording; the service is asked once."""
    from app_pages.service import asked

    known: tuple[str, Recording] | None = st.session_state.get("analysed")
    if known is None or known[0] != recorded.digest:
        with st.spinner("Listening …"):
            answer = asked(
                lambda client: client.predict(recorded.source, picture=True, min_confidence=NOT_SURE_BELOW),
                about=recorded.name,
            )
        if answer is None:
            return None
        known = (recorded.digest, answer)
        st.session_state["analysed"] = known
    return known[1]


def _show(recorded: Recorded, result: Recording) -> None:
    from app_pages import mattered
    from app_pages.bars import answer_html, scores_html

    st.html(answer_html(result))
    if scores := scores_html(result):
        st.html(scores)
    mattered.button(recorded, result)


def _pictures(result: Recording) -> None:
    """Draw waveform and spectrogram of the recording on one time axis, and the model's input."""
    from app_pages import over_time
    from app_pages.drawing import overview, spectrogram, waveform

    picture = result.picture
    assert picture is not None
    st.altair_chart(waveform(picture, whole=bool(result.segments)), alt=_waveform_alt(result))
    apart = picture.overview_db is not None and (result.segments or result.duration_s > picture.window_s)
    st.altair_chart(overview(picture) if apart else spectrogram(picture), alt=_picture_alt(result))
    over_time.section(result, _caption(result))
    if apart and not result.segments:
        st.altair_chart(spectrogram(picture, strip=True), alt=f"The analysed {picture.window_s:g} seconds, enlarged.")
        st.caption(f"Enlarged: the {picture.window_s:g} s that were analysed, as the model sees them.")


def _caption(result: Recording) -> str:
    assert result.picture is not None
    window = f"{result.picture.window_s:g} s"
    if result.segments:
        part = f"all {clock(result.duration_s)} were analysed, in parts of {window}"
    elif result.duration_s <= result.picture.window_s:
        part = "all of it was analysed"
    else:
        part = f"the shaded {window} were analysed"
    return f"Top: waveform, {part}. Bottom: spectrogram; high sounds are up, loud ones bright."


def _waveform_alt(result: Recording) -> str:
    assert result.picture is not None
    told = f"Loudness over time of a recording of {result.duration_s:.1f} seconds. "
    if result.segments:
        return told + "All of it was analysed."
    start_s = max(0.0, result.picture.window_start_s)
    end_s = min(result.duration_s, result.picture.window_start_s + result.picture.window_s)
    return told + f"The part from second {start_s:.1f} to second {end_s:.1f} was analysed."


def _picture_alt(result: Recording) -> str:
    if result.label in NO_ANSWER or not result.scores:
        return f"Spectrogram by time and pitch: {spoken(result.label)}."
    if result.segments:
        return "Spectrogram of all of the recording, by time and pitch."
    best = result.scores[0]
    return f"Spectrogram by time and pitch. The closest answer to it: {spoken(best.label)}, {percent(best.score)}."
