"""The page The model: measured figures, confusion matrix, model card, the service and its limits, prohibited uses."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import pandas as pd
import streamlit as st

from app_pages import verdict
from app_pages.palette import colour
from app_pages.service import address, asked
from app_pages.words import percent, spoken
from serve.schema import ModelInfo

NOTICE = """
**Trained on actors.** The model was trained on actors who spoke given sentences in given emotions, in a studio. It
knows how acting sounds, not what anybody feels. It does not know other languages, children, noise or telephone lines.

**Forbidden at work and in education.** In the European Union, Article 5(1)(f) of the AI Act prohibits inferring the
emotions of people at the workplace and in schools and universities, except for medical or safety reasons.

**Tell people.** Whoever is listened to must know it beforehand. Do not judge, rank, hire, insure, police or diagnose
anybody by these answers.

**What happens to recordings.** This page holds them in memory while it is open, and sends them to the service below.
Neither stores them.
"""
SIBLING = "known_speakers"  # figures of a model of the same recipe that was trained without the test part
OWN = "out_of_fold"  # figures of an adapted model, on the recordings that it was adapted to
_OPEN_SECTIONS = ("Data", "Limits")
# name of a limit -> name on the page, divisor, format
_LIMITS = {
    "max_body_mib": ("Largest upload", 1, "{:g} MB"),
    "max_duration_s": ("Longest recording", 60, "{:g} minutes"),
    "max_windows": ("Most parts over time", 1, "{:g}"),
}


def page() -> None:
    """Draw the page."""
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
    st.html(two_figures_html(model.metrics))
    test = next((model.metrics[name] for name in ("test", SIBLING, OWN) if name in model.metrics), None)
    if test is not None and _measured(test):
        if test is model.metrics.get(SIBLING):
            st.caption(
                "Measured with a model of the same recipe that was trained without these recordings. "
                "The model in use was trained on all of them."
            )
        st.html(verdict.targets_html(_targets(test, model.labels)))
        st.markdown("**Recall by emotion**, with 95 % intervals")
        st.html(_recall_html(model, test))
        _confusion(model, test)
    _elsewhere(model.metrics)
    st.header("What it analyses", anchor=False)
    window = model.features
    speech = model.crops == 1 and window.get("window") == "speech"
    where = "of a recording, where most speech is" if speech else "from the middle of a recording"
    st.markdown(
        f"{model.crops * window.get('window_s', 2):g} seconds {where}, and all of one that is longer than 6 seconds in "
        f"parts: a spectrogram of {window.get('n_mels', '?')} frequency bands, from sound at "
        f"{window.get('sample_rate_hz', 0) / 1000:g} kHz. Voice, not words."
    )


def two_figures_html(metrics: Mapping[str, Any]) -> str:
    """Accuracy for known and for new speakers, equally large; "not measured" where the bundle has no figure."""
    own = _own(metrics)
    known = metrics.get("test", metrics.get(SIBLING, own.get("recording")))
    new = metrics.get("unseen_speakers", own.get("speaker"))
    told = _figure("Voices it knows", known, "other recordings of speakers it learned from")
    told += _figure("New voices", new, "speakers that were not in its training")
    return f'<div class="ser-figures">{told}</div>'


def _own(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Out-of-fold metrics of an adapted model, as ``{group: metrics}``; empty for any other model.

    The group is what its cross-validation kept together in one fold: ``speaker`` or ``recording``.
    """
    training, block = metrics.get("training"), metrics.get(OWN)
    about = training.get("adapted") if isinstance(training, Mapping) else None
    if not isinstance(about, Mapping) or not isinstance(block, Mapping):
        return {}
    return {str(about.get("folds_by")): {**block, "protocol": OWN}}


def _figure(title: str, block: Any, what: str) -> str:
    share = block.get("accuracy") if isinstance(block, Mapping) else None
    if not isinstance(share, int | float):
        return f'<section><h3>{title}</h3><p class="figure">not measured</p><p>right answers for {what}</p></section>'
    n = block.get("n")
    interval = _interval(block, "accuracy") or (verdict.wilson(float(share), n) if isinstance(n, int) else None)
    count = f" ({n:,} recordings)" if isinstance(n, int) else ""
    count += ", measured with models that were trained without them" if "protocol" in block else ""
    return (
        f'<section><h3>{title}</h3><p class="figure">{percent(float(share))}</p>'
        f"<p>95 % interval: {verdict.interval_words(interval)}</p><p>right answers for {what}{count}</p></section>"
    )


