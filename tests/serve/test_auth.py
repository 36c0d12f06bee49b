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

Headers = dict[str, str]
PREDICT, LINK = "/v1/predict", {"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate"}
OPENS = {"authorization": f"Bearer {KEY}"}


@pytest.fixture(scope="module")
def service(tiny_bundle: Bundle) -> LocalService:
    return LocalService(tiny_bundle)


@pytest.fixture(scope="module")
def guarded(tiny_bundle: Bundle) -> LocalService:
    return LocalService(tiny_bundle, key=KEY)


PROTECTED = [
    ("POST", PREDICT, form(wav())),
    ("POST", "/v1/explain", form(wav())),
    ("POST", "/v1/audio-classification", {"content": wav()}),
    ("GET", "/v1/model", {}),
    ("GET", "/v2/models/tiny", {}),
]


@pytest.mark.parametrize(("method", "path", "content"), PROTECTED)
def test_only_the_right_key_opens_to_others(
    service: LocalService, guarded: LocalService, method: str, path: str, content: dict[str, Any]
) -> None:
    async def body() -> Any:
        raise AssertionError("the body of a stranger was read")
        yield b""

    for given in (None, "wrong", "é"):
        headers = {} if given is None else {"authorization": f"Bearer {given}".encode()}
        response = guarded.request(method, path, content=body(), headers=headers)
        problem_of(response, 401, "unauthorized")
        assert response.headers["www-authenticate"] == "Bearer"
    assert guarded.request(method, path, headers=OPENS, **content).status_code == 200
    problem_of(service.request(method, path, host="10.0.0.5"), 403, "key_required")


def test_the_document_asks_for_a_key_where_there_is_one(service: LocalService, guarded: LocalService) -> None:
    with_key = guarded.get("/openapi.json").json()["paths"][PREDICT]["post"]
    assert with_key["security"] == [{"api_key": []}]
    assert "401" in with_key["responses"]
    assert "security" not in service.get("/openapi.json").json()["paths"][PREDICT]["post"]


FOREIGN_HOSTS = ["evil.example", "evil.example:8000", "localhost.evil.example", "127.0.0.1.evil.example:8000"]
FOREIGN_HOSTS += ["127.evil.example", "[::1].evil.example", "10.0.0.5", "", "[::1"]  # some begin as addresses do
FOREIGN = [
    *({"host": host} for host in FOREIGN_HOSTS),
    {"sec-fetch-site": "cross-site"},
    {"sec-fetch-site": "Cross-Site", "sec-fetch-mode": "no-cors"},
    {"origin": "http://evil.example"},
    {"origin": "null"},
]


@pytest.mark.parametrize("headers", FOREIGN)
def test_without_a_key_other_sites_are_refused(service: LocalService, guarded: LocalService, headers: Headers) -> None:
    code = "foreign_host" if "host" in headers else "foreign_page"
    for path in ("/v1/model", "/openapi.json", "/docs", "/v2/models/tiny"):
        problem_of(service.get(path, headers=headers), 403, code)
    asked = service.models.asked
    problem_of(service.post(PREDICT, headers=headers, **form(wav())), 403, code)
    assert service.models.asked == asked
    assert service.get("/v2/health/ready", headers=headers).status_code == 200
    assert guarded.get("/v1/model", headers=headers | OPENS).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {},
        *({"host": host} for host in ("localhost", "LOCALHOST:8000", "127.0.0.1:8000", "127.9.9.9", "[::1]:8000")),
        {"sec-fetch-site": "same-origin", "origin": "http://127.0.0.1:8000"},
        {"sec-fetch-site": "none", "sec-fetch-mode": "navigate"},  # typed
        LINK,
        {"origin": "http://localhost:8501"},
    ],
)
def test_this_machine_s_own_requests_are_answered(service: LocalService, headers: Headers) -> None:
    assert service.get("/v1/model", headers=headers).status_code == 200
    if headers == LINK:  # a form of another site is no link
        problem_of(service.post(PREDICT, headers=headers, **form(wav())), 403, "foreign_page")


