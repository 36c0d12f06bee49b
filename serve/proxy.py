"""What stands before Ray Serve's proxy, so that what must be refused costs nearly nothing. ASGI middlewares, no Ray.

A request that passes the proxy costs calls between processes, refused or not; at twice the capacity, refusals would
take the CPUs that the accepted ones need. So the proxy counts what is in work, and refuses what is too much itself, in
the words of the service. ``ray_settings`` puts these in place.
"""

from __future__ import annotations

import uuid
from typing import TYPE_CHECKING

from serve.problems import answer, overloaded
from serve.request_scope import header

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

_ID = b"x-request-id"


class Admission:
    """Lets so many requests for the models in at a time, and answers 429 to the others.

    Args:
        room: requests in work.
    """

    def __init__(self, app: ASGIApp, *, room: int) -> None:
        self.app, self._room, self._inside = app, room, 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request, or refuse it."""
        if scope["type"] != "http" or scope["method"] != "POST":
            await self.app(scope, receive, send)
        elif self._inside >= self._room:
            await answer(overloaded(), scope)(scope, receive, send)
        else:
            self._inside += 1
            try:
                await self.app(scope, receive, send)
            finally:
                self._inside -= 1


class Identify:
    """Gives every request an id, and every answer the id of its request; to be the outermost one."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        given = header(scope, _ID) or str(uuid.uuid4())
        if header(scope, _ID) is None:
            scope["headers"] = [*scope["headers"], (_ID, given.encode())]

        async def identified(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = list(message.get("headers", []))
                if not any(name.lower() == _ID for name, _ in headers):
                    message = {**message, "headers": [*headers, (_ID, given.encode("latin-1"))]}
            await send(message)

        await self.app(scope, receive, identified)
