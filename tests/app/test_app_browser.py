"""The page in a real browser against the real service: upload, microphone, many files, a service that comes and goes.

Service and page are processes on free ports; what the page shows is compared with what the service answers to a client
of our own. The rules of axe-core decide on accessibility.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    made = Service()
    made.start()
    yield made
    made.stop()
    made.client.close()


@pytest.fixture(scope="module")
def running(service: Service) -> Iterator[tuple[int, str]]:
    with page_process(service.client.base_url) as page:
        yield page


@pytest.fixture
def address(running: tuple[int, str]) -> str:
    return running[1]


@pytest.fixture(scope="module")
def playwright() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as started:
        yield started


@pytest.fixture(scope="module")
def browser(playwright: Any) -> Iterator[Any]:
    launched = playwright.chromium.launch(executable_path=CHROMIUM, args=list(FLAGS))
    yield launched
    launched.close()


@pytest.fixture(scope="module")
def contexts(browser: Any) -> dict[str, Any]:
    """Light and dark; each keeps its cache, so that only its first tab loads the page's scripts."""
    made = {scheme: browser.new_context(color_scheme=scheme) for scheme in ("light", "dark")}
    for context in made.values():
        context.set_default_timeout(PATIENCE_MS)
    return made


@pytest.fixture
def tab(contexts: dict[str, Any]) -> Iterator[Callable[..., Any]]:
    """``tab(url, scheme=...)`` -> a page, which is closed at the end."""
    pages = []

    def opened(url: str, scheme: str = "light") -> Any:
        page = contexts[scheme].new_page()
        pages.append(page)
        page.set_viewport_size({"width": 1280, "height": 720})
        page.goto(url)
        page.wait_for_selector("h1")
        return page

    yield opened
    for page in pages:
        page.close()


def test_an_upload_is_answered_as_the_service_answers(
    tab: Callable[..., Any], address: str, service: Service, write_audio: Callable[..., Path]
) -> None:
    page = tab(address)
    assert first(page)
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
    first(page)
    charts = page.locator('[data-testid="stVegaLiteChart"]')
    page.wait_for_function(CHARTS, arg=3)
    for found in (page.locator(".ser-bars").first, charts.nth(0), charts.nth(1)):
        box = found.bounding_box()
        assert box["y"] >= 0
        assert box["y"] + box["height"] <= 720


def test_nothing_jumps_when_an_answer_comes(
    tab: Callable[..., Any], address: str, write_audio: Callable[..., Path]
) -> None:
    """The sum of layout shifts, as web vitals have it, where below 0.1 counts as good."""
    page = tab(address)
    first(page)
    page.wait_for_function(CHARTS, arg=3)
    page.evaluate(
        "window.shifts = 0; new PerformanceObserver(list => list.getEntries().forEach(e => window.shifts += e.value))"
        ".observe({type: 'layout-shift'})"
    )
    give(page, write_audio("next.wav", duration_s=3.0))
    answered(page, "next.wav")
    page.wait_for_function(CHARTS, arg=3)
    assert page.evaluate("window.shifts") < 0.1


def test_what_is_no_recording_is_one_sentence(
    tab: Callable[..., Any], address: str, service: Service, tmp_path: Path
) -> None:
    page = tab(address)
    first(page)
    (tmp_path / "text.wav").write_bytes(b"no sound at all")
    give(page, tmp_path / "text.wav")
    alert = page.get_by_test_id("stAlert")
    alert.get_by_text(f"text.wav: {service.refusal(tmp_path / 'text.wav')}").wait_for()
    rested(page)
    assert alert.count() == 1
    page.wait_for_function(NOTHING_OLD)


def test_a_file_that_is_too_large_is_told_before_it_is_sent(
    tab: Callable[..., Any], address: str, tmp_path: Path
) -> None:
    page = tab(address)
    first(page)
    (tmp_path / "large.wav").write_bytes(bytes(33 * 2**20))
    page.get_by_text("Another recording").click()
    give(page, tmp_path / "large.wav")
    page.get_by_test_id("stFileUploader").first.get_by_text(re.compile("32.*or smaller")).wait_for()
    assert page.inner_text(".ser-from strong") == "anna_happy_train.ogg"  # what was there stays


def test_keyboard_alone_reaches_what_mattered(tab: Callable[..., Any], address: str) -> None:
    page = tab(address)
    first(page)
    for _ in range(40):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.closest('button')?.innerText.includes('Show what mattered')"):
            break
    page.keyboard.press("Enter")
    page.get_by_role("heading", name="What mattered").wait_for()
    page.wait_for_function(CHARTS, arg=4)


