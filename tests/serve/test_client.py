"""The clients against the service's application (no Ray) and against servers that misbehave."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from serving import Bridge, LocalService, awaited, wav

from pipeline.models.bundle import Bundle
from serve import client as client_module
from serve.client import (
    DEFAULT_URL,
    AsyncClient,
    BadRecording,
    Busy,
    Client,
    ClientError,
    NoAnswer,
    Refused,
    ServiceFault,
    Unreachable,
    WrongKey,
)
from serve.client_wire import FILES_A_REQUEST, parts
from serve.schema import Failure, Recording
from tests.support.processes import free_port

URL = "http://127.0.0.1:8000"
KEY = "key"
Answers = list[Recording | Failure]
AnyClient = type[Client | AsyncClient]
both_clients = pytest.mark.parametrize("kind", [Client, AsyncClient])


@pytest.fixture(scope="module")
def service(tiny_bundle: Bundle) -> LocalService:
    return LocalService(tiny_bundle, key=KEY)


@pytest.fixture
def client(service: LocalService) -> Iterator[Client]:
    with Client(URL, KEY, transport=Bridge(service)) as opened:
        yield opened


def each(service: LocalService, sources: Any, **options: Any) -> tuple[Answers, Answers]:
    """What ``predict_each`` of both clients gives."""

    async def awaited_answers() -> Answers:
        async with AsyncClient(URL, KEY, transport=httpx.ASGITransport(service.app)) as client:
            return [answer async for answer in client.predict_each(sources, **options)]

    with Client(URL, KEY, transport=Bridge(service)) as client:
        return list(client.predict_each(sources, **options)), asyncio.run(awaited_answers())


def codes(answers: Answers) -> list[str]:
    return [answer.problem.code if isinstance(answer, Failure) else "ok" for answer in answers]


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that a client would have slept."""
    slept: list[float] = []

    async def sleep(seconds: float) -> None:
        slept.append(seconds)

    monkeypatch.setattr(client_module.time, "sleep", slept.append)
    monkeypatch.setattr(client_module.asyncio, "sleep", sleep)
    return slept


def scripted(*answers: httpx.Response) -> tuple[httpx.MockTransport, list[httpx.Request]]:
    """A transport that gives one answer after another, the last one for ever; and the requests it got."""
    remaining, seen = list(answers), []

    def handle(request: httpx.Request) -> httpx.Response:
        request.read()
        seen.append(request)
        return remaining.pop(0) if len(remaining) > 1 else remaining[0]

    return httpx.MockTransport(handle), seen


def problem(status: int, code: str, **headers: str) -> httpx.Response:
    body = {"type": "x", "title": "x", "status": status, "code": code, "detail": "said in one sentence"}
    return httpx.Response(status, json=body, headers={name.replace("_", "-"): v for name, v in headers.items()})


FILE = {"status": "ok", "name": "a", "label": "sad", "confidence": 1, "scores": [], "duration_s": 1, "scored_s": 1}
FILE |= {"sample_rate_hz": 1, "channels": 1, "level_dbfs": -1, "mood": "a field of a newer service"}
ANSWER = {"id": "1", "model": "m", "version": "v", "files": [FILE], "news": [1]}


def test_predict_takes_paths_bytes_and_named_bytes(client: Client, tmp_path: Path) -> None:
    path = tmp_path / "speech.wav"
    path.write_bytes(wav())
    sources = {"speech.wav": path, "recording": wav(), "a b.wav": ("a b.wav", wav())}
    for name, source in [*sources.items(), ("speech.wav", str(path))]:
        found = client.predict(source)
        assert isinstance(found, Recording)
        assert found.name == name
        assert sum(score.score for score in found.scores) == pytest.approx(1.0)


@pytest.mark.skipif(os.name == "nt", reason="Windows' file names are text")
def test_file_names_that_are_no_text(client: Client, tmp_path: Path) -> None:
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xe9.wav"))
    path.write_bytes(wav())
    assert client.predict(path).name == r"\udce9.wav"
    assert client.predict((path.name, wav())).name == r"\udce9.wav"


def test_options_reach_the_service(client: Client) -> None:
    found = client.predict(wav(4.0), window_s=1.0, hop_s=None, top_k=2, picture=True, min_confidence=1.0, model="tiny")
    assert (found.label, len(found.scores), len(found.segments or [])) == ("uncertain", 2, 4)
    assert found.picture is not None
    assert client.predict(wav(), picture=False).picture is None


def test_every_method_of_both_clients(client: Client, service: LocalService) -> None:
    async def awaited_answers() -> list[Any]:
        async with AsyncClient(URL, KEY, transport=httpx.ASGITransport(service.app)) as other:
            with pytest.raises(BadRecording):
                await other.predict(b"words")
            with pytest.raises(BadRecording):
                [answer async for answer in other.predict_each([wav()], top_k=0)]
            found: list[Any] = [await other.ready(), await other.live(), (await other.model("tiny")).name]
            found += [(await other.predict(wav())).scores, await other.classify(wav())]
            found += [(await other.explain(wav())).label]
            return found + [file.status for file in (await other.predict_together([wav(), b"words"])).files]

    expected = client.predict(wav())
    assert client.model().name == "tiny"
    found = [client.ready(), client.live(), client.model("tiny").name, expected.scores, client.classify(wav())]
    found += [client.explain(wav()).label, *(file.status for file in client.predict_together([wav(), b"words"]).files)]
    assert found == asyncio.run(awaited_answers())
    assert found == [True, True, "tiny", expected.scores, expected.scores, expected.label, "ok", "failed"]


