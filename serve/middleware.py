"""ASGI middlewares around the application, in the ingress and in front of Ray Serve's proxy. No Ray.

Outermost first: `Identify` gives a request its id, CORS lets pages of named origins read refusals too, `Access` writes
one log line a request and counts it, `BodyLimit` stops reading at the limit, `Admission` refuses what is too much
before it costs calls between processes, `Unpack` takes, in the ingress, the body that `Admission` has read.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
import uuid
import zlib
from contextlib import suppress
from typing import TYPE_CHECKING

from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse

from serve.problems import (
    ServiceError,
    answer,
    hand_over,
    handed_over,
    header,
    note,
    notes,
    overloaded,
    request_id,
    retry_later,
)
from serve.settings import MIB, Settings

if TYPE_CHECKING:
    from collections.abc import Callable

    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from serve.service import Meter

_GZIP = 31  # zlib's word for it, whatever the window
_CLOSE = {"Connection": "close"}
_ASKED = ("http", "websocket")
_STARTS = {  # messages that begin an answer, and their status where it is always the same
    "http.response.start": None,
    "websocket.http.response.start": None,
    "websocket.accept": 101,
}
_LOOK_S = 0.2  # how often a request that comes slowly looks whether the service stops


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
        given = header(scope, b"content-encoding") if scope["method"] == "POST" else None
        self._encoding = (given or "identity").strip().lower()
        self._inflater = zlib.decompressobj(_GZIP) if self._encoding in ("gzip", "x-gzip") else None
        self._until_s = asyncio.get_running_loop().time() + limit.timeout_s

    async def refused_as_declared(self) -> bool:
        """Whether the declared length is too much, which has been answered then."""
        length = header(self._scope, b"content-length")
        if length is not None and length.isdecimal() and int(length) > self._limit.max_bytes:
            await self._refuse(self._too_large())
        elif self._inflater is not None:
            inflated = (b"content-encoding", b"content-length")  # of what was sent, not of what those behind us get
            self._scope["headers"] = [pair for pair in self._scope["headers"] if pair[0] not in inflated]
        elif self._encoding != "identity":
            detail = "a body may be packed with gzip, or not at all"
            await self._refuse(ServiceError("unsupported_media_type", detail, headers={"Accept-Encoding": "gzip"}))
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
        try:
            body = self._unpacked(message.get("body", b""))
        except zlib.error:
            return await self._refuse(ServiceError("bad_request", "the body is no gzip, though its header says so"))
        count = len(body)
        if self.taken_bytes + count > self._limit.max_bytes:
            return await self._refuse(self._too_large())
        if not self._limit.take(count):
            detail = "the service holds as many uploads as it can; send it again in a moment"
            return await self._refuse(retry_later("overloaded", detail))
        self.taken_bytes += count
        return message if self._inflater is None else {**message, "body": body}

    def _unpacked(self, part: bytes) -> bytes:
        """What a part of the body holds, one byte beyond the limit at most."""
        if self._inflater is None:
            return part
        found = self._inflater.decompress(part, self._limit.max_bytes + 1 - self.taken_bytes)
        inside = len(found) + self.taken_bytes <= self._limit.max_bytes
        if inside and (self._inflater.unused_data or (self._complete and not self._inflater.eof)):
            raise zlib.error("it ends too early, or goes on behind its end")
        return found

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


class UntilGone:
    """Gives up the work for an upload when its client has gone; to stand behind `BodyLimit`, next to the routes."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http" or scope["method"] != "POST":
            await self.app(scope, receive, send)
            return
        complete = asyncio.Event()
        last: asyncio.Future[Message] = asyncio.get_running_loop().create_future()

        async def next_message() -> Message:
            if complete.is_set():
                return await asyncio.shield(last)
            message = await receive()
            if message["type"] != "http.request" or not message.get("more_body", False):
                complete.set()
            return message

        async def watch() -> None:
            await complete.wait()
            message = await receive()
            while message["type"] != "http.disconnect":
                message = await receive()
            last.set_result(message)

        answering = asyncio.ensure_future(self.app(scope, next_message, send))
        watching = asyncio.ensure_future(watch())
        try:
            await asyncio.wait({answering, watching}, return_when=asyncio.FIRST_COMPLETED)
            if not last.done():
                await answering
            elif not answering.done():
                answering.cancel()
                with suppress(asyncio.CancelledError):
                    await answering
        finally:
            watching.cancel()
            answering.cancel()


