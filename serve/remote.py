"""Model workers behind Ray Serve's handles, and what the ingress does when one is full, dies, or is gone."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from typing import Any

from ray import serve as ray_serve
from ray.exceptions import RayActorError
from ray.serve._private.common import ReplicaState
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from serve.asks import Ask, Card, Explained, Heard
from serve.problems import ServiceError, overloaded, retry_later

logger = logging.getLogger("ray.serve.ser")
_READY_WITHIN_S = 2.0


class RemoteModels:
    """``asks.Models`` behind deployment handles.

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

    async def predict(self, model: str, data: bytes, ask: Ask) -> Heard:
        """What one recording sounds like."""
        heard: Heard = await self._twice(model, "predict", data, ask)
        return heard

    async def explain(self, model: str, data: bytes, ask: Ask) -> Explained:
        """Why."""
        explained: Explained = await self._twice(model, "explain", data, ask)
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

    async def _twice(self, model: str, method: str, data: bytes, ask: Ask) -> Any:
        """Ask; when the worker dies over it, ask another one, the recording then decoded apart."""
        self._open[model] += 1
        try:
            return await self._once(model, method, data, ask)
        except _WorkerDied:
            logger.warning("a worker of %s died while it held a request; asking again", model)
            return await self._once(model, method, data, ask, True)
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
    return bool(deployment and deployment.replica_states.get(ReplicaState.RUNNING))


class _WorkerDied(ServiceError):
    """The process that held a request has gone."""

    def __init__(self) -> None:
        super().__init__("unavailable", "the model's worker has just gone; send it again in a moment")
        self.headers["Retry-After"] = "2"


def _unavailable(model: str) -> ServiceError:
    return retry_later("unavailable", f"no worker of {model} can answer; send it again in a moment", after_s=2)