def test_errors_have_types_and_sentences(client: Client, service: LocalService, tmp_path: Path) -> None:
    with pytest.raises(BadRecording, match="not an audio file") as caught:
        client.predict(b"words")
    assert (caught.value.code, caught.value.status) == ("not_audio", 400)
    for several in ([wav()], [wav(), wav()]):  # no recording is to blame, not even where there is one only
        with pytest.raises(Refused, match="no model has this name") as unknown:
            list(client.predict_each(several, model="other"))
        assert type(unknown.value) is Refused
    with pytest.raises(ClientError, match="cannot read"):
        client.predict(tmp_path / "missing.wav")
    for key in ("wrong", None):
        with Client(URL, key, transport=Bridge(service)) as stranger, pytest.raises(WrongKey):
            stranger.model()


def test_each_of_many_in_order(service: LocalService) -> None:
    sources = [(f"{n}.wav", wav(0.3, f0_hz=100 + 10 * n) if n % 5 else b"words") for n in range(FILES_A_REQUEST + 5)]
    for found in each(service, sources):
        assert [item.name for item in found] == [name for name, _ in sources]
        assert codes(found) == ["ok" if n % 5 else "not_audio" for n in range(len(sources))]
    assert [codes(found) for found in each(service, [("x", b"words")])] == [["not_audio"]] * 2
    assert each(service, []) == ([], [])


@pytest.mark.parametrize("limits", [{"max_files": 8}, {"max_files": 1}, {"max_body_mib": 0.1}])
def test_a_service_with_smaller_limits_gets_smaller_requests(tiny_bundle: Bundle, limits: dict[str, Any]) -> None:
    strict = LocalService(tiny_bundle, key=KEY, **limits)
    sources = [(f"{number}.wav", wav(0.5)) for number in range(9)]
    sources[4] = ("4.wav", wav(0.5) + bytes(200_000))  # in one of the cases too large alone
    found, other = each(strict, sources, top_k=1)
    plain = [[one.model_dump(exclude={"problem": {"request_id"}}) for one in answers] for answers in (found, other)]
    assert plain[0] == plain[1]
    assert [answer.name for answer in found] == [name for name, _ in sources]
    assert codes(found) == ["body_too_large" if n == 4 and "max_body_mib" in limits else "ok" for n in range(9)]
    with pytest.raises(BadRecording, match="top_k"):
        each(strict, sources, top_k=0)


def test_a_file_that_cannot_be_read_costs_no_other_its_answer(service: LocalService, tmp_path: Path) -> None:
    good = tmp_path / "good.wav"
    good.write_bytes(wav())
    sources = [tmp_path / "missing.wav", good, str(tmp_path), good / "below.wav", "a\0b.wav", good, ("x.wav", b"words")]
    for found in each(service, sources):
        assert codes(found) == ["not_found", "ok", "not_a_file", "not_found", "not_found", "ok", "not_audio"]
        assert [item.name for item in found][:2] == ["missing.wav", "good.wav"]


def test_parts_keep_to_their_size() -> None:
    sizes = [1, 10 * 2**20, 7 * 2**20, 17 * 2**20, 1]
    sources = [(str(number), bytes(size)) for number, size in enumerate(sizes)]
    assert [[name for name, _ in part] for part in parts(sources)] == [["0", "1"], ["2"], ["3"], ["4"]]


@awaited
async def test_busy_answers_are_tried_again_when_told(waits: list[float]) -> None:
    for kind in (Client, AsyncClient):
        busy = [problem(429, "overloaded", retry_after="1"), problem(503, "unavailable", retry_after="2")]
        transport, seen = scripted(*busy, httpx.Response(200, json=ANSWER))
        asked: Any = kind(URL, transport=transport).predict(("a", b"data"))
        assert (asked if isinstance(asked, Recording) else await asked).label == "sad"
        assert len(seen) == 3
        assert all(b"data" in request.content for request in seen)
    assert waits == [1.0, 2.0] * 2


