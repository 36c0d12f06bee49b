"""Conversion of a worker's results to the response models of ``schema``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline.inference.explain import Picture
from pipeline.inference.predictor import Prediction
from pipeline.inference.timeline import (
    NO_EMOTION,
    NOT_SPEECH,
    SILENCE,
    SILENCE_DBFS,
    UNCERTAIN,
    Floats,
    Timeline,
    log_softmax,
)
from serve import schema
from serve.problems import recording_error
from serve.schema import Options, StreamOptions
from serve.service import Card, Explained, WorkerResult

_SILENT_DBFS = -200.0
_DIGITS = 4
OTHER_ANSWERS = {
    UNCERTAIN: "the confidence is below min_confidence; or min_confidence is above 0 and the recording is unlike the "
    "training recordings",
    NOT_SPEECH: "no speech was found: no class, no confidence, no scores",
    SILENCE: f"the level is below {SILENCE_DBFS:g} dBFS: no class, no confidence, no scores",
}
_PLATFORMS = {"onnx": "onnxruntime_onnx", "torch": "pytorch"}


def recording(result: WorkerResult, name: str | None, options: Options) -> schema.Recording:
    """The answer for one recording; raises ServiceError where it could not be used."""
    prediction = usable(result.prediction).told()
    label = prediction.label(options.min_confidence)
    assert label is not None
    return schema.Recording(
        name=name,
        label=label,
        confidence=known(prediction.confidence),
        scores=scores(result.labels, prediction.probabilities, options.top_k),
        duration_s=prediction.duration_s,
        scored_s=prediction.scored_s,
        sample_rate_hz=prediction.sample_rate_hz,
        channels=prediction.channels,
        familiarity=known(prediction.familiarity),
        speech_share=known(prediction.speech_share),
        level_dbfs=level(prediction.level_dbfs),
        notice=prediction.notice or None,
        segments=None if result.timeline is None else segments(result.timeline, result.labels, options),
        picture=None if result.picture is None else picture(result.picture),
    )


def usable(prediction: Prediction) -> Prediction:
    """``prediction`` unchanged; raises ServiceError where its recording could not be used."""
    if not prediction.ok:
        raise recording_error(prediction.status, prediction.error or "")
    return prediction


def scores(labels: Sequence[str], probabilities: NDArray[np.float64], top_k: int | None) -> list[schema.Score]:
    """Classes and their probabilities ``(classes,)``, most probable first; empty where they are NaN."""
    if not np.isfinite(probabilities).all():
        return []
    order = np.argsort(-probabilities, kind="stable")[:top_k]
    return [schema.Score(label=labels[i], score=float(probabilities[i])) for i in order]


def segments(timeline: Timeline, labels: Sequence[str], options: Options | StreamOptions) -> list[schema.Segment]:
    """The windows of a recording, in order."""
    probabilities = timeline.told()
    return [
        schema.Segment(
            channel=str(timeline.channel[i]),
            start_s=float(timeline.start_s[i]),
            end_s=float(timeline.end_s[i]),
            label=label,
            confidence=known(float(probabilities[i].max())),
            scores=scores(labels, probabilities[i], options.top_k),
            familiarity=known(float(timeline.familiarity[i])),
            level_dbfs=level(float(timeline.level_dbfs[i])),
        )
        for i, label in enumerate(timeline.names(labels, options.min_confidence))
    ]


class Segments:
    """The windows of a stream, joined to segments as they come, by the rules of ``Timeline.merged``."""

    def __init__(self, labels: Sequence[str], options: StreamOptions) -> None:
        self._labels, self._options = labels, options
        self._open: _Run | None = None

    def add(self, timeline: Timeline, later_s: float) -> tuple[schema.Segment, list[schema.StreamSegment]]:
        """Add the window of ``timeline``, its times moved by ``later_s``; returns it and the segments it changes."""
        found = segments(timeline, self._labels, self._options)[0]
        start_s, end_s = round(found.start_s + later_s, 6), round(found.end_s + later_s, 6)
        window = found.model_copy(update={"start_s": start_s, "end_s": end_s})
        changed, run = [], self._open
        if run is None or run.label != window.label:
            if run is not None:
                border_s = (run.end_s + start_s) / 2 if run.end_s > start_s else run.end_s
                changed.append(self._told(run, border_s, final=True))
                start_s = max(border_s, start_s)
            run = self._open = _Run(window.label, start_s, np.zeros(len(self._labels)))
        run.add(window, timeline.log_p[0])
        return window, [*changed, self._told(run, run.end_s, final=False)]

    def last(self) -> list[schema.StreamSegment]:
        """The last segment, now final; empty where there was no window."""
        return [] if self._open is None else [self._told(self._open, self._open.end_s, final=True)]

    def _told(self, run: _Run, end_s: float, *, final: bool) -> schema.StreamSegment:
        p = np.exp(log_softmax(run.log_p[np.newaxis] / run.windows)[0])
        p = np.full(len(p), np.nan) if run.label in NO_EMOTION else p
        return schema.StreamSegment(
            channel="mix",
            start_s=run.start_s,
            end_s=end_s,
            label=run.label,
            confidence=known(float(p.max())),
            scores=scores(self._labels, p, self._options.top_k),
            familiarity=None if run.familiarity is None else run.familiarity / run.windows,
            level_dbfs=run.level_dbfs,
            final=final,
            windows=run.windows,
        )


@dataclass
class _Run:
    """Consecutive windows of one label: sums of their log-probabilities ``(classes,)`` and familiarities."""

    label: str
    start_s: float
    log_p: Floats
    end_s: float = 0.0
    familiarity: float | None = 0.0
    level_dbfs: float = -math.inf
    windows: int = 0

    def add(self, window: schema.Segment, log_p: Floats) -> None:
        self.windows, self.end_s = self.windows + 1, window.end_s
        self.log_p = self.log_p + log_p
        self.level_dbfs = max(self.level_dbfs, window.level_dbfs)
        known_too = self.familiarity is not None and window.familiarity is not None
        self.familiarity = (self.familiarity or 0.0) + (window.familiarity or 0.0) if known_too else None


def known(number: float) -> float | None:
    """``number``; None where it is not finite."""
    return number if math.isfinite(number) else None


def level(dbfs: float) -> float:
    """``dbfs``; -200 where it is not finite, which JSON cannot carry."""
    return dbfs if math.isfinite(dbfs) else _SILENT_DBFS


def picture(drawn: Picture) -> schema.Picture:
    """A picture, its values rounded to the precision of a plot."""
    return schema.Picture(
        waveform=schema.Waveform(
            start_s=drawn.outline_start_s,
            end_s=drawn.outline_end_s,
            low=drawn.low.astype(float).round(_DIGITS).tolist(),
            high=drawn.high.astype(float).round(_DIGITS).tolist(),
        ),
        window_start_s=drawn.window_start_s,
        window_s=drawn.window_s,
        frequency_hz=drawn.frequency_hz.round(1).tolist(),
        time_s=drawn.time_s.round(_DIGITS).tolist(),
        level_db=drawn.level_db.astype(float).round(1).tolist(),
        overview_db=drawn.overview_db.astype(float).round().tolist(),
    )


def explanation(explained: Explained, request_id: str) -> schema.Explanation:
    """The response of ``POST /v1/explain``; raises ServiceError where there is no explanation."""
    prediction = usable(explained.prediction)
    assert explained.occlusion is not None
    assert explained.picture is not None
    occlusion, drawn = explained.occlusion, picture(explained.picture)
    times_s = drawn.window_start_s + occlusion.time_edges_s(explained.features)
    return schema.Explanation(
        id=request_id,
        model=explained.model,
        version=explained.version,
        label=explained.labels[occlusion.target],
        confidence=prediction.confidence,
        scores=scores(explained.labels, prediction.probabilities, None),
        time_s=times_s.round(_DIGITS).tolist(),
        frequency_hz=occlusion.frequency_edges_hz(explained.features).round(1).tolist(),
        importance=occlusion.importance.round(_DIGITS).tolist(),
        picture=drawn,
    )


def model_info(card: Card, names: Sequence[str], limits: dict[str, float]) -> schema.ModelInfo:
    """The response of ``GET /v1/model``: a model, all ``names``, and the service's limits."""
    return schema.ModelInfo(
        name=card.name,
        version=card.version,
        labels=list(card.labels),
        other_answers=OTHER_ANSWERS,
        features=card.features.to_dict(),
        crops=card.crops,
        metrics=card.metrics,
        card=card.text,
        models=list(names),
        limits=limits,
    )


def metadata(card: Card) -> schema.ModelMetadata:
    """The description of a model in the Open Inference Protocol."""
    return schema.ModelMetadata(
        name=card.name,
        versions=[card.version],
        platform=_PLATFORMS.get(card.backend, card.backend),
        inputs=[schema.Tensor(name="features", datatype="FP32", shape=[-1, *card.features.input_shape])],
        outputs=[schema.Tensor(name="logits", datatype="FP32", shape=[-1, len(card.labels)])],
    )
