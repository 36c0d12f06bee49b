"""The endpoints, the FastAPI application with its middlewares, and the OpenAPI document. No Ray.

The API key and the queue are checked before a body is read. A single recording that cannot be used makes the response
a problem document; among several, each has its own entry. ``/v2`` follows the Open Inference Protocol.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from functools import cache, partial
from typing import Annotated, Any

from fastapi import APIRouter, Depends, FastAPI, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.utils import get_openapi
from fastapi_offline import FastAPIOffline
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware

from pipeline.inference.predictor import Channels
from serve import answers, schema, uploads
from serve.auth import PageCheck, require_key, require_loopback
from serve.middleware import STREAM, Access, Closing, Identify, Unpack, UntilGone, cors_of, limits_of
from serve.problems import KINDS, MEDIA_TYPE, ServiceError, answer, invalid_fields, note, request_id, retry_later
from serve.schema import ExplainOptions, Options, Problem, TaskInput
from serve.service import PredictRequest, Service, WorkerResult, service_of
from serve.settings import Settings
from serve.streams import Streams
from serve.uploads import Upload, check_query

router = APIRouter(prefix="/v1", tags=["inference"])
_AT_ONCE = 8  # recordings of one request that are processed at a time, so that other requests get a share


@router.post("/predict", response_model=schema.Prediction, response_model_exclude_none=True)
async def predict(request: Request) -> schema.Prediction:
    """Predict the emotion of one or several recordings."""
    service = service_of(request)
    service.check_room()
    files, options = await uploads.read_form(request, Options, service.settings.max_files)
    model = service.model(options.model)
    service.models.check_room(model)
    if options.window_s == "middle" and (options.hop_s is not None or options.channels == "each"):
        one = "middle is a single window; leave out hop_s and channels=each, or give a length"
        raise uploads.invalid("window_s", one)
    if isinstance(options.window_s, float) and options.window_s > service.window_s:
        most = f"{options.window_s:g} is above {service.window_s:g}, the longest input window of the models"
        raise uploads.invalid("window_s", most)
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
    """The Hugging Face task: send audio bytes, or JSON with base64 and parameters; returns labels and scores."""
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
    """Explain a prediction: how much each part of the log-mel spectrogram supports the label (occlusion)."""
    service = service_of(request)
    service.check_room()
    files, options = await uploads.read_form(request, ExplainOptions, max_files=1)
    model = service.model(options.model)
    service.models.check_room(model)
    note(request.scope, model=model, files=1)
    async with _deadline(service):
        wanted = PredictRequest(channels=_channels(options.channels))
        explained = await service.models.explain(model, files[0].data, wanted)
    with _counted(service, model):
        return answers.explanation(explained, request_id(request.scope))


async def _all_of_them(service: Service, model: str, files: list[Upload], options: Options) -> list[WorkerResult]:
    """The result of each file. A ServiceError, for example for a full queue, ends the whole request."""
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
        detail = f"no answer within {service.settings.deadline_s:g} s; send fewer or shorter recordings, or try later"
        raise retry_later("deadline_exceeded", detail) from None


@contextmanager
def _counted(service: Service, model: str) -> Iterator[None]:
    """Count one recording in the metrics, by the error raised inside or as ok."""
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
    request: Request,
    model: Annotated[str | None, Query(max_length=100, description="name of a model; default: the first")] = None,
) -> schema.ModelInfo:
    """Describe a model (labels, input, measured figures, model card) and the service's limits."""
    service = service_of(request)
    card = await service.models.card(service.model(model))
    return answers.model_info(card, service.models.names, service.settings.public_limits)


@models.get("/v2/models/{name}", response_model=schema.ModelMetadata)
async def model_metadata(request: Request, name: str) -> schema.ModelMetadata:
    """Describe a model's inputs and outputs (Open Inference Protocol)."""
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


_HTTP_CODES = {401: "unauthorized", 404: "not_found", 405: "method_not_allowed", 413: "body_too_large"}


def create_app(service: Service, closed: Callable[[], bool] | None = None, *, relayed: bool = False) -> FastAPI:
    """The application. Once ``closed()`` is true, it refuses new requests. ``relayed``: see ``Streams``."""
    settings = service.settings
    app = FastAPIOffline(title="Speech emotion recognition", version="1", redoc_url=None)
    app.state.service = service
    allowed = [Depends(require_key if service.key_digest else require_loopback), Depends(check_query)]
    app.include_router(router, dependencies=allowed)
    app.include_router(models, dependencies=allowed)
    app.include_router(health)
    streams = Streams(service, closed or (lambda: False), relayed=relayed)
    app.add_api_websocket_route(STREAM, streams.serve)
    app.add_exception_handler(ServiceError, _service_error)
    app.add_exception_handler(RequestValidationError, _validation_error)
    app.add_exception_handler(HTTPException, _http_error)
    pages = [] if service.key_digest else [Middleware(PageCheck, origins=settings.cors_origins)]
    closing = [Middleware(Closing, closed=closed)] if closed else []
    inner = [Middleware(UntilGone), limits_of(settings), *pages, *closing, Middleware(Access, meter=service.meter)]
    outwards = [*inner, *cors_of(settings), Middleware(Unpack), Middleware(Identify)]
    for middleware in outwards:
        app.add_middleware(middleware.cls, *middleware.args, **middleware.kwargs)
    app.openapi = cache(partial(_document, app, service))  # type: ignore[method-assign]
    return app


