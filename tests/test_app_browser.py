"""The page in a real browser against the real service: upload, microphone, many files, a service that comes and goes.

Service and page are processes on free ports; what the page shows is compared with what the service answers to a client
of our own. The rules of axe-core decide on accessibility.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from app_pages.words import NOT_SURE_BELOW, headline, percent
from serve.client import Client

pytestmark = [pytest.mark.browser, pytest.mark.timeout(600)]
ROOT = Path(__file__).resolve().parents[1]
CHROMIUM = os.environ.get("CHROMIUM", "/usr/bin/chromium")
HOST = "127.0.0.1"
SERVICE_WORDS = [sys.executable, "-m", "jobs.serve"]
PATIENCE_MS = 60_000  # of everything in the browser: the machine may be busy
START_S = 240.0
CHARTS = "n => document.querySelectorAll('[data-testid=stVegaLiteChart] svg').length === n"
PAGES = {"listen": "", "many": "many", "model": "model"}


def free_port() -> int:
    with socket.socket() as free:
        free.bind((HOST, 0))
        return int(free.getsockname()[1])


@contextmanager
def process(words: list[str], environment: dict[str, str], ready: Callable[[], bool]) -> Iterator[None]:
    """A process that is ready, and is stopped at the end."""
    log = Path(tempfile.mkstemp(prefix="page-test-", suffix=".log")[1])
    with log.open("w") as output:
        started = subprocess.Popen(words, cwd=ROOT, env={**os.environ, **environment}, stdout=output, stderr=output)
    try:
        until_s = time.monotonic() + START_S
        while not ready():
            assert started.poll() is None, log.read_text()[-2000:]
            assert time.monotonic() < until_s, log.read_text()[-2000:]
            time.sleep(0.2)
        yield
    finally:
        started.send_signal(signal.SIGTERM)
        started.wait(90)


class Service:
    """The real service on a port of its own, to be started and stopped."""

    def __init__(self) -> None:
        self.port = free_port()
        self.client = Client(f"http://{HOST}:{self.port}")
        self._running: Any = None

    def start(self) -> None:
        words = [*SERVICE_WORDS, "--port", str(self.port), "--metrics_port", str(free_port())]
        self._running = process(words, {}, self.client.ready)
        self._running.__enter__()

    def stop(self) -> None:
        if self._running is not None:
            self._running.__exit__(None, None, None)
            self._running = None

    def headline(self, path: Path) -> str:
        """What the page must say of a short recording."""
        return headline(self.client.predict(path, min_confidence=NOT_SURE_BELOW).label, whole=True)


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    made = Service()
    made.start()
    yield made
    made.stop()
    made.client.close()


@pytest.fixture(scope="module")
def address(service: Service) -> Iterator[str]:
    import httpx

    port = free_port()
    words = [sys.executable, "-m", "streamlit", "run", "app.py"]
    words += ["--server.port", str(port), "--server.headless", "true"]

    def ready() -> bool:
        try:
            return httpx.get(f"http://{HOST}:{port}/_stcore/health").is_success
        except httpx.HTTPError:
            return False

    with process(words, {"SER_API_URL": service.client.base_url}, ready):
        yield f"http://{HOST}:{port}"


@pytest.fixture(scope="module")
def playwright() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as started:
        yield started


def launch(playwright: Any, *arguments: str) -> Any:
    basic = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    return playwright.chromium.launch(executable_path=CHROMIUM, args=[*basic, *arguments])


@pytest.fixture(scope="module")
def browser(playwright: Any) -> Iterator[Any]:
    launched = launch(playwright)
    yield launched
    launched.close()


@pytest.fixture
def tab(browser: Any) -> Iterator[Callable[..., Any]]:
    """``tab(url, width=..., scheme=...)`` -> a page in a context of its own."""
    contexts = []

    def opened(url: str, width: int = 1280, height: int = 720, scheme: str = "light") -> Any:
        context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
        context.set_default_timeout(PATIENCE_MS)
        contexts.append(context)
        page = context.new_page()
        page.goto(url)
        page.wait_for_selector("h1")
        return page

    yield opened
    for context in contexts:
        context.close()


def rested(page: Any) -> None:
    """The page's script has run to its end."""
    page.wait_for_selector('[data-testid="stApp"][data-test-script-state="notRunning"]')


def answered(page: Any, name: str) -> str:
    """The headline, once the page has answered for the recording ``name``."""
    page.wait_for_function("name => document.querySelector('.ser-from strong')?.innerText === name", arg=name)
    rested(page)
    page.wait_for_selector(".ser-answer")
    return str(page.inner_text(".ser-answer"))


