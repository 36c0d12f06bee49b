"""Requests and responses of the clients, without sending: building, reading, and one exception class per remedy.

ClientError
├── Refused               the service answered with a problem: ``code`` is stable, ``status`` is HTTP's (404: no such
│   │                     model or address)
│   ├── BadRecording      this recording cannot be used (400, 413, 415, 422; 503 decode_timeout): send another one
│   ├── WrongKey          401, 403: give the service's key
│   ├── Busy              429, 503, after the retries: try again later
│   └── ServiceFault      500, or a response that is not from this service
├── NotRead               a local file that cannot be read; ``problem`` says why, in the service's format
├── Unreachable           no connection: is the service running?
└── NoAnswer              connected, but no answer within the timeout
"""

# ruff: noqa: D101 - the tree above says what each is

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import httpx
from pydantic import TypeAdapter, ValidationError

from serve.schema import Failure, Prediction, Problem, Recording

FOREIGN = "foreign_answer"
"""Problem code of responses that are not from this service."""

Source = str | os.PathLike[str] | bytes | tuple[str, bytes]
"""A recording: a path, a file's bytes, or its name and bytes."""

Part = list[tuple[str, bytes]]
"""File names and bytes of the recordings in one request."""

DIRECT: Mapping[str, None] = dict.fromkeys(("all://localhost", "all://127.0.0.1", "all://[::1]"))
"""``mounts`` of httpx: requests to this machine bypass a proxy that the environment sets; it would get the key."""

FILES_A_REQUEST = 16
BYTES_A_REQUEST = 16 * 2**20
_LONGEST_WAIT_S = 30.0
_NOT_READ: Mapping[type[Exception], str] = {
    FileNotFoundError: "not_found",
    NotADirectoryError: "not_found",
    ValueError: "not_found",
    IsADirectoryError: "not_a_file",
    PermissionError: "permission_denied",
}
Answer = TypeVar("Answer")


class ClientError(Exception):
    """Base class of the clients' errors; ``str()`` is one line for people."""


class Refused(ClientError):
    def __init__(self, problem: Problem) -> None:
        super().__init__(problem.detail)
        self.problem = problem

    @property
    def code(self) -> str:
        """Identifier of the problem, in snake_case; it never changes."""
        return self.problem.code

    @property
    def status(self) -> int:
        """HTTP status."""
        return self.problem.status


class NotRead(ClientError):
    def __init__(self, code: str, name: str, detail: str) -> None:
        super().__init__(detail)
        self.name = name
        self.problem = Problem(
            type=f"urn:ser:problem:{code}", title="The recording cannot be used", status=400, code=code, detail=detail
        )


class BadRecording(Refused):
    pass


class WrongKey(Refused):
    pass


class Busy(Refused):
    pass


class ServiceFault(Refused):
    pass


class Unreachable(ClientError):
    pass


class NoAnswer(ClientError):
    pass


def refused(problem: Problem) -> Refused:
    """The exception for a problem."""
    if problem.status in (401, 403):
        return WrongKey(problem)
    if problem.code == "decode_timeout":  # a 503 that a retry would not change
        return BadRecording(problem)
    if problem.status in (429, 503):
        return Busy(problem)
    if problem.status >= 500 or problem.code == FOREIGN:
        return ServiceFault(problem)
    if problem.status in (404, 405):
        return Refused(problem)
    return BadRecording(problem)


class Retries:
    """Decides whether and when one request is sent again: after 429 or 503 with ``Retry-After``.

    At most ``most`` times, and within ``patience_s`` seconds of the first attempt.
    """

    def __init__(self, most: int, patience_s: float) -> None:
        self._left = most
        self._until_s = time.monotonic() + patience_s

    def wait_s(self, response: httpx.Response) -> float | None:
        """Seconds to wait before the next attempt; None where there is no retry."""
        after = response.headers.get("retry-after", "")
        if response.status_code not in (429, 503) or not after.isdecimal() or not self._left:
            return None
        self._left -= 1
        wait_s = min(float(after), _LONGEST_WAIT_S)
        return wait_s if time.monotonic() + wait_s <= self._until_s else None


