"""Live streams as a client has them: a connection over a real socket, all messages that came, how it was closed."""

from __future__ import annotations

import io
import json
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlencode

import av
import numpy as np
import soundfile
from numpy.typing import NDArray
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection, connect

from pipeline.models.bundle import Bundle
from serve.local import LocalService
from serve.schema import key_digest
from serve.settings import Settings
from serve.worker import open_bundles
from tests.support.processes import free_port

PCM = {"format": "s16le", "sample_rate_hz": 16_000}
END = json.dumps({"type": "end"})


@dataclass
class Heard:
    """What came back: messages in order, and the close code."""

    messages: list[dict[str, Any]] = field(default_factory=list)
    code: int | None = None

    def of(self, kind: str) -> list[dict[str, Any]]:
        return [message for message in self.messages if message["type"] == kind]

    @property
    def windows(self) -> list[dict[str, Any]]:
        return [answer["window"] for answer in self.of("answer")]

    @property
    def finals(self) -> list[dict[str, Any]]:
        told = [segment for message in self.of("answer") + self.of("done") for segment in message["segments"]]
        return [segment for segment in told if segment["final"]]

    @property
    def problem(self) -> str:
        return str(self.of("error")[-1]["problem"]["code"])


def opened(url: str, *, headers: dict[str, str] | None = None, protocols: Any = None, **query: Any) -> ClientConnection:
    """A connection to the service at ``url``; ``query`` is what its address says."""
    address = url.replace("http", "ws", 1) + "/v1/stream" + (f"?{urlencode(query)}" if query else "")
    return connect(address, additional_headers=headers, subprotocols=protocols, proxy=None, max_queue=None)


def sent(url: str, messages: Iterable[str | bytes], **options: Any) -> Heard:
    """What comes back for these messages, sent one after the other as fast as they are taken, until it is closed."""
    heard = Heard()
    with opened(url, **options) as socket:
        try:
            for message in messages:
                socket.send(message)
            for told in socket:
                heard.messages.append(json.loads(told))
        except ConnectionClosed:
            heard.messages += [json.loads(told) for told in rest(socket)]
        heard.code = socket.close_code
    return heard


def rest(socket: ClientConnection) -> Iterator[str | bytes]:
    """What had come before the connection was closed."""
    while True:
        try:
            yield socket.recv(timeout=0)
        except (ConnectionClosed, TimeoutError):
            return


def pieces(data: bytes, size: int) -> list[bytes]:
    return [data[at : at + size] for at in range(0, len(data), size)]


def pcm_and_wav(samples: NDArray[np.float32], rate_hz: int, kind: str = "s16le") -> tuple[bytes, bytes]:
    """Samples ``(n,)`` or ``(n, channels)`` as raw PCM, and as a WAV of the same numbers."""
    integers = np.round(samples * 32_767).astype("<i2")
    stored = integers if kind == "s16le" else samples.astype("<f4")
    buffer = io.BytesIO()
    soundfile.write(buffer, stored, rate_hz, format="WAV", subtype="PCM_16" if kind == "s16le" else "FLOAT")
    return stored.tobytes(), buffer.getvalue()


def webm(samples: NDArray[np.float32], *, live: bool = True) -> bytes:
    """Mono samples ``(n,)`` at 48 kHz as WebM with Opus, ``live`` as a browser writes it: of unknown length."""
    buffer = io.BytesIO()
    options = {"live": "1", "cluster_time_limit": "1000"} if live else {}
    with av.open(buffer, "w", format="webm", options=options) as file:
        stream = file.add_stream("libopus", rate=48_000, layout="mono")
        frame = av.AudioFrame.from_ndarray(samples[np.newaxis].astype(np.float32), format="flt", layout="mono")
        frame.sample_rate = 48_000
        for part in [frame, None]:
            for packet in stream.encode(part):
                file.mux(packet)
    return buffer.getvalue()


@contextmanager
def running(bundle: Bundle, key: str | None = None, **settings: Any) -> Iterator[tuple[str, LocalService]]:
    """The address of a service of its own."""
    port, ready = free_port(), threading.Event()
    made = Settings(bundles=(str(bundle.folder),), **settings)
    service = LocalService(made, key_digest(key) if key else None)
    service.open(open_bundles(made.bundles))
    thread = threading.Thread(target=service.run, args=("127.0.0.1", port, ready.set))
    thread.start()
    assert ready.wait(60)
    yield f"http://127.0.0.1:{port}", service
    service.stop()
    thread.join(60)
    assert not thread.is_alive()
