"""The page Many recordings: a table of all answers to filter, sort, play and download; with labels, also the accuracy.

Answers stay in the session. After a change of page or an outage, the page asks only for the missing ones.
"""

from __future__ import annotations

import streamlit as st

from app_pages import many_results
from app_pages.collection import Collection
from app_pages.labels import LabelsError, read_labels
from app_pages.recordings import Recorded, examples
from app_pages.service import client, tell
from app_pages.words import plain
from serve.client import ClientError
from serve.schema import ModelInfo


def page() -> None:
    """Draw the page."""
    st.title("Many recordings", anchor=False)
    st.markdown("A table of all answers, to filter, sort, play and download.")
    collection = _collection()
    _choose(collection)
    for kind, sentence in st.session_state.pop("many_notes", []):
        st.error(sentence) if kind == "error" else st.info(sentence)
    if not collection.entries:
        return
    try:
        _answer(collection)
        _model()
    except ClientError as error:
        tell(error)
    model: ModelInfo | None = st.session_state.get("model")
    if model is not None and (collection.read() or collection.failed()):
        many_results.show(collection, model)


def add(files: list[tuple[str, bytes]]) -> None:
    """Add recordings and tables of labels, each ``(name, bytes)``, to the list."""
    _add(_collection(), files)


def _collection() -> Collection:
    found: Collection = st.session_state.setdefault("collection", Collection())
    return found


def _choose(collection: Collection) -> None:
    """Draw the drop zone, which is emptied once its files are in the list."""
    turn = st.session_state.setdefault("many_turn", 0)
    key = f"many_upload_{turn}"
    st.file_uploader(
        "Recordings, and a CSV with their labels if you have one",
        accept_multiple_files=True,
        key=key,
        on_change=_take,
        args=(collection, key),
        help="WAV, FLAC, OGG, MP3 and more. The CSV needs a column “file” and a column “label”; then the page also "
        "shows how many answers are right.",
    )
    if not collection.entries:
        st.caption("Nothing at hand? Try the synthetic examples.")
        st.button("Use the examples", on_click=_take_examples, args=(collection,), icon=":material/library_music:")


def _take(collection: Collection, key: str) -> None:
    files = [(file.name, file.getvalue()) for file in st.session_state[key]]
    st.session_state["many_turn"] += 1
    _add(collection, files)


def _take_examples(collection: Collection) -> None:
    _add(collection, [(path.name, path.read_bytes()) for path in examples().values()])


def _add(collection: Collection, files: list[tuple[str, bytes]]) -> None:
    notes = st.session_state.setdefault("many_notes", [])
    tables = [(name, data) for name, data in files if name.lower().endswith(".csv")]
    known = collection.add(Recorded(name, data) for name, data in files if not name.lower().endswith(".csv"))
    if known:
        notes.append(("info", f"{known} of these recordings {'was' if known == 1 else 'were'} in the list already."))
    for name, data in tables:
        try:
            collection.truth |= read_labels(data, name, _model().labels)
        except LabelsError as error:
            notes.append(("error", plain(str(error))))
        except ClientError:
            told = f"{plain(name)} was not read, because the service does not answer; add it again, please."
            notes.append(("error", told))


def _model() -> ModelInfo:
    """The description of the model, also kept in the session for outages of the service."""
    found = client().model()
    st.session_state["model"] = found
    return found


def _answer(collection: Collection) -> None:
    """Get the missing answers, with a progress bar; after a ClientError the answers received so far are kept."""
    waiting = collection.waiting()
    if not waiting:
        return
    counted = "1 recording" if len(waiting) == 1 else f"{len(waiting)} recordings"
    bar = st.progress(0.0, text=f"Listening to {counted} …")
    answers = client().predict_each(entry.recorded.source for entry in waiting)
    try:
        for number, (entry, answer) in enumerate(zip(waiting, answers, strict=True), start=1):
            entry.answer = answer
            bar.progress(number / len(waiting), text=f"{number} of {counted}")
    finally:
        bar.empty()