def checked_address(url: str) -> str:
    """The address of a service, without a slash at its end; refuses, with ClientError, what is not http or https."""
    try:
        parts = httpx.URL(url)
    except httpx.InvalidURL:
        parts = httpx.URL()
    if parts.scheme not in ("http", "https") or not parts.host:
        raise ClientError(f"{url!r} is not an http or https address; give one like http://127.0.0.1:8000")
    return url.rstrip("/")


def named(source: Source) -> tuple[str, bytes]:
    """File name and bytes of a recording; reads paths, or raises NotRead."""
    if isinstance(source, tuple):
        return _text(source[0]), source[1]
    if isinstance(source, bytes):
        return "recording", source
    try:
        return _text(Path(source).name), Path(source).read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        code = next((code for kind, code in _NOT_READ.items() if isinstance(error, kind)), "unreadable")
        reason = getattr(error, "strerror", None) or error
        raise NotRead(
            code, _text(os.path.basename(source)), f"cannot read {_text(os.fspath(source))}: {reason}"
        ) from error


def _text(name: str) -> str:
    """A file name as valid Unicode; bytes that are not text become backslash sequences."""
    return name.encode("utf-8", "backslashreplace").decode()


def form(sources: Sequence[Source], options: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of httpx for a multipart form; options that are None are left out."""
    given = {key: value for key, value in options.items() if value is not None}
    fields = {key: str(value).lower() if isinstance(value, bool) else str(value) for key, value in given.items()}
    return {"files": [("file", named(source)) for source in sources], "data": fields}


def parts(sources: Iterable[Source]) -> Iterator[Part | Failure]:
    """Recordings in groups, each small enough for one request; a Failure for each file that cannot be read."""
    part: Part = []
    held_bytes = 0
    for source in sources:
        try:
            name, data = named(source)
        except NotRead as error:
            if part:
                yield part
            yield Failure(name=error.name, problem=error.problem)
            part, held_bytes = [], 0
            continue
        if part and (len(part) == FILES_A_REQUEST or held_bytes + len(data) > BYTES_A_REQUEST):
            yield part
            part, held_bytes = [], 0
        part.append((name, data))
        held_bytes += len(data)
    if part:
        yield part


def single(prediction: Prediction) -> Recording:
    """The answer for the only recording; raises Refused where it could not be used."""
    (answer,) = prediction.files
    if isinstance(answer, Failure):
        raise refused(answer.problem)
    return answer


@contextmanager
def translate_errors(base_url: str) -> Iterator[None]:
    """Turn httpx's errors into ClientErrors."""
    try:
        yield
    except (httpx.ReadTimeout, httpx.WriteTimeout, httpx.PoolTimeout) as error:
        raise NoAnswer(
            f"the service at {base_url} did not answer in time; send fewer recordings, or try later"
        ) from error
    except httpx.HTTPError as error:
        raise Unreachable(f"no service answers at {base_url}; is it running?") from error


def read(response: httpx.Response, kind: type[Answer]) -> Answer:
    """The body of a response as a ``kind``; raises Refused for a problem, or for the response of another server."""
    expected: Any = kind if response.is_success else Problem
    try:
        answer: Any = TypeAdapter(expected).validate_json(response.content)
    except ValidationError as error:  # the response of another server or of a proxy
        raise refused(_foreign(response)) from error
    if not response.is_success:
        raise refused(answer)
    found: Answer = answer
    return found


def _foreign(response: httpx.Response) -> Problem:
    status = response.status_code if response.status_code >= 400 else 502
    detail = f"{response.url.host} answered {response.status_code}, but not as this service does; check the address"
    return Problem(
        type="about:blank", title="Not a response of this service", status=status, code=FOREIGN, detail=detail
    )
