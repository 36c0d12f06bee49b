"""What travels with a request through all layers: its id, its headers, its body, and notes for its line in the log.

Ray Serve's proxy makes an id (``X-Request-ID``) where a client sends none, and puts it on every answer, also on those
it writes itself.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from starlette.types import Scope

_LONGEST = 128
_NOTES, _BODY = "ser.notes", "ser.body"


def header(scope: Scope, name: bytes) -> str | None:
    """The first value of a header (lower-case name), as text."""
    return next((value.decode("latin-1") for key, value in scope["headers"] if key == name), None)


def request_id(scope: Scope) -> str:
    """Printable characters of the request's id, 128 at most; empty where nothing in front of us gave one."""
    given = header(scope, b"x-request-id") or ""
    return "".join(character for character in given if character.isprintable())[:_LONGEST]


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
