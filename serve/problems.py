"""Errors as RFC 9457 problem documents, and what travels with a request: id, headers, body, notes for its log line.

A problem has a status, a stable ``code``, one sentence; never a path or a traceback. The codes of recordings are those
of ``pipeline.audio.load`` (``AudioError.code``); the others are listed in ``KINDS``. ``Identify`` makes an id
(``X-Request-ID``) where a client sends none, and puts it on every answer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, NamedTuple

from fastapi.responses import JSONResponse

from pipeline.storage.errors import ERRORS
from serve.schema import FieldError, Problem

if TYPE_CHECKING:
    from starlette.types import Scope

MEDIA_TYPE = "application/problem+json"


class Kind(NamedTuple):
    """HTTP status and title of a code."""

    status: int
    title: str


KINDS: Mapping[str, Kind] = {
    "bad_request": Kind(400, "The request cannot be read"),
    "unauthorized": Kind(401, "An API key is needed"),
    "key_required": Kind(403, "The service has no API key"),
    "foreign_host": Kind(403, "The service answers under another name"),
    "foreign_page": Kind(403, "A page of another site"),
    "not_found": Kind(404, "Nothing at this address"),
    "unknown_model": Kind(404, "No model of this name"),
    "method_not_allowed": Kind(405, "Another method is needed"),
    "body_timeout": Kind(408, "The request came too slowly"),
    "body_too_large": Kind(413, "The request is too large"),
    "too_many_files": Kind(422, "Too many recordings in one request"),
    "unsupported_media_type": Kind(415, "Another content type is needed"),
    "invalid_request": Kind(422, "A field is wrong"),
    "too_many_windows": Kind(422, "Too many windows"),
    "not_explainable": Kind(422, "This model cannot be explained"),
    "overloaded": Kind(429, "Too many requests"),
    "too_fast": Kind(429, "Sound that comes faster than it sounds"),
    "internal_error": Kind(500, "Our mistake"),
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


class ServiceError(Exception):
    """A request, or one recording of it, that cannot be answered.

    ``headers`` are added to the answer, ``errors`` name the fields that are wrong.
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
        """As a document."""
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
    """Status and title of a code: ours, or an AudioError's."""
    return KINDS.get(code) or Kind(_AUDIO_STATUS.get(code, 422), _AUDIO_TITLE)


def recording_error(code: str, detail: str) -> ServiceError:
    """The error of a recording with the ``status`` and ``error`` of a Prediction; unforeseen ones tell nothing."""
    if code == "internal_error" or code not in {*ERRORS, *KINDS}:
        return ServiceError("internal_error", "this recording met a mistake of ours; report it with the request id")
    return ServiceError(code, detail)


def retry_later(code: str, detail: str, after_s: float = 1.0) -> ServiceError:
    """An error that goes away by itself, with ``Retry-After`` in whole seconds."""
    return ServiceError(code, detail, headers={"Retry-After": str(max(1, math.ceil(after_s)))})


def overloaded() -> ServiceError:
    """The error of a full queue."""
    return retry_later("overloaded", "as many recordings wait as may; send it again in a moment")


def answer(error: ServiceError, scope: Scope) -> JSONResponse:
    """The answer that tells the client of the request ``scope`` of ``error``; its code is noted for the log."""
    note(scope, code=error.code)
    document = error.problem(request_id(scope) or None)
    headers = dict(error.headers)
    if document.status == HTTPStatus.UNAUTHORIZED:
        headers.setdefault("WWW-Authenticate", "Bearer")
    content = document.model_dump(mode="json", exclude_none=True)
    return JSONResponse(content, document.status, headers, media_type=MEDIA_TYPE)


_LONGEST = 128
_NOTES, _BODY = "ser.notes", "ser.body"


def header(scope: Scope, name: bytes) -> str | None:
    """The first value of a header (lower-case name), as text."""
    return next((value.decode("latin-1") for key, value in scope["headers"] if key == name), None)


def request_id(scope: Scope) -> str:
    """Printable ASCII of the request's id, 128 characters at most; empty where nothing in front of us gave one."""
    given = header(scope, b"x-request-id") or ""
    return "".join(character for character in given if character.isascii() and character.isprintable())[:_LONGEST]


def notes(scope: Scope) -> dict[str, Any]:
    """What is known of the request so far."""
    found: dict[str, Any] = scope.setdefault(_NOTES, {})
    return found


def note(scope: Scope, **values: Any) -> None:
    """Add to ``notes``."""
    notes(scope).update(values)


def hand_over(scope: Scope, body: bytes) -> None:
    """Send the whole body along with the scope, which spares the ingress to ask the proxy for it."""
    scope[_BODY] = body


def holds_body(scope: Scope) -> bool:
    """Whether the whole body has been handed over, and not been taken yet."""
    return _BODY in scope


def handed_over(scope: Scope) -> bytes | None:
    """Take the body out of the scope; None where it is not there, and must be received."""
    body: bytes | None = scope.pop(_BODY, None)
    return body
