"""What stands before the proxy: so many at a time, in the service's words; an id for every request and answer."""

from __future__ import annotations

import asyncio
import json
import logging
from typing import Any

import httpx
import pytest
from serving import KeptFigures

from serve.access import Access
from serve.proxy import Admission, Identify


class Busy:
    """An application whose answers wait for ``leave``."""

    def __init__(self) -> None:
        self.inside, self.seen = 0, []
        self.leave = asyncio.Event()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.seen.append(dict(scope["headers"]).get(b"x-request-id", b"").decode())
        self.inside += 1
        if scope["method"] == "POST":
            await self.leave.wait()
        self.inside -= 1
        if scope["path"] == "/fails":
            raise ConnectionError
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})


def client(application: Any) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(application), base_url="http://127.0.0.1", timeout=10)


def test_so_many_at_a_time() -> None:
    async def scenario() -> None:
        busy = Busy()
        async with client(Identify(Admission(busy, room=3))) as http:
            held = [asyncio.create_task(http.post("/v1/predict")) for _ in range(3)]
            while busy.inside < 3:
                await asyncio.sleep(0)
            refused = await http.post("/v1/predict", content=b"x" * 1000)
            assert (refused.status_code, refused.json()["code"]) == (429, "overloaded")
            assert refused.headers["retry-after"] == "1"
            assert refused.headers["x-request-id"] == refused.json()["request_id"]
            assert (await http.get("/v2/health/live")).status_code == 200  # health is always answered
            busy.leave.set()
            assert [answer.status_code for answer in await asyncio.gather(*held)] == [200] * 3
            assert (await http.post("/v1/predict")).status_code == 200

    asyncio.run(scenario())


def test_room_is_given_back_by_failures_and_by_those_who_leave() -> None:
    async def scenario() -> None:
        busy = Busy()
        async with client(Admission(busy, room=1)) as http:
            gone = asyncio.create_task(http.post("/v1/predict"))
            while not busy.inside:
                await asyncio.sleep(0)
            gone.cancel()
            await asyncio.gather(gone, return_exceptions=True)
            busy.leave.set()
            await asyncio.gather(http.post("/fails"), return_exceptions=True)
            assert (await http.post("/v1/predict")).status_code == 200

    asyncio.run(scenario())


def test_ids() -> None:
    async def scenario() -> None:
        busy = Busy()
        async with client(Identify(busy)) as http:
            made = await http.get("/")
            given = await http.get("/", headers={"x-request-id": "mine"})
        assert given.headers.get_list("x-request-id") == ["mine"]
        assert busy.seen == [made.headers["x-request-id"], "mine"]
        assert len(made.headers["x-request-id"]) == 36

    asyncio.run(scenario())


def test_an_id_that_the_application_gave_is_left_alone() -> None:
    async def application(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"X-Request-ID", b"its")]})
        await send({"type": "http.response.body", "body": b""})

    async def scenario() -> None:
        async with client(Identify(application)) as http:
            assert (await http.get("/")).headers.get_list("x-request-id") == ["its"]

    asyncio.run(scenario())


def test_what_is_refused_here_is_counted_and_told_here_and_nothing_else(caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        busy = Busy()
        async with client(Identify(Access(Admission(busy, room=0), meter=figures, refusals=True))) as http:
            assert (await http.post("/v1/predict")).status_code == 429
            assert (await http.post("/elsewhere")).status_code == 429
            assert (await http.get("/v2/health/live")).status_code == 200

    figures = KeptFigures()
    with caplog.at_level(logging.INFO, logger="ray.serve.ser"):
        asyncio.run(scenario())
    assert figures.requests == [("/v1/predict", 429, "overloaded"), ("unmatched", 429, "overloaded")]
    told = [json.loads(record.message) for record in caplog.records if record.name == "ray.serve.ser"]
    assert [(line["route"], line["status"]) for line in told] == [("/v1/predict", 429), ("unmatched", 429)]
