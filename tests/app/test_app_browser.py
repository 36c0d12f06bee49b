"""The page in a real browser against the real service: upload, microphone, many files, a service that comes and goes.

Service and page are processes on free ports; what the page shows is compared with what the service answers to a client
of our own. The rules of axe-core decide on accessibility.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from browser_page import CHARTS, Service, accessible, answered, first, give, rested, tick

from app_pages.words import percent
from tests.support.browser import CHROMIUM, FLAGS, PATIENCE_MS, page_process

pytestmark = [pytest.mark.browser, pytest.mark.timeout(1800)]
FITS = """() => [...document.querySelectorAll('html, [data-testid=stMain]')]
  .every(element => element.scrollWidth <= innerWidth)"""
NOTHING_OLD = "() => !document.querySelector('audio, .ser-answer, [data-testid=stVegaLiteChart]')"
PAGES = {"listen": "", "many": "many", "model": "model"}


@dataclass
class Site:
    """The page's process and its address, the service behind it, tabs of a browser, and recordings to give."""

    service: Service
    pid: int
    address: str
    playwright: Any
    contexts: dict[str, Any]  # light and dark; each keeps its cache: only its first tab loads the page's scripts
    write_audio: Callable[..., Path] | None = None
    folder: Path = Path()

    def tab(self, path: str = "", scheme: str = "light") -> Any:
        page = self.contexts[scheme].new_page()
        page.set_viewport_size({"width": 1280, "height": 720})
        page.goto(f"{self.address}/{path}")
        page.wait_for_selector("h1")
        return page

    def clip(self, name: str, **voice: Any) -> Path:
        assert self.write_audio
        return self.write_audio(name, **voice)

    def file(self, name: str, content: str | bytes) -> Path:
        path = self.folder / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    @contextmanager
    def speaking(self, voice: Path) -> Iterator[Any]:
        """A tab of a browser whose microphone hears ``voice``, again and again."""
        device = ("--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream")
        flags = [*FLAGS, *device, f"--use-file-for-fake-audio-capture={voice}"]
        chromium = self.playwright.chromium.launch(executable_path=CHROMIUM, args=flags)
        context = chromium.new_context(permissions=["microphone"])
        context.set_default_timeout(PATIENCE_MS)
        page = context.new_page()
        page.goto(self.address)
        yield page
        chromium.close()


@pytest.fixture(scope="module")
def running() -> Iterator[Site]:
    from playwright.sync_api import sync_playwright

    service = Service()
    service.start()
    with page_process(service.client.base_url) as (pid, address), sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=list(FLAGS))
        contexts = {scheme: browser.new_context(color_scheme=scheme) for scheme in ("light", "dark")}
        for context in contexts.values():
            context.set_default_timeout(PATIENCE_MS)
        yield Site(service, pid, address, playwright, contexts)
        browser.close()
    service.stop()
    service.client.close()


@pytest.fixture
def site(running: Site, write_audio: Callable[..., Path], tmp_path: Path) -> Iterator[Site]:
    yield replace(running, write_audio=write_audio, folder=tmp_path)
    for context in running.contexts.values():
        for page in context.pages:
            page.close()


def test_an_upload_is_answered_as_the_service_answers(site: Site) -> None:
    page = site.tab()
    assert first(page)
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    for name, f0_hz in (("low.wav", 90.0), ("high.wav", 380.0)):
        clip = site.clip(name, f0_hz=f0_hz, duration_s=2.0)
        give(page, clip)
        assert answered(page, name) == site.service.headline(clip)
    assert page.locator(".ser-bars tr").count() == len(site.service.client.model().labels)
    page.wait_for_function(CHARTS, arg=2)
    ours = (site.address, site.address.replace("http", "ws"), "data:", "blob:")
    assert [url for url in asked if not url.startswith(ours)] == []


def test_the_answer_is_in_the_first_screenful_and_nothing_jumps_when_the_next_one_comes(site: Site) -> None:
    """The sum of layout shifts, as web vitals have it, where below 0.1 counts as good."""
    page = site.tab()
    first(page)
    charts = page.locator('[data-testid="stVegaLiteChart"]')
    page.wait_for_function(CHARTS, arg=3)
    for found in (page.locator(".ser-bars").first, charts.nth(0), charts.nth(1)):
        box = found.bounding_box()
        assert box["y"] >= 0
        assert box["y"] + box["height"] <= 720
    page.evaluate(
        "window.shifts = 0; new PerformanceObserver(list => list.getEntries().forEach(e => window.shifts += e.value))"
        ".observe({type: 'layout-shift'})"
    )
    give(page, site.clip("next.wav", duration_s=3.0))
    answered(page, "next.wav")
    page.wait_for_function(CHARTS, arg=3)
    assert page.evaluate("window.shifts") < 0.1
    text = site.file("text.wav", b"no sound at all")
    give(page, text)
    page.get_by_test_id("stAlert").get_by_text(f"text.wav: {site.service.refusal(text)}").wait_for()
    page.wait_for_function(NOTHING_OLD)