class Closing:
    """Refuses new work once ``closed()``, while what is in work is answered: 503 with ``Retry-After``.

    A request whose body has not come by then is refused as well, so that a slow sender does not hold up the end.
    """

    def __init__(self, app: ASGIApp, *, closed: Callable[[], bool]) -> None:
        self.app, self._closed = app, closed

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request, or refuse it."""
        if scope["type"] not in _ASKED or (scope["type"] == "websocket" and not self._closed()):
            await self.app(scope, receive, send)  # streams look for themselves
        elif not self._closed():
            await self._serve(scope, receive, send)
        elif scope["path"] == "/v2/health/live":
            await JSONResponse({"live": True})(scope, receive, send)
        else:
            await _stopping(scope)(scope, receive, send)

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        complete = refused = False

        async def next_message() -> Message:
            nonlocal complete, refused
            while not (complete or refused):
                try:
                    async with asyncio.timeout(_LOOK_S):
                        message = await receive()
                except TimeoutError:
                    if self._closed():
                        refused = True
                        await _stopping(scope)(scope, receive, send)
                    continue
                complete = not message.get("more_body", False)
                return message
            return {"type": "http.disconnect"} if refused else await receive()

        async def unless_refused(message: Message) -> None:
            if not refused:
                await send(message)

        try:
            await self.app(scope, next_message, unless_refused)
        except Exception:
            if not refused:
                raise  # else: the application, surprised that its client has gone


def _stopping(scope: Scope) -> JSONResponse:
    error = retry_later("unavailable", "the service is stopping; send it again in a moment", after_s=5)
    error.headers |= _CLOSE
    return answer(error, scope)


class Identify:
    """Gives every request an id, and every answer the id of its request; to be the outermost one.

    An id that came with the request is cut to 128 characters of printable ASCII.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] not in _ASKED:
            await self.app(scope, receive, send)
            return
        given = (request_id(scope).strip() or str(uuid.uuid4())).encode()
        scope["headers"] = [*((name, value) for name, value in scope["headers"] if name != _ID), (_ID, given)]

        async def identified(message: Message) -> None:
            if message["type"] in _STARTS:
                others = [pair for pair in message.get("headers", []) if pair[0].lower() != _ID]  # Ray's proxy adds one
                message = {**message, "headers": [*others, (_ID, given)]}
            await send(message)

        await self.app(scope, receive, identified)


logger = logging.getLogger("ray.serve.ser")  # below Ray Serve's logger, whose file and format it shares
_NO_ROUTE = "unmatched"
UPLOADS = {"/v1/predict", "/v1/explain", "/v1/audio-classification"}  # known also where no router has seen them
STREAM = "/v1/stream"


class Access:
    """The middleware, to be the outermost one.

    Args:
        refusals: tell only of requests refused here, before Ray Serve's proxy; the ingress tells of the others.
    """

    def __init__(self, app: ASGIApp, *, meter: Meter, refusals: bool = False) -> None:
        self.app, self.meter, self._refusals = app, meter, refusals

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request, measure it, write its line."""
        if scope["type"] not in _ASKED:
            await self.app(scope, receive, send)
            return
        status = 0

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] in _STARTS:
                status = _STARTS[message["type"]] or message["status"]
            await send(message)

        started_s = time.perf_counter()
        try:
            await self.app(scope, receive, watched)
        except ClientDisconnect:
            logger.debug("request %s: its client has gone", request_id(scope))
        except Exception:
            logger.exception("request %s met a mistake of ours", request_id(scope))
            if not status:
                error = ServiceError("internal_error", "this request met a mistake of ours; report it with its id")
                await answer(error, scope)(scope, receive, watched)
        finally:
            self._tell(scope, status, time.perf_counter() - started_s)

    def _tell(self, scope: Scope, status: int, seconds: float) -> None:
        known = notes(scope)
        if self._refusals and "code" not in known:
            return
        unrouted = scope["path"] if scope["path"] in {*UPLOADS, STREAM} else _NO_ROUTE
        route = str(getattr(scope.get("route"), "path", unrouted))
        code = known.pop("code", "ok" if status and status < 400 else "disconnected" if not status else "other")
        self.meter.request(route, status, code, seconds)
        line = {"event": "request", "id": request_id(scope), "method": scope.get("method", "WS"), "route": route}
        line |= {"status": status, "code": code, "ms": round(seconds * 1e3, 1), **known}
        logger.info(json.dumps(line, ensure_ascii=True))


def cors_of(settings: Settings) -> list[Middleware]:
    """What lets pages of the origins in ``settings`` read answers, refusals too, as a middleware; none by default."""
    if not settings.cors_origins:
        return []
    cors = Middleware(
        CORSMiddleware,
        allow_origins=list(settings.cors_origins),
        allow_methods=["GET", "POST"],
        allow_headers=["Authorization", "Content-Type", "X-Request-ID"],
        expose_headers=["X-Request-ID", "Retry-After"],
    )
    return [cors]


def limits_of(settings: Settings) -> Middleware:
    """The body limit of ``settings`` as a middleware."""
    return Middleware(
        BodyLimit,
        max_bytes=round(settings.max_body_mib * MIB),
        max_held_bytes=round(settings.max_held_mib * MIB),
        timeout_s=settings.body_timeout_s,
    )
