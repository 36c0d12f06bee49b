"""Python clients of the service, built on httpx: ``Client`` is synchronous, ``AsyncClient`` asynchronous.

    with Client("http://127.0.0.1:8000", api_key) as client:
        answer = client.predict("speech.wav")
        print(answer.label, answer.confidence)

A request is sent again only after 429 or 503 with ``Retry-After``: up to ``retries`` times, for at most ``patience_s``
seconds. Errors are the exceptions of ``client_wire``; the text of each is one line.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from typing import Any

import httpx

from serve.client_wire import (
    DIRECT,
    BadRecording,
    Busy,
    ClientError,
    NoAnswer,
    NotRead,
    Part,
    Refused,
    Retries,
    ServiceFault,
    Source,
    Unreachable,
    WrongKey,
    checked_address,
    form,
    named,
    parts,
    read,
    single,
    translate_errors,
)
from serve.schema import Explanation, Failure, ModelInfo, Prediction, Recording, Score, checked_key

__all__ = [
    "AsyncClient",
    "BadRecording",
    "Busy",
    "Client",
    "ClientError",
    "NoAnswer",
    "NotRead",
    "Refused",
    "ServiceFault",
    "Source",
    "Unreachable",
    "WrongKey",
]
DEFAULT_URL = "http://127.0.0.1:8000"
_TIMEOUT = httpx.Timeout(90.0, connect=5.0, pool=5.0)
_HEALTH_TIMEOUT = httpx.Timeout(5.0, connect=2.0)


def _only(part: Part, error: BadRecording) -> Failure:
    """A Failure for the only recording of a refused request; raises ``error`` where the recording is not the cause."""
    if len(part) > 1 or error.code == "invalid_request":
        raise error
    return Failure(name=part[0][0], problem=error.problem)


def _halves(part: Part, error: BadRecording) -> list[Part]:
    """The two halves of a request that the service refused as too large, the second first; else an empty list."""
    middle = len(part) // 2
    return [part[middle:], part[:middle]] if middle and error.code in ("too_many_files", "body_too_large") else []


class _Caller:
    """What both clients share.

    Args:
        base_url: address of the service; an invalid one raises ClientError.
        api_key: the service's API key, if it has one; an invalid one raises ClientError.
        timeout: seconds, or httpx.Timeout; by default 5 s to connect and 90 s for an answer.
        retries: maximum number of retries of a request.
        patience_s: seconds since the first attempt after which there is no retry.
        transport: a transport of httpx, for tests.
    """

    _kind: Any

    def __init__(
        self,
        base_url: str = DEFAULT_URL,
        api_key: str | None = None,
        *,
        timeout: float | httpx.Timeout = _TIMEOUT,
        retries: int = 5,
        patience_s: float = 60.0,
        transport: httpx.BaseTransport | httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self.base_url = checked_address(base_url)
        self.retries, self.patience_s = retries, patience_s
        try:
            key = checked_key(api_key)
        except ValueError as error:
            raise ClientError(str(error)) from error
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._http = self._kind(headers=headers, timeout=timeout, transport=transport, mounts=DIRECT)


class Client(_Caller):
    """Synchronous client. Use it in a ``with`` block, or call ``close``. Threads may share one."""

    _kind = httpx.Client
    _http: httpx.Client

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def predict(self, source: Source, **options: Any) -> Recording:
        """Emotions of one recording: a path, bytes, or (name, bytes). Errors as in ``client_wire``.

        Options: ``window_s, hop_s, channels, top_k, min_confidence, picture, model``, as in ``schema.Options``.
        """
        return single(self.predict_together([source], **options))

    def predict_together(self, sources: Sequence[Source], **options: Any) -> Prediction:
        """Emotions of several recordings in one request; those that cannot be used are ``Failure`` entries.

        A single one that cannot be used is a ``BadRecording``. Errors as in ``client_wire``.
        """
        return read(self._send("POST", "/v1/predict", **form(sources, options)), Prediction)

    def predict_each(self, sources: Iterable[Source], **options: Any) -> Iterator[Recording | Failure]:
        """Emotions of any number of recordings, in order, several per request.

        A recording that cannot be read or used gives a ``Failure``; errors: the service cannot be used.
        """
        for group in parts(sources):
            if isinstance(group, Failure):
                yield group
                continue
            waiting = [group]
            while waiting:
                part = waiting.pop()
                try:
                    yield from self.predict_together(part, **options).files
                except BadRecording as error:
                    if smaller := _halves(part, error):
                        waiting += smaller
                    else:
                        yield _only(part, error)

    def explain(self, source: Source, **options: Any) -> Explanation:
        """Which parts of the spectrogram support the predicted label; options ``channels, model``."""
        return read(self._send("POST", "/v1/explain", **form([source], options)), Explanation)

    def classify(self, source: Source) -> list[Score]:
        """Only the scores, most probable first."""
        return read(self._send("POST", "/v1/audio-classification", content=named(source)[1]), list[Score])

    def model(self, name: str | None = None) -> ModelInfo:
        """Description of a model (default: the first) and the service's limits."""
        return read(self._send("GET", "/v1/model", params={"model": name} if name else {}), ModelInfo)

    def live(self) -> bool:
        """Whether the service runs. Never raises ClientError."""
        return self._healthy("/v2/health/live")

    def ready(self) -> bool:
        """Whether all models can answer now. Never raises ClientError."""
        return self._healthy("/v2/health/ready")

    def _healthy(self, path: str) -> bool:
        try:
            return self._http.get(self.base_url + path, timeout=_HEALTH_TIMEOUT).is_success
        except httpx.HTTPError:
            return False

    def _send(self, method: str, path: str, **content: Any) -> httpx.Response:
        retries = Retries(self.retries, self.patience_s)
        while True:
            with translate_errors(self.base_url):
                response = self._http.request(method, self.base_url + path, **content)
            wait_s = retries.wait_s(response)
            if wait_s is None:
                return response
            time.sleep(wait_s)


