"""What stands before the proxy: so many at a time, once they are complete; an id for every request and answer."""

from __future__ import annotations

import asyncio
import json
import logging
import pickle
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from serving import KeptFigures, awaited, reply

from serve.auth import KeyCheck
from serve.middleware import Access, Admission, Closing, Identify, Unpack, UntilGone
from serve.ray_settings import limit_slow_headers
from serve.schema import key_digest


class Busy:
    """An application whose answers wait for ``leave``, and have an id of their own."""

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
        await reply(send, b"", (b"X-Request-ID", b"of Ray's proxy"))

    async def holds(self, count: int) -> None:
        while self.inside < count:
            await asyncio.sleep(0)


def client(application: Any) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(application), base_url="http://127.0.0.1", timeout=10)


async def unread() -> AsyncIterator[bytes]:
    raise AssertionError("a body was read for nothing")
    yield b""


@awaited
async def test_so_many_at_a_time_each_with_one_id() -> None:
    busy, mine = Busy(), {"x-request-id": "mine"}
    async with client(Identify(Admission(busy, room=3))) as http:
        held = [asyncio.create_task(http.post("/v1/predict", headers=mine)) for _ in range(3)]
        await busy.holds(3)
        refused = await http.post("/v1/predict", content=unread())
        assert (refused.status_code, refused.json()["code"]) == (429, "overloaded")
        assert refused.headers["retry-after"] == "1"
        assert refused.headers["x-request-id"] == refused.json()["request_id"]
        assert (await http.get("/v2/health/live")).status_code == 200  # health is always answered
        busy.leave.set()
        for answer in await asyncio.gather(*held):
            assert (answer.status_code, answer.headers.get_list("x-request-id")) == (200, ["mine"])
        assert busy.seen[:3] == ["mine"] * 3
        assert (await http.post("/v1/predict")).status_code == 200


@awaited
async def test_room_is_given_back_by_failures_and_by_those_who_leave() -> None:
    busy = Busy()
    async with client(Admission(busy, room=1)) as http:
        gone = asyncio.create_task(http.post("/v1/predict"))
        await busy.holds(1)
        gone.cancel()
        await asyncio.gather(gone, return_exceptions=True)
        busy.leave.set()
        await asyncio.gather(http.post("/fails"), return_exceptions=True)
        assert (await http.post("/v1/predict")).status_code == 200


@pytest.mark.parametrize("sizes", [[40], [10, 20, 30], [0, 5, 0], [0]])
@awaited
async def test_a_body_travels_with_the_scope_in_one_piece(sizes: list[int]) -> None:
    messages: list[Any] = []
    chunks = [bytes([number]) * size for number, size in enumerate(sizes)]

    async def keep(scope: Any, receive: Any, send: Any) -> None:
        messages.append(await receive())
        await reply(send)

    async def ray(scope: Any, receive: Any, send: Any) -> None:
        async def silence() -> Any:
            raise AssertionError("the body was fetched, too")

        await Unpack(keep)(pickle.loads(pickle.dumps(scope)), silence, send)  # as Ray Serve's proxy hands it on

    async def body() -> AsyncIterator[bytes]:
        for chunk in chunks:
            yield chunk

    whole = b"".join(chunks)
    async with client(Identify(Admission(ray, room=1))) as http:
        assert (await http.post("/", content=body())).status_code == 200
    async with client(Unpack(keep)) as http:  # nothing in the scope: it is received
        assert (await http.post("/", content=whole)).status_code == 200
    assert messages[0] == {"type": "http.request", "body": whole, "more_body": False}
    assert messages[1]["body"] == whole


@awaited
async def test_bodies_on_their_way_keep_no_place_from_others() -> None:
    busy, moment, begun = Busy(), asyncio.Event(), []

    async def slowly() -> AsyncIterator[bytes]:
        yield b"a"
        begun.append(None)
        await moment.wait()

    async with client(Admission(busy, room=1)) as http:
        slow = [asyncio.create_task(http.post("/", content=slowly())) for _ in range(20)]
        while len(begun) < len(slow):
            await asyncio.sleep(0)
        busy.leave.set()
        assert (await http.post("/v1/predict")).status_code == 200
        busy.leave.clear()
        held = asyncio.create_task(http.post("/v1/predict"))
        await busy.holds(1)
        moment.set()  # all complete, and the one place is taken
        assert {answer.status_code for answer in await asyncio.gather(*slow)} == {429}
        busy.leave.set()
        assert (await held).status_code == 200


STRANGERS = [None, "Bearer", "Bearer ", "Bearer wrong", "Basic secret", "secret", "Bearer secre", "Bearer secretx"]


@awaited
async def test_strangers_are_sent_away_before_their_bodies_are_read() -> None:
    busy = Busy()
    busy.leave.set()
    async with client(KeyCheck(busy, digest=key_digest("secret"))) as http:
        for given in STRANGERS:
            headers = {} if given is None else {"authorization": given}
            refused = await http.post("/v1/predict", content=unread(), headers=headers)
            assert (refused.status_code, refused.json()["code"]) == (401, "unauthorized"), given
            assert refused.headers["www-authenticate"] == "Bearer"
        assert busy.seen == []
        for right in ("Bearer secret", "bearer secret"):
            assert (await http.post("/v1/predict", headers={"authorization": right})).status_code == 200
        assert (await http.get("/v2/health/live")).status_code == 200


