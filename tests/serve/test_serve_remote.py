"""What the ingress does when a worker is full, dies or is gone, and the proxy without an ingress. No Ray is started."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from ray.exceptions import ActorDiedError, ActorUnavailableError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from serving import awaited, reply, run

from serve.deployment import Offer, RemoteModels
from serve.middleware import Admission
from serve.problems import ServiceError, kind_of
from serve.ray_settings import ShortWay
from serve.service import PredictRequest
from serve.settings import Settings

ASK = PredictRequest()
FULL = BackPressureError(num_queued_requests=3, max_queued_requests=3)
FAILED = DeploymentUnavailableError(None)  # type: ignore[arg-type]


class Handle:
    """A deployment handle that does what its script says, call by call."""

    app_name, deployment_name = "ser", "Model0"

    def __init__(self, *script: Any) -> None:
        self.script, self.calls = list(script), []

    def __getattr__(self, method: str) -> Any:
        async def remote(*arguments: object) -> object:
            self.calls.append((method, *arguments))
            step = self.script.pop(0)
            if isinstance(step, Exception):
                raise step
            return await step() if callable(step) else step

        return SimpleNamespace(remote=remote)


def models(*script: Any, room: int = 5) -> tuple[RemoteModels, Handle]:
    handle = Handle(*script)
    return RemoteModels({"m": handle}, room), handle  # type: ignore[dict-item]


@pytest.mark.parametrize("death", [ActorDiedError(), ActorUnavailableError("gone", None)])
@pytest.mark.parametrize("method", ["predict", "explain"])
def test_work_of_a_dead_worker_is_asked_again_apart(method: str, death: Exception) -> None:
    remote, handle = models(death, "answer", "next answer")
    ask = getattr(remote, method)
    assert [run(ask("m", b"data", ASK)) for _ in range(2)] == ["answer", "next answer"]
    assert handle.calls == [(method, b"data", ASK), (method, b"data", ASK, True), (method, b"data", ASK)]


@pytest.mark.parametrize(
    ("script", "code", "status"),
    [
        ([ActorDiedError(), ActorDiedError()], "unavailable", 503),
        ([FULL], "overloaded", 429),  # and not asked again
        ([FAILED], "unavailable", 503),
    ],
)
def test_what_no_worker_can_answer_is_told(script: list[Exception], code: str, status: int) -> None:
    remote, handle = models(*script, ZeroDivisionError())
    with pytest.raises(ServiceError) as caught:
        run(remote.predict("m", b"data", ASK))
    assert (caught.value.code, kind_of(caught.value.code).status) == (code, status)
    assert int(caught.value.headers["Retry-After"]) >= 1
    assert len(handle.calls) == len(script)
    with pytest.raises(ZeroDivisionError):  # a mistake of ours stays one
        run(remote.predict("m", b"data", ASK))


@pytest.mark.parametrize(
    ("step", "running", "ready"),
    [
        ("card", False, True),
        (FULL, False, True),
        (ActorDiedError(), True, False),
        (lambda: asyncio.sleep(60), False, False),
        (lambda: asyncio.sleep(60), True, True),  # busy
    ],
)
def test_readiness(step: Any, running: bool, ready: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    deployments = {"Model0": SimpleNamespace(replica_states={"RUNNING" if running else "STARTING": 1})}
    status = SimpleNamespace(applications={"ser": SimpleNamespace(deployments=deployments)})
    monkeypatch.setattr("serve.deployment.ray_serve.status", lambda: status)
    monkeypatch.setattr("serve.deployment._READY_WITHIN_S", 0.05)
    assert run(models(step)[0].ready("m")) is ready


@awaited
async def test_a_busy_worker_s_card_is_the_last_one_it_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serve.deployment._READY_WITHIN_S", 0.05)
    remote, handle = models("first", "second", lambda: asyncio.sleep(60), FULL, FAILED)
    assert [await remote.card("m") for _ in range(4)] == ["first", "second", "second", "second"]
    with pytest.raises(ServiceError) as caught:
        await remote.card("m")
    assert caught.value.code == "unavailable"
    assert handle.calls == [("card",)] * 5


@awaited
async def test_room_is_known_before_asking() -> None:
    leave = asyncio.Event()
    remote, _ = models(*[leave.wait] * 3, room=3)

    async def asked() -> asyncio.Task[Any]:
        task = asyncio.create_task(remote.predict("m", b"data", ASK))
        await asyncio.sleep(0)
        return task

    remote.check_room("m")
    held = [await asked(), await asked()]
    remote.check_room("m")
    held.append(await asked())
    with pytest.raises(ServiceError) as caught:
        remote.check_room("m")
    assert caught.value.code == "overloaded"
    held.pop().cancel()  # a caller who leaves makes room
    await asyncio.sleep(0)
    remote.check_room("m")
    leave.set()
    await asyncio.gather(*held)


def says(name: str) -> Any:
    """An application that answers with its name."""

    async def application(scope: Any, receive: Any, send: Any) -> None:
        await reply(send, name.encode())

    return application


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


def short_way(ingress: Ingress, make: Callable[[Offer], Any] = lambda offer: says("short")) -> ShortWay:
    return ShortWay(says("ingress"), ask=ingress, make=make)


def client(way: ShortWay) -> httpx.AsyncClient:
    transport = httpx.ASGITransport(Admission(way, room=9))
    return httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1", timeout=10)


async def said(http: httpx.AsyncClient, method: str = "POST", path: str = "/v1/predict") -> str:
    answer = (await http.request(method, path)).text
    await asyncio.sleep(0)  # what was asked beside the request is answered
    await asyncio.sleep(0)
    return answer


@awaited
async def test_uploads_take_the_short_way_once_the_offer_is_known(now: list[float]) -> None:
    ingress, made = Ingress("first"), []

    def make(offer: Offer) -> Any:
        made.append(offer.revision)
        return says(f"short {offer.revision}")

    async with client(short_way(ingress, make)) as http:
        assert await said(http) == "ingress"
        assert await said(http) == "short first"
        for method, path in (("GET", "/v1/predict"), ("GET", "/v1/model"), ("POST", "/v1/elsewhere")):
            assert await said(http, method, path) == "ingress"
        assert ingress.asked == 1  # once a second, however many requests
        now[0] += 1.5
        assert await said(http) == "short first"
        assert (ingress.asked, made) == (2, ["first"])  # the same process: the same application
        ingress.found = "second"
        now[0] += 1.5
        assert [await said(http), await said(http)] == ["short first", "short second"]


@awaited
async def test_without_an_ingress_to_ask_the_long_way_stays(now: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serve.ray_settings._PATIENCE_S", 0.05)
    ingress = Ingress(RuntimeError("no such application"))
    way = short_way(ingress)
    async with client(way) as http:
        for asked in (1, 2, 3):
            assert await said(http) == "ingress"
            assert ingress.asked == asked
            now[0] += 1.5
        ingress.found = "first"
        assert [await said(http), await said(http)] == ["ingress", "short"]
        ingress.found = RuntimeError("it has gone")
        now[0] += 1.5
        assert [await said(http), await said(http)] == ["short", "ingress"]
        ingress.found = None
        for _ in range(3):  # one question at a time
            now[0] += 1.5
            assert await said(http) == "ingress"
        assert ingress.asked == 6
        assert way._asking is not None
        await way._asking  # gives up
        ingress.found = "first"
        assert [await said(http), await said(http)] == ["ingress", "short"]


@awaited
async def test_mistakes_of_the_application_are_raised(now: list[float]) -> None:
    async def fails(scope: Any, receive: Any, send: Any) -> None:
        raise ConnectionError

    async with client(short_way(Ingress("first"), lambda offer: fails)) as http:
        await said(http)
        with pytest.raises(ConnectionError):
            await http.post("/v1/predict")


@pytest.mark.parametrize(("found", "way"), [("first", "short"), (RuntimeError("gone"), "ingress")])
@awaited
async def test_streams_wait_for_the_first_offer(now: list[float], found: str | Exception, way: str) -> None:
    """A connection stays where it begins, and behind the proxy nothing would keep a fast sender back."""
    told: list[Any] = []

    async def send(message: Any) -> None:
        told.append(message)

    await short_way(Ingress(found))({"type": "websocket", "path": "/v1/stream"}, asyncio.Event().wait, send)
    assert told[-1]["body"] == way.encode()
