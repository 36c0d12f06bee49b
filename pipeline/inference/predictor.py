"""From recordings to probabilities; jobs, service, app and tests all use this code.

The network's logits are divided by the bundle's temperature. Several crops are pooled: the mean of their
log-probabilities, renormalised. ``predict`` analyses one window (or crops) of each recording, ``follow`` a whole
recording, window by window. Neither raises for a recording that cannot be used: its Prediction has an error code.
"""

from __future__ import annotations

import math
import os
from collections.abc import Generator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from pipeline.audio import load as audio
from pipeline.audio.speech import LEAST_SHARE
from pipeline.audio.windows import GivenWindows, SlidingWindow, check_crops, covered_s
from pipeline.inference.excerpts import LEAST_S, Excerpt, check_sound, describe, failed, listen, walk
from pipeline.inference.timeline import SILENCE_DBFS, Floats, Timeline, finished, joined, named, no_windows, pool
from pipeline.models.backends import Backend, open_backend
from pipeline.models.bundle import Bundle, load_bundle
from pipeline.models.doubt import log_softmax
from pipeline.storage.errors import SerError

Array = NDArray[np.float32]
Channels = int | Literal["mix", "each"]


@dataclass(frozen=True)
class Prediction:
    """The model's answer to one recording; figures of several windows are those of the loudest, or the largest."""

    status: str  # "ok", or the code of the error
    error: str | None  # why the recording could not be used, in one line
    predicted: str | None  # the most probable label; None if there is none
    confidence: float  # its probability, calibrated by the bundle's temperature; NaN if there is none
    probabilities: Floats  # (classes,) in the bundle's label order, sum 1; NaN if there are none
    duration_s: float
    scored_s: float  # seconds of it that were analysed; with follow, silent windows do not count
    sample_rate_hz: int  # as stored
    channels: int  # as stored
    level_dbfs: float = float("nan")  # RMS level of the window
    notice: str = ""  # what users should know about how the recording was read
    speech_share: float = float("nan")  # see audio.speech
    familiarity: float = float("nan")  # see models.doubt; mean over the windows; NaN if the bundle has none
    speech: bool = True  # whether speech_share and familiarity are high enough for speech
    familiar: bool = True  # whether familiarity is high enough to trust the answer

    @property
    def ok(self) -> bool:
        """Whether the recording could be used."""
        return self.status == "ok"

    @property
    def entropy(self) -> float:
        """The normalised entropy of the probabilities, see the function ``entropy``."""
        return float(entropy(self.probabilities))

    @property
    def margin(self) -> float:
        """Best minus second-best probability, see the function ``margin``."""
        return float(margin(self.probabilities))

    def label(self, min_confidence: float = 0.0, silence_dbfs: float = SILENCE_DBFS) -> str | None:
        """``predicted``; or ``silence``, ``not_speech`` or ``uncertain``, see ``timeline.named``."""
        if self.predicted is None:
            return None
        doubt = self.speech, self.familiar
        return named(self.predicted, self.confidence, self.level_dbfs, min_confidence, silence_dbfs, *doubt)

    def told(self, silence_dbfs: float = SILENCE_DBFS) -> Prediction:
        """The Prediction to show: for silence and for what is not speech, without probabilities and confidence."""
        if self.speech and not self.level_dbfs < silence_dbfs:
            return self
        none = np.full(len(self.probabilities), np.nan)
        return replace(self, confidence=float("nan"), probabilities=none)


