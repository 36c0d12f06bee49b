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
from serving import KeptFigures

from serve.auth import KeyCheck
from serve.middleware import Access, Admission, Closing, Identify, Unpack, UntilGone
from serve.ray_settings import limit_slow_headers
from serve.schema import key_digest


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


async def until(moment: asyncio.Event, *chunks: bytes) -> AsyncIterator[bytes]:
    """A body whose last chunk comes at ``moment``."""
    for chunk in chunks[:-1]:
        yield chunk
    await moment.wait()
    yield chunks[-1]


@pytest.mark.parametrize("sizes", [[40], [10, 20, 30], [0, 5, 0], [0]])
def test_a_body_travels_with_the_scope_in_one_piece(sizes: list[int]) -> None:
    messages: list[Any] = []

    async def keep(scope: Any, receive: Any, send: Any) -> None:
        messages.append(await receive())
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    async def ray(scope: Any, receive: Any, send: Any) -> None:
        async def silence() -> Any:
            raise AssertionError("the body was fetched, too")

        await Unpack(keep)(pickle.loads(pickle.dumps(scope)), silence, send)  # as Ray Serve's proxy hands it on

    async def scenario() -> None:
        now = asyncio.Event()
        now.set()
        async with client(Identify(Admission(ray, room=1))) as http:
            assert (await http.post("/", content=until(now, *chunks))).status_code == 200

    chunks = [bytes([number]) * size for number, size in enumerate(sizes)]
    asyncio.run(scenario())
    assert messages == [{"type": "http.request", "body": b"".join(chunks), "more_body": False}]


def test_without_a_body_in_the_scope_it_is_received() -> None:
    async def length(scope: Any, receive: Any, send: Any) -> None:
        message = await receive()
        assert not scope.get("ser.body")
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": str(len(message["body"])).encode()})

    async def scenario() -> None:
        async with client(Unpack(length)) as http:
            assert (await http.post("/", content=b"x" * 7)).text == "7"

    asyncio.run(scenario())


def test_bodies_on_their_way_keep_no_place_from_others() -> None:
    async def scenario() -> None:
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
            while not busy.inside:
                await asyncio.sleep(0)
            moment.set()  # all complete, and the one place is taken
            assert {answer.status_code for answer in await asyncio.gather(*slow)} == {429}
            busy.leave.set()
            assert (await held).status_code == 200

    asyncio.run(scenario())


def test_a_full_house_reads_no_body() -> None:
    async def unread() -> Any:
        raise AssertionError("a body was read for nothing")

    async def scenario() -> None:
        sent: list[Any] = []

        async def send(message: Any) -> None:
            sent.append(message)

        scope = {"type": "http", "method": "POST", "path": "/", "headers": []}
        await Admission(Busy(), room=0)(scope, unread, send)
        assert sent[0]["status"] == 429

    asyncio.run(scenario())


@pytest.mark.parametrize(
    "given", [None, "Bearer", "Bearer ", "Bearer wrong", "Basic secret", "secret", "Bearer secre", "Bearer secretx"]
)
def test_strangers_are_sent_away_before_their_bodies_are_read(given: str | None) -> None:
    taken = []

    async def body() -> AsyncIterator[bytes]:
        taken.append(None)
        yield b"x"

    async def scenario() -> None:
        busy = Busy()
        busy.leave.set()
        headers = {} if given is None else {"authorization": given}
        async with client(KeyCheck(busy, digest=key_digest("secret"))) as http:
            refused = await http.post("/v1/predict", content=body(), headers=headers)
            assert (refused.status_code, refused.json()["code"]) == (401, "unauthorized")
            assert refused.headers["www-authenticate"] == "Bearer"
            assert (busy.seen, taken) == ([], [])
            for right in ("Bearer secret", "bearer secret"):
                assert (await http.post("/v1/predict", headers={"authorization": right})).status_code == 200
            assert (await http.get("/v2/health/live")).status_code == 200

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


def test_an_answer_has_one_id_and_it_is_that_of_the_request() -> None:
    async def application(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"X-Request-ID", b"of Ray's proxy")]})
        await send({"type": "http.response.body", "body": b""})

    async def scenario() -> None:
        async with client(Identify(application)) as http:
            answer = await http.get("/", headers={"x-request-id": "mine"})
        assert answer.headers.get_list("x-request-id") == ["mine"]

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


@pytest.mark.parametrize("goes", [True, False])
def test_what_nobody_waits_for_is_given_up(goes: bool) -> None:
    async def scenario() -> None:
        begun, ended, leave = asyncio.Event(), asyncio.Event(), asyncio.Event()
        said: list[str] = []

        async def long(scope: Any, receive: Any, send: Any) -> None:
            while (await receive())["more_body"]:
                pass
            begun.set()
            try:
                await leave.wait()
                await send({"type": "http.response.start", "status": 200, "headers": []})
            finally:
                ended.set()

        parts = [{"type": "http.request", "body": b"x", "more_body": more} for more in (True, True, False)]

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
        assert said == ([] if goes else ["http.response.start"])

    asyncio.run(scenario())


def test_while_it_stops_new_work_is_told_to_come_again(tmp_path: Path) -> None:
    async def scenario() -> None:
        busy, mark = Busy(), tmp_path / "closing"
        async with client(Identify(Closing(busy, closed=mark.exists))) as http:
            held = asyncio.create_task(http.post("/v1/predict"))
            while not busy.inside:
                await asyncio.sleep(0)
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

    asyncio.run(scenario())


async def hello(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
    await asyncio.sleep(0)
    await send({"type": "http.response.body", "body": b"hi"})


@pytest.mark.parametrize("http", ["h11", "httptools"])
def test_slow_headers_end_the_connection_and_slow_answers_do_not(http: str, monkeypatch: pytest.MonkeyPatch) -> None:
    limit_slow_headers()
    limit_slow_headers()  # once is enough
    request, leave = b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n", asyncio.Event()

    async def application(scope: Any, receive: Any, send: Any) -> None:
        if scope["path"] == "/slow":
            await leave.wait()
        await hello(scope, receive, send)

    async def scenario() -> None:
        config = uvicorn.Config(application, port=0, http=http, lifespan="off", log_level="critical")
        server = uvicorn.Server(config)
        serving = asyncio.create_task(server.serve())
        while not server.started:
            await asyncio.sleep(0)
        port = server.servers[0].sockets[0].getsockname()[1]

        kept = []  # writers that nobody has are closed

        async def connection(sent: bytes, within_s: float) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
            monkeypatch.setattr("serve.ray_settings._HEADERS_WITHIN_S", within_s)
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(sent)
            kept.append(writer)
            return reader, writer

        async def answered(reader: asyncio.StreamReader) -> bool:
            return (await asyncio.wait_for(reader.readuntil(b"hi"), 30)).startswith(b"HTTP/1.1 200")

        slow, _ = await connection(request.replace(b"/ ", b"/slow "), 3.0)
        reader, writer = await connection(request, 3.0)
        assert await answered(reader)
        writer.write(request)  # on the same connection
        assert await answered(reader)
        monkeypatch.setattr("serve.ray_settings._HEADERS_WITHIN_S", 0.2)
        writer.write(request[:20])  # and the next one never ends
        assert await asyncio.wait_for(reader.read(), 30) == b""
        for sent in (b"GET / HTTP/1.1\r\n", request[:-2], b""):
            reader, _ = await connection(sent, 3.5 if not sent else 0.2)
            assert await asyncio.wait_for(reader.read(), 30) == b""  # closed
        leave.set()  # long after the limit
        assert await answered(slow)
        server.should_exit = True
        await serving

    asyncio.run(scenario())
