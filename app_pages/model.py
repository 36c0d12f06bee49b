"""The model: measured figures, confusion matrix, classes, data, limits, card; the service; what must not be done."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import pandas as pd
import streamlit as st

from app_pages import verdict
from app_pages.palette import colour
from app_pages.service import address, asked
from app_pages.words import spoken
from serve.schema import ModelInfo

NOTICE = """
**Learned from actors.** The model heard actors who spoke set sentences in set moods, in a studio. It knows how acting
sounds, not what anybody feels. Other languages, children, noise and telephone lines are strange to it.

**Forbidden at work and in education.** In the European Union, Article 5(1)(f) of the AI Act prohibits inferring the
emotions of people at the workplace and in schools and universities, except for medical or safety reasons.

**Tell people.** Whoever is listened to must know it beforehand. Do not judge, rank, hire, insure, police or diagnose
anybody by these answers.

**What happens to recordings.** This page holds them in memory while it is open, and sends them to the service below.
Neither stores them.
"""
_OPEN_SECTIONS = ("Data", "Limits")
_LIMITS = {
    "max_body_mib": ("Largest upload", 1, "{:g} MB"),
    "max_duration_s": ("Longest recording", 60, "{:g} minutes"),
    "max_windows": ("Most parts over time", 1, "{:g}"),
}  # what the service calls it -> what people call it, its unit, how it is written


def page() -> None:
    """The page."""
    st.title("The model", anchor=False)
    st.markdown("What it is, how well it does, and what it must not be used for.")
    left, right = st.columns([3, 2], gap="large")
    with left:
        model = asked(lambda client: client.model())
        if model is not None:
            _figures(model)
    with right:
        st.header("Please read", anchor=False)
        st.markdown(NOTICE)
        _service(model)
    if model is not None:
        _card(model.card)


def _figures(model: ModelInfo) -> None:
    st.header("How well it does", anchor=False)
    test = model.metrics.get("test")
    if not _measured(test):
        st.info("No recordings were kept out of its training to measure it on. The model card says what is known.")
    else:
        assert test is not None
        recall = {name: float(share) for name, share in test["class_recall"].items() if share is not None}
        weakest = min(recall, key=lambda name: recall[name])
        lowest = (recall[weakest], weakest)
        st.html(verdict.targets_html(float(test["accuracy"]), float(test["weighted_f1"]), lowest))
        n = f"{test['n']} recordings" if isinstance(test.get("n"), int) else "recordings"
        st.caption(f"Measured on {n} that were kept out of training. Voices it has never heard are harder for it.")
        st.markdown(f"**How many it recognises** of each of its {len(model.labels)} answers")
        st.html(_recall_html(model, recall))
        _confusion(model, test)
    st.header("What it hears", anchor=False)
    hears = model.features
    st.markdown(
        f"{model.crops * hears.get('window_s', 2):g} seconds from the middle of a recording, as a picture of "
        f"{hears.get('n_mels', '?')} pitch bands, at {hears.get('sample_rate_hz', 0) / 1000:g} kHz. Voice, not words."
    )


def _measured(test: Any) -> bool:
    return isinstance(test, Mapping) and bool(test.get("class_recall")) and {"accuracy", "weighted_f1"} <= test.keys()


def _recall_html(model: ModelInfo, recall: Mapping[str, float]) -> str:
    rows = "".join(
        f'<tr><th scope="row">{spoken(name)}</th><td><div class="track">'
        f'<div class="bar" style="width:{100 * recall.get(name, 0):.0f}%;background:{colour(name)}"></div></div></td>'
        f'<td class="share">{f"{100 * recall[name]:.0f} %" if name in recall else "none"}</td></tr>'
        for name in model.labels
    )
    return f'<table class="ser-bars"><tbody>{rows}</tbody></table>'


def _confusion(model: ModelInfo, test: Mapping[str, Any]) -> None:
    found = test.get("confusion")
    counts = found.get("counts") if isinstance(found, Mapping) else found
    if not counts or len(counts) != len(model.labels):
        return
    st.markdown("**What it takes for what**, in percent of each class")
    st.altair_chart(verdict.confusion(model.labels, counts), alt=verdict.confusion_alt(model.labels, counts))


def _service(model: ModelInfo | None) -> None:
    st.header("The service", anchor=False)
    rows = [("Address", address()), ("State", "answers" if model else "does not answer")]
    if model is not None:
        rows += [("Model", f"{model.name}, version {model.version}")]
        rows += [
            (name, shown.format(model.limits[key] / unit))
            for key, (name, unit, shown) in _LIMITS.items()
            if key in model.limits
        ]
    st.table(pd.DataFrame(rows, columns=["What", "Value"]), hide_index=True, hide_header=True, border="horizontal")


def _card(card: str) -> None:
    """The model card, a section each; those about data and limits are open."""
    st.header("Model card", anchor=False)
    opening, *sections = re.split(r"^## +", card, flags=re.MULTILINE)
    st.markdown(re.sub(r"^# .*\n", "", opening))
    for section in sections:
        title, _, body = section.partition("\n")
        with st.expander(title.strip(), expanded=title.strip() in _OPEN_SECTIONS):
            st.markdown(body)
