"""How many bytes of a request are taken, and for how long: an ASGI middleware that stops reading at the limit.

A declared length beyond the limit is refused before a byte is read, a chunked body at the first byte too many, a body
that does not come in time when its time is up; and when the bodies of all open requests together would hold more than
the service can spare, new ones are refused with ``Retry-After``. A refusal is answered at once and closes the
connection, so that the rest of the body is not taken either; the application behind sees a client that has gone.

It stands in the ingress, and in front of Ray Serve's proxy as well (``ray_settings``), which would otherwise hold what
comes in faster than it can be passed on.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from serve.problems import ServiceError, answer, retry_later
from serve.request_scope import header, note
from serve.settings import MIB

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

_CLOSE = {"Connection": "close"}


class BodyLimit:
    """The middleware.

    Args:
        max_bytes: of one request.
        max_held_bytes: of all requests that are being received or answered.
        timeout_s: from the start of a request until its body is complete.
    """

    def __init__(self, app: ASGIApp, *, max_bytes: int, max_held_bytes: int, timeout_s: float) -> None:
        self.app = app
        self.max_bytes, self.max_held_bytes, self.timeout_s = max_bytes, max_held_bytes, timeout_s
        self._held_bytes = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request within the limits."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        body = _Body(self, scope, receive, send)
        try:
            if not await body.refused_as_declared():
                await self.app(scope, body.receive, body.send)
        except Exception:
            if not body.refused:
                raise  # else: the application, surprised that its client has gone
        finally:
            self._held_bytes -= body.taken_bytes
            note(scope, bytes=body.taken_bytes)

    def take(self, count: int) -> bool:
        """Account for bytes that have come; False when they are more than the service can spare."""
        if self._held_bytes + count > self.max_held_bytes:
            return False
        self._held_bytes += count
        return True


class _Body:
    """The body of one request, and the way to its client."""

    def __init__(self, limit: BodyLimit, scope: Scope, receive: Receive, send: Send) -> None:
        self.taken_bytes, self.refused = 0, False
        self._limit, self._scope, self._receive, self._send = limit, scope, receive, send
        self._complete = False
        self._until_s = asyncio.get_running_loop().time() + limit.timeout_s

    async def refused_as_declared(self) -> bool:
        """Whether the declared length is too much, which has been answered then."""
        length = header(self._scope, b"content-length")
        if length is not None and length.isdecimal() and int(length) > self._limit.max_bytes:
            await self._refuse(self._too_large())
        return self.refused

    async def receive(self) -> Message:
        """What comes next, as the application sees it."""
        if self._complete or self.refused:
            return await self._receive()
        try:
            async with asyncio.timeout_at(self._until_s):
                message = await self._receive()
        except TimeoutError:
            detail = f"the body did not come within {self._limit.timeout_s:g} s; use a faster line, or a smaller file"
            return await self._refuse(ServiceError("body_timeout", detail))
        self._complete = not message.get("more_body", False)
        count = len(message.get("body", b""))
        if self.taken_bytes + count > self._limit.max_bytes:
            return await self._refuse(self._too_large())
        if not self._limit.take(count):
            detail = "the service holds as many uploads as it can; send it again in a moment"
            return await self._refuse(retry_later("overloaded", detail))
        self.taken_bytes += count
        return message

    async def send(self, message: Message) -> None:
        """What the application answers, unless the request has been refused."""
        if not self.refused:
            await self._send(message)

    async def _refuse(self, error: ServiceError) -> Message:
        self.refused = True
        error.headers |= _CLOSE
        await answer(error, self._scope)(self._scope, self._receive, self._send)
        return {"type": "http.disconnect"}

    def _too_large(self) -> ServiceError:
        detail = f"a request may hold {self._limit.max_bytes / MIB:g} MiB; send fewer or shorter recordings"
        return ServiceError("body_too_large", detail)
