"""Plain words for answers, confidences, and the reasons why a recording cannot be used."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from serve.client import ClientError
    from serve.schema import Problem, Score

NOT_SURE_BELOW = 0.5
"""An answer with a lower confidence is shown as "not sure"."""
UNCERTAIN, SILENCE = "uncertain", "silence"
NO_ANSWER = {SILENCE: "silent", "not_speech": "no speech", "too_short": "too short"}
"""Labels of recordings without usable speech, in words."""

_ADJECTIVES = {"disgust": "disgusted", "fear": "fearful", "anger": "angry", "happiness": "happy", "sadness": "sad"}
SURE = ((0.9, "Almost certain"), (0.7, "Fairly sure"), (0.0, "Weak guess"))
"""Lowest confidence -> how sure the model is, in words."""
_REASONS = {
    "not_audio": "This is not an audio file, or it is damaged beyond reading.",
    "empty_file": "This file is empty.",
    "no_samples": "This file contains no sound.",
    "unsupported_format": "This kind of audio cannot be read here; WAV, FLAC, OGG, MP3 and m4a can.",
    "extra_needed": "This kind of audio cannot be read here; WAV, FLAC, OGG, MP3 and m4a can.",
    "corrupt": "This file is damaged.",
    "truncated": "This file ends too early; it may not have been copied in full.",
    "too_short": "This recording is too short; it needs at least a quarter of a second.",
    "not_finite": "This file contains values that are not sound.",
    "out_of_range": "This file contains values that are not sound.",
    "too_long": "This recording is too long; cut it into parts.",
    "too_large": "This recording is too large; cut it into parts.",
    "body_too_large": "This file is too large; save it as FLAC or MP3, or cut it into parts.",
    "too_many_windows": "This recording is too long to be analysed over time; cut it into parts.",
    "bad_sample_rate": "This file has a sample rate that cannot be used.",
    "bad_channels": "This file has too many channels.",
    "decoder_crashed": "This file is damaged: its decoder crashed.",
    "decode_timeout": "This file could not be read in time; it may be damaged.",
    "not_explainable": "This model's answers cannot be explained as a picture.",
}


def spoken(label: str) -> str:
    """A label in the form that completes the sentence "this voice sounds ...".

    >>> spoken("disgust"), spoken("very_loud")
    ('disgusted', 'very loud')
    """
    return {UNCERTAIN: "not sure", **NO_ANSWER}.get(label, _ADJECTIVES.get(label, label.replace("_", " ")))


def unsure(best: str) -> str:
    """The entry of a table where the model is not sure: its best guess as a question.

    >>> unsure("disgust")
    'not sure (disgusted?)'
    """
    return f"{spoken(UNCERTAIN)} ({spoken(best)}?)"


def how_sure(confidence: float) -> str:
    """How sure the model is, in words.

    >>> how_sure(0.95), how_sure(0.51)
    ('Almost certain', 'Weak guess')
    """
    return next(words for least, words in SURE if confidence >= least)


def percent(share: float) -> str:
    """A share in whole percent, without line breaks; 0 % and 100 % only where exact.

    >>> [percent(share).split() for share in (0.4567, 0.9999, 0.001, 1.0)]
    [['46', '%'], ['>', '99', '%'], ['<', '1', '%'], ['100', '%']]
    """
    number = f"{100 * share:.0f}"
    if 0 < share < 0.005:
        number = "<\u00a01"
    elif 0.995 <= share < 1:
        number = ">\u00a099"
    return f"{number}\u00a0%"


def headline(label: str, scores: Sequence[Score]) -> str:
    """The answer in a sentence."""
    if label == SILENCE:
        return "There is nothing to hear"
    if label in NO_ANSWER:
        return "This is no speech" if label == "not_speech" else "There is too little to hear"
    if label == UNCERTAIN:
        closest = ", ".join(f"{spoken(score.label)} ({percent(score.score)})" for score in scores[:2])
        return f"No clear answer. Closest: {closest}"
    return f"This voice sounds {spoken(label)}"


def explained(label: str, confidence: float | None) -> str:
    """The sentence below the headline."""
    if label == SILENCE:
        return "It is so quiet that any answer would be a guess."
    if confidence is None or label in NO_ANSWER:
        return "No emotion is named without a voice."
    if label == UNCERTAIN:
        return "No answer is more likely right than wrong."
    return f"{how_sure(confidence)}: {percent(confidence)}"


def over_time(shares: Mapping[str, float]) -> tuple[str, str]:
    """Headline and sentence for a long recording, from ``shares``: label -> share of the time, largest first."""
    named = [(spoken(label), share) for label, share in shares.items() if label not in (UNCERTAIN, *NO_ANSWER)]
    if not named:
        if UNCERTAIN in shares:
            return "No clear answer in any part", "No answer is more likely right than wrong."
        return headline(next(iter(shares)), ()), explained(next(iter(shares)), None)
    first, *others = [f"{word} for {percent(share)}" for word, share in named[:3]]
    told = f"Sounds {first} of the time" + "".join(f", {more}" for more in others)
    unsure_for = shares.get(UNCERTAIN, 0.0)
    return told, f"For {percent(unsure_for)} of the time the model is not sure." if unsure_for else ""


def clock(seconds: float) -> str:
    """A time in a recording.

    >>> clock(4), clock(65.5), clock(3601)
    ('0:04.0', '1:05.5', '60:01.0')
    """
    tenths = round(max(0.0, seconds) * 10)
    return f"{tenths // 600}:{tenths % 600 // 10:02d}.{tenths % 10}"


def channel_name(channel: str, channels: int) -> str:
    """The name of a channel on the page."""
    if channel == "mix":
        return "All channels" if channels > 1 else "Recording"
    if channels == 2:
        return {"0": "Left", "1": "Right"}.get(channel, channel)
    return f"Channel {int(channel) + 1}"


def reason(problem: Problem) -> str:
    """Why a recording cannot be used, in one sentence."""
    return _REASONS.get(problem.code) or sentence(problem.detail)


def trouble(error: ClientError) -> str:
    """A client's error, in one sentence."""
    problem: Problem | None = getattr(error, "problem", None)  # only where the recording is the cause
    return reason(problem) if problem else sentence(str(error))


def plain(text: str) -> str:
    r"""``text`` escaped for Markdown, because a file name may contain the syntax of images and links.

    >>> print(plain("![x](http://a) *b*"))
    \!\[x\](http\://a) \*b\*
    """
    return re.sub(r"([\\`*_\[\]<>$~#|!:])", r"\\\1", text)


def sentence(text: str) -> str:
    """``text`` with a capital and a full stop."""
    text = text.strip()
    return text[:1].upper() + text[1:] + ("" if text.endswith((".", "!", "?")) else ".")
