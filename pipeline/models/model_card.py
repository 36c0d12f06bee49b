"""Writes the model card of a bundle in Markdown: data and licence, figures, recipe, limits, forbidden uses.

The headings follow Mitchell et al. 2019, "Model Cards for Model Reporting", shortened. Every figure names the training
data; the card contains only what the run has recorded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from pipeline.data.corpora import Corpus, by_name
from pipeline.features.features import FeatureConfig

OUT_OF_FOLD = "out_of_fold"
PARTS = {
    "test": "held-out test part",
    "inner_val": "inner validation part, which was also used to choose the epoch",
    OUT_OF_FOLD: "user, each answered by a model that was adapted to the others (cross-validation)",
}
_OWN = "{} are the user's own; the bundle holds no audio. Their licence may bind these weights."
_ACTED_LIMIT = (
    "Acted emotion: {}. The training had no spontaneous speech, no other languages, no children, no real noise and no "
    "telephone lines."
)
_LIMITS = (
    "The model analyses sound, not words, and always answers with one of its classes; a confidence is no proof.",
    "Speakers of the training part are recognised better than other speakers: if the figures come from a random split, "
    "the same speakers are in the training and the test part.",
)
_FORBIDDEN = (
    "Do not use it to infer the emotions of people at work or in education: the EU AI Act, Art. 5(1)(f), prohibits it "
    "(medical and safety reasons apart).",
    "Do not use it to judge, rank, hire, insure, police or diagnose people, nor on anybody who does not know about it.",
)


def model_card(
    name: str,
    labels: Sequence[str],
    features: FeatureConfig,
    training: Mapping[str, Any],
    figures: Mapping[str, Mapping[str, Any]],
    recordings: pd.DataFrame,
) -> str:
    """The text of the model card.

    Args:
        training: the `training` block of metrics.json.
        figures: part -> its block of figures in metrics.json.
        recordings: manifest rows of all parts, for their number, speakers and corpora.
    """
    names = sorted(set(recordings["corpus"].fillna("").astype(str))) if "corpus" in recordings else [""]
    corpora = [corpus for name in names if (corpus := by_name(name)) and corpus.summary]
    acted = [_ACTED_LIMIT.format("; ".join(corpus.summary for corpus in corpora))] if len(corpora) == len(names) else []
    return "\n".join(
        [
            f"# {name}",
            "",
            f"Speech emotion classifier (`{training['model']}`), trained from scratch: no pretrained weights. "
            f"Classes in index order: {', '.join(labels)}. {_input(features)}",
            "",
            "## Data",
            "",
            f"{training['trained_on']}, of {_described(recordings)}. {_sources(corpora, len(corpora) == len(names))}",
            "",
            *_figures(figures),
            *_recipe(training),
            *_list("Limits", (*acted, *_LIMITS)),
            *_list("Must not be used", _FORBIDDEN),
        ]
    )


def _input(features: FeatureConfig) -> str:
    which = "by default the middle" if features.window == "middle" else "those with most speech"
    return (
        f"Its input is {features.window_s:g} s of a recording ({which}) at "
        f"{features.sample_rate_hz / 1000:g} kHz: `{features.kind}` of {features.n_mels} mel bands up to "
        f"{features.top_hz / 1000:g} kHz, {features.n_frames} frames."
    )


def _sources(corpora: Sequence[Corpus], whole: bool) -> str:
    """Sources and licences of the recordings; ``whole``: there are no others than these corpora."""
    sources = [f"{c.title} ({c.citation}, <{c.source}>), licence {c.licence}" for c in corpora]
    if not sources:
        return _OWN.format("The recordings")
    known = f"The recordings are {'; '.join(sources)}."
    return f"{known} The bundle holds no audio." if whole else f"{known} {_OWN.format('Others')}"


def _described(recordings: pd.DataFrame) -> str:
    speakers = recordings["speaker"].nunique() if "speaker" in recordings else 0
    return f"{len(recordings)} recordings" + (f" of {speakers} speakers" if speakers else "")


def _figures(figures: Mapping[str, Mapping[str, Any]]) -> list[str]:
    lines: list[str] = []
    for part, found in figures.items():
        intervals, confidence = found["intervals_95"], found["confidence"]
        at = "" if part == OUT_OF_FOLD else ", at temperature 1"
        rows = {"accuracy": (found["accuracy"], intervals["accuracy"])}
        rows["weighted F1"] = (found["weighted_f1"], intervals["weighted_f1"])
        if part == OUT_OF_FOLD:
            rows["UAR"] = (found["uar"], intervals["uar"])
        for label, recall in found["class_recall"].items():
            rows[f"recall of {label}"] = (recall, intervals["class_recall"][label])
        lines += [
            "## Figures",
            "",
            f"On the {found['n']} recordings of the {PARTS[part]}; trained on {found['trained_on']}. Intervals: 95%, "
            f"{intervals['method']}.",
            "",
            "| figure | value | interval |",
            "|---|---|---|",
            *(f"| {name} | {_percent(value)} | {_span(interval)} |" for name, (value, interval) in rows.items()),
            "",
            f"Confidences{at}: expected calibration error {_percent(confidence['ece'])}, Brier score "
            f"{confidence['brier']:.3f}, log-loss {confidence['log_loss']:.3f}.",
            "",
        ]
    return lines


def _span(interval: Sequence[float] | None) -> str:
    return "n/a" if interval is None else f"{interval[0]:.1%} to {interval[1]:.1%}"


def _percent(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.1%}"


def _recipe(training: Mapping[str, Any]) -> list[str]:
    if "joined" in training:
        return _joined(training["joined"])
    if "adapted" in training:
        return _adapted(training)
    settings = training["settings"]
    return [
        "## Recipe",
        "",
        f"Weights of epoch {training['best_epoch']} of {training['epochs']}; {training['seconds']:.0f} s with PyTorch "
        f"{training['torch']} on {training['machine']}; split seed {training['split_seed']}, seed {settings['seed']}.",
        "",
        "| setting | value |",
        "|---|---|",
        *(f"| {name} | {value} |" for name, value in settings.items() if value not in (None, {}, ())),
        "",
        *_start(training),
        *_teachers(training),
    ]


def _joined(members: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = [
        f"{len(members)} networks answer together, with their mean log-probability. The figures of a single network do "
        "not hold for this model.",
        "",
    ]
    return ["## Recipe", "", *lines, *map(_told, members), ""]


def _adapted(training: Mapping[str, Any]) -> list[str]:
    about = training["adapted"]
    lines = [
        f"`ser adapt`: {about['method']}, on {about['recordings']} recordings, starting from {about['parent']} "
        f"({about['parent_sha256'][:12]}). Chosen and measured by cross-validation by {about['folds_by']}.",
        "",
        f"Verdict: {about['verdict']['told']}.",
        "",
        "UAR with each input window: " + ", ".join(f"{name} {uar:.1%}" for name, uar in about["windows"].items()),
        "",
    ]
    curve = [f"- {row['share']:.0%}: {row['uar']:.1%} ({_span(row['interval_95'])})" for row in about["learning_curve"]]
    lines += ["UAR with a part of the recordings, and its interval:", "", *curve, ""] if curve else []
    return ["## Recipe", "", *lines, *_start(training)]


def _told(model: Mapping[str, Any]) -> str:
    """One line about a teacher, a joined model or the model that the training started from."""
    settings = model.get("settings") or {}
    more = "".join(f", {name} {settings[name]}" for name in ("epochs", "seed") if name in settings)
    return f"- weights {model['model_sha256'][:12]}, trained on {model['trained_on'] or 'unknown data'}{more}"


def _start(training: Mapping[str, Any]) -> list[str]:
    if "init" not in training:
        return []
    text = "It started from the weights of an earlier model of this project, which was itself trained from scratch:"
    return [text, "", _told(training["init"]), ""]


def _teachers(training: Mapping[str, Any]) -> list[str]:
    teachers = training.get("teachers", ())
    if not teachers:
        return []
    text = (
        f"It was also trained on the mean answers of {len(teachers)} trained models (knowledge distillation); these "
        f"made up {training['distill']:.0%} of the loss."
    )
    return [text, "", *map(_told, teachers), ""]


def _list(heading: str, items: Sequence[str]) -> list[str]:
    return [f"## {heading}", "", *(f"- {item}" for item in items), ""]
