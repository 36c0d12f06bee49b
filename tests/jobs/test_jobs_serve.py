"""Starting the service: what is refused in one line before Ray starts, settings in both spellings, the builder."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families
from pydantic import ValidationError

from jobs import serve as job
from pipeline.models.bundle import Bundle
from serve.auth import is_loopback, key_digest_from_environment
from serve.schema import checked_key, key_digest
from serve.settings import Settings
from tests.support.processes import free_port

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def _no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SER_API_KEY", raising=False)


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
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


def test_a_missing_bundle_and_two_of_one_name(capsys: Any, tmp_path: Path, tiny_bundle: Bundle) -> None:
    assert "missing" in refused(capsys, "--port", "0", "--bundles", str(tmp_path / "missing"))
    pair = f"{tiny_bundle.folder},{tiny_bundle.folder}"
    assert "name" in refused(capsys, "--port", "0", "--bundles", pair)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.7"])
def test_others_are_let_in_only_with_a_key(capsys: pytest.CaptureFixture[str], host: str) -> None:
    assert "SER_API_KEY" in refused(capsys, "--host", host)


def test_a_port_that_is_taken(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert "--port" in refused(capsys, "--port", str(taken.getsockname()[1]))
    assert "--port" in refused(capsys, "--port", "70000")


def test_a_metrics_port_that_is_taken(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serve.worker.open_bundles", lambda _: [])
    monkeypatch.setattr(job, "start_ray", lambda **_: pytest.fail("Ray is started"))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        line = refused(capsys, "--port", "0", "--metrics_port", str(taken.getsockname()[1]))
    assert "--metrics_port" in line


def test_more_threads_than_cpus(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr("serve.worker.open_bundles", lambda _: [])
    monkeypatch.setattr(job, "start_ray", lambda **_: pytest.fail("Ray is started"))
    assert "9999" in refused(capsys, "--port", "0", "--threads", "9999")


def test_what_only_one_engine_can(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["--replicas", "2", "--engine", "local"], ["--stop_with_stdin"]):
        assert job.main(words) == 2
        assert words[0] in capsys.readouterr().err


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

    class Ray(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write("\n".join(exported).encode())

        def log_message(self, *_: object) -> None:
            pass

    source = HTTPServer(("127.0.0.1", 0), Ray)
    threading.Thread(target=source.serve_forever, daemon=True).start()
    page = job._Metrics(0)
    address = f"http://127.0.0.1:{page.server_port}"
    try:
        assert httpx.get(f"{address}/metrics", trust_env=False).status_code == 503  # Ray is starting
        page.source = lambda: job.fetched(f"http://127.0.0.1:{source.server_port}/metrics")
        text = httpx.get(f"{address}/metrics", trust_env=False).text
        everything = httpx.get(f"{address}/metrics/all", trust_env=False).text
        assert httpx.get(address, trust_env=False).status_code == 404
        source.shutdown()
        source.server_close()
        assert httpx.get(f"{address}/metrics", trust_env=False).status_code == 503
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


@pytest.mark.parametrize(
    "words",
    [
        ["--threads", "0"],
        ["--max-body-mib", "-1"],
        ["--replicas", "0"],
        ["--deadline_s", "inf"],
        ["--max_held_mib", "inf"],
    ],
)
def test_numbers_out_of_range(capsys: pytest.CaptureFixture[str], words: list[str]) -> None:
    assert words[0].replace("-", "_").replace("__", "--") in refused(capsys, *words)


def test_settings_know_their_names_and_lists() -> None:
    assert Settings(bundles="a,b", cors_origins="").bundles == ("a", "b")  # type: ignore[arg-type]
    assert Settings(**{"threads": "2"}).threads == 2  # as a command line gives it
    with pytest.raises(ValidationError):
        Settings(thread=2)  # type: ignore[call-arg]


def test_every_limit_is_public() -> None:
    limits = {name for name in Settings.model_fields if name.startswith("max_") or name.endswith("_s")}
    assert limits - set(Settings().public_limits) == {"max_replicas", "max_ongoing", "max_queued", "max_held_mib"}


def test_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    assert key_digest_from_environment() is None
    monkeypatch.setenv("SER_API_KEY", "")
    assert key_digest_from_environment() is None
    monkeypatch.setenv("SER_API_KEY", "k")
    assert key_digest_from_environment() == key_digest("k") != key_digest("K")
    monkeypatch.setenv("SER_API_KEY", " k\r\n")  # as a file holds it
    assert key_digest_from_environment() == key_digest("k")
    assert checked_key("correct horse battery staple") == "correct horse battery staple"


@pytest.mark.parametrize("key", ["schl\u00fcssel", "a\nb", "a\x7f"])
def test_a_key_that_no_header_carries(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    monkeypatch.setenv("SER_API_KEY", key)
    line = refused(capsys, "--port", "0")
    assert "ASCII" in line
    assert key not in line


@pytest.mark.parametrize(
    ("host", "expected"),
    [("127.0.0.1", True), ("127.9.9.9", True), ("::1", True), ("localhost", True), ("0.0.0.0", False), ("::", False)],
)
def test_loopback(host: str, expected: bool) -> None:
    assert is_loopback(host) is expected


def test_the_configuration_file_fits(tmp_path: Path) -> None:
    from ray.serve.schema import ServeDeploySchema

    from serve.deployment import http_options

    config = yaml.safe_load((ROOT / "serve" / "config.yaml").read_text())
    (application,) = ServeDeploySchema.model_validate(config).applications
    settings = Settings(**application.args)
    assert application.import_path == "serve.deployment:build"
    ours = http_options("127.0.0.1", 8000, settings)
    assert config["http_options"] == ours


def test_ray_s_command_line_tells_a_bad_bundle_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from click.testing import CliRunner
    from ray.serve.scripts import cli

    monkeypatch.syspath_prepend(str(ROOT))  # `serve run` puts the folder there itself
    found = CliRunner().invoke(cli, ["run", "serve.deployment:build", f"bundles={tmp_path / 'missing'}"])
    assert found.exit_code == 1
    assert "Traceback" not in found.output
    (told,) = (line for line in found.output.splitlines() if line.startswith("Error: "))
    assert "missing" in told