class AsyncClient(_Caller):
    """Asynchronous client with the methods of ``Client``; use it in an ``async with`` block."""

    _kind = httpx.AsyncClient
    _http: httpx.AsyncClient

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def predict(self, source: Source, **options: Any) -> Recording:
        return single(await self.predict_together([source], **options))

    async def predict_together(self, sources: Sequence[Source], **options: Any) -> Prediction:
        return read(await self._send("POST", "/v1/predict", **form(sources, options)), Prediction)

    async def predict_each(self, sources: Iterable[Source], **options: Any) -> AsyncIterator[Recording | Failure]:
        for group in parts(sources):
            if isinstance(group, Failure):
                yield group
                continue
            waiting = [group]
            while waiting:
                part = waiting.pop()
                try:
                    for answer in (await self.predict_together(part, **options)).files:
                        yield answer
                except BadRecording as error:
                    if smaller := _halves(part, error):
                        waiting += smaller
                    else:
                        yield _only(part, error)

    async def explain(self, source: Source, **options: Any) -> Explanation:
        return read(await self._send("POST", "/v1/explain", **form([source], options)), Explanation)

    async def classify(self, source: Source) -> list[Score]:
        return read(await self._send("POST", "/v1/audio-classification", content=named(source)[1]), list[Score])

    async def model(self, name: str | None = None) -> ModelInfo:
        return read(await self._send("GET", "/v1/model", params={"model": name} if name else {}), ModelInfo)

    async def live(self) -> bool:
        return await self._healthy("/v2/health/live")

    async def ready(self) -> bool:
        return await self._healthy("/v2/health/ready")

    async def _healthy(self, path: str) -> bool:
        try:
            return (await self._http.get(self.base_url + path, timeout=_HEALTH_TIMEOUT)).is_success
        except httpx.HTTPError:
            return False

    async def _send(self, method: str, path: str, **content: Any) -> httpx.Response:
        retries = Retries(self.retries, self.patience_s)
        while True:
            with translate_errors(self.base_url):
                response = await self._http.request(method, self.base_url + path, **content)
            wait_s = retries.wait_s(response)
            if wait_s is None:
                return response
            await asyncio.sleep(wait_s)
