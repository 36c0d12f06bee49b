"""From recordings to probabilities: the only path that jobs, service, app and tests take.

A recording is decoded (``pipeline.audio.load``), its window or crops become features (``pipeline.features.features``),
the network gives logits (``pipeline.models.backends``), which are divided by the bundle's temperature; several crops
are pooled as the mean of their log-probabilities, renormalised. ``predict`` hears the middle (or crops) of recordings,
``follow`` all of one, window by window. A recording that cannot be used becomes a Prediction with its error's code;
neither raises.
"""

from __future__ import annotations

import os
from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from pipeline.audio import load as audio
from pipeline.audio.windows import SlidingWindow, check_crops, covered_s
from pipeline.inference.excerpts import LEAST_S, Excerpt, check_sound, describe, failed, listen, walk
from pipeline.inference.timeline import SILENCE_DBFS, Floats, Timeline, joined, log_softmax, named, no_windows, pool
from pipeline.models.backends import Backend, open_backend
from pipeline.models.bundle import Bundle, load_bundle
from pipeline.storage.errors import SerError

Array = NDArray[np.float32]
Channels = int | Literal["mix", "each"]


@dataclass(frozen=True)
class Prediction:
    """What the model says of one recording.

    Attributes:
        status: ``ok``, or the code of the AudioError.
        error: why the recording could not be used, one line; None when it could.
        predicted: the most probable label; None when there is none.
        confidence: its probability, calibrated by the bundle's temperature; NaN when there is none.
        probabilities: float64 ``(classes,)`` in the bundle's label order, sum 1; NaN when there are none.
        duration_s: length of the recording.
        scored_s: how much of it was heard.
        sample_rate_hz: of the recording as stored.
        channels: of the recording as stored.
        level_dbfs: RMS level of what was heard, of the loudest window when there are several.
        notice: what users should know of how the recording was read, "" mostly.
    """

    status: str
    error: str | None
    predicted: str | None
    confidence: float
    probabilities: Floats
    duration_s: float
    scored_s: float
    sample_rate_hz: int
    channels: int
    level_dbfs: float = float("nan")
    notice: str = ""

    @property
    def ok(self) -> bool:
        """Whether the recording could be used."""
        return self.status == "ok"

    @property
    def entropy(self) -> float:
        """See ``entropy``."""
        return float(entropy(self.probabilities))

    @property
    def margin(self) -> float:
        """See ``margin``."""
        return float(margin(self.probabilities))

    def label(self, min_confidence: float = 0.0, silence_dbfs: float = SILENCE_DBFS) -> str | None:
        """``predicted``; ``silence`` below that level, else ``uncertain`` below ``min_confidence``."""
        if self.predicted is None:
            return None
        return named(self.predicted, self.confidence, self.level_dbfs, min_confidence, silence_dbfs)

    def told(self, silence_dbfs: float = SILENCE_DBFS) -> Prediction:
        """As it is told: silence has no probabilities, and no confidence."""
        if not self.level_dbfs < silence_dbfs:
            return self
        none = np.full(len(self.probabilities), np.nan)
        return replace(self, confidence=float("nan"), probabilities=none)