@awaited
async def test_what_is_refused_here_is_counted_and_told_here_and_nothing_else(caplog: pytest.LogCaptureFixture) -> None:
    figures = KeptFigures()
    application = Identify(Access(Admission(Busy(), room=0), meter=figures, refusals=True))
    with caplog.at_level(logging.INFO, logger="ray.serve.ser"):
        async with client(application) as http:
            asked = (await http.post("/v1/predict"), await http.post("/elsewhere"), await http.get("/v2/health/live"))
    assert [answer.status_code for answer in asked] == [429, 429, 200]
    assert figures.requests == [("/v1/predict", 429, "overloaded"), ("unmatched", 429, "overloaded")]
    told = [json.loads(record.message) for record in caplog.records if record.name == "ray.serve.ser"]
    assert [(line["route"], line["status"]) for line in told] == [("/v1/predict", 429), ("unmatched", 429)]


@pytest.mark.parametrize("goes", [True, False])
@awaited
async def test_what_nobody_waits_for_is_given_up(goes: bool) -> None:
    begun, ended, leave = asyncio.Event(), asyncio.Event(), asyncio.Event()
    parts = [{"type": "http.request", "body": b"x", "more_body": more} for more in (True, True, False)]
    said: list[str] = []

    async def long(scope: Any, receive: Any, send: Any) -> None:
        while (await receive())["more_body"]:
            pass
        begun.set()
        try:
            await leave.wait()
            await reply(send)
        finally:
            ended.set()

    async def receive() -> Any:
        if parts:
            return parts.pop(0)
        await begun.wait()
        if not goes:
            leave.set()
            await asyncio.Event().wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        said.append(message["type"])

    scope = {"type": "http", "method": "POST", "path": "/v1/predict", "headers": []}
    await asyncio.wait_for(UntilGone(long)(scope, receive, send), 10)
    assert ended.is_set()
    assert said == ([] if goes else ["http.response.start", "http.response.body"])


@awaited
async def test_while_it_stops_new_work_is_told_to_come_again(tmp_path: Path) -> None:
    busy, mark = Busy(), tmp_path / "closing"
    async with client(Identify(Closing(busy, closed=mark.exists))) as http:
        held = asyncio.create_task(http.post("/v1/predict"))
        await busy.holds(1)
        mark.touch()
        for method, path in (("POST", "/v1/predict"), ("GET", "/v2/health/ready"), ("GET", "/v1/model")):
            refused = await http.request(method, path)
            assert (refused.status_code, refused.json()["code"]) == (503, "unavailable")
            assert int(refused.headers["retry-after"]) > 0
            assert refused.headers["connection"] == "close"
        assert (await http.get("/v2/health/live")).json() == {"live": True}
        busy.leave.set()
        assert (await held).status_code == 200  # what was in work is answered
        assert len(busy.seen) == 1


@pytest.mark.parametrize("http", ["h11", "httptools"])
@awaited
async def test_slow_headers_end_the_connection_not_slow_answers(http: str, monkeypatch: pytest.MonkeyPatch) -> None:
    limit_slow_headers()
    limit_slow_headers()  # once is enough
    request, leave = b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n", asyncio.Event()
    kept = []  # writers that nobody has are closed

    def within(seconds: float) -> None:
        monkeypatch.setattr("serve.ray_settings._HEADERS_WITHIN_S", seconds)

    async def application(scope: Any, receive: Any, send: Any) -> None:
        if scope["path"] == "/slow":
            await leave.wait()
        await reply(send, b"hi", (b"content-length", b"2"))

    async def connection(sent: bytes, within_s: float) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        within(within_s)
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(sent)
        kept.append(writer)
        return reader, writer

    async def answered(reader: asyncio.StreamReader) -> bool:
        return (await asyncio.wait_for(reader.readuntil(b"hi"), 30)).startswith(b"HTTP/1.1 200")

    server = uvicorn.Server(uvicorn.Config(application, port=0, http=http, lifespan="off", log_level="critical"))
    serving = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0)
    port = server.servers[0].sockets[0].getsockname()[1]
    slow, _ = await connection(request.replace(b"/ ", b"/slow "), 3.0)
    reader, writer = await connection(request, 3.0)
    assert await answered(reader)
    writer.write(request)  # on the same connection
    assert await answered(reader)
    within(0.2)
    writer.write(request[:20])  # and the next one never ends
    assert await asyncio.wait_for(reader.read(), 30) == b""
    for sent in (b"GET / HTTP/1.1\r\n", request[:-2], b""):
        reader, _ = await connection(sent, 3.5 if not sent else 0.2)
        assert await asyncio.wait_for(reader.read(), 30) == b""  # closed
    leave.set()  # long after the limit
    assert await answered(slow)
    server.should_exit = True
    await serving