def _interval(block: Mapping[str, Any], name: str) -> tuple[float, float] | None:
    """The 95 % interval stored with a figure; None where there is none."""
    given = block.get("intervals_95", {}).get(name)
    return (float(given[0]), float(given[1])) if given else None


def _measured(test: Any) -> bool:
    return isinstance(test, Mapping) and bool(test.get("class_recall")) and {"accuracy", "weighted_f1"} <= test.keys()


def _recalls(test: Mapping[str, Any]) -> dict[str, float]:
    return {name: float(share) for name, share in test["class_recall"].items() if share is not None}


def _counts(test: Mapping[str, Any]) -> Any:
    return test.get("confusion", {}).get("counts")


def _of_class(test: Mapping[str, Any], labels: Sequence[str]) -> dict[str, tuple[float, float]]:
    """95 % intervals of the recall of each class with a known number of recordings."""
    counts, recall = _counts(test), _recalls(test)
    if not counts or len(counts) != len(labels):
        return {}
    sums = {name: sum(row) for name, row in zip(labels, counts, strict=True)}
    return {name: verdict.wilson(share, sums[name]) for name, share in recall.items() if sums.get(name)}


def _targets(test: Mapping[str, Any], labels: Sequence[str]) -> list[verdict.Figure]:
    recall = _recalls(test)
    weakest = min(recall, key=lambda name: recall[name])
    of_class = _of_class(test, labels)
    accuracy, f1 = float(test["accuracy"]), float(test["weighted_f1"])
    return [
        verdict.Figure("Right answers (accuracy)", accuracy, verdict.ACCURACY, _interval(test, "accuracy")),
        verdict.Figure("Balanced (weighted F1)", f1, verdict.WEIGHTED_F1, _interval(test, "weighted_f1")),
        verdict.Figure(
            f"Weakest class: {spoken(weakest)} (recall)", recall[weakest], verdict.CLASS_RECALL, of_class.get(weakest)
        ),
    ]


def _recall_html(model: ModelInfo, test: Mapping[str, Any]) -> str:
    recall, intervals = _recalls(test), _of_class(test, model.labels)
    rows = "".join(
        f'<tr><th scope="row">{escape(spoken(name))}</th><td><div class="track">'
        f'<div class="bar" style="width:{100 * recall.get(name, 0):.0f}%;background:{colour(name)}"></div></div></td>'
        f'<td class="share">{f"{100 * recall[name]:.0f} %" if name in recall else "none"}</td>'
        f'<td class="interval">{verdict.interval_words(intervals[name]) if name in intervals else ""}</td></tr>'
        for name in model.labels
    )
    return f'<table class="ser-bars"><tbody>{rows}</tbody></table>'


def _confusion(model: ModelInfo, test: Mapping[str, Any]) -> None:
    counts = _counts(test)
    if not counts or len(counts) != len(model.labels):
        return
    st.markdown("**What it confuses**, in percent of each class")
    st.altair_chart(verdict.confusion(model.labels, counts), alt=verdict.confusion_alt(model.labels, counts))


def _elsewhere(metrics: Mapping[str, Any]) -> None:
    """Draw the figures on corpora that the model was not trained on."""
    told = [
        f"- {name}: {percent(block['accuracy'])} right (95 % interval "
        f"{verdict.interval_words(verdict.wilson(block['accuracy'], block['n']))}) of {block['n']:,} recordings"
        for name, block in metrics.items()
        if name not in ("test", SIBLING, "unseen_speakers", OWN) and isinstance(block, Mapping)
        if isinstance(block.get("accuracy"), float) and isinstance(block.get("n"), int)
    ]
    if told:
        st.markdown("**Measured elsewhere**\n\n" + "\n".join(told))


def _service(model: ModelInfo | None) -> None:
    st.header("The service", anchor=False)
    rows = [("Address", address()), ("Status", "running" if model else "not answering")]
    if model is not None:
        rows += [("Model", f"{model.name}, version {model.version}")]
        limits = {key: told for key, told in _LIMITS.items() if key in model.limits}
        rows += [(name, shown.format(model.limits[key] / unit)) for key, (name, unit, shown) in limits.items()]
    st.table(pd.DataFrame(rows, columns=["What", "Value"]), hide_index=True, hide_header=True, border="horizontal")


def _card(card: str) -> None:
    """Draw the model card, one expander per section; Data and Limits are open."""
    st.header("Model card", anchor=False)
    opening, *sections = re.split(r"^## +", card, flags=re.MULTILINE)
    st.markdown(re.sub(r"^# .*\n", "", opening))
    for section in sections:
        title, _, body = section.partition("\n")
        with st.expander(title.strip(), expanded=title.strip() in _OPEN_SECTIONS):
            st.markdown(body)
