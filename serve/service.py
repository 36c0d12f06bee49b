"""What the parts tell each other: what a model worker is asked and answers, and what every request needs. No Ray."""

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
    """What is asked of a recording.

    Attributes:
        window_s: hear all of it in windows of this length; ``hop_s`` from one to the next. Either implies the other:
            the model's window, and the window's length. ``middle``: the bundle's one window, or crops. None and None:
            the middle up to ``LONG_S``, all of it in the model's windows beyond.
        channels: ``mix``, the number of one channel, or ``each``, which implies windows. None: ``mix``, and ``each``
            where all of a recording beyond ``LONG_S`` is heard and its channels differ.
        picture: whether to add what the model sees.
        at: hear the windows of the model's length that start there, in seconds, ascending, and nothing else: those of a
            stream, of which the recording is a part.
    """

    window_s: float | Literal["middle"] | None = None
    hop_s: float | None = None
    channels: Channels | None = None
    picture: bool = False
    at: tuple[float, ...] = ()

    @property
    def channel(self) -> Channel:
        """The one channel that is heard, or the mix of all where each is."""
        return "mix" if self.channels is None or self.channels == "each" else self.channels

    @property
    def windowed(self) -> bool:
        """Whether all of the recording is heard, however long it is."""
        return isinstance(self.window_s, float) or self.hop_s is not None or self.channels == "each" or bool(self.at)

    @property
    def by_length(self) -> bool:
        """Whether its length decides what is heard."""
        return self.window_s is None and not self.windowed


@dataclass(frozen=True)
class Timing:
    """Where the time of an answer went.

    Attributes:
        decode_s: decoding and features; ``wait_s``: for the network to be free; ``network_s``: in it.
        batch: recordings that went through the network together.
    """

    decode_s: float = 0.0
    wait_s: float = 0.0
    network_s: float = 0.0
    batch: int = 0


@dataclass(frozen=True)
class WorkerResult:
    """The answer for one recording, with the model that gave it."""

    model: str
    version: str
    labels: tuple[str, ...]
    prediction: Prediction
    timeline: Timeline | None = None
    picture: Picture | None = None
    timing: Timing = field(default=Timing())


@dataclass(frozen=True)
class Explained:
    """An answer of ``explain``; ``occlusion`` and ``picture`` are None when the recording could not be used."""

    model: str
    version: str
    labels: tuple[str, ...]
    prediction: Prediction
    features: FeatureConfig
    occlusion: OcclusionMap | None = None
    picture: Picture | None = None


@dataclass(frozen=True)
class Card:
    """A model worker's model."""

    name: str
    version: str
    labels: tuple[str, ...]
    features: FeatureConfig
    crops: int
    backend: str
    metrics: dict[str, object]
    text: str


class Models(Protocol):
    """The models of a service, wherever they run. Each call may raise ``problems.ServiceError``."""

    @property
    def names(self) -> tuple[str, ...]:
        """Their names; the first is the default."""
        ...

    async def predict(self, model: str, data: bytes, request: PredictRequest) -> WorkerResult:
        """What one recording sounds like."""
        ...

    async def explain(self, model: str, data: bytes, request: PredictRequest) -> Explained:
        """Why."""
        ...

    async def card(self, model: str) -> Card:
        """What is known of a model."""
        ...

    async def ready(self, model: str) -> bool:
        """Whether it can answer now."""
        ...

    def check_room(self, model: str) -> None:
        """Raise the ``ServiceError`` of a full queue, so that no body need be read for nothing."""
        ...


class Meter(Protocol):
    """Where figures go."""

    def request(self, route: str, status: int, code: str, seconds: float) -> None:
        """Count a request; ``code`` is ``ok`` or that of its problem."""
        ...

    def recording(self, model: str, code: str) -> None:
        """Count a recording; ``code`` is ``ok`` or that of its problem."""
        ...

    def streams(self, count: int) -> None:
        """Note how many live streams are open now."""
        ...


@dataclass(frozen=True)
class Service:
    """All that a request needs: models, what is allowed, where figures go, the longest window, the key's hash."""

    models: Models
    settings: Settings
    meter: Meter
    window_s: float
    key_digest: str | None = None

    def check_room(self) -> None:
        """Raise the ``ServiceError`` of a full queue when those of all models are: no body need be read for nothing."""
        full = None
        for name in self.models.names:
            try:
                return self.models.check_room(name)
            except ServiceError as error:
                full = error
        assert full is not None, "a service has models"
        raise full

    def model(self, name: str | None) -> str:
        """The model called ``name``, by default the first.

        Raises:
            ServiceError: there is none.
        """
        names = self.models.names
        if name is not None and name not in names:
            raise ServiceError("unknown_model", f"no model of this name; there are {', '.join(names)}")
        return name or names[0]


def service_of(request: Request) -> Service:
    """The service that a request was sent to."""
    service: Service = request.app.state.service
    return service
