"""The body limit as an ASGI middleware: it stops reading at the limit, counts chunks, gives up in time, lets go."""

from __future__ import annotations

import asyncio
import importlib
import json
import os
from typing import Any

import httpx
import pytest
from serving import awaited, reply

from serve import ray_settings
from serve.middleware import Admission, BodyLimit
from serve.settings import Settings


class Stream:
    """A request whose body comes in ``chunks``; counts what is taken. After them it waits, or is complete."""

    def __init__(self, chunks: list[bytes], *, complete: bool = True, declared: int | None = None) -> None:
        self.chunks, self.complete = list(chunks), complete
        self.taken = 0
        headers = [] if declared is None else [(b"content-length", str(declared).encode())]
        self.scope: dict[str, Any] = {"type": "http", "method": "POST", "path": "/", "headers": headers}
        self.sent: list[dict[str, Any]] = []

    async def receive(self) -> dict[str, Any]:
        if not self.chunks and not self.complete:
            await asyncio.Event().wait()
        chunk = self.chunks.pop(0) if self.chunks else b""
        self.taken += len(chunk)
        return {"type": "http.request", "body": chunk, "more_body": bool(self.chunks) or not self.complete}

    async def send(self, message: dict[str, Any]) -> None:
        self.sent.append(message)

    async def to(self, application: Any) -> Stream:
        await application(self.scope, self.receive, self.send)
        return self

    @property
    def status(self) -> int:
        return int(self.sent[0]["status"])

    @property
    def headers(self) -> dict[bytes, bytes]:
        return dict(self.sent[0]["headers"])

    @property
    def code(self) -> str:
        return str(json.loads(self.sent[1]["body"])["code"])


async def echo_length(scope: Any, receive: Any, send: Any) -> None:
    """Reads all of the body, answers with its length."""
    length, more = 0, True
    while more:
        message = await receive()
        length += len(message["body"])
        more = message["more_body"]
    await reply(send, str(length).encode())


def limited(application: Any = echo_length, **limits: Any) -> BodyLimit:
    return BodyLimit(application, **{"max_bytes": 100, "max_held_bytes": 10**9, "timeout_s": 5.0} | limits)


@awaited
async def test_up_to_the_limit_everything_passes() -> None:
    for sizes in ([100], [50, 50], [1] * 100, [0], [0, 100, 0]):
        stream = await Stream([b"x" * size for size in sizes]).to(limited())
        assert (stream.status, stream.sent[1]["body"]) == (200, str(sum(sizes)).encode())
    seen: list[Any] = []

    async def application(*given: Any) -> None:
        seen.append(given)

    websocket = ({"type": "websocket"}, stream.receive, stream.send)  # other protocols pass untouched
    await limited(application, max_bytes=1)(*websocket)
    assert seen == [websocket]


LONG = [b"x" * 60] * 1000


@pytest.mark.parametrize(
    ("stream", "status", "code", "taken"),
    [
        (Stream(LONG, declared=101), 413, "body_too_large", 0),
        (Stream(LONG), 413, "body_too_large", 120),  # the chunk that breaks the limit is the last one taken
        (Stream(LONG, declared=5), 413, "body_too_large", 120),
        (Stream([b"x"], complete=False), 408, "body_timeout", 1),
    ],
)
@awaited
async def test_beyond_the_limits_nothing_is_read(stream: Stream, status: int, code: str, taken: int) -> None:
    await stream.to(limited(timeout_s=0.05))
    assert (stream.status, stream.code, stream.taken) == (status, code, taken)
    assert stream.headers[b"connection"] == b"close"


@awaited
async def test_drops_that_keep_coming_do_not_prolong_the_time() -> None:
    class Dripping(Stream):
        async def receive(self) -> dict[str, Any]:
            await asyncio.sleep(0.01)
            self.taken += 1
            return {"type": "http.request", "body": b"x", "more_body": True}

    stream = await Dripping([]).to(limited(timeout_s=0.1))
    assert stream.status == 408
    assert 1 <= stream.taken <= 11


