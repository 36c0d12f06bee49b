"""Who may come in: keys, this machine's own requests and those of other sites' pages, ids of requests."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from serving import KEY, LocalService, form, problem_of, wav
from streaming import END, PCM, opened, running, sent
from websockets.exceptions import InvalidStatus

from pipeline.models.bundle import Bundle
from serve.schema import STREAM_PROTOCOL, key_digest, stream_ticket


@pytest.fixture(scope="module")
def service(tiny_bundle: Bundle) -> LocalService:
    return LocalService(tiny_bundle)


@pytest.fixture(scope="module")
def guarded(tiny_bundle: Bundle) -> LocalService:
    return LocalService(tiny_bundle, key=KEY)


PROTECTED = [
    ("POST", "/v1/predict"),
    ("POST", "/v1/explain"),
    ("POST", "/v1/audio-classification"),
    ("GET", "/v1/model"),
    ("GET", "/v2/models/tiny"),
]


@pytest.mark.parametrize(("method", "path"), PROTECTED)
@pytest.mark.parametrize("given_key", [None, "wrong", "é"])
def test_wrong_keys_are_refused_before_the_body_is_read(
    guarded: LocalService, method: str, path: str, given_key: str | None
) -> None:
    headers = {} if given_key is None else {"authorization": f"Bearer {given_key}".encode()}
    taken = []

    async def body() -> Any:
        taken.append(1)
        yield b"x" * 1000

    response = guarded.request(method, path, content=body(), headers=headers)
    problem_of(response, 401, "unauthorized")
    assert response.headers["www-authenticate"] == "Bearer"
    assert not taken


@pytest.mark.parametrize(("method", "path"), PROTECTED)
def test_the_right_key_opens(guarded: LocalService, method: str, path: str) -> None:
    content: dict[str, Any] = form(wav()) if method == "POST" else {}
    if path.endswith("classification"):
        content = {"content": wav()}
    assert guarded.request(method, path, headers={"authorization": f"Bearer {KEY}"}, **content).status_code == 200


@pytest.mark.parametrize("path", ["/v2/health/live", "/v2/health/ready"])
def test_health_answers_to_head(service: LocalService, path: str) -> None:
    assert service.request("HEAD", path).status_code == 200


@pytest.mark.parametrize(("method", "path"), PROTECTED)
def test_without_a_key_only_this_machine_is_served(service: LocalService, method: str, path: str) -> None:
    problem_of(service.request(method, path, host="10.0.0.5"), 403, "key_required")


FOREIGN = [
    {"host": "evil.example"},
    {"host": "evil.example:8000"},
    {"host": "127.evil.example"},  # begins as an address does
    {"host": "localhost.evil.example"},
    {"host": "127.0.0.1.evil.example:8000"},
    {"host": "[::1].evil.example"},
    {"host": "10.0.0.5"},
    {"host": ""},
    {"host": "[::1"},
    {"sec-fetch-site": "cross-site"},
    {"sec-fetch-site": "Cross-Site", "sec-fetch-mode": "no-cors"},
    {"origin": "http://evil.example"},
    {"origin": "null"},
]


@pytest.mark.parametrize("headers", FOREIGN)
def test_pages_of_other_sites_are_refused_where_there_is_no_key(
    service: LocalService, guarded: LocalService, headers: dict[str, str]
) -> None:
    code = "foreign_host" if "host" in headers else "foreign_page"
    for path in ("/v1/model", "/openapi.json", "/docs", "/v2/models/tiny"):
        problem_of(service.get(path, headers=headers), 403, code)
    asked = service.models.asked
    problem_of(service.post("/v1/predict", headers=headers, **form(wav())), 403, code)
    assert service.models.asked == asked
    assert service.get("/v2/health/ready", headers=headers).status_code == 200
    with_key = headers | {"authorization": f"Bearer {KEY}"}
    assert guarded.get("/v1/model", headers=with_key).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {},
        *({"host": host} for host in ("localhost", "LOCALHOST:8000", "127.0.0.1:8000", "127.9.9.9", "[::1]:8000")),
        {"sec-fetch-site": "same-origin", "origin": "http://127.0.0.1:8000"},
        {"sec-fetch-site": "none", "sec-fetch-mode": "navigate"},  # typed
        {"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate"},  # a link
        {"origin": "http://localhost:8501"},
    ],
)
def test_this_machine_s_own_requests_are_answered(service: LocalService, headers: dict[str, str]) -> None:
    assert service.get("/v1/model", headers=headers).status_code == 200


def test_a_form_of_another_site_is_no_link(service: LocalService) -> None:
    headers = {"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate"}
    problem_of(service.post("/v1/predict", headers=headers, **form(wav())), 403, "foreign_page")


def test_pages_that_cors_allows_are_answered(tiny_bundle: Bundle) -> None:
    service = LocalService(tiny_bundle, cors_origins="http://page.example")
    headers = {"origin": "http://page.example", "sec-fetch-site": "cross-site"}
    assert service.get("/v1/model", headers=headers).status_code == 200
    problem_of(service.get("/v1/model", headers=headers | {"host": "page.example"}), 403, "foreign_host")
    problem_of(service.get("/v1/model", headers=headers | {"origin": "http://other.example"}), 403, "foreign_page")


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (b"mine-1", "mine-1"),
        (b"\xff\xfe\x80odd\x01", "odd"),
        (b"x" * 100_000, "x" * 128),
        ("zwölf".encode(), "zwlf"),
        (b"\xff", None),
        (b" ", None),
    ],
)
def test_ids_of_requests_are_short_plain_text(service: LocalService, given: bytes, told: str | None) -> None:
    for path in ("/v1/model", "/v1/nothing"):
        response = service.get(path, headers={"x-request-id": given})
        (found,) = response.headers.get_list("x-request-id")
        assert found == told or (told is None and len(found) == 36)
        if path.endswith("nothing"):
            assert response.json()["request_id"] == found


@pytest.fixture(scope="module")
def url(tiny_bundle: Bundle) -> Iterator[str]:
    """A service over a socket, without a key."""
    with running(tiny_bundle) as (url, _):
        yield url


@pytest.fixture(scope="module")
def guarded_url(tiny_bundle: Bundle) -> Iterator[str]:
    with running(tiny_bundle, KEY) as (url, _):
        yield url


def refused(url: str, **options: Any) -> tuple[int, str]:
    with pytest.raises(InvalidStatus) as found, opened(url, **PCM, **options):
        pass
    response = found.value.response
    assert response.headers["content-type"] == "application/problem+json"
    assert response.headers["x-request-id"]
    return response.status_code, json.loads(response.body or b"")["code"]


@pytest.mark.parametrize(
    ("headers", "code"),
    [
        ({"Origin": "http://evil.example"}, "foreign_page"),
        ({"Origin": "null"}, "foreign_page"),
        ({"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "websocket"}, "foreign_page"),
        ({"Origin": "http://127.0.0.1.evil.example"}, "foreign_page"),
    ],
)
def test_pages_of_other_sites_are_refused(url: str, headers: dict[str, str], code: str) -> None:
    assert refused(url, headers=headers) == (403, code)


def test_another_name_for_this_machine_is_refused(url: str) -> None:
    """DNS rebinding: the page's own name resolves to 127.0.0.1."""
    port = url.rpartition(":")[2]
    handshake = {"Connection": "Upgrade", "Upgrade": "websocket", "Sec-WebSocket-Version": "13"}
    handshake |= {"Sec-WebSocket-Key": "AAAAAAAAAAAAAAAAAAAAAA==", "Host": f"evil.example:{port}"}
    answer = httpx.get(f"{url}/v1/stream", headers=handshake)
    assert (answer.status_code, answer.json()["code"]) == (403, "foreign_host")


