"""What is known of the models and whether they answer: ``/v1/model`` and the Open Inference Protocol's ``/v2``."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Annotated

from fastapi import APIRouter, Query, Request, Response

from serve import answers, schema
from serve.service import Service, service_of

models = APIRouter(tags=["model"])
health = APIRouter(prefix="/v2", tags=["health"])


@models.get("/v1/model", response_model=schema.ModelInfo)
async def model_info(
    request: Request, model: Annotated[str | None, Query(max_length=100, description="default: the first")] = None
) -> schema.ModelInfo:
    """Labels in order, what the model hears, measured figures, card, and the service's limits."""
    service = service_of(request)
    card = await service.models.card(service.model(model))
    return answers.model_info(card, service.models.names, service.settings.public_limits)


@models.get("/v2/models/{name}", response_model=schema.ModelMetadata)
async def model_metadata(request: Request, name: str) -> schema.ModelMetadata:
    """A model's inputs and outputs (Open Inference Protocol)."""
    service = service_of(request)
    return answers.metadata(await service.models.card(service.model(name)))


@models.get("/v2/models/{name}/ready", response_model=schema.Ready, responses={503: {"model": schema.Ready}})
async def model_ready(request: Request, response: Response, name: str) -> schema.Ready:
    """Whether a model can answer now (Open Inference Protocol)."""
    service = service_of(request)
    return await _readiness(service, [service.model(name)], response)


@health.head("/health/live", include_in_schema=False)
@health.get("/health/live", response_model=schema.Live)
async def live() -> schema.Live:
    """Whether the service runs (Open Inference Protocol)."""
    return schema.Live(live=True)


@health.head("/health/ready", include_in_schema=False)
@health.get("/health/ready", response_model=schema.Ready, responses={503: {"model": schema.Ready}})
async def ready(request: Request, response: Response) -> schema.Ready:
    """Whether all models can answer now (Open Inference Protocol)."""
    service = service_of(request)
    return await _readiness(service, service.models.names, response)


async def _readiness(service: Service, names: Sequence[str], response: Response) -> schema.Ready:
    answers_now = await asyncio.gather(*(service.models.ready(name) for name in names))
    if not all(answers_now):
        response.status_code = 503
    return schema.Ready(ready=all(answers_now))
