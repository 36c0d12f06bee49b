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
from serving import Bridge, LocalService, wav

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


@pytest.fixture(scope="module")
def service(tiny_bundle: Bundle) -> LocalService:
    return LocalService(tiny_bundle, key=KEY)


@pytest.fixture
def client(service: LocalService) -> Iterator[Client]:
    with Client(URL, KEY, transport=Bridge(service)) as opened:
        yield opened


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


def answer(*names: str) -> httpx.Response:
    file = {"label": "sad", "confidence": 1, "scores": [], "duration_s": 1, "scored_s": 1, "sample_rate_hz": 1}
    files = [{"status": "ok", "name": name, "channels": 1, "level_dbfs": -1, **file} for name in names]
    return httpx.Response(200, json={"id": "1", "model": "m", "version": "v", "files": files})


def test_predict_takes_paths_bytes_and_named_bytes(client: Client, tmp_path: Path) -> None:
    path = tmp_path / "speech.wav"
    path.write_bytes(wav())
    for source, name in (
        (path, "speech.wav"),
        (str(path), "speech.wav"),
        (wav(), "recording"),
        (("a b.wav", wav()), "a b.wav"),
    ):
        found = client.predict(source)
        assert isinstance(found, Recording)
        assert found.name == name
        assert sum(score.score for score in found.scores) == pytest.approx(1.0)


def test_options_reach_the_service(client: Client) -> None:
    found = client.predict(wav(4.0), window_s=1.0, hop_s=None, top_k=2, picture=True, min_confidence=1.0, model="tiny")
    assert found.label == "uncertain"
    assert len(found.scores) == 2
    assert len(found.segments or []) == 4
    assert found.picture is not None
    assert client.predict(wav(), picture=False).picture is None


def test_everything_else(client: Client, service: LocalService) -> None:
    assert client.ready()
    assert client.live()
    assert client.model().name == client.model("tiny").name == "tiny"
    assert client.classify(wav()) == client.predict(wav()).scores
    assert client.explain(wav()).label == client.predict(wav()).label
    together = client.predict_together([wav(), b"words"])
    assert [file.status for file in together.files] == ["ok", "failed"]


def test_errors_have_types_and_sentences(client: Client, service: LocalService, tmp_path: Path) -> None:
    with pytest.raises(BadRecording, match="not an audio file") as caught:
        client.predict(b"words")
    assert (caught.value.code, caught.value.status) == ("not_audio", 400)
    for several in ([wav()], [wav(), wav()]):  # no recording is to blame, not even where there is one only
        with pytest.raises(Refused, match="no model has this name") as caught:
            list(client.predict_each(several, model="other"))
        assert type(caught.value) is Refused
    with pytest.raises(ClientError, match="cannot read"):
        client.predict(tmp_path / "missing.wav")
    with Client(URL, "wrong", transport=Bridge(service)) as stranger, pytest.raises(WrongKey):
        stranger.predict(wav())
    with Client(URL, transport=Bridge(service)) as stranger, pytest.raises(WrongKey):
        stranger.model()


def test_each_of_many_in_order(client: Client) -> None:
    sources = [(f"{n}.wav", wav(0.3, f0_hz=100 + 10 * n) if n % 5 else b"words") for n in range(FILES_A_REQUEST + 5)]
    found = list(client.predict_each(iter(sources)))
    assert [item.name for item in found] == [name for name, _ in sources]
    assert [isinstance(item, Failure) for item in found] == [n % 5 == 0 for n in range(len(sources))]
    (alone,) = client.predict_each([("x", b"words")])
    assert isinstance(alone, Failure)
    assert list(client.predict_each([])) == []
    with pytest.raises(BadRecording, match="top_k"):
        list(client.predict_each([wav()], top_k=0))


@pytest.mark.parametrize("limits", [{"max_files": 8}, {"max_files": 1}, {"max_body_mib": 0.1}])
def test_a_service_with_smaller_limits_gets_smaller_requests(tiny_bundle: Bundle, limits: dict[str, Any]) -> None:
    strict = LocalService(tiny_bundle, **limits)
    sources = [(f"{number}.wav", wav(0.5)) for number in range(9)]
    sources[4] = ("4.wav", wav(0.5) + bytes(200_000))  # in one of the cases too large alone
    expected = [Failure if n == 4 and "max_body_mib" in limits else Recording for n in range(9)]
    with Client(URL, transport=Bridge(strict)) as client:
        found = list(client.predict_each(sources, top_k=1))
        with pytest.raises(BadRecording, match="top_k"):
            list(client.predict_each(sources, top_k=0))

    async def awaited() -> list[Recording | Failure]:
        async with AsyncClient(URL, transport=httpx.ASGITransport(strict.app)) as client:
            return [answer async for answer in client.predict_each(sources, top_k=1)]

    of_its_own = {"problem": {"request_id"}}
    for one, other in zip(found, asyncio.run(awaited()), strict=True):
        assert one.model_dump(exclude=of_its_own) == other.model_dump(exclude=of_its_own)
    assert [answer.name for answer in found] == [name for name, _ in sources]
    assert [type(answer) for answer in found] == expected


