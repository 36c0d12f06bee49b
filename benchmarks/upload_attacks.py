"""Send hostile and mistaken uploads to the service; print status, time and growth of memory for each.

    python -m benchmarks.upload_attacks [--engine local]

It starts its own service. The growth of memory is the peak of proxy, ingress and model worker during the upload, minus
the memory of each before. After each upload, a normal recording must still be answered.
"""

from __future__ import annotations

import argparse
import io
import socket
import sys
import time
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass

import httpx
import numpy as np

from benchmarks.common import RATE_HZ, clips
from benchmarks.services import HOST, Running, ours, started
from tests.support.processes import machine, sampled
from tests.support.recordings import encode, every_format

MIB = 2**20
GIB = 2**30
_PREDICT, _TASK = "/v1/predict", "/v1/audio-classification"
_BODY_TIMEOUT_S = 8
Statuses = Counter[str]


@dataclass(frozen=True)
class Attack:
    """An upload, and the statuses that are right."""

    name: str
    send: Callable[[Running], Statuses]
    wanted: frozenset[str]


def post(path: str, **content: object) -> Callable[[Running], Statuses]:
    """A function that sends one request with httpx."""

    def send(service: Running) -> Statuses:
        answer = httpx.post(service.url + path, timeout=120, **content)  # type: ignore[arg-type]
        return Counter([_told(answer)])

    return send


def _told(answer: httpx.Response) -> str:
    try:
        found = answer.json()
    except ValueError:
        return f"{answer.status_code} not JSON"
    if isinstance(found, dict) and "code" in found:
        return f"{answer.status_code} {found['code']}"
    if isinstance(found, dict) and "files" in found:
        return f"{answer.status_code} " + "+".join(sorted({file["status"] for file in found["files"]}))
    return str(answer.status_code)


def file(data: bytes, **fields: str) -> Callable[[Running], Statuses]:
    return post(_PREDICT, files={"file": ("x", data)}, data=fields)


def stream(parts: Iterator[bytes], *, declared: int | None = None) -> Callable[[Running], Statuses]:
    """A function that sends a raw request as fast as the service reads; it returns the status and the MiB sent."""

    def send(service: Running) -> Statuses:
        length = "Transfer-Encoding: chunked" if declared is None else f"Content-Length: {declared}"
        head = f"POST {_TASK} HTTP/1.1\r\nHost: {HOST}\r\nContent-Type: audio/wav\r\n{length}\r\n\r\n"
        sent = 0
        with socket.create_connection((HOST, service.port), timeout=60) as connection:
            connection.sendall(head.encode())
            with suppress(OSError):  # the service closed the connection
                for part in parts:
                    connection.sendall(b"%x\r\n%s\r\n" % (len(part), part) if declared is None else part)
                    sent += len(part)
            status = "hung up"
            with suppress(OSError):
                status = _answer(connection)
        return Counter([f"{status} (took {sent / MIB:.0f} MiB)"])

    return send


def slow_bodies(count: int) -> Callable[[Running], Statuses]:
    """A function that opens many connections, which declare a body and then send a byte a second."""

    def one(service: Running) -> str:
        head = f"POST {_TASK} HTTP/1.1\r\nHost: {HOST}\r\nContent-Type: audio/wav\r\nContent-Length: 100000\r\n\r\n"
        with socket.create_connection((HOST, service.port), timeout=1.0) as connection:
            connection.sendall(head.encode())
            until_s = time.monotonic() + 5 * _BODY_TIMEOUT_S
            while time.monotonic() < until_s:
                try:
                    connection.sendall(b"x")
                    return _answer(connection)
                except TimeoutError:
                    continue
                except OSError:
                    return "hung up"
        return "still open"

    def send(service: Running) -> Statuses:
        with ThreadPoolExecutor(count + 1) as threads:
            answers = [threads.submit(one, service) for _ in range(count)]
            time.sleep(2.0)
            begun_s = time.monotonic()
            ordinary = file(clips(1)[0])(service)
            took_s = time.monotonic() - begun_s
            found = Counter(answer.result() for answer in answers)
        return found + Counter(f"meanwhile {status} in {took_s:.1f} s" for status in ordinary)

    return send