def test_keyboard_alone_reaches_what_mattered(site: Site) -> None:
    page = site.tab()
    first(page)
    for _ in range(40):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.closest('button')?.innerText.includes('Show what mattered')"):
            break
    page.keyboard.press("Enter")
    page.get_by_role("heading", name="What mattered").wait_for()
    page.wait_for_function(CHARTS, arg=4)


def test_a_long_recording_has_a_time_line(site: Site) -> None:
    page = site.tab()
    first(page)
    give(page, site.clip("long.wav", duration_s=12.0, channels=2))
    assert answered(page, "long.wav")
    page.wait_for_function(CHARTS, arg=2)
    box = page.locator(".ser-time .band").first.bounding_box()
    for chart in (0, 1):  # one time axis
        axis = page.locator('[data-testid="stVegaLiteChart"]').nth(chart).locator(".role-axis-label").first
        for seconds in (4, 8):
            tick_box = axis.get_by_text(str(seconds), exact=True).bounding_box()
            at = box["x"] + box["width"] * seconds / 12.0
            assert tick_box["x"] + tick_box["width"] / 2 == pytest.approx(at, abs=4)
    page.mouse.click(box["x"] + box["width"] - 5, box["y"] + 10)
    page.wait_for_function("document.querySelector('audio').currentTime > 0 && !document.querySelector('audio').paused")
    start_s = float(page.locator(".ser-time .run").last.get_attribute("data-start"))
    assert page.evaluate("document.querySelector('audio').currentTime") >= start_s
    page.wait_for_function("document.querySelector('.ser-time .head').style.display === 'block'")
    labels = page.locator('[data-testid="stVegaLiteChart"]').first.locator(".role-axis-label text")
    seconds = labels.all_text_contents()
    assert seconds[:6] == ["0", "2", "4", "6", "8", "10"]


def test_a_voice_from_the_microphone_is_answered(site: Site) -> None:
    spoken = site.clip("voice.wav", duration_s=10.0, sample_rate_hz=48_000, peak=0.8)
    with site.speaking(spoken) as page:
        button = page.get_by_test_id("stAudioInputActionButton")
        button.click()
        page.get_by_test_id("stAudioInputWaveformTimeCode").get_by_text("00:02").wait_for()
        button.click()
        assert re.search("sounds|Sounds|No clear", answered(page, "Your voice.wav"))


def test_live_shows_what_is_heard_as_a_moving_band(site: Site) -> None:
    spoken = site.clip("spoken.wav", samples=voice(20.0), sample_rate_hz=48_000)
    with site.speaking(spoken) as page:
        page.get_by_role("button", name="Start live").click()
        page.wait_for_selector(".ser-live .run.emotion, .ser-live .run.unsure")
        assert re.search("sounds|No clear", page.inner_text(".ser-live .ser-answer"))
        drawn = {entry.get_attribute("data-label") for entry in page.locator(".ser-live .legend li").all()}
        assert drawn <= {*site.service.client.model().labels, "uncertain", "silence", "not_speech"}
        where = "getComputedStyle(document.querySelector('.ser-live .track')).transform"
        page.wait_for_function(f"before => {where} !== before", arg=page.evaluate(where))  # it moves
        accessible(page)
        page.locator(".ser-live .toggle").click()
        page.get_by_role("button", name="Start", exact=True).wait_for()
        page.wait_for_function("!document.querySelector('.ser-live .interim')")  # the last one is final
        assert page.inner_text(".ser-live .told") == ""
        site.service.stop()
        page.locator(".ser-live .toggle").click()
        page.get_by_text("This browser cannot reach the service").wait_for()
        site.service.start()
        page.get_by_role("button", name="Back").click()
        page.get_by_role("button", name="Start live").wait_for()


def test_many_files_become_a_table_and_a_csv(site: Site) -> None:
    clips = [site.clip(f"clip{i:02}.wav", f0_hz=100.0 + 6 * i, seed=i) for i in range(40)]
    broken = site.file("broken.wav", b"RIFF and nothing more")
    labels = site.file("labels.csv", "file,label\n" + "".join(f"{clip.name},sad\n" for clip in clips))
    page = site.tab("many")
    page.evaluate(
        "window.told = new Set(); new MutationObserver(() => document.querySelectorAll('[data-testid=stProgress]')"
        ".forEach(bar => told.add(bar.innerText.trim()))).observe(document.body, {childList: true, subtree: true})"
    )
    give(page, *clips, broken, labels)
    page.get_by_role("heading", name="40 answered, 1 could not be used").wait_for()
    page.get_by_role("heading", name="How many are right?").wait_for()
    rested(page)
    told = page.evaluate("[...told]")
    assert any(re.fullmatch(r"(Listening to|\d+ of) 41 recordings( …)?", text) for text in told), told
    with page.expect_download() as download:
        page.get_by_role("button", name="Download CSV").click()
    table = pd.read_csv(download.value.path())
    assert list(table["speech"]) == [*[clip.name for clip in clips], "broken.wav"]
    assert list(table["status"]) == ["ok"] * 40 + ["not_audio"]
    expected = [site.service.client.predict(clip) for clip in clips]
    assert list(table["predicted"][:40]) == [answer.label for answer in expected]
    sure = [float("nan") if answer.confidence is None else answer.confidence for answer in expected]  # not_speech: none
    assert list(table["confidence"][:40]) == pytest.approx(sure, abs=1e-6, nan_ok=True)
    right = sum(answer.label == "sad" for answer in expected) / 40
    assert percent(right) in page.inner_text(".ser-targets tbody tr:first-child")
    tick(page)
    assert page.inner_text(".ser-answer") == site.service.headline(clips[0])
    sound, listed = page.locator("audio").bounding_box(), page.get_by_test_id("stDataFrame").first.bounding_box()
    assert sound["x"] >= listed["x"] + listed["width"]  # where it is seen without scrolling
    page.wait_for_function("document.querySelector('audio').duration === 1")