async def _service_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ServiceError)
    return answer(error, request.scope)


async def _validation_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    wrong = invalid_fields((".".join(map(str, one["loc"][1:])), one["msg"]) for one in error.errors())
    return answer(wrong, request.scope)


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    code = _HTTP_CODES.get(error.status_code, "bad_request")
    detail = {"not_found": "no such endpoint; see /docs", "method_not_allowed": "see the header Allow"}.get(code)
    return answer(ServiceError(code, detail or str(error.detail), headers=error.headers), request.scope)


_PROBLEM = {"$ref": "#/components/schemas/Problem"}
_BINARY = {"type": "string", "format": "binary"}
_REF = "#/components/schemas/{model}"
_UPLOAD_STATUSES = (400, 408, 413, 415, 422, 429, 500, 503)
_DESCRIPTION = (
    "Predicts emotions from recordings of speech. Send recordings as bytes; paths and URLs are not accepted. Errors "
    "are RFC 9457 problem documents with a stable `code`; 429 and 503 have `Retry-After` where a retry makes sense. "
    "`WS /v1/stream` answers live sound, see docs/live.md."
)


def _document(app: FastAPI, service: Service) -> dict[str, Any]:
    """The OpenAPI document."""
    document = get_openapi(title=app.title, version=app.version, description=_DESCRIPTION, routes=app.routes)
    document["components"].setdefault("schemas", {}).update(_schemas(Problem, Options, ExplainOptions, TaskInput))
    for path, operations in document["paths"].items():
        for operation in operations.values():
            _complete(operation, path, service.settings, service.models.names)
    form = document["paths"]["/v1/predict"]["post"]["requestBody"]["content"]["multipart/form-data"]["schema"]
    form["properties"]["window_s"]["oneOf"][0]["maximum"] = service.window_s
    return document


def _complete(operation: dict[str, Any], path: str, settings: Settings, names: Sequence[str]) -> None:
    statuses = [401] if operation.get("security") else [403] if path.startswith("/v1") or "models" in path else []
    bodies = {
        "/v1/predict": lambda: _form(Options, settings.max_files),
        "/v1/explain": lambda: _form(ExplainOptions, 1),
        "/v1/audio-classification": _task,
    }
    if path in bodies:
        operation["requestBody"] = bodies[path]()
        statuses += _UPLOAD_STATUSES
        statuses += [404] if path != "/v1/audio-classification" else []
    elif "models" in path or path == "/v1/model":
        statuses += [404, 422, 503]
    for parameter in operation.get("parameters", []):
        parameter["schema"]["examples"] = list(names)
    responses = operation["responses"]
    responses.pop("422", None)
    for status in statuses:
        told = responses.setdefault(str(status), {"description": _titles(status), "content": {}})
        told.setdefault("content", {})[MEDIA_TYPE] = {"schema": _PROBLEM}
    for described_response in responses.values():
        described_response["headers"] = {"X-Request-ID": {"schema": {"type": "string"}}}
    for retried in {"429", "503"} & set(responses):
        responses[retried]["headers"]["Retry-After"] = {"schema": {"type": "integer"}, "description": "seconds"}


def _titles(status: int) -> str:
    return "; ".join(f"{code}: {kind.title}" for code, kind in KINDS.items() if kind.status == status)


def _form(options: type[BaseModel], max_files: int) -> dict[str, Any]:
    fields = options.model_json_schema()
    files: Mapping[str, Any] = {"type": "array", "items": _BINARY, "minItems": 1, "maxItems": max_files}
    form = {
        "type": "object",
        "properties": {"file": files if max_files > 1 else _BINARY, **_plain(fields["properties"])},
        "required": ["file"],
        "additionalProperties": False,
    }
    return {"required": True, "content": {"multipart/form-data": {"schema": form}}}


def _plain(properties: Mapping[str, Any]) -> dict[str, Any]:
    """Schemas of form fields, without null: a form leaves a field out instead."""
    fields = {}
    for name, given in properties.items():
        kept = {key: value for key, value in given.items() if key not in ("anyOf", "default") or value is not None}
        choices = [choice for choice in kept.pop("anyOf", []) if choice.get("type") != "null"]
        kept |= choices[0] if len(choices) == 1 else {"anyOf": choices} if choices else {}
        fields[name] = kept
    return fields


def _task() -> dict[str, Any]:
    content: dict[str, Any] = {kind: {"schema": _BINARY} for kind in ("application/octet-stream", "audio/wav")}
    content["application/json"] = {"schema": {"$ref": _REF.format(model=TaskInput.__name__)}}
    return {"required": True, "content": content}


def _schemas(*models: type[BaseModel]) -> dict[str, Any]:
    _, found = models_json_schema([(model, "serialization") for model in models], ref_template=_REF)
    schemas: dict[str, Any] = found["$defs"]
    return schemas
