"""What is heard of a recording: its window or crops, decoded and made into features. Problems are told, not raised.

``listen`` works in this process. ``listen_apart`` does the same in a process of its own, for a recording that may take
its decoder, and with it the process, down: it costs a second, and the crash becomes the status ``decoder_crashed``.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection

import numpy as np
from numpy.typing import NDArray

from pipeline import audio
from pipeline.features import FeatureConfig, extract
from pipeline.folders import local_path
from pipeline.windows import covered_s, crop_starts

Array = NDArray[np.float32]
_SPAN_S = 60.0  # crops that lie within this are cut from one read
_APART_LIMIT_S = 120.0


@dataclass(frozen=True)
class Excerpt:
    """What is heard of one recording: features ``(crops, *input_shape)``, none when it cannot be used."""

    features: Array
    duration_s: float = float("nan")
    scored_s: float = 0.0
    sample_rate_hz: int = 0
    channels: int = 0
    status: str = "ok"
    error: str | None = None


def listen(source: audio.AudioSource, config: FeatureConfig, crops: int = 1, channel: audio.Channel = "mix") -> Excerpt:
    """Decode ``crops`` windows of a recording and make their features, ``(crops, *config.input_shape)``.

    A recording that is not longer than the window gives one, zero padded; ``file://`` paths are understood. Problems
    are told in the Excerpt's ``status`` and ``error``; nothing is raised.
    """
    if isinstance(source, str):
        source = local_path(source)
    try:
        return _middle(source, config, channel) if crops == 1 else _crops(source, config, crops, channel)
    except audio.AudioError as error:
        return failed(config, error.code, str(error))
    except Exception as error:  # a recording must never end the job: what was not foreseen becomes a row as well
        return failed(config, "internal_error", f"{type(error).__name__}: {error}")


def listen_apart(
    source: audio.AudioSource, config: FeatureConfig, crops: int = 1, channel: audio.Channel = "mix"
) -> Excerpt:
    """As ``listen``, in a process of its own; ``decoder_crashed`` or ``decode_timeout`` when that does not answer."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_listen_into, args=(sender, source, config, crops, channel), daemon=True)
    child.start()
    sender.close()
    name = "the bytes given" if isinstance(source, bytes) else os.fspath(source)
    try:
        if not receiver.poll(_APART_LIMIT_S):
            return failed(config, "decode_timeout", f"{name}: not decoded within {_APART_LIMIT_S:g} s; convert it")
        excerpt: Excerpt = receiver.recv()
        return excerpt
    except EOFError:
        child.join(5)
        return failed(
            config, "decoder_crashed", f"{name}: the decoder ended its process ({child.exitcode}); convert it"
        )
    finally:
        child.kill()
        child.join()
        receiver.close()


def _listen_into(
    sender: Connection, source: audio.AudioSource, config: FeatureConfig, crops: int, channel: audio.Channel
) -> None:
    with sender:
        sender.send(listen(source, config, crops, channel))


def failed(config: FeatureConfig, status: str, error: str) -> Excerpt:
    """The Excerpt of a recording that cannot be used."""
    return Excerpt(np.empty((0, *config.input_shape), np.float32), status=status, error=" ".join(error.split()))


def _middle(source: audio.AudioSource, config: FeatureConfig, channel: audio.Channel) -> Excerpt:
    clip = audio.load_middle(source, window_s=config.window_s, sample_rate_hz=config.sample_rate_hz, channel=channel)
    return _excerpt(extract(clip.samples, config)[np.newaxis], clip.info, clip.scored_s)


def _crops(source: audio.AudioSource, config: FeatureConfig, crops: int, channel: audio.Channel) -> Excerpt:
    info = audio.probe(source)
    starts = crop_starts(info.duration_s, config.window_s, crops)
    if len(starts) == 1:
        return _middle(source, config, channel)
    read = _reader(source, config, channel, starts)
    features = np.stack([extract(read(start_s), config) for start_s in starts])
    return _excerpt(features, info, covered_s(starts, info.duration_s, config.window_s))


def _reader(
    source: audio.AudioSource, config: FeatureConfig, channel: audio.Channel, starts: Sequence[float]
) -> Callable[[float], Array]:
    """A function from a start in seconds to the window's samples; reads once when the windows lie close together."""
    rate_hz, size = config.sample_rate_hz, config.window_samples

    def load(start_s: float, duration_s: float) -> Array:
        clip = audio.load(source, sample_rate_hz=rate_hz, start_s=start_s, duration_s=duration_s, channel=channel)
        return clip.samples

    def fitted(samples: Array) -> Array:
        return np.pad(samples[:size], (0, max(0, size - len(samples))))

    span_s = starts[-1] - starts[0] + config.window_s
    if span_s > _SPAN_S:
        return lambda start_s: fitted(load(start_s, config.window_s))
    span = load(starts[0], span_s)
    return lambda start_s: fitted(span[round((start_s - starts[0]) * rate_hz) :])


def _excerpt(features: Array, info: audio.AudioInfo, scored_s: float) -> Excerpt:
    return Excerpt(features, info.duration_s, scored_s, info.sample_rate_hz, info.channels)


def _one_line(text: str) -> str:
    """The text in one line, without the stand-ins for bytes that are not UTF-8."""
    return " ".join(text.encode("utf-8", "backslashreplace").decode("utf-8").split())
