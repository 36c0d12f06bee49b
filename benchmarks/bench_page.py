"""Measure the page in a real browser: time from upload to charts, its parts, and the memory over many uploads.

    python -m benchmarks.bench_page                 # 200 uploads; starts service and page itself
    python -m benchmarks.bench_page --service URL   # with a running service

Needs Chromium and Playwright (``make test-browser`` installs the latter). Every upload is a different recording, so no
answer comes from a cache. The time is that of the browser's clock, from the event that a file was chosen until the new
answer and all charts are in the page. Its parts are: sending the file, the service (measured by a client in this
process), the rest until Streamlit's script ends, and drawing after that.
"""

from __future__ import annotations

import argparse
import os
import time
from contextlib import ExitStack
from typing import Any

import numpy as np
import pandas as pd

from benchmarks.services import ours, started
from serve.client import Client
from tests.support.browser import DRAWN, EXAMPLE, FIRST, chromium, page_process, tab
from tests.support.processes import machine, resident_bytes
from tests.support.recordings import encode, synthetic_speech

MIB = 2**20
PARTS = ("sent", "told", "drawn")
_WATCH = """name => {
  window.seen = {};
  performance.clearResourceTimings();
  document.addEventListener('change', () => { seen.chosen = performance.now() }, {capture: true, once: true});
  const look = () => {
    const told = document.querySelector('.ser-from strong')?.innerText === name
      && document.querySelector('[data-testid=stApp]').dataset.testScriptState === 'notRunning';
    if (told && !seen.told) seen.told = performance.now();
    if (told && document.querySelectorAll('[data-testid=stVegaLiteChart] svg').length === 3) {
      seen.sent = performance.getEntriesByType('resource').findLast(e => e.name.includes('upload_file'))?.responseEnd;
      seen.drawn = performance.now();
    } else requestAnimationFrame(look);
  };
  look();
}"""


def recording(number: int) -> bytes:
    """2.5 s of speech-like sound at 48 kHz, 16 bit (240 kB), different for each number."""
    return encode(synthetic_speech(2.5, 48_000, seed=number), 48_000, "WAV", "PCM_16")


def uploads(page: Any, count: int, pid: int) -> tuple[pd.DataFrame, dict[int, float]]:
    """A row per upload of ms after choosing a file (columns ``PARTS``); MiB of the page after some uploads."""
    rows, memory_mib = [], {}
    for number in range(count):
        name = f"clip{number:04d}.wav"
        page.evaluate(_WATCH, name)
        file = {"name": name, "mimeType": "audio/wav", "buffer": recording(number)}
        page.locator("input[type=file]").first.set_input_files(file)
        page.wait_for_function("seen.drawn")
        rows.append(page.evaluate("seen"))
        if number + 1 in (1, 10, 50, 100, 150, 200) or number + 1 == count:
            memory_mib[number + 1] = resident_bytes(pid) / MIB
    times = pd.DataFrame(rows, columns=["chosen", *PARTS], dtype=float)
    return times[list(PARTS)].sub(times["chosen"], axis=0), memory_mib


def service_ms(url: str, count: int) -> float:
    """Median milliseconds of the page's request, sent from this process."""
    found = []
    with Client(url) as client:
        for number in range(count):
            data = recording(10_000 + number)
            start_s = time.perf_counter()
            client.predict(("clip.wav", data), picture=True, min_confidence=0.5)
            found.append(1000 * (time.perf_counter() - start_s))
    return float(np.median(found))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--uploads", type=int, default=200)
    parser.add_argument("--service", help="address of a running service")
    arguments = parser.parse_args()
    print(f"{machine()}; load before {os.getloadavg()[0]:.1f}", flush=True)
    with ExitStack() as stack:
        url = arguments.service or stack.enter_context(started(ours())).url
        pid, address = stack.enter_context(page_process(url))
        page = tab(stack.enter_context(chromium()))
        start_s = time.perf_counter()
        page.goto(address)
        page.get_by_text(EXAMPLE, exact=True).wait_for()
        first_s = time.perf_counter() - start_s
        page.get_by_text(EXAMPLE, exact=True).click()
        page.wait_for_function(DRAWN, arg=[FIRST, 3], polling="raf")
        before_mib = resident_bytes(pid) / MIB
        times_ms, memory_mib = uploads(page, arguments.uploads, pid)
        asked_ms = service_ms(url, min(50, arguments.uploads))
    sent_ms, told_ms, drawn_ms = times_ms.median()
    print(f"first visit to the choices, browser cold: {first_s:.1f} s")
    print(f"upload to charts, {len(times_ms)} uploads of 240 kB: median {drawn_ms:.0f} ms, ", end="")
    print(f"90 % within {times_ms['drawn'].quantile(0.9):.0f} ms; its parts (medians):")
    print(f"  sending {sent_ms:.0f} ms, service {asked_ms:.0f} ms, ", end="")
    print(f"Streamlit {told_ms - sent_ms - asked_ms:.0f} ms, drawing after that {drawn_ms - told_ms:.0f} ms")
    after = ", ".join(f"{mib:.0f} after {number}" for number, mib in memory_mib.items())
    print(f"memory of the page's process, MiB: {before_mib:.0f} before, {after}")


if __name__ == "__main__":
    main()
