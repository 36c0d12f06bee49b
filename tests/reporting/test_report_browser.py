"""The report in a real browser: nothing is cut off on a phone or a desktop, nothing is fetched, clips can be played."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from made_predictions import LABELS, made_predictions

from pipeline.reporting.report import write_report

pytestmark = pytest.mark.browser
CHROMIUM = os.environ.get("CHROMIUM", "/usr/bin/chromium")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        arguments = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=arguments)
        yield chromium
        chromium.close()


@pytest.fixture
def address(tmp_path: Path, write_audio: Callable[..., Path]) -> str:
    table = made_predictions(240, accuracy=0.8, failed=6, speakers=24)
    clip = write_audio("clip.wav", duration_s=1.5)
    table["speech"] = str(clip)
    write_report(table, LABELS, tmp_path / "report", meta={"model_sha256": "ab" * 32}, embed_audio=3)
    return (tmp_path / "report" / "report.html").as_uri()


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_fits_loads_nothing_and_shows_one_picture_of_each(
    browser: Any, address: str, width: int, scheme: str
) -> None:
    page = browser.new_page(viewport={"width": width, "height": 844}, color_scheme=scheme)
    told: list[str] = []
    requested: list[str] = []
    page.on("console", lambda message: told.append(message.text))
    page.on("request", lambda request: requested.append(request.url))
    page.goto(address)
    page.wait_for_load_state("load")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    cut = "[...document.querySelectorAll('.scroll')].filter(e => e.scrollWidth > e.clientWidth + 1).length"
    assert page.evaluate(cut) == 0
    shown = page.evaluate("[...document.images].filter(i => i.clientWidth > 0).map(i => [i.className, i.naturalWidth])")
    assert [name for name, _ in shown] == [f"on-{scheme}"] * 4
    assert all(natural > 0 for _, natural in shown)
    assert told == []
    assert [url for url in requested if not url.startswith(("file:", "data:"))] == []
    page.close()


def test_the_clips_can_be_played(browser: Any, address: str) -> None:
    page = browser.new_page()
    page.goto(address)
    page.wait_for_function("[...document.querySelectorAll('audio')].every(a => a.readyState >= 1)")
    lengths = page.evaluate("[...document.querySelectorAll('audio')].map(a => a.duration)")
    assert lengths == pytest.approx([1.5] * 3, abs=0.05)
    page.close()
