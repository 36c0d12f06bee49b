"""Model workers behind Ray Serve's handles: what happens when one is full, dies, or is gone; and the ingress' offer.

An ``Offer`` is what an ingress process serves, as a value that a proxy makes the same application of (``ShortWay``).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI
from ray import serve as ray_serve
from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from serve.problems import ServiceError, overloaded, retry_later
from serve.routes import create_app
from serve.service import Card, Explained, Meter, PredictRequest, Service, WorkerResult
from serve.settings import Settings

logger = logging.getLogger("ray.serve.ser")
_READY_WITHIN_S = 2.0


class RemoteModels:
    """``service.Models`` behind deployment handles.

    Args:
        handles: name -> workers of the model.
        room: recordings that the workers of one model can hold, in work and waiting.
    """

    def __init__(self, handles: Mapping[str, DeploymentHandle[Any]], room: int) -> None:
        self._handles, self._room = dict(handles), room
        self._open = dict.fromkeys(handles, 0)
        self._cards: dict[str, Card] = {}  # as they were last told

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the models."""
        return tuple(self._handles)

    def check_room(self, model: str) -> None:
        """Raise 429 when the workers are known to be full."""
        if self._open[model] >= self._room:
            raise overloaded()

    async def predict(self, model: str, data: bytes, request: PredictRequest) -> WorkerResult:
        """What one recording sounds like."""
        result: WorkerResult = await self._twice(model, "predict", data, request)
        return result

    async def explain(self, model: str, data: bytes, request: PredictRequest) -> Explained:
        """Why."""
        explained: Explained = await self._twice(model, "explain", data, request)
        return explained

    async def card(self, model: str) -> Card:
        """What is known of a model; what it told last, where its workers are too busy to tell."""
        if model not in self._cards:
            return await self._fresh_card(model)
        try:
            return await asyncio.wait_for(self._fresh_card(model), _READY_WITHIN_S)
        except TimeoutError:  # at work, perhaps on one recording
            return self._cards[model]
        except ServiceError as error:
            if error.code != "overloaded":
                raise
            return self._cards[model]

    async def _fresh_card(self, model: str) -> Card:
        card: Card = await self._once(model, "card")
        self._cards[model] = card
        return card

    async def ready(self, model: str) -> bool:
        """Whether a worker answers; a full one counts as ready."""
        try:
            await asyncio.wait_for(self._fresh_card(model), _READY_WITHIN_S)
        except TimeoutError:  # at work, or hanging: Serve's health checks know
            return await _running(self._handles[model])
        except ServiceError as error:
            return error.code == "overloaded"
        return True

    async def _twice(self, model: str, method: str, data: bytes, request: PredictRequest) -> Any:
        """Ask; when the worker dies over it, ask another one, the recording then decoded in a process of its own."""
        self._open[model] += 1
        try:
            return await self._once(model, method, data, request)
        except _WorkerDied:
            logger.warning("a worker of %s died while it held a request; asking again", model)
            return await self._once(model, method, data, request, True)
        finally:
            self._open[model] -= 1

    async def _once(self, model: str, method: str, *arguments: object) -> Any:
        try:
            return await getattr(self._handles[model], method).remote(*arguments)
        except BackPressureError:
            raise overloaded() from None
        except DeploymentUnavailableError:
            raise _unavailable(model) from None
        except RayActorError as error:
            raise _WorkerDied from error


async def _running(handle: DeploymentHandle[Any]) -> bool:
    """Whether Serve knows a healthy worker of a model."""
    application = (await asyncio.to_thread(ray_serve.status)).applications.get(handle.app_name)
    deployment = application and application.deployments.get(handle.deployment_name)
    return bool(deployment and any(count and state == "RUNNING" for state, count in deployment.replica_states.items()))


class _WorkerDied(ServiceError):
    """The process that held a request has gone."""

    def __init__(self) -> None:
        super().__init__("unavailable", "the model's worker has just gone; send it again in a moment")
        self.headers["Retry-After"] = "2"


def _unavailable(model: str) -> ServiceError:
    return retry_later("unavailable", f"no worker of {model} can answer; send it again in a moment", after_s=2)


@dataclass(frozen=True)
class Offer:
    """What one ingress process serves.

    Attributes:
        revision: another one in every process.
        digest: hash of the API key, where one is needed.
        window_s: the longest window of all models.
        handles: name -> workers of the model.
    """

    revision: str
    settings: Settings
    digest: str | None
    window_s: float
    handles: Mapping[str, DeploymentHandle[Any]]

    def application(self, meter: Meter, closed: Callable[[], bool] | None = None, *, relayed: bool = False) -> FastAPI:
        """The HTTP interface to it, as of ``routes.create_app``."""
        models = RemoteModels(self.handles, self.settings.room)
        service = Service(models, self.settings, meter, self.window_s, self.digest)
        return create_app(service, closed, relayed=relayed)


def asking(app_name: str) -> Callable[[], Awaitable[Offer]]:
    """A function that asks an ingress process of the application ``app_name``; it raises while there is none."""
    ingress: DeploymentHandle[Any] | None = None

    async def ask() -> Offer:
        nonlocal ingress
        if ingress is None:
            ingress = await asyncio.to_thread(ray_serve.get_app_handle, app_name)
        offer: Offer = await ingress.offer.remote()
        return offer

    return ask
