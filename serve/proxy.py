"""What stands before Ray Serve's proxy, so that what must be refused costs nearly nothing. ASGI middlewares, no Ray.

A request that passes the proxy costs calls between processes, refused or not; at twice the capacity, refusals would
take the CPUs that the accepted ones need. So the proxy counts what is in work, and refuses what is too much itself, in
the words of the service. ``ray_settings`` puts these in place.
"""

from __future__ import annotations

import uuid
from typing import TYPE_CHECKING

from serve.problems import answer, overloaded
from serve.request_scope import hand_over, handed_over, header

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

_ID = b"x-request-id"


class Admission:
    """Lets so many requests for the models in at a time, and answers 429 to the others.

    A request takes its place once its body is complete, so that slow senders keep none from others; the body then
    travels with the scope (``Unpack``), for fetching it would be calls more. While all places are taken, no body is
    read.

    Args:
        room: requests in work.
    """

    def __init__(self, app: ASGIApp, *, room: int) -> None:
        self.app, self._room, self._inside = app, room, 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request, or refuse it."""
        if scope["type"] != "http" or scope["method"] != "POST":
            await self.app(scope, receive, send)
            return
        if not self._full and not await _received(scope, receive):
            return  # the client has gone, or the body was refused
        if self._full:  # others may have come in meanwhile
            await answer(overloaded(), scope)(scope, receive, send)
        else:
            self._inside += 1
            try:
                await self.app(scope, receive, send)
            finally:
                self._inside -= 1

    @property
    def _full(self) -> bool:
        return self._inside >= self._room


async def _received(scope: Scope, receive: Receive) -> bool:
    """Put the whole body into the scope; False when the client has gone before it was complete."""
    parts = []
    more = True
    while more:
        message = await receive()
        if message["type"] != "http.request":
            return False
        parts.append(message.get("body", b""))
        more = message.get("more_body", False)
    hand_over(scope, b"".join(parts))
    return True


class Unpack:
    """Receives the body that `Admission` put into the scope; to be the outermost middleware of the ingress."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        body = handed_over(scope)
        waiting: list[Message] = []
        if body is not None:
            waiting.append({"type": "http.request", "body": body, "more_body": False})
        del body  # a request may take long

        async def next_message() -> Message:
            return waiting.pop() if waiting else await receive()

        await self.app(scope, next_message, send)


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
