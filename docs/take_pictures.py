"""Pictures of a report for the README, taken in a headless Chromium.

    python -m docs.take_pictures REPORT.html docs/pictures   (needs `make test-browser` once, which installs Playwright)

The first screen at desktop width in light and dark, and the top of the page at phone width.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from tests.support.browser import chromium, tab

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
    with chromium() as browser:
        for name, (width, height, scheme) in VIEWS.items():
            page = tab(browser, width, arguments.height if width > 500 else 2 * height, scheme)
            page.goto(arguments.report.absolute().as_uri())
            page.screenshot(path=arguments.out / f"{name}.png")


if __name__ == "__main__":
    main()