@awaited
async def test_the_time_of_answering_is_not_the_body_s() -> None:
    async def slow(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(receive(), 0.2)  # waits for the client to go, beyond the body's time
        await reply(send)

    class Gone(Stream):
        async def receive(self) -> dict[str, Any]:
            if self.taken:
                await asyncio.Event().wait()
            return await super().receive()

    assert (await Gone([b"x"]).to(limited(slow, timeout_s=0.05))).status == 200


@awaited
async def test_all_requests_together_hold_no_more_than_they_may() -> None:
    entered, leave = asyncio.Event(), asyncio.Event()

    async def hold(scope: Any, receive: Any, send: Any) -> None:
        if (await receive())["type"] == "http.disconnect":
            raise ConnectionError  # as frameworks do; nobody shall hear of it
        entered.set()
        await leave.wait()
        await reply(send)

    middleware = limited(hold, max_held_bytes=150)
    first, second, third = (Stream([b"x" * 90]) for _ in range(3))
    holding = asyncio.create_task(first.to(middleware))
    await entered.wait()
    await second.to(middleware)
    assert (second.status, second.code, second.headers[b"retry-after"]) == (429, "overloaded", b"1")
    leave.set()
    await holding
    await third.to(middleware)  # the first has let go, the second took nothing
    assert (first.status, third.status) == (200, 200)


@awaited
async def test_bytes_are_let_go_when_the_application_fails_or_the_caller_leaves() -> None:
    async def fail(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        raise ConnectionError

    failing, held = limited(fail, max_held_bytes=100), limited(max_held_bytes=100)
    for _ in range(3):
        with pytest.raises(ConnectionError):
            await Stream([b"x" * 90]).to(failing)
        stream = Stream([b"x" * 90], complete=False)
        task = asyncio.create_task(stream.to(held))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert stream.taken == 90


@pytest.mark.parametrize(
    ("given", "room"),
    [
        ({}, 32 + 16),
        ({"replicas": 4}, 4 * 32 + 16),
        ({"replicas": 2, "max_replicas": 3}, 3 * 32 + 16),
        ({"replicas": 4, "bundles": "a,b"}, 2 * (4 * 32 + 16)),
    ],
)
def test_room_for_all_that_workers_hold(given: Any, room: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SER_PROXY_SETTINGS", Settings(**given).model_dump_json())
    (admission,) = [middleware for middleware in ray_settings.in_proxy() if middleware.cls is Admission]
    assert admission.kwargs["room"] == room


def proxy(middlewares: Any) -> Any:
    """An application behind what stands in the proxy."""
    application: Any = echo_length
    for middleware in middlewares:
        application = middleware.cls(application, *middleware.args, **middleware.kwargs)
    return application


@awaited
async def test_pages_of_the_origin_can_read_what_the_proxy_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Settings(cors_origins="https://page.example", max_body_mib=0.001)  # type: ignore[arg-type]
    monkeypatch.setenv("SER_PROXY_SETTINGS", settings.model_dump_json())
    monkeypatch.setenv("SER_PROXY_KEY_DIGEST", "another")
    origin = {"origin": "https://page.example"}
    transport = httpx.ASGITransport(proxy(ray_settings.in_proxy()))
    async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1", headers=origin) as client:
        asking = {"access-control-request-method": "POST"}
        refused = await client.post("/v1/predict", content=b"x")
        asked = await client.request("OPTIONS", "/v1/predict", headers=asking)
    assert (refused.status_code, asked.status_code) == (401, 200)
    for answer in (refused, asked):
        assert answer.headers.get("access-control-allow-origin") == "https://page.example"
        assert "x-request-id" in answer.headers


@awaited
async def test_the_proxy_gets_the_service_s_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    names = (*ray_settings.VARIABLES, ray_settings.MESSAGE_BYTES, "SER_PROXY_SETTINGS", "SER_PROXY_KEY_DIGEST")
    for name in names:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SER_API_KEY", "secret")
    monkeypatch.setenv("RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP", "1")
    ray_settings.prepare(Settings(max_body_mib=0.001, body_timeout_s=2))
    assert os.environ["RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP"] == "1"  # what was set stays
    assert int(os.environ[ray_settings.MESSAGE_BYTES]) > 2**20 * Settings().max_held_mib  # calls carry whole bodies
    module, _, function = os.environ["RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"].rpartition(".")
    application = proxy(getattr(importlib.import_module(module), function)())
    assert "secret" not in {os.environ[name] for name in names}
    stranger = await Stream([b"x" * 2000]).to(application)
    assert (stranger.status, stranger.code, stranger.taken) == (401, "unauthorized", 0)
    large = Stream([b"x" * 2000])
    large.scope["headers"].append((b"authorization", b"Bearer secret"))
    await large.to(application)
    assert (large.status, large.code) == (413, "body_too_large")
    monkeypatch.delenv("SER_API_KEY")
    ray_settings.prepare(Settings())
    assert not os.environ["SER_PROXY_KEY_DIGEST"]
