"""The pictures docs/page-*.png: every view of the page, at desktop and phone width, light and dark.

    python -m docs.take_page_pictures               # starts service (the shipped model) and page itself
    python -m docs.take_page_pictures --service URL --views listen,many --out FOLDER

Needs Chromium and Playwright (``make test-browser`` installs the latter). What is heard are the synthetic samples.
"""

from __future__ import annotations

import argparse
import io
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import soxr
from PIL import Image

from benchmarks.services import ROOT, ours, started
from tests.support.browser import DRAWN, EXAMPLE, chromium, page_process, tab

SAMPLES = ROOT / "samples"
SIZES = {"desktop": (1280, 720), "phone": (390, 844)}
SCHEMES = ("light", "dark")
_CALL_HZ = 24_000
_SPEAKERS = (
    ("anna_angry_window.flac", "anna_calm_letter.flac", "anna_happy_train.ogg", "anna_sad_letter.ogg"),
    ("ben_sad_window.wav", "ben_happy_letter.wav", "ben_neutral_kettle.flac", "ben_angry_kettle.wav"),
)
_READY = """() => document.querySelector('[data-testid=stApp]').dataset.testScriptState === 'notRunning'
  && !document.querySelector('[data-testid=stSkeleton], [data-stale=true]') && document.fonts.status === 'loaded'"""
File = dict[str, Any]


def two_speakers() -> File:
    """A call: one synthetic voice on the left, the other on the right."""
    lanes = [np.concatenate([_at_call_rate(name) for name in names]) for names in _SPEAKERS]
    length = max(map(len, lanes))
    buffer = io.BytesIO()
    stereo = np.stack([np.pad(lane, (0, length - len(lane))) for lane in lanes], axis=1)
    soundfile.write(buffer, stereo, _CALL_HZ, format="WAV")
    return {"name": "two_speakers.wav", "mimeType": "audio/wav", "buffer": buffer.getvalue()}


def _at_call_rate(name: str) -> np.ndarray:
    samples, rate_hz = soundfile.read(SAMPLES / name, dtype="float32", always_2d=True)
    return np.pad(soxr.resample(samples.mean(axis=1), rate_hz, _CALL_HZ), (0, _CALL_HZ // 3))


def many_files() -> list[File]:
    """All samples, their labels, and a file that is no recording."""
    paths = [path for path in sorted(SAMPLES.iterdir()) if path.suffix in (".wav", ".flac", ".ogg", ".csv")]
    files = [{"name": path.name, "mimeType": "", "buffer": path.read_bytes()} for path in paths]
    return [*files, {"name": "notes.txt", "mimeType": "", "buffer": b"Nothing to hear."}]


def first(page: Any) -> None:
    """The first visit."""
    page.get_by_text(EXAMPLE, exact=True).wait_for()


def listen(page: Any) -> None:
    """An example."""
    page.get_by_text("Anna, angry", exact=True).click()
    page.wait_for_function(DRAWN, arg=["anna_angry_window.flac", 3])


def mattered(page: Any) -> None:
    """What mattered for the same example."""
    listen(page)
    page.get_by_role("button", name="Show what mattered").click()
    page.wait_for_function(DRAWN, arg=["anna_angry_window.flac", 4])


def over_time(page: Any) -> None:
    """A stereo recording of several sentences."""
    listen(page)
    call = two_speakers()
    page.locator("input[type=file]").first.set_input_files(call)
    page.wait_for_function(DRAWN, arg=[call["name"], 2])


def many(page: Any) -> None:
    """All samples with their labels, the first row ticked."""
    page.wait_for_function(_READY)
    page.locator("input[type=file]").first.set_input_files(many_files())
    page.get_by_role("heading", name="How many are right?").wait_for()
    page.wait_for_function(_READY)
    table = page.get_by_test_id("stDataFrame").first
    table.click(position={"x": 16, "y": 52})
    page.locator(".ser-answer").wait_for()


def model(page: Any) -> None:
    """The model and the service."""
    page.get_by_role("heading", name="Model card").wait_for()


VIEWS: dict[str, tuple[str, Callable[[Any], None], bool]] = {
    "first": ("", first, False),
    "listen": ("", listen, True),
    "mattered": ("", mattered, True),
    "over-time": ("", over_time, True),
    "many": ("many", many, True),
    "model": ("model", model, True),
}
"""Name -> address, how to get there, and whether the whole page is taken or only the first screenful."""


def take(page: Any, address: str, view: str, size: str, scheme: str, out: Path) -> None:
    """One picture, in 256 colours."""
    path, prepare, whole = VIEWS[view]
    width, height = SIZES[size]
    page.set_viewport_size({"width": width, "height": height})
    page.goto(f"{address}/{path}")
    page.wait_for_selector("h1")
    prepare(page)
    page.wait_for_function(_READY)
    if whole:
        height = page.evaluate("document.querySelector('[data-testid=stMain]').scrollHeight")
        page.set_viewport_size({"width": width, "height": height})
    page.mouse.move(0, 0)
    page.wait_for_timeout(1000)  # animations: none of them tells when it has ended
    page.wait_for_function(_READY)
    taken = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
    few = taken.quantize(256, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)  # keeps rare colours apart
    few.save(out / f"page-{view}-{size}-{scheme}.png", optimize=True)


def main() -> None:
    """Take them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "docs")
    parser.add_argument("--service", help="address of a service that runs already")
    parser.add_argument("--views", default=",".join(VIEWS), help=f"some of {','.join(VIEWS)}")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        url = arguments.service or stack.enter_context(started(ours("--engine", "local"))).url
        _, address = stack.enter_context(page_process(url))
        browser = stack.enter_context(chromium())
        for scheme in SCHEMES:
            page = tab(browser, scheme=scheme)
            for view in arguments.views.split(","):
                for size in SIZES:
                    take(page, address, view, size, scheme, arguments.out)


if __name__ == "__main__":
    main()
