"""What the ingress does when a worker is full, dies or is gone: handles of Ray Serve, scripted. No Ray is started."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import ActorDiedError, ActorUnavailableError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from serving import run

from serve.deployment import RemoteModels
from serve.problems import ServiceError, kind_of
from serve.service import PredictRequest

ASK = PredictRequest()
FULL = BackPressureError(num_queued_requests=3, max_queued_requests=3)


class Handle:
    """A deployment handle that does what its script says, call by call."""

    def __init__(self, *script: Any) -> None:
        self.script, self.calls = list(script), []

    app_name, deployment_name = "ser", "Model0"

    def __getattr__(self, method: str) -> Any:
        return Method(self, method)


class Method:
    def __init__(self, handle: Handle, name: str) -> None:
        self.handle, self.name = handle, name

    async def remote(self, *arguments: object) -> object:
        self.handle.calls.append((self.name, *arguments))
        step = self.handle.script.pop(0)
        if isinstance(step, Exception):
            raise step
        return await step() if callable(step) else step


def models(*script: Any, room: int = 5) -> tuple[RemoteModels, Handle]:
    handle = Handle(*script)
    return RemoteModels({"m": handle}, room), handle  # type: ignore[dict-item]


def raised(call: Callable[[], Any]) -> ServiceError:
    with pytest.raises(ServiceError) as caught:
        run(call())
    return caught.value


def test_an_answer_passes_through() -> None:
    remote, handle = models("heard", "why", "card")
    assert run(remote.predict("m", b"data", ASK)) == "heard"
    assert run(remote.explain("m", b"data", ASK)) == "why"
    assert run(remote.card("m")) == "card"
    assert handle.calls == [("predict", b"data", ASK), ("explain", b"data", ASK), ("card",)]
    assert remote.names == ("m",)


@pytest.mark.parametrize("death", [ActorDiedError(), ActorUnavailableError("gone", None)])
@pytest.mark.parametrize("method", ["predict", "explain"])
def test_work_of_a_dead_worker_is_asked_again_apart(method: str, death: Exception) -> None:
    remote, handle = models(death, "answer")
    assert run(getattr(remote, method)("m", b"data", ASK)) == "answer"
    assert handle.calls == [(method, b"data", ASK), (method, b"data", ASK, True)]


def test_two_deaths_are_told() -> None:
    remote, handle = models(ActorDiedError(), ActorDiedError())
    error = raised(lambda: remote.predict("m", b"data", ASK))
    assert (error.code, kind_of(error.code).status) == ("unavailable", 503)
    assert int(error.headers["Retry-After"]) >= 1
    assert len(handle.calls) == 2


def test_a_full_queue_is_told_and_not_asked_again() -> None:
    remote, handle = models(FULL)
    error = raised(lambda: remote.predict("m", b"data", ASK))
    assert (error.code, kind_of(error.code).status) == ("overloaded", 429)
    assert int(error.headers["Retry-After"]) >= 1
    assert len(handle.calls) == 1


def test_a_deployment_that_failed_is_told() -> None:
    remote, _ = models(DeploymentUnavailableError(None))  # type: ignore[arg-type]
    assert raised(lambda: remote.predict("m", b"data", ASK)).code == "unavailable"


def test_a_mistake_of_ours_stays_one() -> None:
    remote, _ = models(ZeroDivisionError())
    with pytest.raises(ZeroDivisionError):
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
    state = {"RUNNING" if running else "STARTING": 1}
    deployments = {"Model0": SimpleNamespace(replica_states=state)}
    status = SimpleNamespace(applications={"ser": SimpleNamespace(deployments=deployments)})
    monkeypatch.setattr("serve.deployment.ray_serve.status", lambda: status)
    monkeypatch.setattr("serve.deployment._READY_WITHIN_S", 0.05)
    remote, _ = models(step)
    assert run(remote.ready("m")) is ready


def test_a_busy_worker_s_card_is_the_last_one_it_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serve.deployment._READY_WITHIN_S", 0.05)
    remote, handle = models("first", "second", lambda: asyncio.sleep(60), FULL, DeploymentUnavailableError(None))  # type: ignore[arg-type]

    async def scenario() -> list[object]:
        return [await remote.card("m") for _ in range(4)]

    assert run(scenario()) == ["first", "second", "second", "second"]
    assert raised(lambda: remote.card("m")).code == "unavailable"
    assert len(handle.calls) == 5


def test_room_is_known_before_asking() -> None:
    async def scenario() -> None:
        leave = asyncio.Event()
        remote, _ = models(*[leave.wait] * 3, ActorDiedError(), leave.wait, room=3)
        remote.check_room("m")
        held = [asyncio.create_task(remote.predict("m", b"data", ASK)) for _ in range(2)]
        await asyncio.sleep(0)
        remote.check_room("m")
        held.append(asyncio.create_task(remote.predict("m", b"data", ASK)))
        await asyncio.sleep(0)
        with pytest.raises(ServiceError) as caught:
            remote.check_room("m")
        assert caught.value.code == "overloaded"
        held.pop().cancel()  # a caller who leaves makes room
        await asyncio.sleep(0)
        remote.check_room("m")
        leave.set()
        await asyncio.gather(*held)
        remote.check_room("m")

    asyncio.run(scenario())
