"""Plain words for what the model answers, how sure it is, and why a recording cannot be used."""

from __future__ import annotations

import re

from serve.client import BadRecording, ClientError
from serve.schema import Problem, Score

NOT_SURE_BELOW = 0.5
"""Confidence below which an answer is more likely wrong than right, and is told as "not sure"."""
UNCERTAIN, SILENCE = "uncertain", "silence"

_ADJECTIVES = {"disgust": "disgusted", "fear": "fearful", "anger": "angry", "happiness": "happy", "sadness": "sad"}
_SURE = ((0.9, "almost certain"), (0.7, "fairly sure"), (NOT_SURE_BELOW, "leaning this way"))
_REASONS = {
    "not_audio": "This is not an audio file, or it is damaged beyond reading.",
    "empty_file": "This file is empty.",
    "no_samples": "This file holds no sound.",
    "unsupported_format": "This kind of audio cannot be read here; WAV, FLAC, OGG, MP3 and m4a can.",
    "extra_needed": "This kind of audio cannot be read here; WAV, FLAC, OGG, MP3 and m4a can.",
    "corrupt": "This file is damaged.",
    "truncated": "This file ends too early; it may not have been copied in full.",
    "too_short": "There is too little sound in this recording; a quarter of a second is the least.",
    "not_finite": "This file holds values that are no sound.",
    "out_of_range": "This file holds values that are no sound.",
    "too_long": "This recording is too long; cut it into parts.",
    "too_large": "This recording is too large; cut it into parts.",
    "body_too_large": "This file is too large; save it as FLAC or MP3, or cut it into parts.",
    "too_many_windows": "This recording is too long to be followed over time; cut it into parts.",
    "bad_sample_rate": "This file has a sampling rate that cannot be used.",
    "bad_channels": "This file has more channels than can be used.",
    "decoder_crashed": "This file is damaged in a way that stopped its reader.",
    "decode_timeout": "This file could not be read in time; it may be damaged.",
    "not_explainable": "This model's answers cannot be explained as a picture.",
}


def spoken(label: str) -> str:
    """A label as it ends the sentence "this voice sounds ..."."""
    return {UNCERTAIN: "not sure", SILENCE: "silent"}.get(label, _ADJECTIVES.get(label, label))


def unsure(best: str) -> str:
    """What a table says where the model is not sure: its best guess, as a question.

    >>> unsure("disgust")
    'not sure (disgusted?)'
    """
    return f"{spoken(UNCERTAIN)} ({spoken(best)}?)"


def how_sure(confidence: float) -> str:
    """How sure the model is, without the number.

    >>> how_sure(0.95), how_sure(0.55)
    ('almost certain', 'leaning this way')
    """
    return next((words for least, words in _SURE if confidence >= least), "not sure")


def percent(share: float) -> str:
    """A share in whole percent, in one piece; neither 0 % nor 100 % unless it is exactly that.

    >>> [percent(share).split() for share in (0.4567, 0.9999, 0.001, 1.0)]
    [['46', '%'], ['>', '99', '%'], ['<', '1', '%'], ['100', '%']]
    """
    number = f"{100 * share:.0f}"
    if 0 < share < 0.005:
        number = "<\u00a01"
    elif 0.995 <= share < 1:
        number = ">\u00a099"
    return f"{number}\u00a0%"


def headline(label: str, *, whole: bool) -> str:
    """The answer in a sentence; ``whole``: the model heard all of the recording, not only its middle."""
    what = "This voice" if whole else "The middle of this recording"
    if label == SILENCE:
        return "There is nothing to hear" + ("" if whole else " in the middle of this recording")
    if label == UNCERTAIN:
        return "Not sure"
    return f"{what} sounds {spoken(label)}"


def explained(label: str, confidence: float | None, scores: list[Score]) -> str:
    """The sentence below the headline."""
    if label == SILENCE or confidence is None:
        return "It is so quiet that any answer would be a guess."
    first, *others = scores
    if label == UNCERTAIN:
        second = f", then {spoken(others[0].label)} ({percent(others[0].score)})" if others else ""
        return f"No answer stands out. The best guess is {spoken(first.label)} ({percent(first.score)}){second}."
    return f"The model is {how_sure(confidence)}: {percent(confidence)}."


def clock(seconds: float) -> str:
    """A time in a recording.

    >>> clock(4), clock(65.5), clock(3601)
    ('0:04.0', '1:05.5', '60:01.0')
    """
    tenths = round(max(0.0, seconds) * 10)
    return f"{tenths // 600}:{tenths % 600 // 10:02d}.{tenths % 10}"


def channel_name(channel: str, channels: int) -> str:
    """What people call a channel."""
    if channel == "mix":
        return "All channels" if channels > 1 else "Recording"
    if channels == 2:
        return {"0": "Left", "1": "Right"}.get(channel, channel)
    return f"Channel {int(channel) + 1}"


def reason(problem: Problem) -> str:
    """Why a recording cannot be used, in one sentence."""
    return _REASONS.get(problem.code) or sentence(problem.detail)


def trouble(error: ClientError) -> str:
    """What went wrong, in one sentence."""
    return reason(error.problem) if isinstance(error, BadRecording) else sentence(str(error))


def plain(text: str) -> str:
    r"""``text``, to be shown as it is where Markdown is understood: file names may hold pictures and links.

    >>> print(plain("![x](http://a) *b*"))
    \!\[x\](http\://a) \*b\*
    """
    return re.sub(r"([\\`*_\[\]<>$~#|!:])", r"\\\1", text)


def sentence(text: str) -> str:
    """``text`` with a capital and a full stop."""
    text = text.strip()
    return text[:1].upper() + text[1:] + ("" if text.endswith((".", "!", "?")) else ".")
