"""The endpoints: recordings in, emotions out; what is known of the models, and whether they answer.

Key and length of the queue are asked before a body is read. One recording that cannot be used is the answer's problem;
among several, each has its own, and the others are answered. ``/v2`` is the Open Inference Protocol's.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from typing import Annotated

from fastapi import APIRouter, Query, Request, Response

from pipeline.inference.predictor import Channels
from serve import answers, schema, uploads
from serve.problems import ServiceError, note, request_id, retry_later
from serve.schema import ExplainOptions, Options
from serve.service import PredictRequest, Service, WorkerResult, service_of
from serve.uploads import Upload

router = APIRouter(prefix="/v1", tags=["inference"])
_AT_ONCE = 8  # recordings of one request that are in work together; others shall come through as well


@router.post("/predict", response_model=schema.Prediction, response_model_exclude_none=True)
async def predict(request: Request) -> schema.Prediction:
    """Emotions of one recording or several."""
    service = service_of(request)
    service.check_room()
    files, options = await uploads.read_form(request, Options, service.settings.max_files)
    model = service.model(options.model)
    service.models.check_room(model)
    if options.window_s == "middle" and (options.hop_s is not None or options.channels == "each"):
        raise uploads.invalid("window_s", "middle is one window; leave out hop_s and channels=each, or give a length")
    if isinstance(options.window_s, float) and options.window_s > service.window_s:
        raise uploads.invalid("window_s", f"{options.window_s:g} is above {service.window_s:g}, all that models hear")
    note(request.scope, model=model, files=len(files))
    async with _deadline(service):
        found = await _all_of_them(service, model, files, options)
    _note_timing(request, found[0])
    answered: list[schema.Recording | schema.Failure] = []
    for upload, result in zip(files, found, strict=True):
        try:
            with _counted(service, model):
                answered.append(answers.recording(result, upload.name, options))
        except ServiceError as error:
            if len(files) == 1:
                raise
            answered.append(schema.Failure(name=upload.name, problem=error.problem(None)))
    name, version = found[0].model, found[0].version
    return schema.Prediction(id=request_id(request.scope), model=name, version=version, files=answered)


@router.post("/audio-classification", response_model=list[schema.Score])
async def audio_classification(request: Request) -> list[schema.Score]:
    """The Hugging Face task: audio bytes (or JSON with base64 and parameters) in, labels and scores out."""
    service = service_of(request)
    model = service.model(None)
    service.models.check_room(model)
    upload, parameters = await uploads.read_task(request)
    note(request.scope, model=model, files=1)
    async with _deadline(service):
        result = await service.models.predict(model, upload.data, PredictRequest())
    _note_timing(request, result)
    with _counted(service, model):
        prediction = answers.usable(result.prediction).told()
    return answers.scores(result.labels, prediction.probabilities, parameters.top_k)


@router.post("/explain", response_model=schema.Explanation)
async def explain(request: Request) -> schema.Explanation:
    """Which parts of what the model sees speak for the predicted label, over time and mel bands."""
    service = service_of(request)
    service.check_room()
    files, options = await uploads.read_form(request, ExplainOptions, max_files=1)
    model = service.model(options.model)
    service.models.check_room(model)
    note(request.scope, model=model, files=1)
    async with _deadline(service):
        explained = await service.models.explain(
            model, files[0].data, PredictRequest(channels=_channels(options.channels))
        )
    with _counted(service, model):
        return answers.explanation(explained, request_id(request.scope))


async def _all_of_them(service: Service, model: str, files: list[Upload], options: Options) -> list[WorkerResult]:
    """What became of each file. A ServiceError (a full queue, say) concerns the request as a whole."""
    wanted = PredictRequest(options.window_s, options.hop_s, _channels(options.channels), options.picture)
    places = asyncio.Semaphore(_AT_ONCE)

    async def one(upload: Upload) -> WorkerResult:
        async with places:
            return await service.models.predict(model, upload.data, wanted)

    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(one(upload)) for upload in files]
    except* ServiceError as errors:
        raise errors.exceptions[0] from None
    return [task.result() for task in tasks]


@asynccontextmanager
async def _deadline(service: Service) -> AsyncIterator[None]:
    try:
        async with asyncio.timeout(service.settings.deadline_s):
            yield
    except TimeoutError:
        detail = f"no answer within {service.settings.deadline_s:g} s; send fewer or shorter recordings, or later"
        raise retry_later("deadline_exceeded", detail) from None


@contextmanager
def _counted(service: Service, model: str) -> Iterator[None]:
    """Count the recording whose answer is made here."""
    try:
        yield
    except ServiceError as error:
        service.meter.recording(model, error.code)
        raise
    service.meter.recording(model, "ok")


def _channels(text: str | None) -> Channels | None:
    if text is None:
        return None
    if text.isdecimal():
        return int(text)
    return "each" if text == "each" else "mix"


def _note_timing(request: Request, result: WorkerResult) -> None:
    timing = result.timing
    stages = {"decode_ms": timing.decode_s, "wait_ms": timing.wait_s, "network_ms": timing.network_s}
    note(request.scope, batch=timing.batch, **{name: round(value * 1e3, 1) for name, value in stages.items()})


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
