"""Who may come in: an API key as bearer token, compared in constant time; without one, this machine only.

That holds however the service was started: where no key is set, requests that arrive at an address beyond loopback are
refused, so that a service bound to all interfaces by mistake is closed, not open.
"""

from __future__ import annotations

import hmac
from typing import Annotated

from fastapi import Request, Security
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from serve.problems import ServiceError
from serve.settings import API_KEY_VARIABLE, is_loopback, key_digest

_BEARER = HTTPBearer(auto_error=False, scheme_name="api_key", description="the value of SER_API_KEY")


async def require_key(
    request: Request, given: Annotated[HTTPAuthorizationCredentials | None, Security(_BEARER)]
) -> None:
    """Let requests with the right key in.

    Raises:
        ServiceError: no key, or another one.
    """
    expected: str = request.app.state.service.key_digest
    digest = key_digest(given.credentials if given else "")
    if given is None or not hmac.compare_digest(digest, expected):
        raise ServiceError("unauthorized", "send the service's key as the header Authorization: Bearer KEY")


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
