"""The service's process: which signals end it, when, and what is refused because CPUs are missing. Ray stands still."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import ray
from ray import serve as ray_serve
from ray.serve.exceptions import RayServeException

from jobs import serve as job
from pipeline.models.bundle import Bundle
from pipeline.storage.errors import SerError
from serve import deployment
from serve.ray_settings import MESSAGE_BYTES, VARIABLES, prepare
from serve.schema import key_digest
from serve.settings import Settings

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What the job asked of Ray, which does nothing; handlers of signals are put back."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    asked: list[str] = []
    monkeypatch.delenv("SER_API_KEY", raising=False)
    monkeypatch.setattr("serve.worker.open_bundles", lambda _: [])
    monkeypatch.setattr("serve.ray_settings.prepare", lambda _: None)
    monkeypatch.setattr(job, "start_ray", lambda **_: asked.append("start"))
    monkeypatch.setattr(job, "stop_ray", lambda: asked.append("stop_ray"))
    monkeypatch.setattr(deployment, "run", lambda *_: asked.append("run"))
    monkeypatch.setattr(deployment, "roll_out", lambda *_: asked.append("roll_out"))
    monkeypatch.setattr(deployment, "stop", lambda: asked.append("stop"))
    yield asked
    for number, handler in before.items():
        signal.signal(number, handler)


def waits_for_ever(calls: list[str], name: str, *numbers: signal.Signals) -> Callable[..., None]:
    """A call that gets signals while it is at work, and would not return by itself."""

    def call(*_: object) -> None:
        calls.append(name)
        try:
            for number in numbers:
                os.kill(os.getpid(), number)
            threading.Event().wait(30)
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # as Ray's compiled parts do
            raise SystemError("returned a result with an exception set") from error
        pytest.fail(f"{name} went on in spite of the signal")

    return call


def main() -> int:
    return job.main(["--port", "0", "--metrics_port", "0"])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("name", ["run", "roll_out"])
def test_a_start_or_a_roll_out_that_waits_is_ended(
    calls: list[str], monkeypatch: pytest.MonkeyPatch, name: str, number: signal.Signals
) -> None:
    monkeypatch.setattr(deployment, "run", lambda *_: os.kill(os.getpid(), signal.SIGHUP))  # asks for a roll-out
    monkeypatch.setattr(deployment, name, waits_for_ever(calls, name, number))
    assert main() == 0
    assert calls == ["start", name, "stop", "stop_ray"]


@pytest.mark.parametrize("started", [True, False])
def test_the_end_is_not_interrupted(calls: list[str], monkeypatch: pytest.MonkeyPatch, started: bool) -> None:
    def fails(*_: object) -> None:
        calls.append("run")
        raise SerError("out of memory")

    monkeypatch.setattr(deployment, "run", waits_for_ever(calls, "run", signal.SIGTERM) if started else fails)

    def impatient() -> None:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            os.kill(os.getpid(), number)
        calls.append("stop")

    monkeypatch.setattr(deployment, "stop", impatient)
    assert (main() == 0) == started
    assert calls == ["start", "run", "stop", "stop_ray"]


ON_A_TERMINAL = """
import fcntl, os, sys, termios
os.setsid()
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
from jobs import serve as job
from serve import deployment, ray_settings, worker
told = int(sys.argv[1])
worker.open_bundles = lambda _: []
ray_settings.prepare = lambda _: None
job.start_ray = lambda **_: None
job.stop_ray = lambda: os.write(told, b"stopped\\n")
deployment.run = lambda *_: os.write(told, b"ready\\n")
def roll_out(*_):
    os.write(told, b"rolled out\\n")
    while os.isatty(2):  # until the terminal has gone; the signal of that may be on its way
        pass
