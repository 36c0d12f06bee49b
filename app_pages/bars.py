"""The answer in words and a bar for each class, as plain HTML: quick to draw, and a table for screen readers."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from app_pages.palette import colour
from app_pages.words import UNCERTAIN, explained, headline, over_time, percent, sentence, spoken
from serve.schema import Recording, Score

FOLDED_BELOW = 0.05
"""Classes with a smaller share are folded."""


def answer_html(recording: Recording) -> str:
    """Headline and confidence; screen readers announce a change.

    For a recording that was analysed in windows, the headline gives the share of the time of each emotion.
    """
    if recording.segments:
        found = _shares(recording)
        told, below = over_time(found)
        label = next((label for label in found if label != UNCERTAIN), UNCERTAIN)  # the first in the headline
    else:
        label = recording.label
        told, below = headline(label, recording.scores), explained(label, recording.confidence)
    dot = f'<span class="dot" aria-hidden="true" style="background:{colour(label)}"></span>'
    return (
        '<div role="status">'
        f'<h2 class="ser-answer">{dot}{escape(told)}</h2>'
        f'<p class="ser-sure">{escape(below)}</p>{_notice(recording)}</div>'
    )


def _notice(recording: Recording) -> str:
    return f'<p class="ser-sure">{escape(sentence(recording.notice))}</p>' if recording.notice else ""


def scores_html(recording: Recording) -> str:
    """A bar for each class; for a recording that was analysed in windows, its share of the time."""
    if not recording.segments:
        return bars_html(recording.scores) if recording.scores else ""
    found = [Score(label=label, score=min(share, 1.0)) for label, share in _shares(recording).items()]
    return bars_html(found, "Share of the time")


def _shares(recording: Recording) -> dict[str, float]:
    from app_pages.timeline import shares

    return shares(recording.segments or [])


def bars_html(scores: Sequence[Score], caption: str = "All scores") -> str:
    """A table with a bar for each class, most probable first; those below ``FOLDED_BELOW`` folded."""
    shown = [score for i, score in enumerate(scores) if i == 0 or score.score >= FOLDED_BELOW]
    folded = scores[len(shown) :]
    table = f'<table class="ser-bars"><caption>{escape(caption)}</caption><tbody>{_rows(shown)}</tbody></table>'
    if not folded:
        return table
    words = f"{len(folded)} more, each under {percent(FOLDED_BELOW)}"
    more = f'<table class="ser-bars"><tbody>{_rows(folded, first=False)}</tbody></table>'
    return f'{table}<details class="ser-folded"><summary>{escape(words)}</summary>{more}</details>'


def _rows(scores: Sequence[Score], *, first: bool = True) -> str:
    return "".join(
        f'<tr{" class=best" if first and i == 0 else ""}><th scope="row">{escape(spoken(score.label))}</th>'
        f'<td><div class="track"><div class="bar" style="width:{100 * score.score:.1f}%;'
        f'background:{colour(score.label)}"></div></div></td><td class="share">{escape(percent(score.score))}</td></tr>'
        for i, score in enumerate(scores)
    )
