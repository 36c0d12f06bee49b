"""The report in a real browser: nothing is cut off on a phone or a desktop, nothing is fetched, clips can be played."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from made_predictions import LABELS, made_predictions

from pipeline.reporting.report import write_report
from tests.support.browser import chromium, tab

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as opened:
        yield opened


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_fits_and_stands_alone(
    browser: Any, scheme: str, tmp_path: Path, write_audio: Callable[..., Path]
) -> None:
    table = made_predictions(240, accuracy=0.8, failed=6, speakers=24)
    table["speech"] = str(write_audio("clip.wav", duration_s=1.5))
    write_report(table, LABELS, tmp_path / "report", meta={"model_sha256": "ab" * 32}, embed_audio=3)
    for width in (390, 1280):
        page = tab(browser, width, 844, scheme)
        told: list[str] = []
        requested: list[str] = []
        page.on("console", lambda message, told=told: told.append(message.text))
        page.on("request", lambda request, requested=requested: requested.append(request.url))
        page.goto((tmp_path / "report" / "report.html").as_uri())
        page.wait_for_load_state("load")
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        cut = "[...document.querySelectorAll('.scroll')].filter(e => e.scrollWidth > e.clientWidth + 1).length"
        assert page.evaluate(cut) == 0
        images = "[...document.images].filter(i => i.clientWidth > 0).map(i => [i.className, i.naturalWidth])"
        shown = page.evaluate(images)
        assert [name for name, _ in shown] == [f"on-{scheme}"] * 4
        assert all(natural > 0 for _, natural in shown)
        page.wait_for_function("[...document.querySelectorAll('audio')].every(a => a.readyState >= 1)")
        lengths = page.evaluate("[...document.querySelectorAll('audio')].map(a => a.duration)")
        assert lengths == pytest.approx([1.5] * 3, abs=0.05)
        assert told == []
        assert [url for url in requested if not url.startswith(("file:", "data:"))] == []
        page.close()