def _answer(connection: socket.socket) -> str:
    """Status and problem code of a raw response; OSError where there is none."""
    answer = connection.recv(65536).decode("latin-1")
    code = answer.partition('"code":"')[2].partition('"')[0]
    return f"{answer[9:12]} {code}".strip() or "hung up"


def together(count: int, send: Callable[[Running], Statuses]) -> Callable[[Running], Statuses]:
    """A function that sends the same upload many times at once."""

    def all_of_them(service: Running) -> Statuses:
        with ThreadPoolExecutor(count) as threads:
            return sum((done for done in threads.map(lambda _: send(service), range(count))), Counter())

    return all_of_them


def silence(seconds: int, channels: int = 1) -> bytes:
    """A small FLAC with a very large decoded size."""
    return encode(np.zeros((seconds * RATE_HZ, channels), np.float32), RATE_HZ, "FLAC", "PCM_16")


def zip_bomb() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("zeros", bytes(100 * MIB))
    return buffer.getvalue()


def patched(data: bytes, position: int, new: bytes) -> bytes:
    return data[:position] + new + data[position + len(new) :]


def attacks() -> list[Attack]:
    """All uploads."""
    clip = clips(1)[0]
    formats = every_format()
    rejected = frozenset({"400 not_audio", "400 empty_file", "415 unsupported_format", "422 truncated", "422 corrupt"})

    def of(name: str, send: Callable[[Running], Statuses], *wanted: str) -> Attack:
        return Attack(name, send, frozenset(wanted) or rejected)

    quiet_20, quiet_60 = silence(1200), silence(3600)
    big = {"files": [("file", (f"{n}.wav", clip)) for n in range(200)]}
    small = {"files": [("file", (f"{n}.wav", formats["FLAC_PCM_16_48000_1.flac"][:5000])) for n in range(200)]}
    head = b'--b\r\nContent-Disposition: form-data; name="'
    broken = {"headers": {"content-type": "multipart/form-data; boundary=b"}}
    json = {"headers": {"content-type": "application/json"}}
    odd_names = [("file", (name, clip)) for name in ("../../etc/passwd", "a\nb", "é" * 200, "C:\\x.wav", ".wav")]
    kinds = {"PNG": b"\x89PNG\r\n\x1a\n" + bytes(500), "PDF": b"%PDF-1.7\n" + bytes(500), "HTML": b"<html>" * 90}
    kinds |= {"ELF": b"\x7fELF" + bytes(500), "pickle": b"\x80\x04K\x01." * 50, "playlist": b"#EXTM3U\n/etc/passwd\n"}
    return [
        of(f"bomb: 20 min of silence as FLAC, {len(quiet_20) // 1000} kB", file(quiet_20), "200 ok"),
        of("the same, all of it in windows of 2 s", file(quiet_20, window_s="2"), "200 ok"),
        of("the same, windows every 0.01 s", file(quiet_20, window_s="2", hop_s="0.01"), "422 too_many_windows"),
        of("the same from 20 at once", together(20, file(quiet_20)), "200 ok", "429 overloaded", "503 deadline"),
        of("bomb: 60 min", file(quiet_60), "413 too_long"),
        of("bomb: 20 min, 8 channels", file(silence(1200, channels=8)), "413 too_large"),
        of("zip bomb, 100 MiB of zeros", file(zip_bomb())),
        of("WAV whose header says 1 GiB", file(patched(clip, 40, b"\0\0\0\x40")), "200 ok"),  # as in a streamed WAV
        of("WAV that says 1 Hz", file(patched(clip, 24, b"\1\0\0\0")), "422 bad_sample_rate"),
        of("WAV that says 1,024 channels", file(patched(clip, 22, b"\0\4")), "422 bad_channels", "422 corrupt"),
        of("WAV of 0 samples", file(clip[:44]), "422 truncated", "422 no_samples"),
        *(of(f"a {kind} file", file(data)) for kind, data in kinds.items()),
        of("nothing", file(b""), "400 empty_file"),
        of("1 GiB, declared", stream((bytes(MIB) for _ in range(1024)), declared=GIB), "413 body_too_large", "hung up"),
        of("1 GiB, chunked", stream(bytes(MIB) for _ in range(1024)), "413 body_too_large", "hung up"),
        of("33 MiB in a form", file(bytes(33 * MIB)), "413 body_too_large"),
        of("30 MiB from 40 at once", together(40, post(_TASK, content=bytes(30 * MIB))), "400 not_audio", "429", "408"),
        of(f"100 slow bodies, a byte a second ({_BODY_TIMEOUT_S} s allowed)", slow_bodies(100), "408"),
        of("200 files of 355 kB at once", post(_PREDICT, **big), "413 body_too_large"),
        of("200 files of 5 kB at once", post(_PREDICT, **small), "422 too_many_files"),
        of("file names that are paths", post(_PREDICT, files=odd_names), "200 ok"),
        of("a field of 1 MiB", file(clip, model="x" * MIB), "422 invalid_request"),
        of("5,000 fields", file(clip, **{f"f{n}": "x" for n in range(5000)}), "422 too_many_files"),
        of("a part whose header is 8 MiB", post(_PREDICT, content=head + b"x" * 8 * MIB, **broken), "400 bad_request"),
        of("1 MiB of dashes", post(_PREDICT, content=b"--b\r\n" * 200_000, **broken), "422 too_many_files"),
        of("JSON of 100,000 brackets", post(_TASK, content=b"[" * 100_000, **json), "422 invalid_request"),
        of("an address for a recording", post(_TASK, json={"inputs": "http://127.0.0.1/x.wav"}), "422 invalid_request"),
    ]