def test_leaving_in_the_middle_loses_nothing(site: Site) -> None:
    clips = [site.clip(f"clip{i:02d}.wav", f0_hz=80.0 + 10 * i, seed=i) for i in range(40)]
    page = site.tab()
    first(page)
    give(page, *clips)  # several, given on the first page
    page.get_by_role("heading", name="Many recordings").wait_for()
    page.get_by_role("link", name="Listen").click()
    assert answered(page, "anna_happy_train.ogg")
    page.get_by_role("link", name="Many recordings").click()
    page.get_by_role("heading", name="40 answered").wait_for()


def test_two_tabs_do_not_mix(site: Site) -> None:
    clips = [site.clip(f"tab{i}.wav", f0_hz=100.0 + 200 * i, peak=0.2 + 0.6 * i) for i in range(2)]
    pages = [site.tab() for _ in clips]
    for page, clip in zip(pages, clips, strict=True):
        give(page, clip)
    for page, clip in zip(pages, clips, strict=True):
        assert answered(page, clip.name) == site.service.headline(clip)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", PAGES)
def test_every_page_fits_is_accessible_and_loads_nothing_that_hears(site: Site, name: str, scheme: str) -> None:
    page = site.tab(PAGES[name], scheme)
    if name == "many":
        labels = site.file("labels.csv", "file,label\nclip.wav,sad\n")
        give(page, site.clip("clip.wav"), labels, site.file("broken.wav", b"no sound"))
        page.get_by_role("heading", name="How many are right?").wait_for()
        rested(page)
        tick(page)
    elif name == "listen":
        rested(page)
        accessible(page)  # the first view
        first(page)
        give(page, site.clip("long.wav", samples=voice(9.0), sample_rate_hz=48_000))
        answered(page, "long.wav")
        page.get_by_role("button", name="Show what mattered").click()
        page.get_by_role("heading", name="What mattered").wait_for()
    rested(page)
    colour = page.evaluate("getComputedStyle(document.querySelector('[data-testid=stApp]')).backgroundColor")
    brightness = sum(int(part) for part in re.findall(r"\d+", colour)[:3]) / (3 * 255)
    assert brightness < 0.2 if scheme == "dark" else brightness > 0.9
    if name == "listen":
        accessible(page)
        page.get_by_text("Another recording").click()
    for width in (1280, 390):
        page.set_viewport_size({"width": width, "height": 844})
        for title in ("Listen", "Many recordings", "The model"):
            assert page.get_by_role("link", name=title).is_visible()
        page.wait_for_function("width => innerWidth === width", arg=width)
        page.wait_for_function(FITS)
        accessible(page)
    if (maps := Path(f"/proc/{site.pid}/maps")).exists():
        loaded = maps.read_text(encoding="utf-8")
        assert "/numpy/" in loaded
        for library in ("/torch/", "/ray/", "/onnxruntime/", "/soxr/", "/numba/", "/llvmlite/", "libsndfile"):
            assert library not in loaded


def test_a_service_that_stops_is_told_and_one_that_starts_is_used(site: Site) -> None:
    page = site.tab()
    first(page)
    site.service.stop()
    clip = site.clip("later.wav", f0_hz=250.0, duration_s=2.0)
    give(page, clip)
    page.get_by_text("does not answer at").wait_for()
    assert page.locator(".ser-answer").count() == 0
    fresh = site.tab("model")
    fresh.get_by_text("does not answer at").wait_for()
    accessible(page)
    site.service.start()
    assert answered(page, "later.wav") == site.service.headline(clip)  # by itself: nobody touched the page
    fresh.get_by_role("heading", name="How well it does").wait_for()


def voice(seconds: float) -> Any:
    """A sample's voice at 48 kHz, again and again: what the fixtures make is too plain for the shipped model's ear."""

    from pipeline.audio.load import load

    samples = load(Path(__file__).parents[2] / "samples/anna_calm_letter.flac", sample_rate_hz=48_000).samples
    return np.resize(samples, round(seconds * 48_000))
