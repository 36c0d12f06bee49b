"""The body limit as an ASGI middleware: it stops reading at the limit, counts chunks, gives up in time, lets go."""

from __future__ import annotations

import asyncio
import importlib
import json
import os
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from serve import ray_settings
from serve.middleware import Admission, BodyLimit
from serve.settings import Settings

MANY = 10**9


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

    @property
    def status(self) -> int:
        return int(self.sent[0]["status"])

    @property
    def headers(self) -> dict[bytes, bytes]:
        return dict(self.sent[0]["headers"])

    @property
    def problem(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.sent[1]["body"])
        return found


async def echo_length(scope: Any, receive: Any, send: Any) -> None:
    """Reads all of the body, answers with its length."""
    length, more = 0, True
    while more:
        message = await receive()
        length += len(message["body"])
        more = message["more_body"]
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": str(length).encode()})


def limited(**limits: Any) -> BodyLimit:
    return BodyLimit(echo_length, **{"max_bytes": 100, "max_held_bytes": MANY, "timeout_s": 5.0} | limits)


def ask(middleware: BodyLimit, stream: Stream) -> Stream:
    asyncio.run(middleware(stream.scope, stream.receive, stream.send))
    return stream


@pytest.mark.parametrize("sizes", [[100], [50, 50], [1] * 100, [0], [0, 100, 0]])
def test_up_to_the_limit_everything_passes(sizes: list[int]) -> None:
    stream = ask(limited(), Stream([b"x" * size for size in sizes]))
    assert stream.status == 200
    assert stream.sent[1]["body"] == str(sum(sizes)).encode()


def test_a_declared_length_is_refused_before_reading() -> None:
    stream = ask(limited(), Stream([b"x" * 60] * 50, declared=101))
    assert (stream.status, stream.problem["code"], stream.taken) == (413, "body_too_large", 0)
    assert stream.headers[b"connection"] == b"close"


@pytest.mark.parametrize("declared", [None, 5])
def test_chunks_are_counted_whatever_was_declared(declared: int | None) -> None:
    stream = ask(limited(), Stream([b"x" * 60] * 1000, declared=declared))
    assert (stream.status, stream.problem["code"]) == (413, "body_too_large")
    assert stream.taken == 120  # the chunk that breaks the limit is the last one taken
    assert stream.headers[b"connection"] == b"close"


def test_a_body_that_does_not_come_is_given_up() -> None:
    stream = ask(limited(timeout_s=0.05), Stream([b"x"], complete=False))
    assert (stream.status, stream.problem["code"]) == (408, "body_timeout")
    assert stream.headers[b"connection"] == b"close"


def test_drops_that_keep_coming_do_not_prolong_the_time() -> None:
    async def drip() -> Stream:
        stream = Stream([], complete=False)

        async def receive() -> dict[str, Any]:
            await asyncio.sleep(0.01)
            stream.taken += 1
            return {"type": "http.request", "body": b"x", "more_body": True}

        await limited(timeout_s=0.1)(stream.scope, receive, stream.send)
        return stream

    stream = asyncio.run(drip())
    assert stream.status == 408
    assert 1 <= stream.taken <= 11


