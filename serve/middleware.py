"""ASGI middlewares of the ingress and of Ray Serve's proxy. No Ray.

`Identify` gives a request its id. `Access` counts a request and writes its log line. `Closing` refuses requests while
the service stops. `BodyLimit` stops reading at the limit. `Admission` refuses excess requests in the proxy; `Unpack`
takes, in the ingress, the body that `Admission` read. `UntilGone` cancels the work for a client that has gone.
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
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse

from serve.problems import BODY, ServiceError, answer, header, note, notes, overloaded, request_id, retry_later
from serve.settings import MIB, Settings

if TYPE_CHECKING:
    from collections.abc import Callable

    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from serve.service import Meter

_GZIP = 31  # wbits of zlib for gzip with any window
_CLOSE = {"Connection": "close"}
_ASKED = ("http", "websocket")
_STARTS = {  # messages that begin a response, and their status where it is fixed
    "http.response.start": None,
    "websocket.http.response.start": None,
    "websocket.accept": 101,
}
_LOOK_S = 0.2  # interval at which an incomplete request checks whether the service stops


class BodyLimit:
    """Limits the bytes of a request body, its time from start to end, and the bytes of all requests in progress.

    It unpacks gzip, and counts the unpacked bytes.
    """

    def __init__(self, app: ASGIApp, *, max_bytes: int, max_held_bytes: int, timeout_s: float) -> None:
        self.app = app
        self.max_bytes, self.max_held_bytes, self.timeout_s = max_bytes, max_held_bytes, timeout_s
        self._held_bytes = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        body = _Body(self, scope, receive, send)
        try:
            if not await body.refused_as_declared():
                await self.app(scope, body.receive, body.send)
        except Exception:
            if not body.refused:
                raise  # else the application failed because the request was refused
        finally:
            self._held_bytes -= body.taken_bytes
            note(scope, bytes=body.taken_bytes)

    def take(self, count: int) -> bool:
        """Add received bytes to the total; False where the total would exceed ``max_held_bytes``."""
        if self._held_bytes + count > self.max_held_bytes:
            return False
        self._held_bytes += count
        return True


class _Body:
    """The body of one request, with its ``receive`` and ``send``."""

    def __init__(self, limit: BodyLimit, scope: Scope, receive: Receive, send: Send) -> None:
        self.taken_bytes, self.refused = 0, False
        self._limit, self._scope, self._receive, self._send = limit, scope, receive, send
        self._complete = False
        given = header(scope, b"content-encoding") if scope["method"] == "POST" else None
        self._encoding = (given or "identity").strip().lower()
        self._inflater = zlib.decompressobj(_GZIP) if self._encoding in ("gzip", "x-gzip") else None
        self._until_s = asyncio.get_running_loop().time() + limit.timeout_s

    async def refused_as_declared(self) -> bool:
        """Refuse, and return True, where the headers declare too many bytes or an unknown encoding."""
        length = header(self._scope, b"content-length")
        if length is not None and length.isdecimal() and int(length) > self._limit.max_bytes:
            await self._refuse(self._too_large())
        elif self._inflater is not None:
            inflated = (b"content-encoding", b"content-length")  # they describe the packed body
            self._scope["headers"] = [pair for pair in self._scope["headers"] if pair[0] not in inflated]
        elif self._encoding != "identity":
            detail = f"Content-Encoding {self._encoding[:20]!r} is not supported; send gzip, or leave it out"
            await self._refuse(ServiceError("unsupported_media_type", detail, headers={"Accept-Encoding": "gzip"}))
        return self.refused

    async def receive(self) -> Message:
        """The next message, as the application sees it."""
        if self._complete or self.refused:
            return await self._receive()
        try:
            async with asyncio.timeout_at(self._until_s):
                message = await self._receive()
        except TimeoutError:
            within = f"within {self._limit.timeout_s:g} s"
            detail = f"the body did not arrive {within}; use a faster connection or a smaller file"
            return await self._refuse(ServiceError("body_timeout", detail))
        self._complete = not message.get("more_body", False)
        try:
            body = self._unpacked(message.get("body", b""))
        except zlib.error:
            return await self._refuse(ServiceError("bad_request", "the body is not gzip, but Content-Encoding says so"))
        count = len(body)
        if self.taken_bytes + count > self._limit.max_bytes:
            return await self._refuse(self._too_large())
        if not self._limit.take(count):
            detail = "the service holds as many uploads as it can; send the request again in a moment"
            return await self._refuse(retry_later("overloaded", detail))
        self.taken_bytes += count
        return message if self._inflater is None else {**message, "body": body}

    def _unpacked(self, part: bytes) -> bytes:
        """A part of the body, unpacked, up to one byte beyond the limit."""
        if self._inflater is None:
            return part
        found = self._inflater.decompress(part, self._limit.max_bytes + 1 - self.taken_bytes)
        inside = len(found) + self.taken_bytes <= self._limit.max_bytes
        if inside and (self._inflater.unused_data or (self._complete and not self._inflater.eof)):
            raise zlib.error("the gzip stream is incomplete, or followed by more data")
        return found

    async def send(self, message: Message) -> None:
        """Send a message of the application, unless the request has been refused."""
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
    """Limits the number of uploads that are answered at a time to ``room``; the others get 429.

    An upload counts once its body is complete, so that slow senders do not block others. The body then goes along in
    the scope (``Unpack``), which saves calls between processes. At the limit no body is read; an upload whose body is
    complete only then gets 429 too.
    """

    def __init__(self, app: ASGIApp, *, room: int) -> None:
        self.app, self._room, self._inside = app, room, 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            await self.app(scope, receive, send)
            return
        if not self._full:
            try:
                scope[BODY] = await Request(scope, receive).body()
            except ClientDisconnect:
                return  # or the body was refused
        if self._full:  # the limit may have been reached meanwhile
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


class Unpack:
    """Gives the application the body that `Admission` put into the scope; only `Identify` stands outside it."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        waiting: list[Message] = []
        if BODY in scope:  # out of the scope and the list: it is not held while the request is answered
            waiting.append({"type": "http.request", "body": scope.pop(BODY), "more_body": False})

        async def next_message() -> Message:
            return waiting.pop() if waiting else await receive()

        await self.app(scope, next_message, send)