def watched(service: Running, send: Callable[[Running], Statuses]) -> tuple[Statuses, dict[str, float]]:
    """The statuses of an upload, and the largest growth of each part in MiB."""
    parts = service.parts()
    before = service.memory_mib(parts)
    peaks = dict(before)

    def look() -> float:
        for name, value in service.memory_mib(parts).items():
            peaks[name] = max(peaks[name], value)
        return 0.0

    with sampled(look, every_s=0.05):
        found = send(service)
    return found, {name: peaks[name] - before[name] for name in before}


def main() -> int:
    """Start a service, attack it, print; 0 where every response was right."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", choices=("ray", "local"), default="ray")
    engine = parser.parse_args().engine
    print(f"machine: {machine()}; engine: {engine}")
    wrong = 0
    with started(ours("--engine", engine, "--body_timeout_s", str(_BODY_TIMEOUT_S))) as service:
        ordinary = file(clips(1)[0])
        ordinary(service)
        print(f"at rest, MiB: {', '.join(f'{name} {value:.0f}' for name, value in service.memory_mib().items())}")
        parts = list(service.parts())
        print(f"\n| sent | answer | s | {' | '.join(parts)} |\n|---|---|---{'|---' * len(parts)}|")
        for attack in attacks():
            begun_s = time.monotonic()
            found, grown_mib = watched(service, attack.send)
            took_s = time.monotonic() - begun_s
            grown = " | ".join(f"{value:+.0f}" for value in grown_mib.values())
            wanted = (*attack.wanted, "meanwhile 200 ok")
            right = all(status.startswith(wanted) for status in found)
            alive = ordinary(service) == Counter(["200 ok"])
            wrong += not (right and alive)
            told = ", ".join(f"{status}" + (f" x{count}" if count > 1 else "") for status, count in found.items())
            verdict = "" if right and alive else " **WRONG**" if alive else " **SERVICE GONE**"
            print(f"| {attack.name} | {told}{verdict} | {took_s:.1f} | {grown} |", flush=True)
        print(f"\nafterwards, MiB: {', '.join(f'{name} {value:.0f}' for name, value in service.memory_mib().items())}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