def test_the_time_of_answering_is_not_the_body_s() -> None:
    async def slow(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(receive(), 0.2)  # waits for the client to go, beyond the body's time
        await send({"type": "http.response.start", "status": 204, "headers": []})

    class Gone(Stream):
        async def receive(self) -> dict[str, Any]:
            if self.taken:
                await asyncio.Event().wait()
            return await super().receive()

    middleware = BodyLimit(slow, max_bytes=100, max_held_bytes=MANY, timeout_s=0.05)
    assert ask(middleware, Gone([b"x"])).status == 204


def test_all_requests_together_hold_no_more_than_they_may() -> None:
    async def scenario() -> None:
        entered, leave = asyncio.Event(), asyncio.Event()

        async def hold(scope: Any, receive: Any, send: Any) -> None:
            if (await receive())["type"] == "http.disconnect":
                raise ConnectionError  # as frameworks do; nobody shall hear of it
            entered.set()
            await leave.wait()
            await send({"type": "http.response.start", "status": 200, "headers": []})

        middleware = BodyLimit(hold, max_bytes=100, max_held_bytes=150, timeout_s=5.0)
        first, second, third = (Stream([b"x" * 90]) for _ in range(3))
        holding = asyncio.create_task(middleware(first.scope, first.receive, first.send))
        await entered.wait()
        await middleware(second.scope, second.receive, second.send)
        assert (second.status, second.problem["code"]) == (429, "overloaded")
        assert second.headers[b"retry-after"] == b"1"
        leave.set()
        await holding
        await middleware(third.scope, third.receive, third.send)  # the first has let go, the second took nothing
        assert (first.status, third.status) == (200, 200)

    asyncio.run(scenario())


def test_bytes_are_let_go_when_the_application_fails_or_the_caller_leaves() -> None:
    async def fail(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        raise ConnectionError

    middleware = BodyLimit(fail, max_bytes=100, max_held_bytes=100, timeout_s=5.0)
    for _ in range(3):
        with pytest.raises(ConnectionError):
            ask(middleware, Stream([b"x" * 90]))

    async def leave() -> None:
        held = limited(max_held_bytes=100)
        for _ in range(3):
            stream = Stream([b"x" * 90], complete=False)
            task = asyncio.create_task(held(stream.scope, stream.receive, stream.send))
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert stream.taken == 90

    asyncio.run(leave())


def test_other_protocols_pass_untouched() -> None:
    seen = []

    async def application(scope: Any, receive: Any, send: Any) -> None:
        seen.append((scope["type"], receive, send))

    async def nothing() -> AsyncIterator[None]:
        yield

    asyncio.run(
        BodyLimit(application, max_bytes=1, max_held_bytes=1, timeout_s=1)({"type": "lifespan"}, nothing, nothing)
    )
    assert seen == [("lifespan", nothing, nothing)]


@pytest.mark.parametrize(
    ("given", "room"),
    [
        ({}, 32 + 16),
        ({"replicas": 4}, 4 * 32 + 16),
        ({"replicas": 2, "max_replicas": 3}, 3 * 32 + 16),
        ({"replicas": 4, "bundles": "a,b"}, 2 * (4 * 32 + 16)),
    ],
)
def test_the_proxy_has_room_for_all_that_workers_hold(
    given: dict[str, Any], room: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SER_PROXY_SETTINGS", Settings(**given).model_dump_json())
    (admission,) = [middleware for middleware in ray_settings.in_proxy() if middleware.cls is Admission]
    assert admission.kwargs["room"] == room


def test_pages_of_the_origin_can_read_what_the_proxy_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Settings(cors_origins="https://page.example", max_body_mib=0.001)  # type: ignore[arg-type]
    monkeypatch.setenv("SER_PROXY_SETTINGS", settings.model_dump_json())
    monkeypatch.setenv("SER_PROXY_KEY_DIGEST", "another")
    application: Any = echo_length
    for middleware in ray_settings.in_proxy():
        application = middleware.cls(application, *middleware.args, **middleware.kwargs)

    async def ask_from_page() -> list[httpx.Response]:
        transport, origin = httpx.ASGITransport(application), {"origin": "https://page.example"}
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1", headers=origin) as client:
            asking = origin | {"access-control-request-method": "POST"}
            return [
                await client.post("/v1/predict", content=b"x"),
                await client.request("OPTIONS", "/v1/predict", headers=asking),
            ]

    answers = asyncio.run(ask_from_page())
    assert [answer.status_code for answer in answers] == [401, 200]
    for answer in answers:
        assert answer.headers.get("access-control-allow-origin") == "https://page.example"
        assert "x-request-id" in answer.headers


def test_the_proxy_gets_the_service_s_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    names = (*ray_settings.VARIABLES, ray_settings.MESSAGE_BYTES, "SER_PROXY_SETTINGS", "SER_PROXY_KEY_DIGEST")
    for name in names:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SER_API_KEY", "secret")
    monkeypatch.setenv("RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP", "1")
    ray_settings.prepare(Settings(max_body_mib=0.001, body_timeout_s=2))
    assert os.environ["RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP"] == "1"  # what was set stays
    assert int(os.environ[ray_settings.MESSAGE_BYTES]) > 2**20 * Settings().max_held_mib  # calls carry whole bodies
    module, _, function = os.environ["RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"].rpartition(".")
    application: Any = echo_length
    for middleware in getattr(importlib.import_module(module), function)():
        application = middleware.cls(application, *middleware.args, **middleware.kwargs)
    assert "secret" not in {os.environ[name] for name in names}
    stranger = ask(application, Stream([b"x" * 2000]))
    assert (stranger.status, stranger.problem["code"], stranger.taken) == (401, "unauthorized", 0)
    large = Stream([b"x" * 2000])
    large.scope["headers"].append((b"authorization", b"Bearer secret"))
    assert (ask(application, large).status, large.problem["code"]) == (413, "body_too_large")
    monkeypatch.delenv("SER_API_KEY")
    ray_settings.prepare(Settings())
    assert not os.environ["SER_PROXY_KEY_DIGEST"]
    for name in names:
        monkeypatch.delenv(name, raising=False)
