"""The HTTP interface as one ASGI application over some ``Models``: routes, doors, limits, problems. No Ray in here."""

from __future__ import annotations

from fastapi import Depends, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi_offline import FastAPIOffline
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware

from serve import openapi, routes_inference, routes_info
from serve.access import Access
from serve.doors import require_key, require_loopback
from serve.problems import ServiceError, answer
from serve.proxy import Unpack
from serve.ray_settings import cors_of, limits_of
from serve.schema import FieldError
from serve.service import Service

_HTTP_CODES = {401: "unauthorized", 404: "not_found", 405: "method_not_allowed", 413: "body_too_large"}


def create_app(service: Service) -> FastAPI:
    """The application."""
    settings = service.settings
    app = FastAPIOffline(title="Speech emotion recognition", version="1", redoc_url=None)
    app.state.service = service
    doors = [Depends(require_key if service.key_digest else require_loopback)]
    app.include_router(routes_inference.router, dependencies=doors)
    app.include_router(routes_info.models, dependencies=doors)
    app.include_router(routes_info.health)
    app.add_exception_handler(ServiceError, _service_error)
    app.add_exception_handler(RequestValidationError, _validation_error)
    app.add_exception_handler(HTTPException, _http_error)
    outwards = [limits_of(settings), Middleware(Access, meter=service.meter), *cors_of(settings), Middleware(Unpack)]
    for middleware in outwards:
        app.add_middleware(middleware.cls, *middleware.args, **middleware.kwargs)
    app.openapi = openapi.described(app, service.models.names, service.window_s, settings)  # type: ignore[method-assign]
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