deployment.roll_out = roll_out
deployment.stop = lambda: None
raise SystemExit(job.main(["--port", "0", "--metrics_port", "0"]))
"""


def test_a_hang_up_rolls_out_while_the_terminal_is_there_and_ends_when_it_has_gone() -> None:
    master, slave = os.openpty()
    heard, told = os.pipe()
    child = subprocess.Popen(
        [sys.executable, "-c", ON_A_TERMINAL, str(told)],
        cwd=ROOT,
        stdin=slave,
        stdout=slave,
        stderr=slave,
        pass_fds=[told],
    )
    os.close(slave)
    os.close(told)
    try:
        with os.fdopen(heard) as lines:
            assert lines.readline() == "ready\n"
            child.send_signal(signal.SIGHUP)
            assert lines.readline() == "rolled out\n"
            os.close(master)  # the kernel sends SIGHUP
            assert lines.read() == "stopped\n"
        assert child.wait(60) == 0
    finally:
        child.kill()
        child.wait()


def test_what_ray_starts_gets_the_key_s_hash_and_not_the_key(calls: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SER_API_KEY", "secret\n")
    monkeypatch.setattr("serve.ray_settings.prepare", prepare)
    for name in (*VARIABLES, MESSAGE_BYTES, "SER_PROXY_SETTINGS", "SER_PROXY_KEY_DIGEST"):
        monkeypatch.setenv(name, "")  # put back at the end
    monkeypatch.setattr(job, "start_ray", lambda **_: calls.extend(value for value in os.environ.values()))

    def run(_: Settings, host: str, port: int, digest: str | None) -> None:
        assert digest == key_digest("secret")
        os.kill(os.getpid(), signal.SIGHUP)

    def roll_out(_: Settings, digest: str | None) -> None:
        assert digest == key_digest("secret")
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(deployment, "run", run)
    monkeypatch.setattr(deployment, "roll_out", roll_out)
    assert main() == 0
    assert key_digest("secret") in calls
    assert not [value for value in calls if "secret" in value]


@pytest.mark.parametrize("ends", [None, TimeoutError(), RayServeException()])
def test_what_is_in_work_is_answered_before_the_proxy_ends(
    monkeypatch: pytest.MonkeyPatch, ends: Exception | None
) -> None:
    asked: list[str] = []

    def delete(name: str) -> None:
        asked.append(name)
        if ends:
            raise ends

    monkeypatch.setattr(ray_serve, "delete", delete)
    monkeypatch.setattr(ray_serve, "shutdown", lambda: asked.append("shutdown"))
    deployment.stop()
    assert asked == ["ser", "shutdown"]


@pytest.fixture
def two_cpus(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Ray with two CPUs, both in use, and what Serve is asked to do."""
    asked: list[str] = []
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 2.0})
    monkeypatch.setattr(ray, "available_resources", dict)
    monkeypatch.setattr(ray_serve, "start", lambda **_: asked.append("start"))
    monkeypatch.setattr(ray_serve, "run", lambda *_, **__: asked.append("run"))
    return asked


def test_more_cpus_than_there_are_are_refused(
    two_cpus: list[str], tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundles = (str(tiny_bundle.folder),)
    with pytest.raises(SerError, match="3 CPUs"):
        deployment.run(Settings(bundles=bundles, replicas=3), "127.0.0.1", 8000)
    assert two_cpus == []
    deployment.run(Settings(bundles=bundles, threads=2), "127.0.0.1", 8000)
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")  # of a cluster, which may grow
    deployment.run(Settings(bundles=bundles, threads=64), "127.0.0.1", 8000)
    assert two_cpus == ["start", "run"] * 2


def test_a_roll_out_without_a_free_cpu_is_refused(
    two_cpus: list[str], tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = Settings(bundles=(str(tiny_bundle.folder),))
    with pytest.raises(SerError, match="0 are free"):
        deployment.roll_out(settings)
    assert two_cpus == []
    monkeypatch.setattr(ray, "available_resources", lambda: {"CPU": 1.0})
    deployment.roll_out(settings)
    assert two_cpus == ["run"]