@pytest.mark.parametrize("origin", ["http://localhost:8501", "http://127.0.0.1:8501"])
def test_pages_of_this_machine_may(url: str, origin: str) -> None:
    assert sent(url, [END], headers={"Origin": origin, "Sec-Fetch-Site": "same-site"}, **PCM).code == 1000


def ticket(key: str = KEY, seconds: float = 60.0) -> str:
    return stream_ticket(key_digest(key), time.time() + seconds)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"headers": {"Authorization": "Bearer wrong"}},
        {"protocols": [STREAM_PROTOCOL]},
        {"protocols": [STREAM_PROTOCOL, ticket("another key")]},
        {"protocols": [STREAM_PROTOCOL, ticket(seconds=-1)]},
        {"protocols": [STREAM_PROTOCOL, "ser.ticket.99999999999.00"]},
        {"protocols": [STREAM_PROTOCOL, "ser.ticket.", "ser.ticket.x.y"]},
    ],
)
def test_without_the_key_nothing_opens(guarded_url: str, options: dict[str, Any]) -> None:
    assert refused(guarded_url, **options) == (401, "unauthorized")


def test_key_and_ticket_open_and_are_never_logged(guarded_url: str, caplog: pytest.LogCaptureFixture) -> None:
    made, log = ticket(), logging.getLogger("ray.serve.ser")
    log.addHandler(caplog.handler)  # Ray, where it has been imported, keeps its lines from the root
    with caplog.at_level(logging.DEBUG), caplog.at_level(logging.DEBUG, log.name):
        assert sent(guarded_url, [END], headers={"Authorization": f"Bearer {KEY}"}, **PCM).code == 1000
        with opened(guarded_url, protocols=[STREAM_PROTOCOL, made], **PCM) as socket:
            assert socket.subprotocol == STREAM_PROTOCOL
            assert json.loads(socket.recv())["type"] == "ready"
        ours = [record.getMessage() for record in caplog.records if not record.name.startswith("websockets")]
    log.removeHandler(caplog.handler)
    assert any('"route": "/v1/stream"' in line for line in ours)
    for secret in (KEY, made, key_digest(KEY)):
        assert not any(secret in line for line in ours)


def test_a_ticket_opens_streams_only(guarded_url: str) -> None:
    for given_key in (ticket(), ticket().removeprefix("ser.ticket.")):
        answer = httpx.get(f"{guarded_url}/v1/model", headers={"Authorization": f"Bearer {given_key}"})
        assert answer.status_code == 401
