"""A camera for the demo video: pictures of a real browser page, each with its time on screen and a caption below.

Frames are taken one by one, so that a busy machine makes filming slower and not the film; waiting is on the film only
as long as `hold` says. Encoded with ffmpeg (H.264), 1280 x 800: the page at 1280 x 720 and the caption bar.
"""

from __future__ import annotations

import io
import subprocess
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

WIDTH, HEIGHT, BAR = 1280, 720, 80
FPS = 20
FONT = "DejaVuSans.ttf"
INK, PAPER = "#f4f4f2", "#1d2a35"


class Camera:
    """Takes pictures of a Playwright page into `folder`."""

    def __init__(self, page: Any, folder: Path) -> None:
        self.page = page
        self.folder = folder
        self.caption = ""
        self.shots: list[tuple[Path, float]] = []
        self._font = ImageFont.truetype(FONT, 26)

    @property
    def seconds(self) -> float:
        """How long the film is so far."""
        return sum(seconds for _, seconds in self.shots)

    def hold(self, seconds: float) -> None:
        """The page as it is now, for so many seconds of film."""
        screen = Image.open(io.BytesIO(self.page.screenshot(animations="allow"))).convert("RGB")
        frame = Image.new("RGB", (WIDTH, HEIGHT + BAR), PAPER)
        frame.paste(screen.resize((WIDTH, HEIGHT)) if screen.size != (WIDTH, HEIGHT) else screen)
        draw = ImageDraw.Draw(frame)
        draw.text((WIDTH / 2, HEIGHT + BAR / 2), self.caption, fill=INK, font=self._font, anchor="mm")
        path = self.folder / f"{len(self.shots):05d}.png"
        frame.save(path, compress_level=1)
        self.shots.append((path, seconds))

    def scroll(self, selector: str, distance: int, seconds: float) -> None:
        """Scroll the element by `distance` pixels in `seconds`, a picture every twelfth of a second, eased."""
        steps, done = max(2, round(12 * seconds)), 0
        for step in range(1, steps + 1):
            part = step / steps
            wanted = round(distance * part * part * (3 - 2 * part))
            self.page.evaluate("([s, d]) => document.querySelector(s).scrollBy(0, d)", [selector, wanted - done])
            done = wanted
            self.hold(seconds / steps)

    def develop(self, out: Path) -> None:
        """Encode the film.

        Raises:
            subprocess.CalledProcessError: ffmpeg is not there or failed.
        """
        listing = self.folder / "shots.txt"
        lines = [f"file '{path.name}'\nduration {seconds:.3f}\n" for path, seconds in self.shots]
        listing.write_text("".join([*lines, f"file '{self.shots[-1][0].name}'\n"]), encoding="utf-8")
        words = ["ffmpeg", "-y", "-loglevel", "error", "-f", "concat", "-i", str(listing), "-r", str(FPS)]
        words += ["-c:v", "libx264", "-preset", "slow", "-crf", "26", "-pix_fmt", "yuv420p", "-movflags", "+faststart"]
        subprocess.run([*words, str(out)], check=True)
