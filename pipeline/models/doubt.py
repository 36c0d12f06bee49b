"""How far an answer can be trusted: whether its confidence is honest, and whether it is of a familiar kind.

Temperature scaling (Guo, Pleiss, Sun & Weinberger, "On Calibration of Modern Neural Networks", ICML 2017) changes no
answer: the logits are divided by the T that minimises the log-loss on recordings the model was not trained on. It
starts from probabilities: their logarithms are logits up to a constant that the softmax removes.

Familiarity is how like the training recordings a recording is to the network. Their penultimate features, scaled to
length 1, lie close to a flat of few dimensions (their principal components); what is unlike them lies off it. The
length of a feature vector's part off the flat is its distance, as in Wang, Li, Feng & Zhang, "ViM:
Out-Of-Distribution with Virtual-logit Matching" (CVPR 2022), without the logit.
``familiarity`` is the median distance of training recordings over the recording's own, at most 1: at 0.5 it lies twice
as far off as they do. Limits: it knows sounds unlike speech and corpora unlike those trained on, not which answers are
wrong; training recordings lie closer than others of the same speakers.
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
_RARE = 0.001  # share of the training recordings that are less familiar than the least that counts as familiar
_NO_SPEECH = 0.65  # of that: what is less familiar yet is taken for no speech
LEAST_RECORDINGS = 200


@dataclass(frozen=True)
class Familiarity:
    """Of a bundle: d features.

    Attributes:
        mean: ``(d,)`` of the scaled features; basis: ``(k, d)``, orthonormal rows.
        typical: median distance of the training recordings.
        least: familiarity below which a recording is unfamiliar.
    """

    mean: Floats
    basis: Floats
    typical: float
    least: float

    @classmethod
    def fit(cls, embeddings: NDArray[np.float32]) -> Familiarity:
        """Of the training recordings' penultimate features ``(n, d)``.

        Raises:
            SerError: fewer than ``LEAST_RECORDINGS``.
        """
        if len(embeddings) < LEAST_RECORDINGS:
            raise SerError(f"{len(embeddings)} recordings are too few; expected {LEAST_RECORDINGS} or more")
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
        """The same where these recordings ``(n, d)`` are familiar, too: of a network that is now used for them."""
        return replace(self, least=min(self.least, float(np.quantile(self.of(embeddings), _RARE))))

    @property
    def least_of_speech(self) -> float:
        """Familiarity below which a sound is taken for no speech."""
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
        """What ``to_bytes`` gave.

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
_LEAST_PROBABILITY = 1e-12  # of a probability, before its logarithm
MIN_RECORDINGS = 30


@dataclass(frozen=True)
class Calibration:
    """A temperature, and the figures of the recordings it was fitted on, before and after."""

    temperature: float
    n: int
    before: dict[str, float]
    after: dict[str, float]


def fit_temperature(truth: NDArray[np.int64], probabilities: Floats) -> Calibration:
    """The temperature that minimises the log-loss.

    Args:
        truth: (n,) class indices.
        probabilities: (n, C), at temperature 1.

    Raises:
        SerError: too few recordings, or probabilities that are none.
    """
    if len(truth) < MIN_RECORDINGS:
        raise SerError(f"{len(truth)} recordings are too few to fit a temperature; expected {MIN_RECORDINGS} or more")
    if not np.isfinite(probabilities).all() or probabilities.min() < 0:
        raise SerError("the probabilities hold negative or missing numbers; give what jobs.evaluate wrote")

    from scipy.optimize import minimize_scalar  # a second of imports that no answer needs

    from pipeline.evaluation.outcomes import log_loss

    def loss(log_temperature: float) -> float:
        return log_loss(truth, scaled(probabilities, float(np.exp(log_temperature))))

    found = minimize_scalar(loss, bounds=np.log(_TEMPERATURES), method="bounded", options={"xatol": 1e-6})
    temperature = float(np.exp(found.x))
    after = scaled(probabilities, temperature)
    return Calibration(temperature, len(truth), _figures(truth, probabilities), _figures(truth, after))


def scaled(probabilities: Floats, temperature: float) -> Floats:
    """Probabilities (n, C) at another temperature."""
    logits = np.log(np.maximum(probabilities, _LEAST_PROBABILITY)) / temperature
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    return np.asarray(powers / powers.sum(axis=1, keepdims=True))


def _figures(truth: NDArray[np.int64], probabilities: Floats) -> dict[str, float]:
    from pipeline.evaluation.outcomes import brier, log_loss, reliability

    confidence, correct = probabilities.max(axis=1), probabilities.argmax(axis=1) == truth
    return {
        "log_loss": log_loss(truth, probabilities),
        "brier": brier(truth, probabilities),
        "ece": float(reliability(confidence, correct).ece),
    }
