"""The service's process: what is refused before it starts, its settings and metrics, which signals end it and when."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
import ray
import yaml
from click.testing import CliRunner
from prometheus_client.parser import text_string_to_metric_families
from pydantic import ValidationError
from ray import serve as ray_serve
from ray.serve.exceptions import RayServeException
from ray.serve.schema import ServeDeploySchema
from ray.serve.scripts import cli as ray_cli

from jobs import serve as job
from pipeline.models.bundle import Bundle
from pipeline.storage.errors import SerError
from serve import deployment
from serve.auth import is_loopback, key_digest_from_environment
from serve.ray_settings import MESSAGE_BYTES, VARIABLES, prepare
from serve.schema import checked_key, key_digest
from serve.settings import Settings
from tests.support.processes import free_port

Capture = pytest.CaptureFixture[str]
Patch = pytest.MonkeyPatch
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def _no_key(monkeypatch: Patch) -> None:
    monkeypatch.delenv("SER_API_KEY", raising=False)


# --- what is refused before anything starts --------------------------------------------------------------------------


def refused(capsys: Capture, *words: str) -> str:
    """The one line on stderr of a start that does not happen, on either engine."""
    lines = set()
    for engine in ("ray", "local"):
        assert job.main(["--engine", engine, *words]) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        lines |= set(captured.err.splitlines())
    (line,) = lines
    assert line.startswith("error: ")
    return line


def test_a_missing_bundle_and_two_of_one_name(capsys: Capture, tmp_path: Path, tiny_bundle: Bundle) -> None:
    assert "missing" in refused(capsys, "--port", "0", "--bundles", str(tmp_path / "missing"))
    pair = f"{tiny_bundle.folder},{tiny_bundle.folder}"
    assert "name" in refused(capsys, "--port", "0", "--bundles", pair)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.7"])
def test_others_are_let_in_only_with_a_key(capsys: Capture, host: str) -> None:
    assert "SER_API_KEY" in refused(capsys, "--host", host)


def test_ports_that_are_taken_and_more_threads_than_cpus(capsys: Capture, monkeypatch: Patch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr("serve.worker.open_bundles", lambda _: [])
    monkeypatch.setattr(job, "start_ray", lambda **_: pytest.fail("Ray is started"))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert "another --port" in refused(capsys, "--port", port)
        assert "--metrics_port" in refused(capsys, "--port", "0", "--metrics_port", port)
    assert "another --port" in refused(capsys, "--port", "70000")
    assert "9999" in refused(capsys, "--port", "0", "--metrics_port", "0", "--threads", "9999")


def test_what_only_one_engine_can(capsys: Capture) -> None:
    for words in (["--replicas", "2", "--engine", "local"], ["--stop_with_stdin"]):
        assert job.main(words) == 2
        assert words[0] in capsys.readouterr().err


def test_numbers_out_of_range(capsys: Capture) -> None:
    given = {"threads": "0", "max-body-mib": "-1", "replicas": "0", "deadline_s": "inf", "max_held_mib": "inf"}
    for name, number in given.items():
        assert "--" + name.replace("-", "_") in refused(capsys, f"--{name}", number)


@pytest.mark.parametrize("key", ["schl\u00fcssel", "a\nb", "a\x7f"])
def test_a_key_that_no_header_carries(capsys: Capture, monkeypatch: Patch, key: str) -> None:
    monkeypatch.setenv("SER_API_KEY", key)
    line = refused(capsys, "--port", "0")
    assert "ASCII" in line
    assert key not in line


def test_ray_s_command_line_tells_a_bad_bundle_in_one_line(tmp_path: Path, monkeypatch: Patch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))  # `serve run` puts the folder there itself
    found = CliRunner().invoke(ray_cli, ["run", "serve.deployment:build", f"bundles={tmp_path / 'missing'}"])
    assert found.exit_code == 1
    assert "Traceback" not in found.output
    (told,) = (line for line in found.output.splitlines() if line.startswith("Error: "))
    assert "missing" in told


# --- settings and keys -----------------------------------------------------------------------------------------------


def test_settings_know_their_names_lists_and_public_limits() -> None:
    assert Settings(bundles="a,b", cors_origins="").bundles == ("a", "b")  # type: ignore[arg-type]
    assert Settings(**{"threads": "2"}).threads == 2  # as a command line gives it
    with pytest.raises(ValidationError):
        Settings(thread=2)  # type: ignore[call-arg]
    limits = {name for name in Settings.model_fields if name.startswith("max_") or name.endswith("_s")}
    assert limits - set(Settings().public_limits) == {"max_replicas", "max_ongoing", "max_queued", "max_held_mib"}


def test_the_configuration_file_fits() -> None:
    config = yaml.safe_load((ROOT / "serve" / "config.yaml").read_text())
    (application,) = ServeDeploySchema.model_validate(config).applications
    assert application.import_path == "serve.deployment:build"
    assert config["http_options"] == deployment.http_options("127.0.0.1", 8000, Settings(**application.args))


def test_keys(monkeypatch: Patch) -> None:
    assert key_digest_from_environment() is None
    monkeypatch.setenv("SER_API_KEY", "")
    assert key_digest_from_environment() is None
    for text in ("k", " k\r\n"):  # the second as a file holds it
        monkeypatch.setenv("SER_API_KEY", text)
        assert key_digest_from_environment() == key_digest("k") != key_digest("K")
    assert checked_key("correct horse battery staple") == "correct horse battery staple"


def test_loopback() -> None:
    assert all(map(is_loopback, ("127.0.0.1", "127.9.9.9", "::1", "localhost")))
    assert not any(map(is_loopback, ("0.0.0.0", "::")))


# --- in this process: start, metrics, end ----------------------------------------------------------------------------


def _open(bundle: Bundle, port: int, *words: str) -> subprocess.Popen[str]:
    """``jobs.serve --engine local`` as a process, once it answers."""
    command = [sys.executable, "-m", "jobs.serve", "--engine", "local", "--bundles", str(bundle.folder)]
    command += ["--port", str(port), "--metrics_port", "0", *words]
    process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    assert any(line.startswith("ready: ") for line in process.stderr)
    return process


def test_killed_it_starts_again_at_once_and_a_signal_ends_it_also_during_an_upload(tiny_bundle: Bundle) -> None:
    port = free_port()
    killed = _open(tiny_bundle, port)
    url = f"http://127.0.0.1:{port}"
    with httpx.Client(base_url=url, trust_env=False) as client:
        assert client.get("/v2/health/ready").json() == {"ready": True}
        killed.kill()
        killed.communicate()
    process = _open(tiny_bundle, port)
    head = "POST /v1/audio-classification HTTP/1.1\r\nHost: localhost\r\nContent-Type: audio/wav\r\n"
    with socket.create_connection(("127.0.0.1", port), 60) as upload:
        upload.sendall(f"{head}Content-Length: 100000\r\n\r\n".encode() + bytes(1000))
        assert httpx.get(f"{url}/v2/health/live", trust_env=False).is_success  # by now the upload is in work
        process.terminate()
        answer = b"".join(iter(lambda: upload.recv(10_000), b"")).decode()
        assert answer.startswith("HTTP/1.1 503 ")
        assert "retry-after: " in answer.lower()
        assert '"code":"unavailable"' in answer
    _, said = process.communicate(timeout=60)
    assert process.returncode == 0
    assert said.splitlines()[-1] == "stopped"


def test_it_ends_with_whoever_holds_its_input(tiny_bundle: Bundle) -> None:
    process = _open(tiny_bundle, free_port(), "--stop_with_stdin")
    assert process.stdin is not None
    process.stdin.close()
    assert process.wait(60) == 0


def test_the_page_of_metrics_has_the_service_s_own_summed_over_processes() -> None:
    labels = 'Component="core_worker",NodeAddress="127.0.0.1",SessionName="session",WorkerId="{worker}"'
    bucket = 'ray_ser_request_seconds_bucket{{{tags},le="{le}",route="/v1/predict"}} {n}'
    total = 'ray_ser_requests_total{{{tags},code="ok",route="/v1/{route}",status="200"}} {n}'
    workers = [(labels.format(worker=worker), n) for worker, n in (("a", 2), ("b", 1_234_565))]
    exported = ["# HELP ray_ser_requests_total requests", "# TYPE ray_ser_requests_total counter"]
    exported += [total.format(tags=tags, route=route, n=n) for tags, n in workers for route in "pq"]
    exported += ["# HELP ray_serve_x x", "# TYPE ray_serve_x gauge", "ray_serve_x 3"]
    exported += ['ray_other{a="b"} 1'] * 20_000
    exported += ["# HELP ray_ser_request_seconds s", "# TYPE ray_ser_request_seconds histogram"]
    exported += [bucket.format(tags=tags, le=le, n=n) for tags, n in workers for le in (1, "+Inf")]

    page = job._Metrics(0)
    address = f"http://127.0.0.1:{page.server_port}"

    def asked(path: str) -> httpx.Response:
        return httpx.get(f"{address}{path}", trust_env=False)

    try:
        assert asked("/metrics").status_code == 503  # Ray is starting
        page.source = lambda: "\n".join(exported)
        text, everything = asked("/metrics").text, asked("/metrics/all").text
        assert asked("/").status_code == 404
        page.source = lambda: job.fetched(f"http://127.0.0.1:{free_port()}/metrics")  # Ray has gone
        assert asked("/metrics").status_code == 503
    finally:
        page.end()
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    assert [(sample.name, sorted(sample.labels)) for sample in samples] == [
        *[("ray_ser_requests_total", ["code", "route", "status"])] * 2,
        *[("ray_ser_request_seconds_bucket", ["le", "route"])] * 2,
    ]
    assert {sample.value for sample in samples} == {1_234_567.0}
    assert len(text) < 1000 < len(everything)
    with socket.create_server(("127.0.0.1", page.server_port)):  # is free again
        pass


# --- signals; Ray stands still ---------------------------------------------------------------------------------------


@pytest.fixture
def calls(monkeypatch: Patch) -> Iterator[list[str]]:
    """What the job asked of Ray, which does nothing; handlers of signals are put back."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    asked: list[str] = []
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
    calls: list[str], monkeypatch: Patch, name: str, number: signal.Signals
) -> None:
    monkeypatch.setattr(deployment, "run", lambda *_: os.kill(os.getpid(), signal.SIGHUP))  # asks for a roll-out
    monkeypatch.setattr(deployment, name, waits_for_ever(calls, name, number))
    assert main() == 0
    assert calls == ["start", name, "stop", "stop_ray"]


