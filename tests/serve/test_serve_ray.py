"""The service as it runs, over real sockets, started once: on Ray Serve (proxy, ingress, a model worker), and local.

Limits are low here, so that they can be reached quickly.
"""

from __future__ import annotations

import asyncio
import json
import os
import pickle
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from ipaddress import IPv6Address
from pathlib import Path
from typing import NamedTuple

import grpc
import httpx
import numpy as np
import pytest
from bundles import resaved
from conftest import SERVICE_LIMITS, speech_like
from ray.serve.generated import serve_pb2, serve_pb2_grpc
from serving import form, problem_of, wav
from streaming import END, PCM, opened, pcm_and_wav, pieces, running, sent, webm
from websockets.exceptions import InvalidStatus

from jobs import infer
from pipeline.cluster.ray_internals import SERVE_REPLICA
from pipeline.inference.predictor import Predictor
from pipeline.models.bundle import Bundle
from serve.client import Client
from serve.client_wire import single
from serve.schema import Recording
from serve.settings import Settings
from serve.worker import open_bundles
from tests.support.processes import command_of, descendants, free_port

MIB = 2**20


class Served(NamedTuple):
    """A service that runs: its address, its metrics in Prometheus' format, and other models instead of its own."""

    url: str
    metrics: Callable[[], str]
    roll_out: Callable[[Settings], None]


@pytest.fixture(scope="module", params=["ray", "local"])
def served(request: pytest.FixtureRequest, tiny_bundle: Bundle) -> Iterator[Served]:
    if request.param == "local":
        with running(tiny_bundle, **SERVICE_LIMITS) as (url, service):

            def roll_out(other: Settings) -> None:
                service.settings = other
                service.open(open_bundles(other.bundles))

            yield Served(url, service.metrics, roll_out)
        return
    request.getfixturevalue("ray_session")
    from jobs.serve import fetched
    from serve import deployment

    port = free_port()
    deployment.run(Settings(bundles=(str(tiny_bundle.folder),), **SERVICE_LIMITS), "127.0.0.1", port)
    yield Served(f"http://127.0.0.1:{port}", lambda: fetched(deployment.metrics_address()), deployment.roll_out)
    deployment.stop()


@pytest.fixture
def url(served: Served) -> str:
    return served.url


on_ray = pytest.mark.parametrize("served", ["ray"], indirect=True)


@pytest.fixture
def http(url: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=url, timeout=60) as client:
        yield client


def is_problem(response: httpx.Response, status: int, code: str) -> None:
    assert response.headers["x-request-id"] == problem_of(response, status, code).request_id


