"""What the tests in a real browser share: service and page as processes, and what is done and awaited in the page.

Whatever happens is waited for, never for a time to pass: the machine may be busy.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest

from app_pages.words import NOT_SURE_BELOW, headline, trouble
from serve.client import Client, ClientError
from tests.support.browser import EXAMPLE, FIRST
from tests.support.processes import HOST, ROOT, free_port

SERVICE_WORDS = [sys.executable, "-m", "jobs.serve", "--engine", "local"]
START_S = 600.0
CHARTS = "n => document.querySelectorAll('[data-testid=stVegaLiteChart] svg').length === n"
STILL = """() => document.getAnimations().every(
  animation => animation.playState !== 'running' || animation.effect.getTiming().iterations === Infinity)"""
RESTED = """() => document.querySelector('[data-testid=stApp]').dataset.testScriptState === 'notRunning'
  && !document.querySelector('[data-testid=stSkeleton]')"""


class Service:
    """The real service on a port of its own, to be started and stopped."""

    def __init__(self) -> None:
        self.port = free_port()
        self.client = Client(f"http://{HOST}:{self.port}")
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Until it is ready."""
        words = [*SERVICE_WORDS, "--port", str(self.port), "--metrics_port", "0"]
        log = Path(tempfile.mkstemp(prefix="page-test-", suffix=".log")[1])
        with log.open("w") as output:
            self._process = subprocess.Popen(words, cwd=ROOT, stdout=output, stderr=output)
        until_s = time.monotonic() + START_S
        while self._process.poll() is None and time.monotonic() < until_s:
            if self.client.ready():
                return
            time.sleep(0.2)
        self.stop()
        pytest.fail(log.read_text()[-2000:])

    def stop(self) -> None:
        if self._process is not None:
            self._process.send_signal(signal.SIGTERM)
            self._process.wait(300)
            self._process = None

    def headline(self, path: Path) -> str:
        """What the page must say of a short recording."""
        answer = self.client.predict(path, min_confidence=NOT_SURE_BELOW)
        return headline(answer.label, answer.scores)

    def refusal(self, path: Path) -> str:
        """The sentence that the page must say of a recording that cannot be used."""
        with pytest.raises(ClientError) as refused:
            self.client.predict(path)
        return trouble(refused.value)


def rested(page: Any) -> None:
    """The page's script has run to its end, and nothing waits to be drawn."""
    page.wait_for_function(RESTED)


def accessible(page: Any) -> None:
    """No serious or critical violation of axe-core's rules in what can be seen now."""
    import axe_playwright_python

    page.wait_for_function(STILL)  # what fades in is pale for a moment
    page.evaluate((Path(axe_playwright_python.__file__).parent / "axe.min.js").read_text(encoding="utf-8"))
    found = page.evaluate("axe.run(document, {resultTypes: ['violations']})")
    bad = [(v["id"], v["nodes"][0]["html"]) for v in found["violations"] if v["impact"] in ("serious", "critical")]
    assert bad == []


def answered(page: Any, name: str) -> str:
    """The headline, once the page has answered for the recording ``name``."""
    page.wait_for_function("name => document.querySelector('.ser-from strong')?.innerText === name", arg=name)
    rested(page)
    page.wait_for_selector(".ser-answer")
    return str(page.inner_text(".ser-answer"))


def first(page: Any) -> str:
    """The headline of an example, chosen on the first view."""
    page.get_by_text(EXAMPLE, exact=True).click()
    return answered(page, FIRST)


def tick(page: Any) -> None:
    """The first row of the table."""
    page.get_by_test_id("stDataFrame").first.click(position={"x": 16, "y": 52})
    page.wait_for_selector(".ser-answer")


def give(page: Any, *paths: Path) -> None:
    page.locator("input[type=file]").first.set_input_files([str(path) for path in paths])
