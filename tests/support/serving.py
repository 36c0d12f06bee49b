"""The service without Ray: its ASGI application over a worker in this process, and a meter that remembers."""

from __future__ import annotations

import asyncio
import functools
import io
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any, TypeVar

import httpx
import numpy as np
import soundfile
from conftest import speech_like

from pipeline.inference.predictor import Predictor
from pipeline.models.bundle import Bundle
from serve.local import LocalModels
from serve.routes import create_app
from serve.schema import Problem, key_digest
from serve.service import Explained, PredictRequest, Service, WorkerResult
from serve.settings import Settings
from serve.worker import Worker

KEY = "correct horse battery staple"
Result = TypeVar("Result")


def wav(duration_s: float = 1.0, rate_hz: int = 16_000, channels: int = 1, **voice: Any) -> bytes:
    """A recording, 16-bit PCM."""
    return wav_of(*[speech_like(duration_s=duration_s, sample_rate_hz=rate_hz, **voice)] * channels, rate_hz=rate_hz)


def wav_of(*tracks: Any, rate_hz: int = 16_000, subtype: str = "PCM_16") -> bytes:
    """A recording whose channels are ``tracks``, each ``(n,)``."""
    buffer = io.BytesIO()
    soundfile.write(buffer, np.stack(tracks, axis=1), rate_hz, format="WAV", subtype=subtype)
    return buffer.getvalue()


def form(*recordings: bytes, **fields: object) -> dict[str, Any]:
    """Arguments of httpx for a multipart form; the recordings are called 0.wav, 1.wav, ..."""
    files = [("file", (f"{number}.wav", data)) for number, data in enumerate(recordings)]
    return {"files": files, "data": {name: str(value) for name, value in fields.items()}}


def problem_of(response: Any, status: int, code: str) -> Problem:
    assert response.headers["content-type"] == "application/problem+json"
    problem = Problem.model_validate_json(response.content)
    assert (response.status_code, problem.status, problem.code) == (status, status, code)
    assert problem.type == f"urn:ser:problem:{code}"
    assert problem.detail
    assert "\n" not in problem.detail
    for secret in ("Traceback", str(Path(__file__).resolve().parents[2]), "site-packages", "/tmp/"):
        assert secret not in response.text
    return problem


class ScriptedModels(LocalModels):
    """One worker in this process, under several names. ``error`` is raised instead of an answer when it is set."""

    def __init__(self, worker: Worker, settings: Settings, names: Sequence[str]) -> None:
        super().__init__(dict.fromkeys(names, worker), settings)
        self.worker = worker
        self.error: Exception | None = None
        self.full: Exception | None = None
        self.asked = 0

    def check_room(self, model: str) -> None:
        if self.full:
            raise self.full
        super().check_room(model)

    async def predict(self, model: str, data: bytes, request: PredictRequest) -> WorkerResult:
        self.asked += 1
        if self.error:
            raise self.error
        return await super().predict(model, data, request)

    async def explain(self, model: str, data: bytes, request: PredictRequest) -> Explained:
        if self.error:
            raise self.error
        return await super().explain(model, data, request)

    async def ready(self, model: str) -> bool:
        return self.error is None and await super().ready(model)


class KeptFigures:
    """``service.Meter`` that remembers."""

    def __init__(self) -> None:
        self.requests: list[tuple[str, int, str]] = []
        self.recordings: list[tuple[str, str]] = []
        self.open_streams = 0

    def request(self, route: str, status: int, code: str, seconds: float) -> None:
        assert seconds >= 0
        self.requests.append((route, status, code))

    def recording(self, model: str, code: str) -> None:
        self.recordings.append((model, code))

    def streams(self, count: int) -> None:
        self.open_streams = count


class LocalService:
    """The service over ``bundle``; ``request`` sends one HTTP request to it, as from this machine."""

    def __init__(self, bundle: Bundle, *, key: str | None = None, names: Sequence[str] = (), **settings: Any) -> None:
        self.settings = Settings(**settings)
        predictor = Predictor.from_bundle(bundle.folder, threads=1, limits=self.settings.audio_limits)
        worker = Worker(predictor, max_windows=self.settings.max_windows)
        self.models = ScriptedModels(worker, self.settings, names or [bundle.name])
        self.meter = KeptFigures()
        digest = key_digest(key) if key else None
        self.app = create_app(Service(self.models, self.settings, self.meter, bundle.features.window_s, digest))

    def request(self, method: str, path: str, *, host: str = "127.0.0.1", **content: Any) -> httpx.Response:
        async def send() -> httpx.Response:
            async with self.client(host) as client:
                return await client.request(method, path, **content)

        return run(send())

    def client(self, host: str = "127.0.0.1") -> httpx.AsyncClient:
        transport = httpx.ASGITransport(self.app)
        return httpx.AsyncClient(transport=transport, base_url=f"http://{host}", timeout=60)

    def post(self, path: str, **content: Any) -> httpx.Response:
        return self.request("POST", path, **content)

    def get(self, path: str, **content: Any) -> httpx.Response:
        return self.request("GET", path, **content)


def awaited(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """A test that is a coroutine, run in a loop of its own."""

    @functools.wraps(test)
    def run_test(*arguments: Any, **fixtures: Any) -> None:
        asyncio.run(test(*arguments, **fixtures))

    return run_test


async def reply(send: Any, body: bytes = b"", *headers: tuple[bytes, bytes]) -> None:
    """Answer 200, as an ASGI application does."""
    await send({"type": "http.response.start", "status": 200, "headers": list(headers)})
    await send({"type": "http.response.body", "body": body})


def run(coroutine: Coroutine[Any, Any, Result]) -> Result:
    """Run to the end in a loop of its own."""
    return asyncio.run(coroutine)


class Bridge(httpx.BaseTransport):
    """A synchronous way into an ASGI application."""

    def __init__(self, service: LocalService) -> None:
        self.service = service

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        async def send() -> httpx.Response:
            transport = httpx.ASGITransport(self.service.app)
            copied = httpx.Request(request.method, request.url, headers=request.headers, content=request.read())
            response = await transport.handle_async_request(copied)
            return httpx.Response(response.status_code, headers=response.headers, content=await response.aread())

        return asyncio.run(send())