def test_cors_is_closed_unless_opened_and_then_for_one_origin(service: LocalService, tiny_bundle: Bundle) -> None:
    page, allowed = {"origin": "https://page.example"}, "access-control-allow-origin"
    asked = page | {"access-control-request-method": "POST"}
    closed = service.request("OPTIONS", PREDICT, headers=asked)
    assert closed.status_code == 403
    assert not [name for name in closed.headers if name.startswith("access-control")]
    opened = LocalService(tiny_bundle, cors_origins=page["origin"])
    assert opened.request("OPTIONS", PREDICT, headers=asked).headers[allowed] == page["origin"]
    other = opened.request("OPTIONS", PREDICT, headers=asked | {"origin": "https://evil.example"})
    assert allowed not in other.headers
    across = page | {"sec-fetch-site": "cross-site"}
    assert opened.get("/v1/model", headers=across).status_code == 200
    problem_of(opened.get("/v1/model", headers=across | {"host": "page.example"}), 403, "foreign_host")
    problem_of(opened.get("/v1/model", headers=across | {"origin": "http://other.example"}), 403, "foreign_page")
    opened.models.error = ZeroDivisionError()  # mistakes of ours and refusals can be read by the page
    answers = [opened.post(PREDICT, headers=page, **form(wav())), opened.get("/nowhere", headers=page)]
    assert [(found.status_code, found.headers.get(allowed)) for found in answers] == [
        (500, page["origin"]),
        (404, page["origin"]),
    ]


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


def test_streams_are_for_pages_of_this_machine(url: str) -> None:
    for origin in ("http://evil.example", "null", "http://127.0.0.1.evil.example"):
        assert refused(url, headers={"Origin": origin}) == (403, "foreign_page")
    across = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "websocket"}
    assert refused(url, headers=across) == (403, "foreign_page")
    for origin in ("http://localhost:8501", "http://127.0.0.1:8501"):
        assert sent(url, [END], headers={"Origin": origin, "Sec-Fetch-Site": "same-site"}, **PCM).code == 1000
    # DNS rebinding: the page's own name resolves to 127.0.0.1
    handshake = {"Connection": "Upgrade", "Upgrade": "websocket", "Sec-WebSocket-Version": "13"}
    handshake |= {"Sec-WebSocket-Key": "A" * 22 + "==", "Host": f"evil.example:{url.rpartition(':')[2]}"}
    answer = httpx.get(f"{url}/v1/stream", headers=handshake)
    assert (answer.status_code, answer.json()["code"]) == (403, "foreign_host")


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
def test_without_the_key_no_stream_opens(guarded_url: str, options: dict[str, Any]) -> None:
    assert refused(guarded_url, **options) == (401, "unauthorized")


def test_key_and_ticket_open_and_are_never_logged(guarded_url: str, caplog: pytest.LogCaptureFixture) -> None:
    made, log = ticket(), logging.getLogger("ray.serve.ser")
    log.addHandler(caplog.handler)  # Ray, where it has been imported, keeps its lines from the root
    with caplog.at_level(logging.DEBUG), caplog.at_level(logging.DEBUG, log.name):
        assert sent(guarded_url, [END], headers=OPENS, **PCM).code == 1000
        with opened(guarded_url, protocols=[STREAM_PROTOCOL, made], **PCM) as socket:
            assert socket.subprotocol == STREAM_PROTOCOL
            assert json.loads(socket.recv())["type"] == "ready"
        ours = [record.getMessage() for record in caplog.records if not record.name.startswith("websockets")]
    log.removeHandler(caplog.handler)
    assert any('"route": "/v1/stream"' in line for line in ours)
    for secret in (KEY, made, key_digest(KEY)):
        assert not any(secret in line for line in ours)
    for given in (made, made.removeprefix("ser.ticket.")):
        answer = httpx.get(f"{guarded_url}/v1/model", headers={"Authorization": f"Bearer {given}"})
        assert answer.status_code == 401
