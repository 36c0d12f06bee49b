"""Pictures of a report for the README, taken in a headless Chromium.

    python docs/take_pictures.py REPORT.html docs/pictures   (needs `make test-browser` once, which installs Playwright)

The first screen at desktop width in light and dark, and the top of the page at phone width.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from playwright.sync_api import sync_playwright

ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
VIEWS = {
    "report-desktop-light": (1280, 900, "light"),
    "report-desktop-dark": (1280, 900, "dark"),
    "report-phone-light": (390, 844, "light"),
}


def main() -> None:
    """Take them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("report", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument(
        "--height", type=int, default=1925, help="of the desktop pictures (default 1925: to the figures)"
    )
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=os.environ.get("CHROMIUM", "/usr/bin/chromium"), args=ARGUMENTS
        )
        for name, (width, height, scheme) in VIEWS.items():
            tall = arguments.height if width > 500 else 2 * height
            page = browser.new_page(viewport={"width": width, "height": tall}, color_scheme=scheme)  # type: ignore[arg-type]
            page.goto(arguments.report.absolute().as_uri())
            page.screenshot(path=arguments.out / f"{name}.png")
        browser.close()


if __name__ == "__main__":
    main()
