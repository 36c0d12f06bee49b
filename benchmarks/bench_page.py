"""The page in a real browser: time from upload to picture, what it is made of, and the page's memory over many uploads.

    python -m benchmarks.bench_page                 # 200 uploads; starts service and page itself
    python -m benchmarks.bench_page --service URL   # with a service that runs already

Needs Chromium and Playwright (``make test-browser`` installs the latter). Every upload is another recording, so nothing
is answered from memory. Its time is the browser's: from choosing the file until the new answer and both pictures stand
in the page. Parts: what the browser takes to send the file, what the service takes (asked for the same recordings by a
client of its own, from this process), and the rest: Streamlit and drawing.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import httpx
import numpy as np

from benchmarks.processes import machine, resident_bytes
from benchmarks.recordings import encode, synthetic_speech
from benchmarks.services import HOST, ROOT, free_port, ours, started
from serve.client import Client

CHROMIUM = os.environ.get("CHROMIUM", "/usr/bin/chromium")
MIB = 2**20
_ANSWERED = """name => document.querySelector('.ser-from strong')?.innerText === name
  && document.querySelector('[data-testid=stApp]').dataset.testScriptState === 'notRunning'
  && document.querySelector('.ser-answer')
  && document.querySelectorAll('[data-testid=stVegaLiteChart] svg').length === 2"""
_SENT_MS = """() => performance.getEntriesByType('resource')
  .filter(entry => entry.name.includes('upload_file')).map(entry => entry.duration).at(-1) ?? NaN"""


@contextmanager
def page_process(service_url: str) -> Iterator[tuple[int, str]]:
    """The page: its process and its address."""
    port = free_port()
    words = [sys.executable, "-m", "streamlit", "run", "app.py", "--server.port", str(port)]
    words += ["--server.headless", "true"]
    environment = {**os.environ, "SER_API_URL": service_url}
    process = subprocess.Popen(words, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)
    url = f"http://{HOST}:{port}"
    try:
        for _ in range(600):
            try:
                if httpx.get(f"{url}/_stcore/health").is_success:
                    break
            except httpx.HTTPError:
                time.sleep(0.1)
        yield process.pid, url
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)


def recording(number: int) -> bytes:
    """2.5 s of speech-like sound at 48 kHz, 16 bit: 240 kB, another one for each number."""
    return encode(synthetic_speech(2.5, 48_000, seed=number), 48_000, "WAV", "PCM_16")


def uploads(page: Any, count: int, pid: int) -> tuple[np.ndarray, np.ndarray, dict[int, float]]:
    """Milliseconds from choosing to picture, and of sending alone, of each upload; MiB of the page after some."""
    total_ms, sent_ms, memory_mib = [], [], {}
    for number in range(count):
        name = f"clip{number:04d}.wav"
        file = {"name": name, "mimeType": "audio/wav", "buffer": recording(number)}
        page.evaluate("performance.clearResourceTimings()")
        start_s = time.perf_counter()
        page.locator("input[type=file]").first.set_input_files(file)
        page.wait_for_function(_ANSWERED, arg=name, polling="raf")
        total_ms.append(1000 * (time.perf_counter() - start_s))
        sent_ms.append(page.evaluate(_SENT_MS))
        if number + 1 in (1, 10, 50, 100, 200) or number + 1 == count:
            memory_mib[number + 1] = resident_bytes(pid) / MIB
    return np.array(total_ms), np.array(sent_ms), memory_mib


def service_ms(url: str, count: int) -> np.ndarray:
    """Milliseconds of the page's question, asked from here."""
    found = []
    with Client(url) as client:
        for number in range(count):
            data = recording(10_000 + number)
            start_s = time.perf_counter()
            client.predict(("clip.wav", data), picture=True, min_confidence=0.5)
            found.append(1000 * (time.perf_counter() - start_s))
    return np.array(found)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--uploads", type=int, default=200)
    parser.add_argument("--service", help="address of a service that runs already")
    arguments = parser.parse_args()
    from playwright.sync_api import sync_playwright

    with ExitStack() as stack:
        url = arguments.service or stack.enter_context(started(ours())).url
        pid, address = stack.enter_context(page_process(url))
        playwright = stack.enter_context(sync_playwright())
        flags = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=flags)
        page = browser.new_page(viewport={"width": 1280, "height": 720})
        page.set_default_timeout(120_000)
        start_s = time.perf_counter()
        page.goto(address)
        page.wait_for_function(_ANSWERED, arg="anna_happy_train.ogg", polling="raf")
        first_s = time.perf_counter() - start_s
        before_mib = resident_bytes(pid) / MIB
        total_ms, sent_ms, memory_mib = uploads(page, arguments.uploads, pid)
        asked_ms = service_ms(url, min(50, arguments.uploads))
        browser.close()
    rest_ms = np.median(total_ms) - np.nanmedian(sent_ms) - np.median(asked_ms)
    print(machine())
    print(f"first visit to answered example, browser cold: {first_s:.1f} s")
    print(f"upload to picture, {len(total_ms)} uploads of 240 kB: median {np.median(total_ms):.0f} ms, ", end="")
    print(f"90 % within {np.quantile(total_ms, 0.9):.0f} ms")
    print(f"  sending {np.nanmedian(sent_ms):.0f} ms, service {np.median(asked_ms):.0f} ms, ", end="")
    print(f"Streamlit and drawing {rest_ms:.0f} ms (medians)")
    after = ", ".join(f"{mib:.0f} after {number}" for number, mib in memory_mib.items())
    print(f"memory of the page's process, MiB: {before_mib:.0f} before, {after}")


if __name__ == "__main__":
    main()
