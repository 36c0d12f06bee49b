"""``make app``: service and page start together and stop together. Stand-ins for both, so that it takes a second."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from jobs import app
from tests.support.processes import free_port

SLEEPER = [sys.executable, "-c", "import time; time.sleep(60)"]
ENDS = [sys.executable, "-c", "raise SystemExit(3)"]
Processes = list[subprocess.Popen[bytes]]


@pytest.fixture
def processes(monkeypatch: pytest.MonkeyPatch) -> Iterator[Processes]:
    """Every process that the job starts."""
    started: Processes = []

    class Noted(subprocess.Popen):  # type: ignore[type-arg]
        def __init__(self, *arguments: object, **options: object) -> None:
            super().__init__(*arguments, **options)
            started.append(self)

    monkeypatch.setattr(app.subprocess, "Popen", Noted)
    monkeypatch.setattr(app, "service_command", lambda arguments: SLEEPER)
    monkeypatch.setattr(app, "page_command", lambda port: SLEEPER)
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    yield started
    for number, handler in before.items():
        signal.signal(number, handler)


def free_ports() -> list[str]:
    """Words of the command line that name ports which are free."""
    return [f"{option}={free_port()}" for option in ("--port", "--service_port", "--metrics_port")]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_stops_both(processes: Processes, number: signal.Signals) -> None:
    def interrupt() -> None:
        while len(processes) < 2:
            time.sleep(0.01)
        os.kill(os.getpid(), number)

    threading.Thread(target=interrupt, daemon=True).start()
    assert app.main(free_ports()) == 0
    assert [process.poll() for process in processes] == [-signal.SIGTERM] * 2


@pytest.mark.parametrize(("runs_already", "ended"), [(False, [-signal.SIGTERM, 3]), (True, [3])])
def test_when_one_ends_the_other_is_stopped_but_no_service_that_ran_before(
    processes: Processes, monkeypatch: pytest.MonkeyPatch, runs_already: bool, ended: list[int]
) -> None:
    monkeypatch.setattr("serve.client.Client.live", lambda client: runs_already)
    monkeypatch.setattr(app, "page_command", lambda port: ENDS)
    assert app.main(free_ports()) == 70
    assert [process.poll() for process in processes] == ended


@pytest.mark.parametrize("option", ["--port", "--service_port", "--metrics_port"])
def test_a_port_that_is_taken_is_told_before_anything_starts(
    processes: Processes, capsys: pytest.CaptureFixture[str], option: str
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert app.main([*free_ports(), option, str(taken.getsockname()[1])]) == 2
    assert f"choose another {option}\n" in capsys.readouterr().err
    assert processes == []


def test_a_missing_page_is_told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(app, "PAGE", Path("/nowhere/app.py"))
    assert app.main([]) == 2
    assert "python -m jobs.app" in capsys.readouterr().err


def test_ports_bundles_and_the_openmp_switch_reach_the_commands() -> None:
    arguments = app.build_parser().parse_args(["--service_port", "9", "--metrics_port", "7", "--bundles", "runs/a"])
    assert app.service_command(arguments)[-6:] == ["--port", "9", "--metrics_port", "7", "--bundles", "runs/a"]
    assert app.page_command(8600)[-1] == "8600"
    name = "KMP_DUPLICATE_LIB_OK"  # for Windows only, and it never overrides
    for given, platform, expected in (({}, "linux", None), ({}, "win32", "TRUE"), ({name: "FALSE"}, "win32", "FALSE")):
        assert app.service_environment(given, platform).get(name) == expected


def test_a_page_under_another_name_gets_no_content() -> None:
    """A name of somebody else's that resolves to this machine: the page's content goes over its WebSocket."""
    port = free_port()
    words = [*app.page_command(port), "--server.headless", "true"]
    page = subprocess.Popen(words, cwd=app.PAGE.parent, stdout=subprocess.PIPE, text=True)

    def opened(host: str) -> bool:
        handshake = f"GET /_stcore/stream HTTP/1.1\r\nHost: {host}\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
        handshake += f"Origin: http://{host}\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: {'A' * 22}==\r\n\r\n"
        with socket.create_connection(("127.0.0.1", port), 60) as connection:
            connection.sendall(handshake.encode())
            return b" 101 " in connection.recv(100)

    try:
        assert page.stdout is not None
        assert any(str(port) in line for line in page.stdout)  # it listens
        assert [opened(f"{host}:{port}") for host in ("localhost", "127.0.0.1", "[::1]")] == [True] * 3
        assert [opened(host) for host in (f"evil.example:{port}", "evil.example", "10.0.0.5")] == [False] * 3
    finally:
        page.kill()
        page.communicate()
