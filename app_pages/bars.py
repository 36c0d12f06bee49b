"""The answer in words and the bars of all classes, as plain HTML: read by screen readers as a table, drawn at once."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from app_pages.palette import colour
from app_pages.words import explained, headline, percent, sentence, spoken
from serve.schema import Recording, Score


def answer_html(recording: Recording) -> str:
    """Headline and how sure the model is; announced when it changes.

    Of recordings of which the model hears less than half, it says that the answer is about their middle.
    """
    whole = recording.duration_s <= 2 * recording.scored_s
    dot = f'<span class="dot" aria-hidden="true" style="background:{colour(recording.label)}"></span>'
    return (
        '<div role="status">'
        f'<h2 class="ser-answer">{dot}{escape(headline(recording.label, whole=whole))}</h2>'
        f'<p class="ser-sure">{escape(explained(recording.label, recording.confidence, recording.scores))}</p>'
        f"{_notice(recording)}</div>"
    )


def _notice(recording: Recording) -> str:
    return f'<p class="ser-sure">{escape(sentence(recording.notice))}</p>' if recording.notice else ""


def bars_html(scores: Sequence[Score], caption: str = "What it could be") -> str:
    """A table with a bar for each class, most probable first."""
    rows = "".join(_row(score, best=i == 0) for i, score in enumerate(scores))
    return f'<table class="ser-bars"><caption>{escape(caption)}</caption><tbody>{rows}</tbody></table>'


def _row(score: Score, *, best: bool) -> str:
    width = f"width:{100 * score.score:.1f}%;background:{colour(score.label)}"
    return (
        f'<tr{" class=best" if best else ""}><th scope="row">{escape(spoken(score.label))}</th>'
        f'<td><div class="track"><div class="bar" style="{width}"></div></div></td>'
        f'<td class="share">{escape(percent(score.score))}</td></tr>'
    )