def test_parts_keep_to_their_size() -> None:
    sizes = [1, 10 * 2**20, 7 * 2**20, 17 * 2**20, 1]
    sources = [(str(number), bytes(size)) for number, size in enumerate(sizes)]
    assert [[name for name, _ in part] for part in parts(sources)] == [["0", "1"], ["2"], ["3"], ["4"]]


def test_busy_answers_are_tried_again_when_told(waits: list[float]) -> None:
    transport, seen = scripted(
        problem(429, "overloaded", retry_after="1"), problem(503, "unavailable", retry_after="2"), answer("a")
    )
    with Client(URL, transport=transport) as client:
        assert client.predict(("a", b"data")).label == "sad"
    assert waits == [1.0, 2.0]
    assert len(seen) == 3
    assert all(b"data" in request.content for request in seen)


@pytest.mark.parametrize(
    ("response", "kind"),
    [
        (problem(503, "decode_timeout"), BadRecording),  # no Retry-After: it would be the same again
        (problem(429, "overloaded", retry_after="soon"), Busy),
        (problem(500, "internal_error", retry_after="1"), ServiceFault),
        (problem(408, "body_timeout", retry_after="1"), BadRecording),
        (problem(422, "corrupt"), BadRecording),
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
    with Client(URL, transport=transport) as client, pytest.raises(kind) as caught:
        client.predict(b"data")
    assert type(caught.value) is kind
    assert str(caught.value)
    assert (waits, len(seen)) == ([], 1)


def test_patience_and_retries_end(waits: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    busy = problem(429, "overloaded", retry_after="1")
    transport, seen = scripted(busy)
    with Client(URL, transport=transport, retries=3) as client, pytest.raises(Busy):
        client.predict(b"data")
    assert (waits, len(seen)) == ([1.0] * 3, 4)
    waits.clear()
    monkeypatch.setattr("serve.client_wire.time.monotonic", lambda: sum(waits))
    with Client(URL, transport=transport, patience_s=4.0) as client, pytest.raises(Busy):
        client.predict(b"data")
    assert waits == [1.0] * 4
    transport, _ = scripted(problem(503, "unavailable", retry_after="3600"))
    waits.clear()
    with Client(URL, transport=transport) as client, pytest.raises(Busy):
        client.predict(b"data")
    assert max(waits) <= 30.0


def test_a_file_that_cannot_be_read_costs_no_other_its_answer(
    client: Client, service: LocalService, tmp_path: Path
) -> None:
    good = tmp_path / "good.wav"
    good.write_bytes(wav())
    sources = [tmp_path / "missing.wav", good, str(tmp_path), good / "below.wav", "a\0b.wav", good, ("x.wav", b"words")]
    expected = ["not_found", "ok", "not_a_file", "not_found", "not_found", "ok", "not_audio"]

    async def awaited() -> list[Recording | Failure]:
        async with AsyncClient(URL, KEY, transport=httpx.ASGITransport(service.app)) as other:
            return [answer async for answer in other.predict_each(sources)]

    for found in (list(client.predict_each(sources)), asyncio.run(awaited())):
        assert [item.problem.code if isinstance(item, Failure) else "ok" for item in found] == expected
        assert [item.name for item in found][:2] == ["missing.wav", "good.wav"]


def test_a_service_that_is_not_there_or_breaks_off() -> None:
    def broken(request: httpx.Request) -> httpx.Response:
        raise httpx.ReadError("connection reset", request=request)

    with Client(f"http://127.0.0.1:{free_port()}") as client:
        with pytest.raises(Unreachable):
            client.predict(b"data")
        assert not client.ready()
        assert not client.live()
    with Client(URL, transport=httpx.MockTransport(broken)) as client, pytest.raises(Unreachable):
        client.predict(b"data")


@pytest.mark.parametrize(
    "url", ["", "127.0.0.1:8000", "localhost:8000", "http:/127.0.0.1", "nonsense://x", "http://a:b"]
)
@pytest.mark.parametrize("kind", [Client, AsyncClient])
def test_an_address_that_is_none_is_told_as_such(kind: type[Client | AsyncClient], url: str) -> None:
    with pytest.raises(ClientError, match="address") as caught:
        kind(url)
    assert type(caught.value) is ClientError


def test_a_service_that_is_silent() -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        Client(f"http://127.0.0.1:{server.getsockname()[1]}", timeout=0.1) as client,
        pytest.raises(NoAnswer),
    ):
        client.predict(b"data")


def test_the_key_is_sent_and_shown_nowhere(waits: list[float]) -> None:
    transport, seen = scripted(problem(401, "unauthorized"))
    with Client(URL, "s3cret", transport=transport) as client, pytest.raises(WrongKey) as caught:
        client.model()
    assert seen[0].headers["authorization"] == "Bearer s3cret"
    assert "s3cret" not in str(caught.value) + repr(caught.value) + repr(client)


@pytest.mark.parametrize("kind", [Client, AsyncClient])
def test_a_key_is_what_a_header_carries(kind: type[Client | AsyncClient]) -> None:
    assert kind(URL, "s3cret\n")._http.headers["authorization"] == "Bearer s3cret"
    with pytest.raises(ClientError, match="not printable ASCII") as caught:
        kind(URL, "schl\u00fcssel")
    assert "schl" not in str(caught.value)


@pytest.mark.skipif(os.name == "nt", reason="Windows' file names are text")
def test_file_names_that_are_no_text(client: Client, tmp_path: Path) -> None:
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xe9.wav"))
    path.write_bytes(wav())
    assert client.predict(path).name == r"\udce9.wav"
    assert client.predict((path.name, wav())).name == r"\udce9.wav"


@pytest.mark.parametrize("kind", [Client, AsyncClient])
def test_this_machine_is_asked_without_a_proxy(
    kind: type[Client | AsyncClient], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=answer_once, args=[server], daemon=True).start()
        client = kind(f"http://127.0.0.1:{server.getsockname()[1]}", "s3cret")
        found = client.live()
        assert found if isinstance(found, bool) else asyncio.run(found)


def answer_once(server: socket.socket) -> None:
    connection, _ = server.accept()
    with connection:
        connection.recv(10_000)
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")


def test_the_awaited_client_is_the_same(service: LocalService, waits: list[float]) -> None:
    async def scenario() -> None:
        transport = httpx.ASGITransport(service.app)
        async with AsyncClient(URL, KEY, transport=transport) as client:
            found = await client.predict(wav(), top_k=2)
            assert len(found.scores) == 2
            assert await client.ready()
            assert await client.live()
            for sources in ([wav(), b"words"], [b"words"]):
                statuses = [answer.status async for answer in client.predict_each(sources)]
                assert statuses == ["ok", "failed"][-len(sources) :]
            with pytest.raises(BadRecording):
                [answer async for answer in client.predict_each([wav()], top_k=0)]
            assert (await client.model()).name == "tiny"
            assert (await client.classify(wav()))[:2] == found.scores
            assert (await client.explain(wav())).label == found.label
            assert len((await client.predict_together([wav(), b"words"])).files) == 2
            with pytest.raises(BadRecording):
                await client.predict(b"words")
        busy, seen = scripted(problem(429, "overloaded", retry_after="1"), answer("a"))
        async with AsyncClient(URL, transport=busy) as client:
            assert (await client.predict(b"data")).name == "a"
        assert len(seen) == 2
        async with AsyncClient("http://127.0.0.1:9") as nobody:
            assert not await nobody.live()

    asyncio.run(scenario())
    assert waits == [1.0]


def test_newer_fields_do_not_disturb() -> None:
    body = json.loads(answer("a").content)
    body["files"][0]["mood"] = "new"
    body["news"] = [1]
    transport, _ = scripted(httpx.Response(200, json=body))
    with Client(URL, transport=transport) as client:
        assert client.predict(b"data").name == "a"


def test_predict_job(service: LocalService, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    from jobs import predict

    asked: list[str] = []
    monkeypatch.setattr(
        "serve.client.Client",
        lambda url, key: asked.append(url) or Client(url, key, transport=Bridge(service)),
    )
    monkeypatch.setenv("SER_API_KEY", KEY)
    good, bad = tmp_path / "good.wav", tmp_path / "bad.wav"
    good.write_bytes(wav(4.0))
    bad.write_bytes(b"words")
    assert predict.main([str(good), "--window-s", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["file", "emotion", "confidence", "then"]
    assert len(lines) == 4
    assert predict.main(["--json", str(good), str(bad)]) == 4
    captured = capsys.readouterr()
    first, second = (json.loads(line) for line in captured.out.splitlines())
    assert (first["name"], second["problem"]["code"]) == ("good.wav", "not_audio")
    assert "bad.wav: " in captured.err
    assert predict.main([str(good), str(tmp_path / "missing.wav"), str(good)]) == 4
    captured = capsys.readouterr()
    assert [line.split()[0] for line in captured.out.splitlines()] == ["file", "good.wav", "missing.wav", "good.wav"]
    assert "missing.wav  not_found" in captured.out
    assert "cannot read" in captured.err
    assert predict.main([str(good), "--model", "other"]) == 2
    assert "tiny" in capsys.readouterr().err
    assert predict.main([str(good), "--url", "127.0.0.1:8000"]) == 2
    assert "address" in capsys.readouterr().err
    monkeypatch.setenv("SER_API_URL", "")
    monkeypatch.setenv("SER_API_KEY", "wrong")
    assert predict.main([str(good)]) == 2
    assert asked[-1] == DEFAULT_URL
    assert capsys.readouterr().err.startswith("error: ")
