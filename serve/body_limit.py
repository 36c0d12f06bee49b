"""How many bytes of a request are taken, and for how long: an ASGI middleware that stops reading at the limit.

A declared length beyond the limit is refused before a byte is read, a chunked body at the first byte too many, a body
that does not come in time when its time is up; and when the bodies of all open requests together would hold more than
the service can spare, new ones are refused with ``Retry-After``. Refusals close the connection, so that the rest of the
body is not taken either.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from serve.problems import ServiceError, answer, retry_later
from serve.request_scope import header, note

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
        body = _Body(self, receive)
        try:
            body.check_declared(header(scope, b"content-length"))
            await self.app(scope, body.receive, send)
        except ServiceError as error:
            await answer(error, scope)(scope, receive, send)
        finally:
            self._held_bytes -= body.taken_bytes
            note(scope, bytes=body.taken_bytes)

    def take(self, count: int) -> None:
        """Account for bytes that have come.

        Raises:
            ServiceError: they are more than the service can spare.
        """
        if self._held_bytes + count > self.max_held_bytes:
            error = retry_later("overloaded", "the service holds as many uploads as it can; send it again in a moment")
            error.headers |= _CLOSE
            raise error
        self._held_bytes += count


class _Body:
    """The body of one request."""

    def __init__(self, limit: BodyLimit, receive: Receive) -> None:
        self.taken_bytes = 0
        self._limit, self._receive, self._complete = limit, receive, False
        self._until_s = asyncio.get_running_loop().time() + limit.timeout_s

    def check_declared(self, length: str | None) -> None:
        if length is not None and length.isdecimal() and int(length) > self._limit.max_bytes:
            raise self._too_large()

    async def receive(self) -> Message:
        if self._complete:
            return await self._receive()
        try:
            async with asyncio.timeout_at(self._until_s):
                message = await self._receive()
        except TimeoutError:
            detail = f"the body did not come within {self._limit.timeout_s:g} s; use a faster line, or a smaller file"
            raise ServiceError("body_timeout", detail, headers=_CLOSE) from None
        if message["type"] == "http.request":
            self._count(len(message.get("body", b"")))
        self._complete = not message.get("more_body", False)
        return message

    def _count(self, count: int) -> None:
        if self.taken_bytes + count > self._limit.max_bytes:
            raise self._too_large()
        self._limit.take(count)
        self.taken_bytes += count

    def _too_large(self) -> ServiceError:
        detail = f"a request may hold {self._limit.max_bytes / 2**20:g} MiB; send fewer or shorter recordings"
        return ServiceError("body_too_large", detail, headers=_CLOSE)