def give(page: Any, *paths: Path) -> None:
    page.locator("input[type=file]").first.set_input_files([str(path) for path in paths])


def test_an_upload_is_answered_as_the_service_answers(
    tab: Callable[..., Any], address: str, service: Service, write_audio: Callable[..., Path]
) -> None:
    page = tab(address)
    assert answered(page, "anna_happy_train.ogg")
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    for name, f0_hz in (("low.wav", 90.0), ("high.wav", 380.0)):
        clip = write_audio(name, f0_hz=f0_hz, duration_s=2.0)
        give(page, clip)
        assert answered(page, name) == service.headline(clip)
    assert page.locator(".ser-bars tr").count() == len(service.client.model().labels)
    page.wait_for_function(CHARTS, arg=2)
    assert [
        url for url in asked if not url.startswith((address, address.replace("http", "ws"), "data:", "blob:"))
    ] == []


def test_the_answer_is_in_the_first_screenful(tab: Callable[..., Any], address: str) -> None:
    page = tab(address)
    answered(page, "anna_happy_train.ogg")
    charts = page.locator('[data-testid="stVegaLiteChart"]')
    page.wait_for_function(CHARTS, arg=2)
    for found in (page.locator(".ser-bars"), charts.nth(0), charts.nth(1)):
        box = found.bounding_box()
        assert box["y"] >= 0
        assert box["y"] + box["height"] <= 720


def test_nothing_jumps_when_an_answer_comes(
    tab: Callable[..., Any], address: str, write_audio: Callable[..., Path]
) -> None:
    """The sum of layout shifts, as web vitals have it, where below 0.1 counts as good."""
    page = tab(address)
    answered(page, "anna_happy_train.ogg")
    page.wait_for_function(CHARTS, arg=2)
    page.evaluate(
        "window.shifts = 0; new PerformanceObserver(list => list.getEntries().forEach(e => window.shifts += e.value))"
        ".observe({type: 'layout-shift'})"
    )
    give(page, write_audio("next.wav", duration_s=2.0))
    answered(page, "next.wav")
    page.wait_for_function(CHARTS, arg=2)
    assert page.evaluate("window.shifts") < 0.05


def test_what_is_no_recording_is_one_sentence(tab: Callable[..., Any], address: str, tmp_path: Path) -> None:
    page = tab(address)
    answered(page, "anna_happy_train.ogg")
    for name, data in (("text.wav", b"no sound at all"), ("empty.wav", b"")):
        (tmp_path / name).write_bytes(data)
        give(page, tmp_path / name)
        alert = page.locator('[data-testid="stAlert"]')
        alert.wait_for()
        rested(page)
        assert alert.inner_text().strip().count(".") == 1
    assert "Traceback" not in page.content()


def test_keyboard_alone_reaches_what_mattered(tab: Callable[..., Any], address: str) -> None:
    page = tab(address)
    answered(page, "anna_happy_train.ogg")
    for _ in range(40):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.closest('button')?.innerText.includes('Show what mattered')"):
            break
    page.keyboard.press("Enter")
    page.get_by_role("heading", name="What mattered").wait_for()
    page.wait_for_function(CHARTS, arg=3)


def test_a_long_recording_has_a_time_line(
    tab: Callable[..., Any], address: str, write_audio: Callable[..., Path]
) -> None:
    page = tab(address)
    answered(page, "anna_happy_train.ogg")
    give(page, write_audio("long.wav", duration_s=9.0, channels=2))
    assert answered(page, "long.wav")
    page.get_by_role("heading", name="Over time").wait_for()
    page.wait_for_function(CHARTS, arg=3)
    assert page.locator('[data-testid="stDataFrame"]').count() == 1


def test_a_voice_from_the_microphone_is_answered(
    playwright: Any, address: str, write_audio: Callable[..., Path]
) -> None:
    voice = write_audio("voice.wav", duration_s=10.0, sample_rate_hz=48_000, peak=0.8)
    chromium = launch(
        playwright,
        "--use-fake-device-for-media-stream",
        "--use-fake-ui-for-media-stream",
        f"--use-file-for-fake-audio-capture={voice}",
    )
    context = chromium.new_context(permissions=["microphone"])
    context.set_default_timeout(PATIENCE_MS)
    page = context.new_page()
    page.goto(address)
    answered(page, "anna_happy_train.ogg")
    page.get_by_role("tab", name="Speak").click()
    button = page.get_by_test_id("stAudioInputActionButton")
    button.click()
    page.wait_for_timeout(2500)
    button.click()
    assert re.search("sounds|Not sure", answered(page, "Your voice.wav"))
    chromium.close()