@pytest.mark.parametrize("started", [True, False])
def test_the_end_is_not_interrupted(calls: list[str], monkeypatch: Patch, started: bool) -> None:
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
    command = [sys.executable, "-c", ON_A_TERMINAL, str(told)]
    child = subprocess.Popen(command, cwd=ROOT, stdin=slave, stdout=slave, stderr=slave, pass_fds=[told])
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


def test_what_ray_starts_gets_the_key_s_hash_and_not_the_key(calls: list[str], monkeypatch: Patch) -> None:
    monkeypatch.setenv("SER_API_KEY", "secret\n")
    monkeypatch.setattr("serve.ray_settings.prepare", prepare)
    for name in (*VARIABLES, MESSAGE_BYTES, "SER_PROXY_SETTINGS", "SER_PROXY_KEY_DIGEST"):
        monkeypatch.setenv(name, "")  # put back at the end
    monkeypatch.setattr(job, "start_ray", lambda **_: calls.extend(value for value in os.environ.values()))

    def answers_with(number: signal.Signals) -> Callable[..., None]:
        def call(*given: object) -> None:
            assert given[-1] == key_digest("secret")
            os.kill(os.getpid(), number)

        return call

    monkeypatch.setattr(deployment, "run", answers_with(signal.SIGHUP))
    monkeypatch.setattr(deployment, "roll_out", answers_with(signal.SIGTERM))
    assert main() == 0
    assert key_digest("secret") in calls
    assert not [value for value in calls if "secret" in value]


