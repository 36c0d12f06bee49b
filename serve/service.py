"""Types shared by the HTTP side and the model workers: requests, results, and the protocols between them. No Ray."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, Protocol

from fastapi import Request

from pipeline.audio.load import Channel
from pipeline.features.features import FeatureConfig
from pipeline.inference.explain import OcclusionMap, Picture
from pipeline.inference.predictor import Channels, Prediction
from pipeline.inference.timeline import Timeline
from serve.problems import ServiceError
from serve.settings import Settings


@dataclass(frozen=True)
class PredictRequest:
    """Options for the prediction of one recording.

    Attributes:
        window_s: analyse the whole recording in windows of this length; default with ``hop_s``: the model's window.
            ``middle``: the bundle's one window, or its crops. None, and no ``hop_s``: as ``middle`` up to ``LONG_S``;
            longer recordings are analysed as a whole in the model's windows.
        hop_s: time from one window to the next; default: the window's length.
        channels: ``mix``, the number of one channel, or ``each``, which analyses the whole recording. None: ``mix``,
            but ``each`` where the whole of a recording beyond ``LONG_S`` is analysed and its channels differ.
        picture: whether to add the spectrogram of the model's input.
        at: analyse only the windows of the model's length at these start times (seconds, ascending). For streams, where
            the recording is a part of the stream.
    """

    window_s: float | Literal["middle"] | None = None
    hop_s: float | None = None
    channels: Channels | None = None
    picture: bool = False
    at: tuple[float, ...] = ()

    @property
    def channel(self) -> Channel:
        """The channel of the model's one window: a number, or the mix (also for ``each``)."""
        return "mix" if self.channels is None or self.channels == "each" else self.channels

    @property
    def windowed(self) -> bool:
        """Whether the options ask for windows, whatever the recording's length."""
        return isinstance(self.window_s, float) or self.hop_s is not None or self.channels == "each" or bool(self.at)

    @property
    def by_length(self) -> bool:
        """Whether the recording's length decides between one window and the whole recording."""
        return self.window_s is None and not self.windowed


@dataclass(frozen=True)
class Timing:
    """The times of one answer.

    Attributes:
        decode_s: decoding and features.
        wait_s: waiting for a batch of the neural network; of long requests, also for a thread.
        network_s: computing in the neural network.
        batch: windows in the batch; of several batches, the largest; 0 where there was none.
    """

    decode_s: float = 0.0
    wait_s: float = 0.0
    network_s: float = 0.0
    batch: int = 0


@dataclass(frozen=True)
class WorkerResult:
    """The result for one recording, with the model's name, version and labels."""

    model: str
    version: str
    labels: tuple[str, ...]
    prediction: Prediction
    timeline: Timeline | None = None
    picture: Picture | None = None
    timing: Timing = field(default=Timing())


@dataclass(frozen=True)
class Explained:
    """The result of ``explain``; ``occlusion`` and ``picture`` are None where the recording could not be used."""

    model: str
    version: str
    labels: tuple[str, ...]
    prediction: Prediction
    features: FeatureConfig
    occlusion: OcclusionMap | None = None
    picture: Picture | None = None


@dataclass(frozen=True)
class Card:
    """The description of a worker's model; ``text`` is the model card in Markdown."""

    name: str
    version: str
    labels: tuple[str, ...]
    features: FeatureConfig
    crops: int
    backend: str
    metrics: dict[str, object]
    text: str


class Models(Protocol):
    """The models of a service, in this process or on Ray. Each call may raise ``problems.ServiceError``."""

    @property
    def names(self) -> tuple[str, ...]:
        """Their names; the first is the default."""

    async def predict(self, model: str, data: bytes, request: PredictRequest) -> WorkerResult:
        """Predict the emotion of a recording, a file's bytes."""

    async def explain(self, model: str, data: bytes, request: PredictRequest) -> Explained:
        """Explain the prediction of a recording."""

    async def card(self, model: str) -> Card:
        """The description of a model."""

    async def ready(self, model: str) -> bool:
        """Whether the model can answer now."""

    def check_room(self, model: str) -> None:
        """Raise ``overloaded`` where the model's queue is full, before a body is read."""


class Meter(Protocol):
    """The metrics of a process that answers HTTP."""

    def request(self, route: str, status: int, code: str, seconds: float) -> None:
        """Count a request; ``code`` is ``ok`` or a problem's code."""

    def recording(self, model: str, code: str) -> None:
        """Count a recording; ``code`` is ``ok`` or a problem's code."""

    def streams(self, count: int) -> None:
        """Set the number of open live streams."""


@dataclass(frozen=True)
class Service:
    """The service behind the endpoints: models, settings, metrics, the longest input window, the API key's hash."""

    models: Models
    settings: Settings
    meter: Meter
    window_s: float
    key_digest: str | None = None

    def check_room(self) -> None:
        """Raise ``overloaded`` where the queues of all models are full, before a body is read."""
        full = None
        for name in self.models.names:
            try:
                return self.models.check_room(name)
            except ServiceError as error:
                full = error
        assert full is not None, "a service has models"
        raise full

    def model(self, name: str | None) -> str:
        """``name``, or where it is None the name of the first model; an unknown one is refused."""
        names = self.models.names
        if name is not None and name not in names:
            raise ServiceError("unknown_model", f"no model has this name; the models are {', '.join(names)}")
        return name or names[0]


def service_of(request: Request) -> Service:
    """The ``Service`` of the application that a request was sent to."""
    service: Service = request.app.state.service
    return service
