"""From recordings to probabilities: the only path that jobs, service, app and tests take.

A recording is decoded (``pipeline.audio``), its window or crops become features (``pipeline.features``), the network
gives logits (``pipeline.backends``), which are divided by the bundle's temperature; several crops are pooled as the
mean of their log-probabilities, renormalised. A recording that cannot be used becomes a Prediction with its error's
code: ``predict`` does not raise for it.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline import audio
from pipeline.backends import Backend, open_backend
from pipeline.checkpoint import Bundle, load_bundle
from pipeline.errors import SerError
from pipeline.excerpts import Excerpt, listen, listen_apart

Array = NDArray[np.float32]
UNCERTAIN = "uncertain"


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
    """

    status: str
    error: str | None
    predicted: str | None
    confidence: float
    probabilities: NDArray[np.float64]
    duration_s: float
    scored_s: float
    sample_rate_hz: int
    channels: int

    @property
    def ok(self) -> bool:
        """Whether the recording could be used."""
        return self.status == "ok"

    @property
    def entropy(self) -> float:
        """Shannon entropy of the probabilities over that of a uniform guess: 0 certain, 1 clueless."""
        p = self.probabilities
        return float(-(p * np.log(np.maximum(p, 1e-300))).sum() / np.log(len(p)))

    @property
    def margin(self) -> float:
        """Probability of the best label minus that of the second."""
        second, first = np.sort(self.probabilities)[-2:]
        return float(first - second)

    def label(self, min_confidence: float = 0.0) -> str | None:
        """``predicted``, or ``uncertain`` when the confidence is below ``min_confidence``."""
        return UNCERTAIN if self.ok and self.confidence < min_confidence else self.predicted


class Predictor:
    """A bundle, ready to run. Not safe for use by several threads at once."""

    def __init__(self, bundle: Bundle, backend: Backend, *, batch_size: int = 16, crops: int | None = None) -> None:
        if batch_size < 1:
            raise SerError(f"batch_size must be 1 or more, got {batch_size}")
        if crops is not None and crops < 1:
            raise SerError(f"crops must be 1 or more, got {crops}")
        self.bundle = bundle
        self.backend = backend
        self.batch_size = batch_size
        self.crops = crops or bundle.crops

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
    ) -> Predictor:
        """Open the bundle at ``path`` (None: the shipped one) and load its network.

        Args:
            backend: ``auto``, ``onnx`` or ``torch``, see ``pipeline.backends``.
            device: ``cpu``, or a PyTorch device such as ``cuda``.
            threads: math threads; all CPUs that this process may use when None.
            batch_size: examples the network sees at once.
            crops: windows a recording, evenly spaced; the bundle's own number when None.

        Raises:
            BundleError: no usable bundle.
            SerError: a back end or device that is not there, or a number out of range.
        """
        bundle = load_bundle(path)
        return cls(bundle, open_backend(bundle, backend, device, threads), batch_size=batch_size, crops=crops)

    @property
    def labels(self) -> tuple[str, ...]:
        """Class names in the order of every probability vector."""
        return self.bundle.labels

    def log_probabilities(self, features: Array) -> NDArray[np.float64]:
        """Calibrated log-probabilities, float64 ``(n, classes)``, of float32 features ``(n, *input_shape)``."""
        expected = self.bundle.features.input_shape
        if features.shape[1:] != expected:
            raise SerError(f"expected features (n, {', '.join(map(str, expected))}), got {features.shape}")
        if len(features) == 0:
            return np.empty((0, len(self.labels)))
        features = np.ascontiguousarray(features, dtype=np.float32)
        batches = [
            self.backend.logits(features[i : i + self.batch_size]) for i in range(0, len(features), self.batch_size)
        ]
        return _log_softmax(np.concatenate(batches).astype(np.float64) / self.bundle.temperature)

    def probabilities(self, features: Array) -> NDArray[np.float64]:
        """Calibrated probabilities, float64 ``(n, classes)``, rows summing to 1, of features ``(n, *input_shape)``."""
        return np.exp(self.log_probabilities(features))

    def predict(self, sources: Sequence[audio.AudioSource], *, channel: audio.Channel = "mix") -> list[Prediction]:
        """One Prediction a source, in order. Never raises for a recording that cannot be used."""
        results: list[Prediction] = []
        for begin in range(0, len(sources), self.batch_size):
            part = sources[begin : begin + self.batch_size]
            results += self.classify([self.listen(source, channel=channel) for source in part])
        return results

    def listen(self, source: audio.AudioSource, *, channel: audio.Channel = "mix") -> Excerpt:
        """Decode a recording and make its features; problems are told in the Excerpt, not raised."""
        return listen(source, self.bundle.features, self.crops, channel)

    def listen_apart(self, source: audio.AudioSource, *, channel: audio.Channel = "mix") -> Excerpt:
        """As ``listen``, in a process of its own, so that a decoder that crashes costs no more than its recording."""
        return listen_apart(source, self.bundle.features, self.crops, channel)

    def classify(self, excerpts: Sequence[Excerpt]) -> list[Prediction]:
        """One Prediction an excerpt, in order, the network run over all of them together."""
        usable = [excerpt for excerpt in excerpts if excerpt.status == "ok"]
        log_p = self.log_probabilities(np.concatenate([e.features for e in usable])) if usable else np.empty((0, 0))
        pooled = iter(_pool(log_p, [len(e.features) for e in usable]))
        return [self._prediction(e, next(pooled) if e.status == "ok" else None) for e in excerpts]

    def _prediction(self, excerpt: Excerpt, log_p: NDArray[np.float64] | None) -> Prediction:
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
        )


def _log_softmax(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    shifted = logits - logits.max(axis=1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True)))


def _pool(log_p: NDArray[np.float64], counts: Sequence[int]) -> list[NDArray[np.float64]]:
    """Mean of consecutive groups of rows, renormalised; a group of one stays as it is."""
    ends = np.cumsum(counts, dtype=int)
    groups = [log_p[end - count : end] for end, count in zip(ends, counts, strict=True)]
    return [g[0] if len(g) == 1 else _log_softmax(g.mean(axis=0, keepdims=True))[0] for g in groups]