class Predictor:
    """A bundle, ready to run. Not safe for use by several threads at once, but for ``listen``."""

    def __init__(
        self,
        bundle: Bundle,
        backend: Backend,
        *,
        batch_size: int = 16,
        crops: int | None = None,
        limits: audio.Limits = audio.DEFAULT_LIMITS,
    ) -> None:
        if batch_size < 1:
            raise SerError(f"batch_size must be 1 or more, got {batch_size}")
        if crops is not None:
            check_crops(crops)
        self.bundle = bundle
        self.backend = backend
        self.batch_size = batch_size
        self.crops = crops or bundle.crops
        self.limits = limits

    @classmethod
    def from_bundle(
        cls,
        path: str | os.PathLike[str] | None = None,
        *,
        backend: str = "auto",
        device: str = "cpu",
        threads: int | None = None,
        batch_size: int = 16,
        crops: int | None = None,
        limits: audio.Limits = audio.DEFAULT_LIMITS,
    ) -> Predictor:
        """Open the bundle at ``path`` (None: the shipped one) and load its network.

        Args:
            backend: ``auto``, ``onnx`` or ``torch``, see ``pipeline.models.backends``.
            device: ``cpu``, or a PyTorch device such as ``cuda``.
            threads: math threads; all CPUs that this process may use when None.
            batch_size: examples the network sees at once.
            crops: windows a recording, evenly spaced; the bundle's own number when None.
            limits: recordings beyond them are refused before they are decoded.

        Raises:
            BundleError: no usable bundle.
            SerError: a back end or device that is not there, or a number out of range.
        """
        bundle = load_bundle(path)
        opened = open_backend(bundle, backend, device, threads)
        return cls(bundle, opened, batch_size=batch_size, crops=crops, limits=limits)

    @property
    def labels(self) -> tuple[str, ...]:
        """Class names in the order of every probability vector."""
        return self.bundle.labels

    def log_probabilities(self, features: Array) -> Floats:
        """Calibrated log-probabilities, float64 ``(n, classes)``, of float32 features ``(n, *input_shape)``.

        Raises:
            SerError: features of another shape.
        """
        expected = self.bundle.features.input_shape
        if features.shape[1:] != expected:
            raise SerError(f"expected features (n, {', '.join(map(str, expected))}), got {features.shape}")
        if len(features) == 0:
            return np.empty((0, len(self.labels)))
        features = np.ascontiguousarray(features, dtype=np.float32)
        batches = [
            self.backend.logits(features[i : i + self.batch_size]) for i in range(0, len(features), self.batch_size)
        ]
        return log_softmax(np.concatenate(batches).astype(np.float64) / self.bundle.temperature)

    def probabilities(self, features: Array) -> Floats:
        """Calibrated probabilities, float64 ``(n, classes)``, rows summing to 1, of features ``(n, *input_shape)``."""
        return np.exp(self.log_probabilities(features))

    def predict(self, sources: Sequence[audio.AudioSource], *, channel: audio.Channel = "mix") -> list[Prediction]:
        """One Prediction a source, in order. Never raises for a recording that cannot be used."""
        results: list[Prediction] = []
        for begin in range(0, len(sources), self.batch_size):
            part = sources[begin : begin + self.batch_size]
            results += self.classify([self.listen(source, channel=channel) for source in part])
        return results

    def listen(self, source: audio.AudioSource, *, channel: audio.Channel = "mix", apart: bool = False) -> Excerpt:
        """Decode a recording and make its features; problems are told in the Excerpt, not raised.

        Args:
            channel: ``mix``, or the number of one channel.
            apart: decode in a process of its own, so that a decoder that crashes costs no more than its recording.
        """
        return listen(source, self.bundle.features, self.crops, channel, apart=apart, limits=self.limits)

    def classify(self, excerpts: Sequence[Excerpt]) -> list[Prediction]:
        """One Prediction an excerpt, in order, the network run over all of them together."""
        usable = [excerpt for excerpt in excerpts if excerpt.status == "ok"]
        log_p = self.log_probabilities(np.concatenate([e.features for e in usable])) if usable else np.empty((0, 0))
        ends = np.cumsum([len(e.features) for e in usable], dtype=int)
        pooled = iter([pool(log_p[end - len(e.features) : end]) for e, end in zip(usable, ends, strict=True)])
        return [self._prediction(e, next(pooled) if e.status == "ok" else None) for e in excerpts]

    def prediction(self, excerpt: Excerpt, log_p: Floats) -> Prediction:
        """The Prediction of a usable excerpt whose windows have these log-probabilities, ``(windows, classes)``."""
        return self._prediction(excerpt, pool(log_p))

    def follow(
        self,
        source: audio.AudioSource,
        steps: SlidingWindow,
        *,
        channels: Channels = "mix",
        silence_dbfs: float = SILENCE_DBFS,
        apart: bool = False,
    ) -> tuple[Prediction, Timeline]:
        """A recording over time, and all of it together: the windows that are not silent, pooled.

        Args:
            steps: the windows; they may not be longer than the model's.
            channels: ``mix``, the number of one channel, or ``each``.
            apart: as in ``listen``.

        Raises:
            SerError: windows that are longer than the model's.
        """
        walking = self.follow_steps(source, steps, channels=channels, silence_dbfs=silence_dbfs, apart=apart)
        try:
            features = next(walking)
            while True:
                features = walking.send(self.log_probabilities(features))
        except StopIteration as end:
            found: tuple[Prediction, Timeline] = end.value
            return found

    def follow_steps(
        self,
        source: audio.AudioSource,
        steps: SlidingWindow,
        *,
        channels: Channels = "mix",
        silence_dbfs: float = SILENCE_DBFS,
        apart: bool = False,
    ) -> Generator[Array, Floats, tuple[Prediction, Timeline]]:
        """``follow`` for whoever runs the network elsewhere, or shares it: what it decodes, it decodes in between.

        Yields features ``(n, *input_shape)`` of the next windows, n up to ``batch_size``, and is sent their
        log-probabilities ``(n, classes)``.

        Raises:
            SerError: windows longer than the model's.
        """
        config = self.bundle.features
        if steps.window_s > config.window_s:
            raise SerError(
                f"window_s {steps.window_s:g} is more than the {config.window_s:g} s that {self.bundle.name} hears "
                f"at a time; give --window_s {config.window_s:g}"
            )
        try:
            info = describe(source, apart=apart, limits=self.limits)
            check_sound(source, info.duration_s, 0.0, info.duration_s)
            tracks = []
            for channel in range(info.channels) if channels == "each" else [channels]:
                tracks.append((yield from self._track(source, steps, info.duration_s, channel, apart, silence_dbfs)))
            timeline = joined([track for track, _, _ in tracks])
            if steps.window_s >= LEAST_S:
                sound_s = max(sound_s for _, sound_s, _ in tracks)
                check_sound(source, info.duration_s, float(timeline.level_dbfs.max()), sound_s)
        except Exception as error:  # as in listen: a recording never ends the job
            return self._prediction(failed(config, error), None), no_windows(len(self.labels))
        heard = Excerpt(
            np.empty((0, *config.input_shape), np.float32),
            info.duration_s,
            covered_s(steps.starts(info.duration_s), info.duration_s, steps.window_s),
            info.sample_rate_hz,
            info.channels,
            float(timeline.level_dbfs.max()),
            next((notice for _, _, notice in tracks if notice), info.notice),
        )
        return self._prediction(heard, timeline.pooled(silence_dbfs)), timeline

    def _track(
        self,
        source: audio.AudioSource,
        steps: SlidingWindow,
        duration_s: float,
        channel: audio.Channel,
        apart: bool,
        silence_dbfs: float,
    ) -> Generator[Array, Floats, tuple[Timeline, float, str]]:
        """The windows of a channel, seconds of sound in the fullest, and what users should know.

        Silence costs the network nothing: all classes are as likely.
        """
        config, size = self.bundle.features, self.batch_size
        sound_s, notice = 0.0, ""
        stretches = walk(
            source,
            config,
            steps,
            duration_s,
            channel,
            at_once=size,
            silence_dbfs=silence_dbfs,
            apart=apart,
            limits=self.limits,
        )
        parts = []
        for s in stretches:
            sounds = s.level_dbfs >= silence_dbfs
            log_p = np.full((len(sounds), len(self.labels)), -np.log(len(self.labels)))
            if sounds.any():
                log_p[sounds] = yield s.features[sounds]
            parts.append((s.start_s, s.end_s, s.level_dbfs, log_p))
            sound_s, notice = max(sound_s, float(s.sound_s.max())), notice or s.notice
        start_s, end_s, level_dbfs, log_p = (np.concatenate(column) for column in zip(*parts, strict=True))
        name = np.full(len(start_s), str(channel), dtype=object)
        return Timeline(name, start_s, end_s, level_dbfs, log_p), sound_s, notice

    def _prediction(self, excerpt: Excerpt, log_p: Floats | None) -> Prediction:
        p = np.full(len(self.labels), np.nan) if log_p is None else np.exp(log_p)
        best = None if log_p is None else int(p.argmax())
        return Prediction(
            status=excerpt.status,
            error=excerpt.error,
            predicted=None if best is None else self.labels[best],
            confidence=float("nan") if best is None else float(p[best]),
            probabilities=p,
            duration_s=excerpt.duration_s,
            scored_s=excerpt.scored_s,
            sample_rate_hz=excerpt.sample_rate_hz,
            channels=excerpt.channels,
            level_dbfs=excerpt.level_dbfs,
            notice=excerpt.notice,
        )


def entropy(p: Floats) -> Floats:
    """Shannon entropy of probabilities ``(..., classes)`` over that of a uniform guess: 0 certain, 1 clueless."""
    return np.asarray(-(p * np.log(np.maximum(p, 1e-300))).sum(axis=-1) / np.log(p.shape[-1]))


def margin(p: Floats) -> Floats:
    """Probability of the best label minus that of the second, of probabilities ``(..., classes)``."""
    ordered = np.sort(p, axis=-1)
    return np.asarray(ordered[..., -1] - ordered[..., -2])
