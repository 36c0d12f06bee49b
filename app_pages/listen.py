"""Listen: one recording, uploaded, spoken or an example; what the model hears in it, and why. Several go to Many.

The recording is kept in the session, not in the widget it came from: it survives a look at another page, and a service
that is away for a while.
"""

from __future__ import annotations

import html

import streamlit as st

from app_pages import many, mattered, over_time
from app_pages.bars import answer_html, bars_html
from app_pages.drawing import spectrogram, waveform
from app_pages.recordings import Recorded, example, examples
from app_pages.service import asked
from app_pages.words import NOT_SURE_BELOW, SILENCE, clock, percent, spoken
from serve.schema import Recording

MICROPHONE_HZ = 48_000  # the widget's default of 16 kHz would leave the upper third of the picture empty
FIRST_EXAMPLE = "Anna, happy"
_ANSWER_PX = 500  # the height of an answer on a desktop: its placeholder is as high, so that nothing jumps


def page() -> None:
    """The page."""
    st.title("How does this voice sound?", anchor=False)
    left, right = st.columns([5, 11], gap="large")
    with left:
        _choose()
    recorded: Recorded | None = st.session_state.get("recorded")
    if recorded is None:
        with right:
            st.info("Upload a recording, speak, or choose an example.", icon=":material/arrow_back:")
        return
    player = left.empty()
    with player.container():
        _playback(recorded)
    with right:
        heard = _heard(recorded)
    if heard is None:
        player.empty()
        return
    mattered.section(recorded)
    over_time.section(recorded, heard)


def _choose() -> None:
    names = list(examples())
    if "recorded" not in st.session_state and FIRST_EXAMPLE in names:
        st.session_state["recorded"] = example(FIRST_EXAMPLE)
    upload, speak, try_one = st.tabs(["Upload", "Speak", "Examples"])
    with upload:
        key = f"upload_{st.session_state.setdefault('uploads', 0)}"  # another key: empty again
        st.file_uploader(
            "One recording, or several",
            accept_multiple_files=True,
            key=key,
            on_change=_take_files,
            args=(key,),
            help="WAV, FLAC, OGG, MP3 and more, up to 32 MB each; several become a table on the page Many recordings. "
            "They are sent to the service and not stored.",
        )
    with speak:
        st.audio_input(
            "Speak for a few seconds",
            sample_rate=MICROPHONE_HZ,
            key="microphone",
            on_change=_take,
            args=("microphone",),
            help="Browsers give a page the microphone only on this computer (localhost) or over https.",
        )
        st.caption("The microphone works on localhost and https addresses only.")
    with try_one:
        st.pills("Example", names, key="example", on_change=_take, args=("example",), label_visibility="collapsed")
        st.caption("Synthetic voices: nobody felt anything. The word is what the synthesiser was told to imitate.")


def _take_files(key: str) -> None:
    """Files were given: one is the recording now, several go to the page for many."""
    files = [(file.name, file.getvalue()) for file in st.session_state[key]]
    if len(files) == 1:
        st.session_state["recorded"] = Recorded(*files[0])
    elif files:
        many.add(files)
        st.session_state["go_to_many"] = True
    st.session_state["uploads"] += 1


def _take(origin: str) -> None:
    """A widget has changed: what it holds is the recording now. A voice taken back leaves none."""
    given = st.session_state[origin]
    if origin == "example":
        if given:
            st.session_state["recorded"] = example(given)
    elif given is None:
        st.session_state["recorded"] = None
    else:
        st.session_state["recorded"] = Recorded("Your voice.wav", given.getvalue(), origin)


def _playback(recorded: Recorded) -> None:
    note = "An example, a synthetic voice: " if recorded.origin == "example" else ""
    st.html(f'<p class="ser-from">{note}<strong>{html.escape(recorded.name)}</strong></p>')
    if recorded.media_type is None:
        st.caption("Browsers cannot play this kind of file; the model can hear it all the same.")
    elif recorded.data:
        st.audio(recorded.data, format=recorded.media_type, alt=f"The recording {recorded.name}")


def _heard(recorded: Recorded) -> Recording | None:
    """The answer, drawn; asked for once a recording."""
    place = st.empty()
    known = st.session_state.get("heard")
    if known is None or known[0] != recorded.digest:
        place.skeleton(height=_ANSWER_PX)
        with place.container():
            answer = asked(lambda client: client.predict(recorded.source, picture=True, min_confidence=NOT_SURE_BELOW))
        if answer is None:
            return None
        known = (recorded.digest, answer)
        st.session_state["heard"] = known
    with place.container():
        _show(recorded, known[1])
    return known[1]


def _show(recorded: Recorded, heard: Recording) -> None:
    assert heard.picture is not None
    st.html(answer_html(heard))
    bars, pictures = st.columns([4, 7], gap="medium")
    with bars:
        if heard.scores:
            st.html(bars_html(heard.scores))
        mattered.button(recorded, heard)
    with pictures:
        st.altair_chart(waveform(heard.picture), alt=_waveform_alt(heard))
        st.altair_chart(spectrogram(heard.picture), alt=_picture_alt(heard))
        st.caption(_caption(heard))


def _caption(heard: Recording) -> str:
    assert heard.picture is not None
    if heard.duration_s <= heard.picture.window_s:
        part = "all of which the model hears"
    else:
        part = f"and the marked {heard.picture.window_s:g} seconds of {clock(heard.duration_s)} that the model hears"
    return f"Above: the sound, {part}. Below: what it sees; high sounds are up, loud ones bright."


def _waveform_alt(heard: Recording) -> str:
    assert heard.picture is not None
    start_s = max(0.0, heard.picture.window_start_s)
    end_s = min(heard.duration_s, heard.picture.window_start_s + heard.picture.window_s)
    return (
        f"Loudness over time of a recording of {heard.duration_s:.1f} seconds. "
        f"The model hears the part from second {start_s:.1f} to second {end_s:.1f}."
    )


def _picture_alt(heard: Recording) -> str:
    if heard.label == SILENCE:
        return "Picture of the sound by time and pitch: silence."
    best = heard.scores[0]
    return (
        "Picture of the sound that the model sees, by time and pitch. "
        f"Its best guess from it: {spoken(best.label)}, {percent(best.score)}."
    )