def test_a_long_recording_has_a_time_line(
    tab: Callable[..., Any], address: str, write_audio: Callable[..., Path]
) -> None:
    page = tab(address)
    first(page)
    give(page, write_audio("long.wav", duration_s=12.0, channels=2))
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


@contextmanager
def speaking(playwright: Any, voice: Path) -> Iterator[Any]:
    """A tab of a browser whose microphone hears ``voice``, again and again."""
    device = ("--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream")
    flags = [*FLAGS, *device, f"--use-file-for-fake-audio-capture={voice}"]
    chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=flags)
    context = chromium.new_context(permissions=["microphone"])
    context.set_default_timeout(PATIENCE_MS)
    yield context.new_page()
    chromium.close()


def test_a_voice_from_the_microphone_is_answered(
    playwright: Any, address: str, write_audio: Callable[..., Path]
) -> None:
    spoken = write_audio("voice.wav", duration_s=10.0, sample_rate_hz=48_000, peak=0.8)
    with speaking(playwright, spoken) as page:
        page.goto(address)
        button = page.get_by_test_id("stAudioInputActionButton")
        button.click()
        page.get_by_test_id("stAudioInputWaveformTimeCode").get_by_text("00:02").wait_for()
        button.click()
        assert re.search("sounds|Sounds|No clear", answered(page, "Your voice.wav"))


def test_live_shows_what_is_heard_as_a_moving_band(
    playwright: Any, address: str, service: Service, write_audio: Callable[..., Path]
) -> None:
    spoken = write_audio("spoken.wav", samples=voice(20.0), sample_rate_hz=48_000)
    with speaking(playwright, spoken) as page:
        page.goto(address)
        page.get_by_role("button", name="Start live").click()
        page.wait_for_selector(".ser-live .run.emotion, .ser-live .run.unsure")
        assert re.search("sounds|No clear", page.inner_text(".ser-live .ser-answer"))
        drawn = {entry.get_attribute("data-label") for entry in page.locator(".ser-live .legend li").all()}
        assert drawn <= {*service.client.model().labels, "uncertain", "silence", "not_speech"}
        where = "getComputedStyle(document.querySelector('.ser-live .track')).transform"
        page.wait_for_function(f"before => {where} !== before", arg=page.evaluate(where))  # it moves
        accessible(page)
        page.locator(".ser-live .toggle").click()
        page.get_by_role("button", name="Start", exact=True).wait_for()
        page.wait_for_function("!document.querySelector('.ser-live .interim')")  # the last one is final
        assert page.inner_text(".ser-live .told") == ""
        service.stop()
        page.locator(".ser-live .toggle").click()
        page.get_by_text("This browser cannot reach the service").wait_for()
        service.start()
        page.get_by_role("button", name="Back").click()
        page.get_by_role("button", name="Start live").wait_for()


def test_many_files_become_a_table_and_a_csv(
    tab: Callable[..., Any], address: str, service: Service, write_audio: Callable[..., Path], tmp_path: Path
) -> None:
    clips = [write_audio(f"clip{i:02}.wav", f0_hz=100.0 + 6 * i, seed=i) for i in range(40)]
    broken, labels = tmp_path / "broken.wav", tmp_path / "labels.csv"
    broken.write_bytes(b"RIFF and nothing more")
    labels.write_text("file,label\n" + "".join(f"{clip.name},sad\n" for clip in clips))
    page = tab(f"{address}/many")
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
    expected = [service.client.predict(clip) for clip in clips]
    assert list(table["predicted"][:40]) == [answer.label for answer in expected]
    sure = [float("nan") if answer.confidence is None else answer.confidence for answer in expected]  # not_speech: none
    assert list(table["confidence"][:40]) == pytest.approx(sure, abs=1e-6, nan_ok=True)
    right = sum(answer.label == "sad" for answer in expected) / 40
    assert percent(right) in page.inner_text(".ser-targets tbody tr:first-child")


def test_a_row_that_is_ticked_can_be_heard_beside_the_table(
    tab: Callable[..., Any], address: str, service: Service, write_audio: Callable[..., Path]
) -> None:
    clips = [write_audio(f"clip{i}.wav", f0_hz=100.0 + 60 * i, seed=i, duration_s=2.0) for i in range(3)]
    page = tab(f"{address}/many")
    give(page, *clips)
    page.get_by_role("heading", name="3 answered").wait_for()
    rested(page)
    tick(page)
    assert page.inner_text(".ser-answer") == service.headline(clips[0])
    sound, table = page.locator("audio").bounding_box(), page.get_by_test_id("stDataFrame").bounding_box()
    assert sound["x"] >= table["x"] + table["width"]  # where it is seen without scrolling
    page.wait_for_function("document.querySelector('audio').duration === 2")