def test_many_files_become_a_table_and_a_csv(
    tab: Callable[..., Any], address: str, service: Service, write_audio: Callable[..., Path], tmp_path: Path
) -> None:
    clips = [write_audio(f"clip{i}.wav", f0_hz=100.0 + 60 * i, seed=i) for i in range(4)]
    broken, labels = tmp_path / "broken.wav", tmp_path / "labels.csv"
    broken.write_bytes(b"RIFF and nothing more")
    labels.write_text("file,label\n" + "".join(f"{clip.name},sad\n" for clip in clips))
    page = tab(f"{address}/many")
    give(page, *clips, broken, labels)
    page.get_by_role("heading", name="4 answered, 1 could not be used").wait_for()
    page.get_by_role("heading", name="How many are right?").wait_for()
    rested(page)
    with page.expect_download() as download:
        page.get_by_role("button", name="Download CSV").click()
    table = pd.read_csv(download.value.path())
    assert list(table["speech"]) == [*[clip.name for clip in clips], "broken.wav"]
    assert list(table["status"]) == ["ok"] * 4 + ["not_audio"]
    expected = [service.client.predict(clip) for clip in clips]
    assert list(table["predicted"][:4]) == [answer.label for answer in expected]
    assert list(table["confidence"][:4]) == pytest.approx([answer.confidence for answer in expected], abs=1e-6)
    right = sum(answer.label == "sad" for answer in expected) / 4
    assert percent(right) in page.inner_text(".ser-targets tbody tr:first-child")


def test_two_tabs_do_not_mix(
    tab: Callable[..., Any], address: str, service: Service, write_audio: Callable[..., Path]
) -> None:
    clips = [write_audio(f"tab{i}.wav", f0_hz=100.0 + 200 * i, peak=0.2 + 0.6 * i) for i in range(2)]
    pages = [tab(address) for _ in clips]
    for page, clip in zip(pages, clips, strict=True):
        give(page, clip)
    for page, clip in zip(pages, clips, strict=True):
        assert answered(page, clip.name) == service.headline(clip)


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", PAGES)
def test_every_page_fits_is_accessible_and_follows_the_scheme(
    tab: Callable[..., Any],
    address: str,
    write_audio: Callable[..., Path],
    tmp_path: Path,
    name: str,
    scheme: str,
    width: int,
) -> None:
    import axe_playwright_python

    page = tab(f"{address}/{PAGES[name]}", width=width, height=844, scheme=scheme)
    if name == "many":
        clip, labels = write_audio("clip.wav"), tmp_path / "labels.csv"
        (tmp_path / "broken.wav").write_bytes(b"no sound")
        labels.write_text("file,label\nclip.wav,sad\n")
        give(page, clip, labels, tmp_path / "broken.wav")
        page.get_by_role("heading", name="How many are right?").wait_for()
    elif name == "listen":
        answered(page, "anna_happy_train.ogg")
        give(page, write_audio("long.wav", duration_s=9.0, channels=2))
        answered(page, "long.wav")
        page.get_by_role("button", name="Show what mattered").click()
        page.get_by_role("heading", name="What mattered").wait_for()
    rested(page)
    wide = "Math.max(...[...document.querySelectorAll('html, [data-testid=stMain]')].map(e => e.scrollWidth))"
    assert page.evaluate(wide) <= width
    colour = page.evaluate("getComputedStyle(document.querySelector('[data-testid=stApp]')).backgroundColor")
    brightness = sum(int(part) for part in re.findall(r"\d+", colour)[:3]) / (3 * 255)
    assert brightness < 0.2 if scheme == "dark" else brightness > 0.9
    page.evaluate((Path(axe_playwright_python.__file__).parent / "axe.min.js").read_text(encoding="utf-8"))
    found = page.evaluate("axe.run(document, {resultTypes: ['violations']})")
    bad = [(v["id"], v["nodes"][0]["html"]) for v in found["violations"] if v["impact"] in ("serious", "critical")]
    assert bad == []


def test_a_service_that_stops_is_told_and_one_that_starts_is_used(
    tab: Callable[..., Any], address: str, service: Service, write_audio: Callable[..., Path]
) -> None:
    page = tab(address)
    answered(page, "anna_happy_train.ogg")
    service.stop()
    clip = write_audio("later.wav", f0_hz=250.0, duration_s=2.0)
    give(page, clip)
    page.get_by_text("does not answer at").wait_for()
    assert "python -m jobs.serve" in page.inner_text('[data-testid="stCode"]')
    fresh = tab(f"{address}/model")
    fresh.get_by_text("does not answer at").wait_for()
    service.start()
    assert answered(page, "later.wav") == service.headline(clip)  # by itself: nobody touched the page
    fresh.get_by_role("heading", name="How well it does").wait_for()
