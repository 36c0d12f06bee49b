"""Access control: an API key as bearer token, compared in constant time; without a key, this machine only.

Where no key is set, requests that arrive at an address beyond loopback are refused. So a service that is bound to all
interfaces by mistake stays closed, however it was started. Requests that a browser on this machine sends for a foreign
page are refused too: by another host name that resolves to 127.0.0.1 (DNS rebinding), or across sites.
"""

from __future__ import annotations

import hmac
import os
import re
from collections.abc import Sequence
from ipaddress import ip_address
from typing import TYPE_CHECKING, Annotated

from fastapi import Request, Security
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from fastapi.security.utils import get_authorization_scheme_param

from pipeline.storage.errors import SerError
from serve.problems import ServiceError, answer, header
from serve.schema import API_KEY_VARIABLE, checked_key, is_stream_ticket, key_digest

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Scope, Send

_ADDRESS = re.compile(r"(?:[a-z]+://)?(?P<host>\[[0-9a-fA-F:.]+\]|[^:\[\]/@]+)(?::[0-9]*)?")  # stricter than URLs are
_HEALTH = ("/v2/health/", "/-/healthz")
_BEARER = HTTPBearer(auto_error=False, scheme_name="api_key", description="the value of SER_API_KEY")


class KeyCheck:
    """ASGI middleware of Ray Serve's proxy: refuse uploads without the right key before their bodies are read.

    The ingress checks the key again, for every request that needs it.
    """

    def __init__(self, app: ASGIApp, *, digest: str) -> None:
        self.app, self._digest = app, digest

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] == "POST" and not _has_key(scope, self._digest):
            await answer(_unauthorized(), scope)(scope, receive, send)
        else:
            await self.app(scope, receive, send)


class PageCheck:
    """ASGI middleware of a service without a key: refuse requests that a browser sends for pages of other sites.

    A page whose host name resolves to 127.0.0.1 would count as same-origin, so the header ``Host`` must name this
    machine. A foreign page that calls 127.0.0.1 is recognised by ``Sec-Fetch-Site`` or ``Origin``, and refused unless
    ``origins`` names it. Links to the service work, and anyone on this machine may read its health.
    """

    def __init__(self, app: ASGIApp, *, origins: Sequence[str] = ()) -> None:
        self.app, self._origins = app, frozenset(origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        asks = scope["type"] in ("http", "websocket") and not scope["path"].startswith(_HEALTH)
        error = self._refusal(scope) if asks else None
        if error:
            await answer(error, scope)(scope, receive, send)
        else:
            await self.app(scope, receive, send)

    def _refusal(self, scope: Scope) -> ServiceError | None:
        server, origin = scope.get("server"), header(scope, b"origin")
        if server and not is_loopback(server[0]):
            return None  # the routes refuse it
        hosts = [value.decode("latin-1") for name, value in scope["headers"] if name == b"host"]
        if not all(is_loopback(_host_in(host)) for host in hosts):
            detail = f"without an API key the host must be 127.0.0.1 or localhost; use these, or set {API_KEY_VARIABLE}"
            return ServiceError("foreign_host", detail)
        if origin in self._origins or "*" in self._origins:
            return None
        link = scope.get("method") in ("GET", "HEAD") and header(scope, b"sec-fetch-mode") == "navigate"
        across = (header(scope, b"sec-fetch-site") or "").strip().lower() == "cross-site" and not link
        if across or (origin is not None and not is_loopback(_host_in(origin))):
            detail = "without an API key, pages of other sites are refused; add their origin to cors_origins"
            return ServiceError("foreign_page", detail)
        return None


async def require_key(
    request: Request, _given: Annotated[HTTPAuthorizationCredentials | None, Security(_BEARER)]
) -> None:
    """Refuse a missing or wrong API key; the parameter ``_given`` only adds the key to the OpenAPI document."""
    if not _has_key(request.scope, request.app.state.service.key_digest):
        raise _unauthorized()


async def require_loopback(request: Request) -> None:
    """Refuse a request that arrived at an address beyond loopback."""
    if error := _beyond(request.scope):
        raise error


def stream_refusal(scope: Scope, digest: str | None, now: float) -> ServiceError | None:
    """The error for a WebSocket that may not be opened; None with the key, or a valid ticket made from it."""
    if digest is None:
        return _beyond(scope)
    offered = scope.get("subprotocols", ())
    if _has_key(scope, digest) or any(is_stream_ticket(one, digest, now) for one in offered):
        return None
    return _unauthorized()


def _beyond(scope: Scope) -> ServiceError | None:
    server = scope.get("server")
    if server is None or is_loopback(server[0]):
        return None
    detail = f"the service has no API key and answers only this machine; start it with {API_KEY_VARIABLE}"
    return ServiceError("key_required", detail)


def _has_key(scope: Scope, digest: str) -> bool:
    scheme, given = get_authorization_scheme_param(header(scope, b"authorization"))
    return scheme.lower() == "bearer" and hmac.compare_digest(key_digest(given), digest)


def _unauthorized() -> ServiceError:
    return ServiceError("unauthorized", "send the service's key as the header Authorization: Bearer KEY")


def key_from_environment() -> str | None:
    """``SER_API_KEY``; None when it is unset or empty. An invalid key is refused with a SerError."""
    try:
        return checked_key(os.environ.get(API_KEY_VARIABLE))
    except ValueError as error:
        raise SerError(str(error)) from error


def key_digest_from_environment() -> str | None:
    """Hash of ``key_from_environment()``; None without a key."""
    key = key_from_environment()
    return key_digest(key) if key else None


def is_loopback(host: str) -> bool:
    """Whether ``host`` is a name or address that only this machine can reach."""
    name = host.lower().removesuffix(".")
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        address = ip_address(name)
    except ValueError:
        return False
    return (getattr(address, "ipv4_mapped", None) or address).is_loopback


def _host_in(address: str) -> str:
    """The host in a ``Host`` or ``Origin`` header; empty where there is none."""
    found = _ADDRESS.fullmatch(address)
    return found["host"].strip("[]") if found else ""
