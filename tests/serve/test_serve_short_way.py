"""Uploads answered in the proxy: as the ingress offers, by the ingress where nothing is known, never for nobody."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest

from serve.deployment import Offer
from serve.middleware import Admission
from serve.ray_settings import ShortWay
from serve.settings import Settings


class Says:
    """An application that answers with its name."""

    def __init__(self, name: str) -> None:
        self.name = name

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": self.name.encode()})


class Ingress:
    """Something to ask: an offer, an exception, or nothing for ever."""

    def __init__(self, found: str | Exception | None) -> None:
        self.found, self.asked = found, 0

    async def __call__(self) -> Offer:
        self.asked += 1
        if self.found is None:
            await asyncio.Event().wait()
        if isinstance(self.found, Exception):
            raise self.found
        return Offer(str(self.found), Settings(), None, 2.0, {})


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, in seconds, that the middleware sees; a list of one, to be changed."""
    seen = [100.0]
    monkeypatch.setattr("serve.ray_settings.time.monotonic", lambda: seen[0])
    return seen


def client(way: ShortWay) -> httpx.AsyncClient:
    transport = httpx.ASGITransport(Admission(way, room=9))
    return httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1", timeout=10)


async def said(http: httpx.AsyncClient, method: str = "POST", path: str = "/v1/predict") -> str:
    answer = (await http.request(method, path)).text
    await asyncio.sleep(0)  # what was asked beside the request is answered
    await asyncio.sleep(0)
    return answer


def test_uploads_take_the_short_way_once_the_offer_is_known(now: list[float]) -> None:
    async def scenario() -> None:
        ingress, made = Ingress("first"), []

        def make(offer: Offer) -> Says:
            made.append(offer.revision)
            return Says(f"short {offer.revision}")

        async with client(ShortWay(Says("ingress"), ask=ingress, make=make)) as http:
            assert await said(http) == "ingress"
            assert await said(http) == "short first"
            assert [await said(http, "GET", path) for path in ("/v1/predict", "/v1/model")] == ["ingress"] * 2
            assert await said(http, path="/v1/elsewhere") == "ingress"
            assert ingress.asked == 1  # once a second, however many requests
            now[0] += 1.5
            assert await said(http) == "short first"
            assert (ingress.asked, made) == (2, ["first"])  # the same process: the same application
            ingress.found = "second"
            now[0] += 1.5
            assert [await said(http), await said(http)] == ["short first", "short second"]

    asyncio.run(scenario())


def test_without_an_ingress_to_ask_the_long_way_stays(now: list[float]) -> None:
    async def scenario() -> None:
        ingress = Ingress(RuntimeError("no such application"))
        async with client(ShortWay(Says("ingress"), ask=ingress, make=lambda offer: Says("short"))) as http:
            for _ in range(3):
                assert await said(http) == "ingress"
                now[0] += 1.5
            ingress.found = "first"
            assert [await said(http), await said(http)] == ["ingress", "short"]
            ingress.found = RuntimeError("it has gone")
            now[0] += 1.5
            assert [await said(http), await said(http)] == ["short", "ingress"]

    asyncio.run(scenario())


def test_one_question_at_a_time_and_not_for_ever(now: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serve.ray_settings._PATIENCE_S", 0.05)

    async def scenario() -> None:
        ingress = Ingress(None)
        way = ShortWay(Says("ingress"), ask=ingress, make=lambda offer: Says("short"))
        async with client(way) as http:
            for _ in range(3):
                assert await said(http) == "ingress"
                now[0] += 1.5
            assert ingress.asked == 1
            assert way._asking is not None
            await way._asking  # gives up
            ingress.found = "first"
            assert [await said(http), await said(http)] == ["ingress", "short"]

    asyncio.run(scenario())


def test_mistakes_of_the_application_are_raised(now: list[float]) -> None:
    async def fails(scope: Any, receive: Any, send: Any) -> None:
        raise ConnectionError

    async def scenario() -> None:
        way = ShortWay(Says("ingress"), ask=Ingress("first"), make=lambda offer: fails)
        async with client(way) as http:
            await said(http)
            with pytest.raises(ConnectionError):
                await http.post("/v1/predict")

    asyncio.run(scenario())


def test_streams_wait_for_the_first_offer_and_take_the_short_way(now: list[float]) -> None:
    """A connection stays where it begins, and behind the proxy nothing would keep a fast sender back."""

    async def stream(way: ShortWay) -> str:
        told: list[Any] = []

        async def send(message: Any) -> None:
            told.append(message)

        await way({"type": "websocket", "path": "/v1/stream"}, asyncio.Event().wait, send)
        return str(told[-1]["body"].decode())

    async def scenario() -> None:
        way = ShortWay(Says("ingress"), ask=Ingress("first"), make=lambda offer: Says("short"))
        assert await stream(way) == "short"
        alone = ShortWay(Says("ingress"), ask=Ingress(RuntimeError("gone")), make=lambda offer: Says("short"))
        assert await stream(alone) == "ingress"

    asyncio.run(scenario())