@pytest.mark.parametrize(
    ("response", "kind"),
    [
        (problem(503, "decode_timeout"), BadRecording),  # no Retry-After: it would be the same again
        (problem(429, "overloaded", retry_after="soon"), Busy),
        (problem(500, "internal_error", retry_after="1"), ServiceFault),
        (problem(408, "body_timeout", retry_after="1"), BadRecording),
        (problem(422, "corrupt"), BadRecording),
        (problem(401, "unauthorized"), WrongKey),
        (httpx.Response(503, text="Request dropped due to backpressure"), Busy),
        (httpx.Response(502, text="<html>Bad gateway</html>"), ServiceFault),
        (problem(404, "not_found"), Refused),
        (httpx.Response(404, text="Not Found"), ServiceFault),
        (httpx.Response(200, text="<html>another server</html>"), ServiceFault),
        (httpx.Response(200, json={"files": 3}), ServiceFault),
    ],
)
def test_other_answers_stand(waits: list[float], response: httpx.Response, kind: type[Refused]) -> None:
    transport, seen = scripted(response)
    with Client(URL, "s3cret", transport=transport) as client, pytest.raises(kind) as caught:
        client.predict(b"data")
    assert type(caught.value) is kind
    assert str(caught.value)
    assert (waits, len(seen)) == ([], 1)
    assert seen[0].headers["authorization"] == "Bearer s3cret"
    assert "s3cret" not in str(caught.value) + repr(caught.value) + repr(client)


def test_patience_and_retries_end(waits: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serve.client_wire.time.monotonic", lambda: sum(waits))
    for after, options, expected in (
        ("1", {"retries": 3}, [1.0] * 3),
        ("1", {"patience_s": 4.0}, [1.0] * 4),
        ("3600", {}, [30.0] * 2),
    ):
        waits.clear()
        transport, seen = scripted(problem(429, "overloaded", retry_after=after))
        with Client(URL, transport=transport, **options) as client, pytest.raises(Busy):
            client.predict(b"data")
        assert (waits, len(seen)) == (expected, len(expected) + 1)


def test_services_that_are_away_break_off_or_are_silent() -> None:
    def broken(request: httpx.Request) -> httpx.Response:
        raise httpx.ReadError("connection reset", request=request)

    away = f"http://127.0.0.1:{free_port()}"
    for client in (Client(away), Client(URL, transport=httpx.MockTransport(broken))):
        with client, pytest.raises(Unreachable):
            client.predict(b"data")
    with Client(away) as client:
        assert not client.ready()
        assert not client.live()
    assert not asyncio.run(AsyncClient(away).live())
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        Client(f"http://127.0.0.1:{server.getsockname()[1]}", timeout=0.1) as client,
        pytest.raises(NoAnswer),
    ):
        client.predict(b"data")


@both_clients
@pytest.mark.parametrize(
    "url", ["", "127.0.0.1:8000", "localhost:8000", "http:/127.0.0.1", "nonsense://x", "http://a:b"]
)
def test_an_address_that_is_none_is_told_as_such(kind: AnyClient, url: str) -> None:
    with pytest.raises(ClientError, match="address") as caught:
        kind(url)
    assert type(caught.value) is ClientError


@both_clients
def test_a_key_is_what_a_header_carries(kind: AnyClient) -> None:
    assert kind(URL, "s3cret\n")._http.headers["authorization"] == "Bearer s3cret"
    with pytest.raises(ClientError, match="not printable ASCII") as caught:
        kind(URL, "schl\u00fcssel")
    assert "schl" not in str(caught.value)


@both_clients
def test_this_machine_is_asked_without_a_proxy(kind: AnyClient, monkeypatch: pytest.MonkeyPatch) -> None:
    def answer_once() -> None:
        connection, _ = server.accept()
        with connection:
            connection.recv(10_000)
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")

    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=answer_once, daemon=True).start()
        found = kind(f"http://127.0.0.1:{server.getsockname()[1]}", "s3cret").live()
        assert found if isinstance(found, bool) else asyncio.run(found)


def test_predict_job(service: LocalService, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    from jobs import predict

    asked: list[str] = []
    monkeypatch.setattr(
        "serve.client.Client", lambda url, key: asked.append(url) or Client(url, key, transport=Bridge(service))
    )
    monkeypatch.setenv("SER_API_KEY", KEY)
    good, bad, missing = (str(tmp_path / name) for name in ("good.wav", "bad.wav", "missing.wav"))
    Path(good).write_bytes(wav(4.0))
    Path(bad).write_bytes(b"words")

    def printed(status: int, *words: str) -> tuple[list[str], str]:
        assert predict.main(list(words)) == status
        captured = capsys.readouterr()
        return captured.out.splitlines(), captured.err

    lines, _ = printed(0, good, "--window-s", "2")
    assert lines[0].split() == ["file", "emotion", "confidence", "then"]
    assert len(lines) == 4
    lines, told = printed(4, "--json", good, bad)
    first, second = map(json.loads, lines)
    assert (first["name"], second["problem"]["code"]) == ("good.wav", "not_audio")
    assert "bad.wav: " in told
    lines, told = printed(4, good, missing, good)
    assert [line.split()[0] for line in lines] == ["file", "good.wav", "missing.wav", "good.wav"]
    assert "missing.wav  not_found" in lines[2]
    assert "cannot read" in told
    assert "tiny" in printed(2, good, "--model", "other")[1]
    assert "address" in printed(2, good, "--url", "127.0.0.1:8000")[1]
    monkeypatch.setenv("SER_API_URL", "")
    monkeypatch.setenv("SER_API_KEY", "wrong")
    assert printed(2, good)[1].startswith("error: ")
    assert asked[-1] == DEFAULT_URL
