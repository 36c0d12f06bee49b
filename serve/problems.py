"""Errors as RFC 9457 problem documents, and the data of a request in its ASGI scope: id, headers, body, log notes.

A problem has an HTTP status, a stable ``code`` and a one-line detail, but never a path or a traceback. Recordings have
the codes of ``pipeline.audio.load`` (``AudioError.code``); ``KINDS`` lists all others. ``middleware.Identify`` adds the
request's id (``X-Request-ID``) to every response.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, NamedTuple

from fastapi.responses import JSONResponse

from pipeline.storage.errors import ERRORS
from serve.schema import FieldError, Problem

if TYPE_CHECKING:
    from starlette.types import Scope

MEDIA_TYPE = "application/problem+json"


class Kind(NamedTuple):
    """HTTP status and title of a problem code."""

    status: int
    title: str


KINDS: Mapping[str, Kind] = {
    "bad_request": Kind(400, "The request cannot be read"),
    "unauthorized": Kind(401, "An API key is needed"),
    "key_required": Kind(403, "The service has no API key"),
    "foreign_host": Kind(403, "The host name is not allowed"),
    "foreign_page": Kind(403, "Pages of other sites are not allowed"),
    "not_found": Kind(404, "No such endpoint"),
    "unknown_model": Kind(404, "No model has this name"),
    "method_not_allowed": Kind(405, "The endpoint does not have this method"),
    "body_timeout": Kind(408, "The request arrived too slowly"),
    "body_too_large": Kind(413, "The request is too large"),
    "too_many_files": Kind(422, "Too many recordings in one request"),
    "unsupported_media_type": Kind(415, "Another content type is needed"),
    "invalid_request": Kind(422, "A field is wrong"),
    "too_many_windows": Kind(422, "The recording has too many windows"),
    "not_explainable": Kind(422, "This model cannot be explained"),
    "overloaded": Kind(429, "Too many requests"),
    "too_fast": Kind(429, "The sound arrives faster than real time"),
    "internal_error": Kind(500, "Internal error of the service"),
    "unavailable": Kind(503, "Not ready"),
    "deadline_exceeded": Kind(503, "No answer in time"),
}

_AUDIO_STATUS: Mapping[str, int] = {
    "not_audio": 400,
    "empty_file": 400,
    "too_long": 413,
    "too_large": 413,
    "unsupported_format": 415,
    "extra_needed": 415,
    "decode_timeout": 503,
}
_AUDIO_TITLE = "The recording cannot be used"
_MAX_NAME = 64  # characters of a field's name in an error


class ServiceError(Exception):
    """A request that cannot be answered, or one of its recordings.

    ``headers`` are added to the response, ``errors`` name the wrong fields.
    """

    def __init__(
        self,
        code: str,
        detail: str,
        *,
        headers: Mapping[str, str] | None = None,
        errors: list[FieldError] | None = None,
    ) -> None:
        super().__init__(code, detail)
        self.code, self.detail, self.errors = code, detail, errors
        self.headers = dict(headers or {})

    def problem(self, request_id: str | None) -> Problem:
        """The problem document."""
        kind = kind_of(self.code)
        return Problem(
            type=f"urn:ser:problem:{self.code}",
            title=kind.title,
            status=kind.status,
            code=self.code,
            detail=self.detail,
            request_id=request_id,
            errors=self.errors,
        )


def kind_of(code: str) -> Kind:
    """HTTP status and title of a code, from ``KINDS`` or of an AudioError."""
    return KINDS.get(code) or Kind(_AUDIO_STATUS.get(code, 422), _AUDIO_TITLE)


def recording_error(code: str, detail: str) -> ServiceError:
    """The error for a Prediction's ``status`` (code) and ``error`` (detail); ``internal_error`` for unknown codes."""
    if code == "internal_error" or code not in {*ERRORS, *KINDS}:
        code, detail = "internal_error", "this recording met an error in the service; report it with the request id"
    return ServiceError(code, detail)


def retry_later(code: str, detail: str, after_s: float = 1.0) -> ServiceError:
    """A temporary error, with the header ``Retry-After`` in whole seconds."""
    return ServiceError(code, detail, headers={"Retry-After": str(max(1, math.ceil(after_s)))})


def invalid_fields(wrong: Iterable[tuple[str, str]]) -> ServiceError:
    """The error for wrong fields: the name of each, and what is wrong with it."""
    errors = [
        FieldError(field=name if len(name) <= _MAX_NAME else name[: _MAX_NAME - 3] + "...", message=message)
        for name, message in wrong
    ]
    told = "; ".join(f"{error.field}: {error.message}" if error.field else error.message for error in errors[:3])
    return ServiceError("invalid_request", told, errors=errors)


def overloaded() -> ServiceError:
    """The error of a full queue."""
    return retry_later("overloaded", "the queue of recordings is full; send the request again in a moment")


def answer(error: ServiceError, scope: Scope) -> JSONResponse:
    """The response with the problem document of ``error``; its code is noted for the log line of ``scope``."""
    note(scope, code=error.code)
    document = error.problem(request_id(scope) or None)
    headers = dict(error.headers)
    if document.status == HTTPStatus.UNAUTHORIZED:
        headers.setdefault("WWW-Authenticate", "Bearer")
    content = document.model_dump(mode="json", exclude_none=True)
    return JSONResponse(content, document.status, headers, media_type=MEDIA_TYPE)


_LONGEST = 128
_NOTES = "ser.notes"
BODY = "ser.body"
"""Key of a scope that holds the whole body, so that the ingress need not ask the proxy for it."""


def header(scope: Scope, name: bytes) -> str | None:
    """The first value of a header (lower-case name), as text."""
    return next((value.decode("latin-1") for key, value in scope["headers"] if key == name), None)


def request_id(scope: Scope) -> str:
    """The first 128 printable ASCII characters of the request's id; empty where the request has none."""
    given = header(scope, b"x-request-id") or ""
    return "".join(character for character in given if character.isascii() and character.isprintable())[:_LONGEST]


def notes(scope: Scope) -> dict[str, Any]:
    """The fields noted for the log line of a request so far."""
    found: dict[str, Any] = scope.setdefault(_NOTES, {})
    return found


def note(scope: Scope, **values: Any) -> None:
    """Add fields to ``notes``."""
    notes(scope).update(values)
