"""How far an answer can be trusted: calibration of the confidence, and familiarity of the recording.

Calibration: temperature scaling (Guo, Pleiss, Sun & Weinberger, "On Calibration of Modern Neural Networks", ICML 2017)
divides the logits by the T that minimises the log-loss on recordings that the model was not trained on. It is fitted on
probabilities: their logarithms are the logits up to a constant, which softmax removes.

Familiarity: how similar a recording is, for the network, to the training recordings. The penultimate features of these,
scaled to length 1, lie close to a subspace of few dimensions (their principal components). A recording's distance is
the length of its part outside this subspace, as in Wang, Li, Feng & Zhang, "ViM: Out-Of-Distribution with Virtual-logit
Matching" (CVPR 2022), without the logit. ``familiarity`` is the median distance of the training recordings divided by
the recording's own, at most 1. Limits: it detects sounds unlike speech and corpora unlike the training corpora, not
wrong answers; training recordings are closer than others of the same speakers.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from pipeline.storage.errors import SerError

Floats = NDArray[np.float64]
NAME = "familiarity.npz"
_DIMENSIONS = 64
_RARE = 0.001  # share of the training recordings below the threshold ``least``
_NO_SPEECH = 0.65  # factor of ``least``: below it a sound is not speech
LEAST_RECORDINGS = 200


@dataclass(frozen=True)
class Familiarity:
    """The familiarity measure of a bundle whose network has d penultimate features."""

    mean: Floats  # (d,) of the scaled features
    basis: Floats  # (k, d), orthonormal rows that span the subspace
    typical: float  # median distance of the training recordings
    least: float  # familiarity below which a recording is unfamiliar

    @classmethod
    def fit(cls, embeddings: NDArray[np.float32]) -> Familiarity:
        """Fit the measure on the penultimate features ``(n, d)`` of training recordings.

        Raises:
            SerError: fewer than ``LEAST_RECORDINGS`` recordings.
        """
        if len(embeddings) < LEAST_RECORDINGS:
            raise SerError(
                f"{len(embeddings)} recordings are too few to fit the familiarity; expected {LEAST_RECORDINGS} or more"
            )
        unit = _unit(embeddings)
        mean = unit.mean(axis=0)
        _, vectors = np.linalg.eigh(np.cov((unit - mean).T))  # ascending
        basis = vectors[:, ::-1][:, : min(_DIMENSIONS, unit.shape[1] // 2)].T
        found = cls(mean, np.ascontiguousarray(basis), 1.0, 0.0)
        distance = found._distance(unit)
        typical = float(np.median(distance))
        return cls(found.mean, found.basis, typical, float(np.quantile(np.minimum(1, typical / distance), _RARE)))

    def of(self, embeddings: NDArray[np.float32]) -> Floats:
        """Familiarity, 0 to 1, ``(n,)``, of penultimate features ``(n, d)``."""
        distance = self._distance(_unit(embeddings))
        return np.asarray(np.minimum(1.0, self.typical / np.maximum(distance, 1e-12)))

    def widened(self, embeddings: NDArray[np.float32]) -> Familiarity:
        """The same measure with a threshold ``least`` at which these recordings ``(n, d)`` are familiar, too."""
        return replace(self, least=min(self.least, float(np.quantile(self.of(embeddings), _RARE))))

    @property
    def least_of_speech(self) -> float:
        """Familiarity below which a sound is not speech."""
        return _NO_SPEECH * self.least

    def _distance(self, unit: Floats) -> Floats:
        off = unit - self.mean
        return np.asarray(np.sqrt(np.maximum((off**2).sum(axis=1) - ((off @ self.basis.T) ** 2).sum(axis=1), 0)))

    def to_bytes(self) -> bytes:
        """The content of ``familiarity.npz``."""
        file = io.BytesIO()
        numbers = np.array([self.typical, self.least])
        np.savez_compressed(
            file, mean=self.mean.astype(np.float32), basis=self.basis.astype(np.float16), numbers=numbers
        )
        return file.getvalue()

    @classmethod
    def from_bytes(cls, content: bytes) -> Familiarity:
        """The inverse of ``to_bytes``.

        Raises:
            ValueError, KeyError, OSError: other content.
        """
        with np.load(io.BytesIO(content), allow_pickle=False) as kept:
            arrays: Mapping[str, NDArray[np.float64]] = {name: kept[name].astype(np.float64) for name in kept.files}
        typical, least = arrays["numbers"]
        return cls(arrays["mean"], arrays["basis"], float(typical), float(least))


def _unit(embeddings: NDArray[np.float32]) -> Floats:
    vectors = embeddings.astype(np.float64)
    return np.asarray(vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12))


_TEMPERATURES = (0.05, 20.0)
_LEAST_PROBABILITY = 1e-12  # smaller ones are raised to this before the logarithm
MIN_RECORDINGS = 30


@dataclass(frozen=True)
class Calibration:
    """A temperature, and the figures of the ``n`` recordings that it was fitted on, before and after."""

    temperature: float
    n: int
    before: dict[str, float]
    after: dict[str, float]


def fit_temperature(truth: NDArray[np.int64], probabilities: Floats) -> Calibration:
    """The temperature that minimises the log-loss of ``probabilities`` (n, C) at temperature 1, of classes (n,).

    Raises:
        SerError: too few recordings, or negative or missing probabilities.
    """
    if len(truth) < MIN_RECORDINGS:
        raise SerError(f"{len(truth)} recordings are too few to fit a temperature; expected {MIN_RECORDINGS} or more")
    if not np.isfinite(probabilities).all() or probabilities.min() < 0:
        raise SerError("some probabilities are negative or missing; give the predictions that ser evaluate wrote")

    from scipy.optimize import minimize_scalar  # here, as it takes a second to import

    from pipeline.evaluation.outcomes import log_loss

    def loss(log_temperature: float) -> float:
        return log_loss(truth, scaled(probabilities, float(np.exp(log_temperature))))

    found = minimize_scalar(loss, bounds=np.log(_TEMPERATURES), method="bounded", options={"xatol": 1e-6})
    temperature = float(np.exp(found.x))
    after = scaled(probabilities, temperature)
    return Calibration(temperature, len(truth), _figures(truth, probabilities), _figures(truth, after))


def scaled(probabilities: Floats, temperature: float) -> Floats:
    """Probabilities (n, C) at another temperature."""
    return np.exp(log_softmax(np.log(np.maximum(probabilities, _LEAST_PROBABILITY)) / temperature))


def log_softmax(logits: Floats) -> Floats:
    """Log-probabilities of logits (or of unnormalised log-probabilities) ``(n, C)``; faster than SciPy for few rows."""
    shifted = logits - logits.max(axis=1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True)))


def _figures(truth: NDArray[np.int64], probabilities: Floats) -> dict[str, float]:
    from pipeline.evaluation.outcomes import brier, log_loss, reliability

    confidence, correct = probabilities.max(axis=1), probabilities.argmax(axis=1) == truth
    return {
        "log_loss": log_loss(truth, probabilities),
        "brier": brier(truth, probabilities),
        "ece": float(reliability(confidence, correct).ece),
    }
