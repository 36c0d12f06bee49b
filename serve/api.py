"""The HTTP interface as one ASGI application over some ``Models``, and its OpenAPI document. No Ray in here.

The document is what FastAPI derives, completed by the bodies that are read by hand and by our problems.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fastapi import Depends, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.utils import get_openapi
from fastapi_offline import FastAPIOffline
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware

from serve import routes
from serve.auth import PageCheck, require_key, require_loopback
from serve.middleware import Access, Closing, Identify, Unpack, UntilGone, cors_of, limits_of
from serve.problems import KINDS, MEDIA_TYPE, ServiceError, answer
from serve.schema import ExplainOptions, FieldError, Options, Problem, TaskInput
from serve.service import Service
from serve.settings import Settings
from serve.uploads import check_query

_HTTP_CODES = {401: "unauthorized", 404: "not_found", 405: "method_not_allowed", 413: "body_too_large"}


def create_app(service: Service, closed: Callable[[], bool] | None = None) -> FastAPI:
    """The application; it takes no new work once ``closed()``, where that is given."""
    settings = service.settings
    app = FastAPIOffline(title="Speech emotion recognition", version="1", redoc_url=None)
    app.state.service = service
    allowed = [Depends(require_key if service.key_digest else require_loopback), Depends(check_query)]
    app.include_router(routes.router, dependencies=allowed)
    app.include_router(routes.models, dependencies=allowed)
    app.include_router(routes.health)
    app.add_exception_handler(ServiceError, _service_error)
    app.add_exception_handler(RequestValidationError, _validation_error)
    app.add_exception_handler(HTTPException, _http_error)
    pages = [] if service.key_digest else [Middleware(PageCheck, origins=settings.cors_origins)]
    closing = [Middleware(Closing, closed=closed)] if closed else []
    inner = [Middleware(UntilGone), limits_of(settings), *pages, *closing, Middleware(Access, meter=service.meter)]
    outwards = [*inner, *cors_of(settings), Middleware(Unpack), Middleware(Identify)]
    for middleware in outwards:
        app.add_middleware(middleware.cls, *middleware.args, **middleware.kwargs)
    app.openapi = _described(app, service.models.names, service.window_s, settings)  # type: ignore[method-assign]
    return app


async def _service_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ServiceError)
    return answer(error, request.scope)


async def _validation_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    errors = [FieldError(field=".".join(map(str, e["loc"][1:])), message=e["msg"]) for e in error.errors()]
    told = "; ".join(f"{item.field}: {item.message}" for item in errors[:3])
    return answer(ServiceError("invalid_request", told, errors=errors), request.scope)


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
    "Emotions from recordings of speech. Errors are RFC 9457 problem documents with a stable `code`; 429 and 503 carry "
    "`Retry-After` when trying again makes sense. Recordings are sent as bytes: no paths, no addresses."
)


def _described(app: FastAPI, names: Sequence[str], window_s: float, settings: Settings) -> Callable[[], dict[str, Any]]:
    """The function that FastAPI calls for its document, which is made once.

    Args:
        names: of the models.
        window_s: the longest window that a model hears.
    """
    made: dict[str, Any] = {}

    def document() -> dict[str, Any]:
        if not made:
            made.update(_document(app, names, window_s, settings))
        return made

    return document


def _document(app: FastAPI, names: Sequence[str], window_s: float, settings: Settings) -> dict[str, Any]:
    document = get_openapi(title=app.title, version=app.version, description=_DESCRIPTION, routes=app.routes)
    document["components"].setdefault("schemas", {}).update(_schemas(Problem, Options, ExplainOptions, TaskInput))
    for path, operations in document["paths"].items():
        for operation in operations.values():
            _complete(operation, path, settings, names)
    form = document["paths"]["/v1/predict"]["post"]["requestBody"]["content"]["multipart/form-data"]["schema"]
    form["properties"]["window_s"]["oneOf"][0]["maximum"] = window_s
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
    """Fields of a form: a form knows no null, one leaves a field out."""
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
