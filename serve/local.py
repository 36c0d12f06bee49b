"""The service without Ray: the same application on uvicorn, in one process, with the models in threads.

    python -m jobs.serve --engine local

It is for one machine and starts in seconds. Unlike on Ray Serve, a model has one worker, and a decoder that crashes
ends the whole service. If a thread hangs, its model is opened again.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from typing import TYPE_CHECKING

import uvicorn

from pipeline.models.bundle import Bundle
from pipeline.storage.errors import SerError
from serve.metrics import RequestMeter, WorkMeter, in_process
from serve.problems import overloaded
from serve.ray_settings import limit_slow_headers
from serve.routes import create_app
from serve.service import Card, Explained, PredictRequest, Service, WorkerResult
from serve.settings import Settings
from serve.streams import MOST_BYTES
from serve.worker import Worker, open_bundles, open_worker

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Scope, Send

logger = logging.getLogger("ray.serve.ser")
_LOOK_S = 5.0  # time between two checks of the workers' threads
_KEEP_ALIVE_S = 65
_GRACE_S = 2  # for connections, once all requests are answered


class LocalModels:
    """``service.Models`` over workers in this process; use it from one event loop.

    ``renew`` makes a new worker for one that hangs; it is called in a thread.
    """

    def __init__(
        self, workers: Mapping[str, Worker], settings: Settings, renew: Callable[[Worker], Worker] | None = None
    ) -> None:
        self._workers, self._room, self._renew = dict(workers), settings.room, renew
        self._open = dict.fromkeys(workers, 0)
        self._places = {name: asyncio.Semaphore(settings.max_ongoing) for name in workers}

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._workers)

    @property
    def busy(self) -> bool:
        """Whether a thread is running work."""
        return any(worker.busy for worker in self._workers.values())

    def check_room(self, model: str) -> None:
        if self._open[model] >= self._room:
            raise overloaded()

    async def predict(self, model: str, data: bytes, request: PredictRequest) -> WorkerResult:
        async with self._place(model) as worker:
            return await worker.predict(data, request)

    async def explain(self, model: str, data: bytes, request: PredictRequest) -> Explained:
        async with self._place(model) as worker:
            return await worker.explain(data, request)

    async def card(self, model: str) -> Card:
        return self._workers[model].card()

    async def ready(self, model: str) -> bool:
        """Whether none of the model's threads hangs."""
        try:
            self._workers[model].check()
        except RuntimeError:
            return False
        return True

    async def look(self) -> None:
        """Replace the workers whose threads hang."""
        for name, worker in list(self._workers.items()):
            if self._renew and not await self.ready(name):
                logger.error("a thread of %s hangs; the model is opened again", name)
                self._workers[name] = await asyncio.to_thread(self._renew, worker)

    @asynccontextmanager
    async def _place(self, model: str) -> AsyncIterator[Worker]:
        self.check_room(model)
        self._open[model] += 1
        try:
            async with self._places[model]:
                yield self._workers[model]
        finally:
            self._open[model] -= 1


