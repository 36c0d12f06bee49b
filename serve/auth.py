"""Who may come in: an API key as bearer token, compared in constant time; without one, this machine only.

That holds however the service was started: where no key is set, requests that arrive at an address beyond loopback are
refused, so that a service bound to all interfaces by mistake is closed, not open.
"""

from __future__ import annotations

import hmac
import os
from typing import TYPE_CHECKING, Annotated

from fastapi import Request, Security
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from fastapi.security.utils import get_authorization_scheme_param

from pipeline.storage.errors import SerError
from serve.problems import ServiceError, answer, header
from serve.schema import API_KEY_VARIABLE, checked_key, key_digest

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Scope, Send

LOOPBACK = ("127.0.0.1", "::1", "localhost")
_BEARER = HTTPBearer(auto_error=False, scheme_name="api_key", description="the value of SER_API_KEY")


class KeyCheck:
    """Sends uploads without the right key away before their bodies are read: an ASGI middleware before the proxy.

    The ingress asks for the key again, of every request that needs it.
    """

    def __init__(self, app: ASGIApp, *, digest: str) -> None:
        self.app, self._digest = app, digest

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request, or refuse it."""
        if scope["type"] == "http" and scope["method"] == "POST" and not _has_key(scope, self._digest):
            await answer(_unauthorized(), scope)(scope, receive, send)
        else:
            await self.app(scope, receive, send)


async def require_key(
    request: Request, _given: Annotated[HTTPAuthorizationCredentials | None, Security(_BEARER)]
) -> None:
    """Let requests with the right key in; ``_given`` puts the key into the interface's description.

    Raises:
        ServiceError: no key, or another one.
    """
    if not _has_key(request.scope, request.app.state.service.key_digest):
        raise _unauthorized()


async def require_loopback(request: Request) -> None:
    """Let requests from this machine in.

    Raises:
        ServiceError: the request came by another address.
    """
    server = request.scope.get("server")
    if server and not is_loopback(server[0]):
        raise ServiceError(
            "key_required", f"beyond this machine the service answers only with a key; start it with {API_KEY_VARIABLE}"
        )


def _has_key(scope: Scope, digest: str) -> bool:
    scheme, given = get_authorization_scheme_param(header(scope, b"authorization"))
    return scheme.lower() == "bearer" and hmac.compare_digest(key_digest(given), digest)


def _unauthorized() -> ServiceError:
    return ServiceError("unauthorized", "send the service's key as the header Authorization: Bearer KEY")


def key_from_environment() -> str | None:
    """``SER_API_KEY``; None when it is unset or empty.

    Raises:
        SerError: it can be no key.
    """
    try:
        return checked_key(os.environ.get(API_KEY_VARIABLE))
    except ValueError as error:
        raise SerError(str(error)) from error


def key_digest_from_environment() -> str | None:
    """Hash of ``SER_API_KEY``; None when it is unset or empty.

    Raises:
        SerError: it can be no key.
    """
    key = key_from_environment()
    return key_digest(key) if key else None


def is_loopback(host: str) -> bool:
    """Whether only programs of this machine reach ``host``."""
    return host in LOOPBACK or host.startswith("127.")