class UntilGone:
    """Cancels the work for an upload when its client goes away; the innermost middleware, inside `BodyLimit`."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
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
    """Answers new requests with 503 and ``Retry-After`` once ``closed()``; complete requests are still answered.

    A request whose body is incomplete at that time is refused too, so that a slow sender does not delay the stop.
    """

    def __init__(self, app: ASGIApp, *, closed: Callable[[], bool]) -> None:
        self.app, self._closed = app, closed

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in _ASKED or (scope["type"] == "websocket" and not self._closed()):
            await self.app(scope, receive, send)  # open streams check closed() themselves
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
                raise  # else the application failed because the request was refused


def _stopping(scope: Scope) -> JSONResponse:
    error = retry_later("unavailable", "the service is stopping; send the request again in a moment", after_s=5)
    error.headers |= _CLOSE
    return answer(error, scope)


class Identify:
    """Gives every request an id, and its response the same id; the outermost middleware.

    Of an id that the client sent, the first 128 printable ASCII characters are used.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
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


logger = logging.getLogger("ray.serve.ser")  # a child of Ray Serve's logger, so it shares its file and format
_NO_ROUTE = "unmatched"
UPLOADS = {"/v1/predict", "/v1/explain", "/v1/audio-classification"}  # for metrics also without a router
STREAM = "/v1/stream"


class Access:
    """Counts each request in the metrics and writes its log line, a JSON object.

    With ``refusals`` only those refused in Ray Serve's proxy; the ingress does it for the others.
    """

    def __init__(self, app: ASGIApp, *, meter: Meter, refusals: bool = False) -> None:
        self.app, self.meter, self._refusals = app, meter, refusals

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
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
            logger.debug("request %s: the client went away", request_id(scope))
        except Exception:
            logger.exception("request %s failed with an internal error", request_id(scope))
            if not status:
                detail = "this request met an error in the service; report it with its id"
                await answer(ServiceError("internal_error", detail), scope)(scope, receive, watched)
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
    """The CORS middleware for the origins in ``settings``, in a list; an empty list where there are none."""
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