def test_infer_and_service_agree(
    url: str, tiny_bundle: Bundle, write_audio: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    paths = [write_audio("a.wav", duration_s=3.0, sample_rate_hz=44_100, channels=2)]
    paths += [write_audio("b.flac", duration_s=1.0, f0_hz=300), write_audio("c.ogg", duration_s=4.0, f0_hz=90)]
    with Client(url) as client:
        served = [answer for answer in client.predict_each(paths) if isinstance(answer, Recording)]
        raw = [client.classify(path) for path in paths]
    assert infer.main(["--json", "--model_weights", str(tiny_bundle.folder), "--file", *map(str, paths)]) == 0
    inferred = json.loads(capsys.readouterr().out)
    for answer, scores, one in zip(served, raw, inferred, strict=True):
        found = {item.label: item.score for item in answer.scores}
        assert found == pytest.approx(one["probabilities"], abs=1e-5)
        assert answer.label == one["predicted"] == scores[0].label
        assert (answer.duration_s, answer.channels) == (one["duration_s"], one["channels"])


def test_a_stream_is_heard_as_its_file(url: str, tiny_bundle: Bundle) -> None:
    raw, file = pcm_and_wav(speech_like(duration_s=4.2), 16_000)
    packed = webm(speech_like(duration_s=3.0, sample_rate_hz=48_000))
    for sound, whole, said in ((raw, file, PCM), (packed, packed, {"format": "webm"})):
        with Client(url) as client:
            expected = client.predict(("whole", whole), window_s=2, hop_s=0.5).segments
        heard = sent(url, [*pieces(sound, 6_001), END], **said)
        assert (heard.code, heard.of("done")[0]["skipped"]) == (1000, 0)
        for window, segment in zip(heard.windows, expected or [], strict=True):
            assert (window["label"], window["start_s"]) == (segment.label, pytest.approx(segment.start_s))
            found = {score["label"]: score["score"] for score in window["scores"]}
            assert found == pytest.approx({score.label: score.score for score in segment.scores}, abs=2e-4)


@on_ray
def test_a_stream_of_garbage_is_told_and_one_of_another_site_refused(url: str) -> None:
    heard = sent(url, [b"garbage" * 100], format="webm")
    assert (heard.code, heard.problem) == (4400, "not_audio")
    with pytest.raises(InvalidStatus) as refused, opened(url, headers={"Origin": "http://evil.example"}):
        pass
    assert refused.value.response.status_code == 403


def test_every_answer_has_one_request_id(http: httpx.Client) -> None:
    asked = (("GET", "/v2/health/live"), ("GET", "/nothing"), ("GET", "/v1/predict"), ("POST", "/v1/explain"))
    for method, path in asked:
        assert len(http.request(method, path).headers.get_list("x-request-id")) == 1
        given = http.request(method, path, headers={"x-request-id": "mine-1"})
        assert given.headers.get_list("x-request-id") == ["mine-1"]
    answer = http.post("/v1/predict", **form(wav()))
    assert answer.json()["id"] == answer.headers["x-request-id"]


def test_no_version_of_ours_is_told(http: httpx.Client) -> None:
    for answer in (http.get("/v2/health/live"), http.get("/nothing"), http.post("/v1/predict", **form(b"words"))):
        told = " ".join([*map(": ".join, answer.headers.items()), answer.text]).lower()
        assert not any(word in told for word in ("ray", "python", "fastapi", "starlette", "/home", "/tmp"))


def test_the_task_as_hugging_face_s_client_speaks_it(url: str, tmp_path: Path) -> None:
    from huggingface_hub import InferenceClient

    path = tmp_path / "speech.wav"
    path.write_bytes(wav(3.0))
    client = InferenceClient(model=f"{url}/v1/audio-classification", token="none", timeout=60)
    with Client(url) as ours:
        expected = [(score.label, score.score) for score in ours.classify(path)]
    for given, top_k in ((path.read_bytes(), None), (str(path), None), (path.read_bytes(), 3)):
        found = client.audio_classification(given, top_k=top_k)
        assert [(item.label, item.score) for item in found] == expected[:top_k]


def _upload(url: str, parts: list[bytes], declared: int) -> tuple[bytes, int]:
    """Send a body by hand, in chunks where no length is declared; (the answer, bytes of the body that were taken)."""
    address = httpx.URL(url)
    length = f"Content-Length: {declared}" if declared else "Transfer-Encoding: chunked"
    head = f"POST /v1/audio-classification HTTP/1.1\r\nHost: {address.host}\r\n{length}\r\n\r\n"
    sent, answer = 0, bytearray()
    with socket.create_connection((address.host, address.port), timeout=30) as connection:
        connection.sendall(head.encode())

        def read() -> None:
            with suppress(OSError):  # the service has hung up
                while part := connection.recv(65536):
                    answer.extend(part)

        reader = threading.Thread(target=read)
        reader.start()
        with suppress(OSError):
            for part in parts:
                connection.sendall(part if declared else b"%x\r\n%s\r\n" % (len(part), part))
                sent += len(part)
        reader.join(30)
    return bytes(answer), sent


def test_uploads_beyond_the_limits_are_cut_off(url: str) -> None:
    """By what they declare, by what comes in chunks (the sockets and the proxy hold some), by the time they take."""
    for parts, declared, status, code in (
        ([b"x"], 10**9, 413, "body_too_large"),
        ([bytes(MIB)] * 200, 0, 413, "body_too_large"),
        ([b"x"], 1000, 408, "body_timeout"),
    ):
        answer, sent = _upload(url, parts, declared)
        assert f" {status} ".encode() in answer.split(b"\r\n", 1)[0]
        assert f'"code":"{code}"'.encode() in answer
        assert sent < 100 * MIB


def test_up_to_the_limit_bodies_pass(http: httpx.Client) -> None:
    large = wav(60.0, 48_000)
    assert 5 * MIB < len(large) < SERVICE_LIMITS["max_body_mib"] * MIB
    assert http.post("/v1/predict", **form(large)).json()["files"][0]["duration_s"] == 60.0


@on_ray
def test_ports_of_workers_are_not_open_everywhere_and_need_ray_s_token(url: str) -> None:
    request = serve_pb2.ASGIRequest(pickled_request_metadata=pickle.dumps({}))
    replicas = _replicas()
    assert len(replicas) >= 2
    for replica in replicas:
        answers = {}
        for address, port in _listening(replica):
            host = "127.0.0.1" if address == IPv6Address("::") else str(address.ipv4_mapped or f"[{address}]")
            with grpc.insecure_channel(f"{host}:{port}") as channel, pytest.raises(grpc.RpcError) as refused:
                serve_pb2_grpc.ASGIServiceStub(channel).HandleRequest(request, timeout=60)
            answers[address, port] = refused.value.code()
        (serve_s,) = (address for (address, _), code in answers.items() if code is grpc.StatusCode.UNAUTHENTICATED)
        assert serve_s != IPv6Address("::")  # Ray Serve's own choice


def _listening(pid: int) -> list[tuple[IPv6Address, int]]:
    """Addresses (IPv4 ones mapped) and ports at which a process listens, as Linux tells."""
    held, found = set(), []
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(OSError):  # closed meanwhile
            held.add(os.readlink(entry))
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in held:
                text, port = fields[1].split(":")
                words = [int(text[at : at + 8], 16).to_bytes(4, "little") for at in range(0, len(text), 8)]
                raw = b"".join(words) if table == "tcp6" else bytes(10) + b"\xff\xff" + words[0]
                found.append((IPv6Address(raw), int(port, 16)))
    return found


def test_overload_is_told_and_retries_get_through(url: str) -> None:
    body = form(wav(20.0), window_s=2, hop_s=0.2)

    async def flood() -> list[httpx.Response]:
        async with httpx.AsyncClient(base_url=url, timeout=60) as client:
            return await asyncio.gather(*(client.post("/v1/predict", **body) for _ in range(24)))

    answers = asyncio.run(flood())
    refused = [answer for answer in answers if answer.status_code != 200]
    assert 0 < len(refused) < len(answers)
    for answer in refused:
        is_problem(answer, 429, "overloaded")
        assert int(answer.headers["retry-after"]) >= 1
    with Client(url, retries=20) as client, ThreadPoolExecutor(12) as threads:
        found = list(threads.map(lambda _: client.predict(wav(1.0)).label, range(12)))
    assert len(set(found)) == 1


def _replicas(name: str = "") -> list[int]:
    return [pid for pid in descendants(os.getpid()) if command_of(pid).startswith(f"{SERVE_REPLICA}ser:{name}")]


def test_every_metric_of_ours_is_exported_with_its_help(served: Served, http: httpx.Client) -> None:
    is_problem(http.post("/v1/predict", **form(b"words")), 400, "not_audio")
    assert http.post("/v1/predict", **form(wav())).status_code == 200
    wanted = ("requests_total", "request_seconds", "recordings_total", "stage_seconds", "batch_size")
    until_s = time.monotonic() + 60
    while True:  # Ray exports every few seconds
        lines = served.metrics().splitlines()
        helped = {line.split()[2] for line in lines if line.startswith("# HELP ray_ser_") and len(line.split()) > 5}
        codes = [line for line in lines if line.startswith("ray_ser_requests_total{") and 'code="not_audio"' in line]
        codes = [line for line in codes if 'route="/v1/predict"' in line]  # streams have that problem as well
        if {f"ray_ser_{name}" for name in (*wanted, "waiting_recordings", "long_requests")} <= helped and codes:
            break
        assert time.monotonic() < until_s, f"exported are only {sorted(helped)}"
        time.sleep(0.5)
    assert all('status="400"' in line for line in codes)


@on_ray
def test_a_killed_worker_costs_no_request(url: str) -> None:
    (victim,) = _replicas("Model")
    with Client(url, retries=20) as client, ThreadPoolExecutor(3) as threads:
        before = client.predict(wav(20.0), window_s=2, hop_s=0.1)
        asked = [threads.submit(client.predict, wav(20.0), window_s=2, hop_s=0.1) for _ in range(3)]
        while not any(future.running() for future in asked):
            time.sleep(0.01)
        os.kill(victim, signal.SIGKILL)
        for future in asked:
            assert future.result(timeout=120).scores == before.scores
        assert client.ready()
    assert victim not in _replicas("Model")


def test_new_weights_take_over_between_requests_and_several_models_answer_by_name(
    served: Served, tiny_bundle: Bundle, tmp_path: Path
) -> None:
    url = served.url
    state = tiny_bundle.state_dict()
    last = [name for name in state if name.endswith("bias")][-1]
    state[last] = state[last].flip(0)
    better = resaved(tiny_bundle, tmp_path / "tiny", state_dict=state)
    second = resaved(tiny_bundle, tmp_path / "second")
    data, stop, seen, failed = wav(1.0), threading.Event(), [], []

    def load() -> None:
        with Client(url, retries=10) as client:
            while not stop.is_set():
                try:
                    seen.append(client.predict_together([data]).version)
                except Exception as error:
                    failed.append(error)

    threads = [threading.Thread(target=load) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        served.roll_out(Settings(bundles=(str(better.folder), str(second.folder)), **SERVICE_LIMITS))
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert not failed
    old, new, other = (bundle.weights_sha256[:12] for bundle in (tiny_bundle, better, second))
    assert seen[0] == old
    assert set(seen) <= {old, new}
    with Client(url) as client:
        info = client.model()
        assert (info.models, info.version) == (["tiny", "second"], new)
        answers = {name: client.predict_together([data], model=name) for name in (None, "tiny", "second")}
        told = {name: (found.model, found.version) for name, found in answers.items()}
        assert told == {None: ("tiny", new), "tiny": ("tiny", new), "second": ("second", other)}
        by_name = {name: {item.label: item.score for item in single(found).scores} for name, found in answers.items()}
        assert by_name[None] == by_name["tiny"] != by_name["second"]
        (expected,) = Predictor.from_bundle(tiny_bundle.folder, threads=1).predict([data])
        found = [by_name["second"][label] for label in tiny_bundle.labels]
        np.testing.assert_allclose(found, expected.probabilities, atol=1e-5)