class Predictor:
    """A bundle that is ready to run. Only ``listen`` may be called by several threads at once."""

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
        self._familiarity = bundle.familiarity
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
            backend, device, threads: as for ``pipeline.models.backends.open_backend``.
            batch_size: examples in a batch of the network.
            crops: number of evenly spaced windows in each recording; None: the bundle's own number.
            limits: recordings beyond these limits are refused before they are decoded.

        Raises:
            BundleError: no usable bundle.
            SerError: a back end or device that is not available, or a number out of range.
        """
        bundle = load_bundle(path)
        opened = open_backend(bundle, backend, device, threads)
        return cls(bundle, opened, batch_size=batch_size, crops=crops, limits=limits)

    @property
    def labels(self) -> tuple[str, ...]:
        """Class names in the order of every probability vector."""
        return self.bundle.labels

    def log_probabilities(self, features: Array) -> Floats:
        """Calibrated log-probabilities, float64 ``(n, classes)``, of float32 features ``(n, *input_shape)``."""
        return self.answers(features)[:, :-1]

    def answers(self, features: Array) -> Floats:
        """``log_probabilities`` and the familiarity (NaN if the bundle has none), float64 ``(n, classes + 1)``.

        Raises:
            SerError: features of another shape.
        """
        expected = self.bundle.features.input_shape
        if features.shape[1:] != expected:
            raise SerError(f"expected features (n, {', '.join(map(str, expected))}), got {features.shape}")
        if len(features) == 0:
            return np.empty((0, len(self.labels) + 1))
        features = np.ascontiguousarray(features, dtype=np.float32)
        batches = [
            self.backend.outputs(features[i : i + self.batch_size]) for i in range(0, len(features), self.batch_size)
        ]
        logits, embeddings = (np.concatenate(found) for found in zip(*batches, strict=True))
        log_p = log_softmax(logits.astype(np.float64) / self.bundle.temperature)
        known = self._familiarity
        return np.column_stack([log_p, np.full(len(log_p), np.nan) if known is None else known.of(embeddings)])

    def probabilities(self, features: Array) -> Floats:
        """Calibrated probabilities, float64 ``(n, classes)``, rows summing to 1, of features ``(n, *input_shape)``."""
        return np.exp(self.log_probabilities(features))

    def predict(self, sources: Sequence[audio.AudioSource], *, channel: audio.Channel = "mix") -> list[Prediction]:
        """One Prediction for each source, in order. Never raises for a recording that cannot be used."""
        results: list[Prediction] = []
        for begin in range(0, len(sources), self.batch_size):
            part = sources[begin : begin + self.batch_size]
            results += self.classify([self.listen(source, channel=channel) for source in part])
        return results

    def listen(self, source: audio.AudioSource, *, channel: audio.Channel = "mix", isolated: bool = False) -> Excerpt:
        """Decode a recording and compute its features; any error is returned in the Excerpt, not raised.

        Args:
            channel: ``mix``, or the number of one channel, from 0.
            isolated: decode in a separate process, so that a crash of the decoder affects only this recording.
        """
        return listen(source, self.bundle.features, self.crops, channel, isolated=isolated, limits=self.limits)

    def classify(self, excerpts: Sequence[Excerpt]) -> list[Prediction]:
        """One Prediction for each excerpt, in order; the network runs on all of them together."""
        usable = [excerpt for excerpt in excerpts if excerpt.status == "ok"]
        answers = self.answers(np.concatenate([e.features for e in usable])) if usable else np.empty((0, 0))
        ends = np.cumsum([len(e.features) for e in usable], dtype=int)
        parts = iter([answers[end - len(e.features) : end] for e, end in zip(usable, ends, strict=True)])
        return [self.prediction(e, next(parts)) if e.status == "ok" else self._prediction(e, None) for e in excerpts]

    def prediction(self, excerpt: Excerpt, answers: Floats) -> Prediction:
        """The Prediction of a usable excerpt from the ``answers`` to its windows, ``(windows, classes + 1)``."""
        familiarity = float(answers[:, -1].mean())
        speech = bool(self._speech(np.array([excerpt.speech_share]), np.array([familiarity]))[0])
        found = self._prediction(excerpt, pool(answers[:, :-1]))
        return replace(found, familiarity=familiarity, speech=speech, familiar=bool(self._familiar(familiarity)))

    def _familiar(self, familiarity: float | Floats) -> NDArray[np.bool_]:
        """Whether windows are similar enough to the training recordings, ``(n,)``."""
        least = 0.0 if self._familiarity is None else self._familiarity.least
        return np.asarray(~np.less(familiarity, least))

    def _speech(self, share: Floats, familiarity: Floats) -> NDArray[np.bool_]:
        """Whether windows may be speech, ``(n,)``."""
        least = 0.0 if self._familiarity is None else self._familiarity.least_of_speech
        return np.asarray(~(share < LEAST_SHARE) & ~(familiarity < least))

    def follow(
        self,
        source: audio.AudioSource,
        steps: SlidingWindow,
        *,
        channels: Channels = "mix",
        silence_dbfs: float = SILENCE_DBFS,
        isolated: bool = False,
    ) -> tuple[Prediction, Timeline]:
        """Analyse a whole recording in windows: the pooled Prediction of its windows with speech, and the Timeline.

        Args and errors are those of ``follow_steps``.
        """
        walking = self.follow_steps(source, steps, channels=channels, silence_dbfs=silence_dbfs, isolated=isolated)
        return finished(walking, self.answers)

    def follow_steps(
        self,
        source: audio.AudioSource,
        steps: SlidingWindow | GivenWindows,
        *,
        channels: Channels = "mix",
        silence_dbfs: float = SILENCE_DBFS,
        isolated: bool = False,
    ) -> Generator[Array, Floats, tuple[Prediction, Timeline]]:
        """``follow`` as a generator, for callers that run the network elsewhere or share it.

        Yields features ``(n, *input_shape)`` of the next windows, n up to ``batch_size``, and must be sent their
        ``answers``, ``(n, classes + 1)``.

        Args:
            steps: the windows. ``GivenWindows`` are never refused as too short or too silent.
            channels: ``mix``, the number of one channel (from 0), or ``each``.
            isolated: as in ``listen``.

        Raises:
            SerError: windows longer than the model's.
        """
        config = self.bundle.features
        if steps.window_s > config.window_s:
            raise SerError(
                f"window_s {steps.window_s:g} is longer than the input window of {self.bundle.name}, "
                f"{config.window_s:g} s; give --window_s {config.window_s:g}"
            )
        try:
            info = describe(source, isolated=isolated, limits=self.limits)
            check_sound(source, info.duration_s, 0.0, info.duration_s)
            tracks = []
            for channel in range(info.channels) if channels == "each" else [channels]:
                track = self._track(source, steps, info.duration_s, channel, silence_dbfs, isolated)
                tracks.append((yield from track))
            timeline = joined([track for track, *_ in tracks])
            if steps.window_s >= LEAST_S and not isinstance(steps, GivenWindows):
                sound_s = max(sound_s for _, sound_s, *_ in tracks)
                check_sound(source, info.duration_s, float(timeline.level_dbfs.max()), sound_s)
        except Exception as error:  # as in listen: a recording never ends the job
            return self._prediction(failed(config, error), None), no_windows(len(self.labels))
        sounding = np.unique(timeline.start_s[timeline.level_dbfs >= silence_dbfs]).tolist()
        excerpt = Excerpt(
            np.empty((0, *config.input_shape), np.float32),
            info.duration_s,
            covered_s(sounding, info.duration_s, steps.window_s),
            info.sample_rate_hz,
            info.channels,
            float(timeline.level_dbfs.max()),
            next((notice for _, _, notice, _ in tracks if notice), info.notice),
            float(np.fmax.reduce([share for *_, share in tracks])),
        )
        speech, familiarity, familiar = timeline.doubt(silence_dbfs)
        found = self._prediction(excerpt, timeline.pooled(silence_dbfs))
        return replace(found, speech=speech, familiarity=familiarity, familiar=familiar), timeline

    def _track(
        self,
        source: audio.AudioSource,
        steps: SlidingWindow | GivenWindows,
        duration_s: float,
        channel: audio.Channel,
        silence_dbfs: float,
        isolated: bool,
    ) -> Generator[Array, Floats, tuple[Timeline, float, str, float]]:
        """The Timeline of a channel, the most seconds of sound in a window, the notice, and the largest speech_share.

        Silent windows are not sent to the network: they get equal probabilities and an unknown familiarity.
        """
        sound_s, notice = 0.0, ""
        stretches = walk(
            source,
            self.bundle.features,
            steps,
            duration_s,
            channel,
            at_once=self.batch_size,
            silence_dbfs=silence_dbfs,
            isolated=isolated,
            limits=self.limits,
        )
        parts = []
        for s in stretches:
            sounds, classes = s.level_dbfs >= silence_dbfs, len(self.labels)
            answers = np.tile([-np.log(classes)] * classes + [np.nan], (len(sounds), 1))
            if sounds.any():
                answers[sounds] = yield s.features[sounds]
            parts.append((s.start_s, s.end_s, s.level_dbfs, s.speech_share, answers))
            sound_s, notice = max(sound_s, float(s.sound_s.max())), notice or s.notice
        start_s, end_s, level_dbfs, share, answers = (np.concatenate(column) for column in zip(*parts, strict=True))
        name, familiarity = np.full(len(start_s), str(channel), dtype=object), answers[:, -1]
        doubt = self._speech(share, familiarity), familiarity, self._familiar(familiarity)
        return (
            Timeline(name, start_s, end_s, level_dbfs, answers[:, :-1], *doubt),
            sound_s,
            notice,
            float(np.fmax.reduce(share)),
        )

    def _prediction(self, excerpt: Excerpt, log_p: Floats | None) -> Prediction:
        p = np.full(len(self.labels), np.nan) if log_p is None else np.exp(log_p)
        predicted = None if log_p is None else self.labels[int(p.argmax())]
        about = {field.name: getattr(excerpt, field.name) for field in fields(excerpt) if field.name != "features"}
        return Prediction(predicted=predicted, confidence=float(p.max()), probabilities=p, **about)


def entropy(p: Floats) -> Floats:
    """Shannon entropy of probabilities ``(..., classes)``, divided by that of equal ones: 0 certain, 1 all equal."""
    return np.asarray(-(p * np.log(np.maximum(p, 1e-300))).sum(axis=-1) / np.log(p.shape[-1]))


def margin(p: Floats) -> Floats:
    """Probability of the best label minus that of the second, of probabilities ``(..., classes)``."""
    ordered = np.sort(p, axis=-1)
    return np.asarray(ordered[..., -1] - ordered[..., -2])


@dataclass(frozen=True)
class ScoreOptions:
    """Options of a scoring run. A run can be resumed only with the same options."""

    crops: int | None = None  # windows in each recording; None: the bundle's own number
    min_confidence: float = 0.0  # answers below it become "uncertain"; evaluations do not change
    channels: Channels = "mix"  # or the number of one channel, or "each", which needs window_s
    window_s: float | None = None  # analyse whole recordings in windows of this length; None: only one, or the crops
    hop_s: float | None = None  # from one window's start to the next; None: window_s
    silence_dbfs: float = SILENCE_DBFS  # RMS level below which a window is "silence"

    def __post_init__(self) -> None:
        if self.crops is not None:
            check_crops(self.crops)
        if not 0.0 <= self.min_confidence <= 1.0:
            raise SerError(f"min_confidence must be between 0 and 1, got {self.min_confidence}")
        if not math.isfinite(self.silence_dbfs):
            raise SerError(f"silence_dbfs must be a finite number, got {self.silence_dbfs}; -300 calls nothing silence")
        if self.hop_s is not None and self.window_s is None:
            raise SerError(f"hop_s {self.hop_s:g} needs window_s; give --window_s too")
        if self.window_s is None and self.channels == "each":
            raise SerError("channels each needs window_s; give --window_s too")
        if self.crops is not None and self.window_s is not None:
            raise SerError("crops and window_s cannot be used together: window_s covers the whole recording; give one")
        _ = self.steps  # checks the rest

    @property
    def steps(self) -> SlidingWindow | None:
        """The windows of ``window_s`` and ``hop_s``; None without ``window_s``."""
        if self.window_s is None:
            return None
        return SlidingWindow(self.window_s, self.window_s if self.hop_s is None else self.hop_s)

    @property
    def tables(self) -> list[str]:
        """Names of the tables that a run writes."""
        windowed = ["segments"] if self.window_s is not None else []
        return ["predictions", *windowed, *(["channels"] if self.channels == "each" else [])]

    @property
    def channel(self) -> audio.Channel:
        """The one channel to analyse: ``mix`` or a number. Raises ValueError for ``each``."""
        if self.channels == "each":
            raise ValueError("channels is each, not a single channel")
        return self.channels