@pytest.mark.parametrize("ends", [None, TimeoutError(), RayServeException()])
def test_what_is_in_work_is_answered_before_the_proxy_ends(monkeypatch: Patch, ends: Exception | None) -> None:
    asked: list[str] = []

    def delete(name: str) -> None:
        asked.append(name)
        if ends:
            raise ends

    monkeypatch.setattr(ray_serve, "delete", delete)
    monkeypatch.setattr(ray_serve, "shutdown", lambda: asked.append("shutdown"))
    deployment.stop()
    assert asked == ["ser", "shutdown"]


def test_more_cpus_than_there_are_or_are_free_are_refused(tiny_bundle: Bundle, monkeypatch: Patch) -> None:
    asked: list[str] = []
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 2.0})
    monkeypatch.setattr(ray, "available_resources", dict)
    monkeypatch.setattr(ray_serve, "start", lambda **_: asked.append("start"))
    monkeypatch.setattr(ray_serve, "run", lambda *_, **__: asked.append("run"))
    bundles = (str(tiny_bundle.folder),)
    with pytest.raises(SerError, match="3 CPUs"):
        deployment.run(Settings(bundles=bundles, replicas=3), "127.0.0.1", 8000)
    with pytest.raises(SerError, match="0 are free"):
        deployment.roll_out(Settings(bundles=bundles))
    assert asked == []
    monkeypatch.setattr(ray, "available_resources", lambda: {"CPU": 1.0})
    deployment.roll_out(Settings(bundles=bundles))
    assert asked == ["run"]
    deployment.run(Settings(bundles=bundles, threads=2), "127.0.0.1", 8000)
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")  # of a cluster, which may grow
    deployment.run(Settings(bundles=bundles, threads=64), "127.0.0.1", 8000)
    assert asked[1:] == ["start", "run"] * 2
