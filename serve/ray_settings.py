"""Environment variables for a Ray that runs the service, and the middlewares of Ray Serve's HTTP proxy.

``jobs.serve`` sets the variables. On a cluster, set them on every node and for the command that deploys
(``docs/serving.md``). Without them the service is slower.

Serve sends a request from the proxy to the ingress and from there to a worker: two calls between processes. The second
call costs 2 to 3 ms, of which 2 ms are CPU. ``ShortWay`` saves it: once a second the proxy asks the ingress what it
serves (``deployment.Offer``), builds the same application, and answers uploads with it. Other requests go to the
ingress, and so do uploads while the proxy has no offer.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
import uuid
from collections.abc import Awaitable, Callable
from pathlib import Path
from tempfile import gettempdir
from typing import TYPE_CHECKING, Any

from starlette.middleware import Middleware

from serve.auth import KeyCheck, PageCheck, key_digest_from_environment
from serve.middleware import STREAM, UPLOADS, Access, Admission, Closing, Identify, cors_of, limits_of
from serve.problems import BODY
from serve.settings import APP_NAME, MIB, Settings

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Scope, Send

    from serve.deployment import Offer

logger = logging.getLogger("ray.serve.ser")
_EVERY_S = 1.0
_PATIENCE_S = 5.0
_SETTINGS, _KEY_DIGEST, _CLOSING = "SER_PROXY_SETTINGS", "SER_PROXY_KEY_DIGEST", "SER_PROXY_CLOSING"
_HEADERS_WITHIN_S = 30.0
_LIMITED = "_ser_headers_timer"
IN_PROXY = "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"
MESSAGE_BYTES = "RAY_SERVE_REPLICA_GRPC_MAX_MESSAGE_LENGTH"  # of a gRPC call; Ray's default is 4 MiB
_LONGEST_ANSWER_MIB = 64  # the JSON of 32 recordings with 1,800 windows each is 30 MiB
VARIABLES = {
    # smaller recordings are sent with the call, not through the object store: saves 6 ms of CPU per request
    "RAY_max_direct_call_object_size": str(8 * MIB),
    # calls between proxy, ingress and workers use gRPC instead of actor tasks: saves 8 ms of CPU per request
    "RAY_SERVE_USE_GRPC_BY_DEFAULT": "1",
    # one event loop per process instead of three: fewer switches between threads
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    # on a busy machine the imports of a proxy take longer than Serve's 5 s, after which Serve would kill it
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "50",
    IN_PROXY: "serve.ray_settings.in_proxy",
}


class ShortWay:
    """Answers uploads and streams in the proxy with the ingress' own application; the innermost middleware.

    ``ask`` returns the offer of the ingress, or raises any exception; ``make`` builds the application from an offer.
    """

    def __init__(self, app: ASGIApp, *, ask: Callable[[], Awaitable[Offer]], make: Callable[[Offer], ASGIApp]) -> None:
        self.app, self._ask, self._make = app, ask, make
        self._revision: str | None = None
        self._application: ASGIApp | None = None
        self._asked_s = float("-inf")
        self._asking: asyncio.Task[None] | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        streams = scope["type"] == "websocket" and scope["path"] == STREAM
        uploads = scope["type"] == "http" and scope["path"] in UPLOADS and BODY in scope
        if not (streams or uploads):
            await self.app(scope, receive, send)
            return
        self._look()
        if streams and self._application is None and self._asking is not None:
            await asyncio.wait({self._asking})  # a stream cannot move to the short way later
        if self._application is None:
            await self.app(scope, receive, send)
        else:
            await self._application(scope, receive, send)

    def _look(self) -> None:
        """Ask for the offer in the background, where the last time was more than a second ago."""
        now_s = time.monotonic()
        if now_s - self._asked_s >= _EVERY_S and (self._asking is None or self._asking.done()):
            self._asked_s = now_s
            self._asking = asyncio.create_task(self._renew())

    async def _renew(self) -> None:
        try:
            async with asyncio.timeout(_PATIENCE_S):
                offer = await self._ask()
        except Exception as error:
            if self._application is not None:
                logger.warning("no offer from the ingress (%s); uploads go through the ingress", error)
            self._revision = self._application = None
            return
        if offer.revision != self._revision:
            self._revision, self._application = offer.revision, self._make(offer)


def prepare(settings: Settings) -> None:
    """Set the variables for the Ray that this process will start; values of ``VARIABLES`` already set are kept."""
    for name, value in VARIABLES.items():
        os.environ.setdefault(name, value)
    os.environ.setdefault(MESSAGE_BYTES, longest_message(settings))
    os.environ[_SETTINGS] = settings.model_dump_json()
    os.environ[_KEY_DIGEST] = key_digest_from_environment() or ""
    os.environ[_CLOSING] = str(Path(gettempdir()) / f"ser-closing-{uuid.uuid4().hex}")


def refuse_new_work() -> None:
    """Make the proxy of the Ray that ``prepare`` was called for answer 503 to new requests."""
    if mark := os.environ.get(_CLOSING):
        Path(mark).touch()


def tidy_up() -> None:
    """Undo ``refuse_new_work``, after that Ray has ended."""
    if mark := os.environ.pop(_CLOSING, None):
        Path(mark).unlink(missing_ok=True)


def limit_slow_headers() -> None:
    """Make uvicorn, in this process, close connections on which the headers of a request take longer than 30 s.

    uvicorn has no such limit. The time counts while no request is in progress: from the start of the connection, or
    from the first byte after a response. Idle connections after a response are closed by ``timeout_keep_alive``.
    """
    from uvicorn.protocols.http.h11_impl import H11Protocol
    from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

    for protocol in (H11Protocol, HttpToolsProtocol):
        if not hasattr(protocol, _LIMITED):
            _limit(protocol)


def _limit(protocol: Any) -> None:
    connected, received = protocol.connection_made, protocol.data_received

    def waits(connection: Any) -> bool:
        if connection.transport.get_protocol() is not connection:
            return False  # it has become a WebSocket
        return connection.cycle is None or connection.cycle.response_complete

    def watch(connection: Any) -> None:
        timer = getattr(connection, _LIMITED)
        if not waits(connection):
            setattr(connection, _LIMITED, timer and timer.cancel())
        elif timer is None:
            setattr(connection, _LIMITED, connection.loop.call_later(_HEADERS_WITHIN_S, close, connection))

    def close(connection: Any) -> None:
        setattr(connection, _LIMITED, None)
        if waits(connection):
            connection.transport.close()

    def connection_made(connection: Any, transport: Any) -> None:
        connected(connection, transport)
        watch(connection)

    def data_received(connection: Any, data: bytes) -> None:
        received(connection, data)
        watch(connection)

    setattr(protocol, _LIMITED, None)
    protocol.connection_made, protocol.data_received = connection_made, data_received


def longest_message(settings: Settings) -> str:
    """Value of `MESSAGE_BYTES`: the size of all requests together, plus the longest response."""
    return str(round((settings.max_held_mib + _LONGEST_ANSWER_MIB) * MIB))


def in_proxy() -> list[Middleware]:
    """The middlewares of Ray Serve's proxy, the outermost last."""
    from serve import deployment  # imports Ray, which already runs in the proxy
    from serve.metrics import RequestMeter, on_ray

    meter = RequestMeter(on_ray())
    settings = Settings.model_validate_json(os.environ.get(_SETTINGS, "{}"))
    mark = os.environ.get(_CLOSING)
    closed = (lambda: os.path.exists(mark)) if mark else None
    ask, room = deployment.asking(APP_NAME), settings.models * settings.room
    short_way = Middleware(ShortWay, ask=ask, make=lambda found: found.application(meter, closed))
    inwards = [short_way, Middleware(Admission, room=room), limits_of(settings)]
    digest = os.environ.get(_KEY_DIGEST)  # "": no key is set; None: unknown in this process
    if digest:
        inwards.append(Middleware(KeyCheck, digest=digest))
    elif digest is not None:
        inwards.append(Middleware(PageCheck, origins=settings.cors_origins))
    if closed:
        inwards.append(Middleware(Closing, closed=closed))
    limit_slow_headers()
    return [*inwards, Middleware(Access, meter=meter, refusals=True), *cors_of(settings), Middleware(Identify)]