class LocalService:
    """The service on uvicorn; ``run`` returns once ``stop`` was called and the requests in progress are answered.

    ``digest`` is the hash of the API key; without one the service answers on loopback addresses only.
    """

    def __init__(self, settings: Settings, digest: str | None = None) -> None:
        self.settings, self._digest = settings, digest
        kinds, self.metrics = in_process()  # metrics(): text in Prometheus' format
        self._meters = RequestMeter(kinds), WorkMeter(kinds)
        self._models: LocalModels | None = None
        self._app: ASGIApp | None = None
        self._inside = 0
        self._stopping = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._changed: asyncio.Event | None = None

    def open(self, bundles: Sequence[Bundle]) -> None:
        """Use these bundles for new requests; requests in progress finish with the previous models.

        After a SerError the previous models stay in use.
        """
        settings, (requests, work) = self.settings, self._meters
        workers = {bundle.name: open_worker(str(bundle.folder), settings, work) for bundle in bundles}
        models = LocalModels(
            workers, settings, lambda old: open_worker(str(old.predictor.bundle.folder), settings, work)
        )
        window_s = max(bundle.features.window_s for bundle in bundles)
        app = create_app(Service(models, settings, requests, window_s, self._digest), lambda: self._stopping)
        self._models, self._app = models, app

    def run(self, host: str, port: int, ready: Callable[[], None]) -> None:
        """Serve the opened models until ``stop``; ``ready`` is called once the server accepts requests."""
        limit_slow_headers()
        logging.getLogger("uvicorn.error").addFilter(_is_news)
        asyncio.run(self._run(host, port, ready))
        if self._models and self._models.busy:  # Python would wait for a thread that hangs
            logger.error("stopped while a recording was being decoded")
            os._exit(0)

    def stop(self) -> None:
        """Make ``run`` refuse new requests and return once those in progress are answered, or after ``deadline_s``.

        Returns at once. May be called from any thread.
        """
        self._stopping = True
        self._tell()

    def renew(self) -> None:
        """Start to open the bundles again; meanwhile requests are answered. May be called from any thread."""
        if self._loop:
            self._loop.call_soon_threadsafe(lambda: asyncio.ensure_future(self._reopen()))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        assert self._app is not None, "open comes before the first request"
        self._inside += 1
        try:
            await self._app(scope, receive, send)
        finally:
            self._inside -= 1
            self._tell()

    def _tell(self) -> None:
        if self._loop and self._changed:
            self._loop.call_soon_threadsafe(self._changed.set)

    async def _run(self, host: str, port: int, ready: Callable[[], None]) -> None:
        self._loop, self._changed = asyncio.get_running_loop(), asyncio.Event()
        config = uvicorn.Config(
            self,
            host=host,
            port=port,
            log_config=None,
            access_log=False,
            lifespan="off",
            ws_max_size=MOST_BYTES,
            ws_per_message_deflate=False,
            proxy_headers=False,
            server_header=False,
            timeout_keep_alive=_KEEP_ALIVE_S,
            timeout_graceful_shutdown=_GRACE_S,
        )
        server = _Server(config, ready)
        ending = asyncio.create_task(self._end(server))
        looking = asyncio.create_task(self._look())
        try:
            await server.serve()
        finally:
            self._loop = None
            ending.cancel()
            looking.cancel()

    async def _end(self, server: uvicorn.Server) -> None:
        """After ``stop``, end the server once no request is in progress, or after ``deadline_s``."""
        assert self._changed is not None
        while not self._stopping:
            self._changed.clear()
            await self._changed.wait()
        try:
            async with asyncio.timeout(self.settings.deadline_s):
                while self._inside:
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError:
            logger.error("%d requests were not answered in time", self._inside)
        server.should_exit = True

    async def _look(self) -> None:
        while True:
            await asyncio.sleep(_LOOK_S)
            with suppress(SerError):  # tried again
                if self._models:
                    await self._models.look()

    async def _reopen(self) -> None:
        try:
            await asyncio.to_thread(lambda: self.open(open_bundles(self.settings.bundles)))
        except SerError as error:
            logger.error("%s; the previous models stay in use", error)
        else:
            logger.warning("the bundles have been opened again")


def _is_news(record: logging.LogRecord) -> bool:
    """Log filter: False for WebSocket headers (debug level), which contain keys, and for refused handshakes."""
    return record.levelno > logging.DEBUG and "without completing handshake" not in record.getMessage()


class _Server(uvicorn.Server):
    """uvicorn's server without its signal handlers, which calls ``ready`` after startup."""

    def __init__(self, config: uvicorn.Config, ready: Callable[[], None]) -> None:
        super().__init__(config)
        self._ready = ready

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Install no signal handler."""
        yield

    async def startup(self, sockets: object = None) -> None:
        """Start to listen, then call ``ready``."""
        await super().startup(sockets)  # type: ignore[arg-type]
        if self.started:
            self._ready()
