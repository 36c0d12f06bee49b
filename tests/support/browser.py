"""The page as people have it: its process, and the real browser that looks at it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx

from tests.support.processes import HOST, ROOT, free_port

CHROMIUM = os.environ.get("CHROMIUM", "/usr/bin/chromium")
FLAGS = ("--no-sandbox", "--disable-gpu", "--disable-background-networking")
PATIENCE_MS = 240_000  # of everything in the browser: the machine may be busy
_START_S = 240.0
EXAMPLE, FIRST = "Anna, happy", "anna_happy_train.ogg"
"""An example that the first view offers, and its file."""
DRAWN = """([name, charts]) => document.querySelector('.ser-from strong')?.innerText === name
  && document.querySelector('[data-testid=stApp]').dataset.testScriptState === 'notRunning'
  && document.querySelector('.ser-answer')
  && document.querySelectorAll('[data-testid=stVegaLiteChart] svg').length === charts"""
"""Whether the answer for recording ``name`` stands in the page, with so many pictures."""


@contextmanager
def page_process(service_url: str) -> Iterator[tuple[int, str]]:
    """The page: its process and its address."""
    port = free_port()
    words = [sys.executable, "-m", "streamlit", "run", "app.py", "--server.port", str(port)]
    words += ["--server.headless", "true"]
    environment = {**os.environ, "SER_API_URL": service_url}
    process = subprocess.Popen(words, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)
    url = f"http://{HOST}:{port}"
    until_s = time.monotonic() + _START_S
    try:
        while not healthy(f"{url}/_stcore/health"):
            if process.poll() is not None or time.monotonic() > until_s:
                raise SystemExit("the page did not start; what it said is above")
            time.sleep(0.1)
        yield process.pid, url
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)


def healthy(url: str) -> bool:
    """Whether something answers there, and well."""
    try:
        return httpx.get(url).is_success
    except httpx.HTTPError:
        return False


@contextmanager
def chromium() -> Iterator[Any]:
    """A headless browser, Playwright's object."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=list(FLAGS))
        yield browser
        browser.close()


def tab(browser: Any, width: int = 1280, height: int = 720, scheme: str = "light") -> Any:
    """A page of its own, with time for a busy machine."""
    page = browser.new_page(viewport={"width": width, "height": height}, color_scheme=scheme)
    page.set_default_timeout(PATIENCE_MS)
    return page