def test_leaving_in_the_middle_loses_nothing(
    tab: Callable[..., Any], address: str, write_audio: Callable[..., Path]
) -> None:
    clips = [write_audio(f"clip{i:02d}.wav", f0_hz=80.0 + 10 * i, seed=i) for i in range(40)]
    page = tab(address)
    first(page)
    give(page, *clips)  # several, given on the first page
    page.get_by_role("heading", name="Many recordings").wait_for()
    page.get_by_role("link", name="Listen").click()
    assert answered(page, "anna_happy_train.ogg")
    page.get_by_role("link", name="Many recordings").click()
    page.get_by_role("heading", name="40 answered").wait_for()


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="reads /proc")
def test_the_page_process_holds_nothing_that_hears(
    tab: Callable[..., Any], running: tuple[int, str], write_audio: Callable[..., Path], tmp_path: Path
) -> None:
    pid, address = running
    (tmp_path / "labels.csv").write_text("file,label\nclip.wav,sad\n")
    for name, heading in (
        ("", "What emotion does this voice convey?"),
        ("model", "Model card"),
        ("many", "How many are right?"),
    ):
        page = tab(f"{address}/{name}")
        if name == "many":
            give(page, write_audio("clip.wav"), tmp_path / "labels.csv")
        page.get_by_role("heading", name=heading).wait_for()
        rested(page)
    loaded = Path(f"/proc/{pid}/maps").read_text(encoding="utf-8")
    assert "/numpy/" in loaded
    for library in ("torch", "ray", "onnxruntime", "soxr", "numba", "llvmlite"):
        assert f"/{library}/" not in loaded, library
    assert "libsndfile" not in loaded


def test_two_tabs_do_not_mix(
    tab: Callable[..., Any], address: str, service: Service, write_audio: Callable[..., Path]
) -> None:
    clips = [write_audio(f"tab{i}.wav", f0_hz=100.0 + 200 * i, peak=0.2 + 0.6 * i) for i in range(2)]
    pages = [tab(address) for _ in clips]
    for page, clip in zip(pages, clips, strict=True):
        give(page, clip)
    for page, clip in zip(pages, clips, strict=True):
        assert answered(page, clip.name) == service.headline(clip)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", PAGES)
def test_every_page_fits_is_accessible_and_follows_the_scheme(
    tab: Callable[..., Any],
    address: str,
    write_audio: Callable[..., Path],
    tmp_path: Path,
    name: str,
    scheme: str,
) -> None:
    page = tab(f"{address}/{PAGES[name]}", scheme)
    if name == "many":
        clip, labels = write_audio("clip.wav"), tmp_path / "labels.csv"
        (tmp_path / "broken.wav").write_bytes(b"no sound")
        labels.write_text("file,label\nclip.wav,sad\n")
        give(page, clip, labels, tmp_path / "broken.wav")
        page.get_by_role("heading", name="How many are right?").wait_for()
        rested(page)
        tick(page)
    elif name == "listen":
        rested(page)
        accessible(page)  # the first view
        first(page)
        give(page, write_audio("long.wav", samples=voice(9.0), sample_rate_hz=48_000))
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


def test_a_service_that_stops_is_told_and_one_that_starts_is_used(
    tab: Callable[..., Any], address: str, service: Service, write_audio: Callable[..., Path]
) -> None:
    page = tab(address)
    first(page)
    service.stop()
    clip = write_audio("later.wav", f0_hz=250.0, duration_s=2.0)
    give(page, clip)
    page.get_by_text("does not answer at").wait_for()
    assert page.locator(".ser-answer").count() == 0
    fresh = tab(f"{address}/model")
    fresh.get_by_text("does not answer at").wait_for()
    accessible(page)
    service.start()
    assert answered(page, "later.wav") == service.headline(clip)  # by itself: nobody touched the page
    fresh.get_by_role("heading", name="How well it does").wait_for()


def voice(seconds: float) -> Any:
    """A sample's voice at 48 kHz, again and again: what the fixtures make is too plain for the shipped model's ear."""

    from pipeline.audio.load import load

    samples = load(Path(__file__).parents[2] / "samples/anna_calm_letter.flac", sample_rate_hz=48_000).samples
    return np.resize(samples, round(seconds * 48_000))
