"""``WS /v1/stream``: live sound in messages, an answer every hop. Each connection has one session.

A session has two tasks. One receives sound; it stops reading where sound arrives much faster than real time, so that
TCP slows the sender down. The other sends the oldest complete window to a worker, and the answer to the client. Windows
that have waited too long are skipped, so that answers stay current. A window goes to the worker as a short recording
(``pipeline.audio.live``) and shares the batches of all requests. Any worker can answer it; one that dies costs only
that window. Protocol: docs/live.md.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable
from typing import TypeVar

from pydantic import ValidationError
from starlette.websockets import WebSocket, WebSocketDisconnect

from pipeline.audio.live import PcmTape, Tape, WebmTape, ends
from pipeline.storage.errors import AudioError
from serve import answers, schema
from serve.auth import stream_refusal
from serve.problems import ServiceError, answer, invalid_fields, note, recording_error, request_id, retry_later
from serve.schema import STREAM_PROTOCOL, StreamOptions
from serve.service import Card, PredictRequest, Service, WorkerResult

Told = TypeVar("Told")
logger = logging.getLogger("ray.serve.ser")
CLOSED_WITH = 4000  # plus the problem's status: the close code
MOST_BYTES = 2**20  # maximum size of a message
_TEXT_CHARACTERS = 4096
_PIECE_S = 5.0  # maximum length of the sound in a message
_MESSAGES_A_SECOND = 200
_AHEAD_S, _RELAYED_AHEAD_S = 2.0, 30.0  # maximum sound ahead of real time: before reading pauses; before an error
_CATCHES_UP = 1.5  # maximum speed, relative to real time, at which a sender may catch up after an interruption
_LATE_S = 1.5  # a window that has waited longer is skipped where there is a newer one
_START_S, _SEND_S, _PATIENCE_S = 10.0, 10.0, 10.0
_LOOK_S = 0.25  # interval at which a stream checks whether the service stops
_LEAST_S = 0.25  # minimum length of sound for an answer, as in pipeline.inference.excerpts
_PASSES = ("overloaded", "unavailable", "deadline_exceeded")  # temporary errors: the next window may be answered


class Streams:
    """The WebSocket endpoint of one application; ``closed()`` is true once the service stops.

    ``relayed``: whether a proxy in front keeps reading, and buffers, while this endpoint does not read.
    """

    def __init__(self, service: Service, closed: Callable[[], bool], *, relayed: bool) -> None:
        self._service, self._closed, self._relayed = service, closed, relayed
        self._open = 0

    async def serve(self, websocket: WebSocket) -> None:
        """Serve one connection."""
        scope = websocket.scope
        if error := stream_refusal(scope, self._service.key_digest, time.time()):
            await websocket.send_denial_response(answer(error, scope))
            return
        await websocket.accept(STREAM_PROTOCOL if STREAM_PROTOCOL in scope.get("subprotocols", ()) else None)
        self._count(1)
        try:
            if self._open > self._service.settings.max_streams:
                raise retry_later("overloaded", "too many streams are open; connect again in a moment")
            await _Session(self._service, websocket, self._closed, relayed=self._relayed).run()
            await websocket.close()
        except _Gone as gone:
            note(scope, code=str(gone))
        except ServiceError as error:
            await _end(websocket, error)
        except Exception:
            logger.exception("stream %s failed with an internal error", request_id(scope))
            await _end(websocket, recording_error("internal_error", ""))
        finally:
            self._count(-1)

    def _count(self, more: int) -> None:
        self._open += more
        self._service.meter.streams(self._open)


class _Gone(Exception):
    """The client disconnected, or does not read; ``str()`` is the code for the log."""


async def _end(websocket: WebSocket, error: ServiceError) -> None:
    """Send the error, then close the connection."""
    note(websocket.scope, code=error.code)
    problem = error.problem(request_id(websocket.scope) or None)
    try:
        await _send(websocket, schema.StreamError(problem=problem))
        await websocket.close(CLOSED_WITH + problem.status, error.code)
    except (_Gone, RuntimeError, WebSocketDisconnect):
        pass


async def _send(websocket: WebSocket, message: schema.Wire) -> None:
    try:
        async with asyncio.timeout(_SEND_S):
            await websocket.send_text(message.model_dump_json(exclude_none=True))
    except TimeoutError:
        raise _Gone("slow_reader") from None
    except (RuntimeError, WebSocketDisconnect):
        raise _Gone("disconnected") from None


class _Session:
    """One stream."""

    def __init__(self, service: Service, websocket: WebSocket, closed: Callable[[], bool], *, relayed: bool) -> None:
        self._service, self._websocket, self._closed, self._relayed = service, websocket, closed, relayed
        self._begun_s = self._now()
        self._quiet_until_s = self._begun_s + _START_S
        self._ahead_s, self._seen_s = 0.0, self._begun_s  # sound ahead of real time, and when it was measured
        self._ready: deque[tuple[float, float]] = deque()  # complete windows: start in the sound, time of completion
        self._found = 0  # number of complete windows so far
        self._changed = asyncio.Event()
        self._answered, self._skipped = 0, 0

    @staticmethod
    def _now() -> float:
        return asyncio.get_running_loop().time()

    async def run(self) -> None:
        """Serve the stream until its client ends it; raises ServiceError or _Gone where something else does."""
        options = await self._options()
        service = self._service
        model = service.model(options.model)
        card = await self._in_time(service.models.card(model))
        note(self._websocket.scope, model=model, format=options.format)
        tape = _tape(options, card.features.sample_rate_hz)
        limits = service.settings.public_limits
        await _send(
            self._websocket,
            schema.StreamReady(
                id=request_id(self._websocket.scope),
                model=card.name,
                version=card.version,
                labels=list(card.labels),
                window_s=card.features.window_s,
                hop_s=options.hop_s,
                limits={name: limits[name] for name in ("max_stream_s", "stream_idle_s")},
            ),
        )
        taking = asyncio.create_task(self._take(tape, options, card))
        answering = asyncio.create_task(self._answer(tape, options, card))
        try:
            await asyncio.wait({taking, answering}, return_when=asyncio.FIRST_COMPLETED)
            if taking.done():
                taking.result()
            await answering
        finally:
            taking.cancel()
            answering.cancel()
            await asyncio.gather(taking, answering, return_exceptions=True)
            sound_s = round(tape.received_s, 1)
            note(self._websocket.scope, sound_s=sound_s, windows=self._answered, skipped=self._skipped)

    async def _options(self) -> StreamOptions:
        """The options, from the query parameters, or else from the first message."""
        given: object = dict(self._websocket.query_params)
        if not given:
            message = await self._message()
            if not isinstance(message, str):
                raise ServiceError("bad_request", 'expected {"type": "start", ...} as a text message before any sound')
            given = _read(message)
            if not isinstance(given, dict) or given.pop("type", None) != "start":
                raise ServiceError("bad_request", 'expected {"type": "start", "format": ...} as the first message')
        try:
            return StreamOptions.model_validate(given)
        except ValidationError as error:
            found = error.errors(include_url=False)
            raise invalid_fields((".".join(map(str, one["loc"])), one["msg"]) for one in found) from None

    async def _message(self) -> str | bytes:
        """The next message of the client."""
        settings = self._service.settings
        while True:
            if self._closed():
                raise retry_later("unavailable", "the service is stopping; connect again in a moment", after_s=5)
            now_s = self._now()
            if now_s > self._begun_s + settings.max_stream_s:
                raise ServiceError("too_long", f"a stream may last {settings.max_stream_s:g} s; open a new one")
            if now_s > self._quiet_until_s:
                raise ServiceError("body_timeout", "no sound arrived for too long; connect again when there is sound")
            try:
                async with asyncio.timeout(_LOOK_S):
                    message = await self._websocket.receive()
            except TimeoutError:
                continue
            if message["type"] == "websocket.disconnect":
                raise _Gone("disconnected")
            text = message.get("text")
            found: str | bytes = message.get("bytes") or b"" if text is None else text
            if len(found) > (MOST_BYTES if text is None else _TEXT_CHARACTERS):
                raise ServiceError("body_too_large", "a message may hold 1 MiB of sound, or 4,096 characters")
            return found

    async def _take(self, tape: Tape, options: StreamOptions, card: Card) -> None:
        """Receive sound until the client sends ``end``."""
        window_s, idle_s = card.features.window_s, self._service.settings.stream_idle_s
        self._quiet_until_s = self._now() + idle_s
        while True:
            message = await self._message()
            if isinstance(message, str):
                found = _read(message)
                if not isinstance(found, dict) or found.get("type") != "end":
                    raise ServiceError("bad_request", 'expected sound as a binary message, or {"type": "end"} as text')
                tape.ended = True
                if tape.received_s >= _LEAST_S:
                    for start_s in ends(tape.received_s, window_s, options.hop_s, self._found):
                        self._complete(start_s)
                self._changed.set()
                return
            length_s = len(message) / tape.bytes_a_second
            _check_piece(length_s)
            before_s = tape.received_s
            try:
                tape.add(message)
            except AudioError as error:
                raise recording_error(error.code, str(error)) from error
            length_s = max(length_s, tape.received_s - before_s, 1 / _MESSAGES_A_SECOND)
            _check_piece(length_s)
            if message:
                self._quiet_until_s = self._now() + idle_s
            while tape.holds(self._found * options.hop_s, window_s):
                self._complete(self._found * options.hop_s)
            self._leave_out()
            await self._keep_pace(length_s)

    def _complete(self, start_s: float) -> None:
        self._ready.append((start_s, self._now()))
        self._found += 1
        self._changed.set()

    def _leave_out(self) -> None:
        """Skip windows that have waited too long, where there are newer ones."""
        while len(self._ready) > 1 and self._now() - self._ready[0][1] > _LATE_S:
            self._ready.popleft()
            self._skipped += 1

    async def _keep_pace(self, length_s: float) -> None:
        """Pause reading where sound, with the last ``length_s``, is too far ahead of real time."""
        now_s = self._now()
        passed_s, self._seen_s = now_s - self._seen_s, now_s
        self._ahead_s = max(self._ahead_s - _CATCHES_UP * passed_s, 0.0) + length_s
        if self._relayed and self._ahead_s > _RELAYED_AHEAD_S:
            raise ServiceError("too_fast", "sound arrives faster than real time; send it as it is recorded")
        wait_s = (self._ahead_s - _AHEAD_S) / _CATCHES_UP
        if wait_s > 0 and not self._relayed:
            self._quiet_until_s += wait_s
            await asyncio.sleep(wait_s)

    async def _answer(self, tape: Tape, options: StreamOptions, card: Card) -> None:
        """Answer the complete windows, until the last one after ``end``."""
        segments = answers.Segments(card.labels, options)
        answered_s = self._now()
        while True:
            while not (self._ready or tape.ended):
                self._changed.clear()
                await self._changed.wait()
                answered_s = self._now()
            self._leave_out()
            if not self._ready:
                break
            start_s, since_s = self._ready.popleft()
            try:
                result, shift_s = await self._asked(tape, start_s, card)
            except ServiceError as error:
                if error.code not in _PASSES or self._now() - answered_s > _PATIENCE_S:
                    raise
                self._skipped += 1
                await asyncio.sleep(_LOOK_S)
                continue
            if result.version != card.version:
                raise retry_later("unavailable", "the model has been replaced; connect again")
            answered_s = self._now()
            self._answered += 1
            assert result.timeline is not None
            window, changed = segments.add(result.timeline, shift_s)
            told = schema.StreamAnswer(
                window=window,
                segments=changed,
                received_s=round(tape.received_s, 3),
                lag_s=round(answered_s - since_s, 4),
                skipped=self._skipped,
            )
            await _send(self._websocket, told)
        done = schema.StreamDone(
            segments=segments.last(),
            duration_s=round(tape.received_s, 6),
            windows=self._answered,
            skipped=self._skipped,
        )
        await _send(self._websocket, done)

    async def _asked(self, tape: Tape, start_s: float, card: Card) -> tuple[WorkerResult, float]:
        """A worker's result for a window, and the seconds to add to its times."""
        part = tape.part(start_s, card.features.window_s)
        asked = self._service.models.predict(card.name, part.data, PredictRequest(at=(part.start_s,)))
        result = await self._in_time(asked)
        if not result.prediction.ok:
            raise recording_error(result.prediction.status, result.prediction.error or "")
        return result, part.shift_s

    async def _in_time(self, asked: Awaitable[Told]) -> Told:
        try:
            async with asyncio.timeout(self._service.settings.deadline_s):
                return await asked
        except TimeoutError:
            raise retry_later("deadline_exceeded", "a window was not answered in time; connect again later") from None


def _check_piece(length_s: float) -> None:
    if length_s > _PIECE_S:
        raise ServiceError("body_too_large", f"a message may hold {_PIECE_S:g} s of sound; send shorter ones")


def _read(text: str) -> object:
    try:
        found: object = json.loads(text)
    except (ValueError, RecursionError):
        raise ServiceError("bad_request", "a message in text must be JSON; sound is sent as binary") from None
    return found


def _tape(options: StreamOptions, rate_hz: int) -> Tape:
    """The buffer for the sound of a stream, for a model with sample rate ``rate_hz``."""
    if options.sample_rate_hz is None:
        return WebmTape(rate_hz)
    return PcmTape(rate_hz, options.format, options.sample_rate_hz, options.channels)
