"""What an ingress process serves, as a value that a proxy can make the same application of (``serve.short_way``)."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI
from ray import serve as ray_serve
from ray.serve.handle import DeploymentHandle

from serve.access import Meter
from serve.api import create_app
from serve.remote import RemoteModels
from serve.service import Service
from serve.settings import Settings


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

    def application(self, meter: Meter) -> FastAPI:
        """The HTTP interface to it."""
        models = RemoteModels(self.handles, self.settings.room)
        return create_app(Service(models, self.settings, meter, self.window_s, self.digest))


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
