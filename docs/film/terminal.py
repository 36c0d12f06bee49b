"""A terminal for the demo video: commands are really run, their output is recorded with its times, then shown again.

What is shown is what was printed, line by line; only pauses are shortened (`longest_pause_s`), and captions say so.
"""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path

from docs.film.camera import Camera

PAGE = """<!doctype html><meta charset=utf-8><style>
body { margin: 0; background: #10181f; color: #e4e7e9; font: 18px/25px "DejaVu Sans Mono", monospace }
pre { margin: 0; padding: 18px 22px; height: 684px; overflow: hidden }
b { color: #7fd1b9; font-weight: normal }
</style><pre><div id=screen></div></pre>"""
TYPED_S = 0.045


def run(command: str, folder: Path, environment: dict[str, str]) -> list[tuple[float, str]]:
    """Run a shell command to its end: each line it printed, and when, in seconds from the start.

    Raises:
        SystemExit: it failed, with what it said.
    """
    start_s, lines = time.monotonic(), []
    process = subprocess.Popen(
        ["bash", "-c", command],
        cwd=folder,
        env={**os.environ, **environment},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout is not None
    for line in process.stdout:
        lines.append((time.monotonic() - start_s, line.rstrip("\n").split("\r")[-1]))
    if process.wait():
        raise SystemExit(f"{command!r} ended with {process.returncode}:\n" + "\n".join(text for _, text in lines))
    return lines


class Terminal:
    """Shows commands and their output on a page, in front of a camera."""

    def __init__(self, camera: Camera) -> None:
        self.camera = camera
        self.camera.page.set_content(PAGE)

    def clear(self) -> None:
        """An empty screen."""
        self.camera.page.evaluate("() => document.getElementById('screen').replaceChildren()")

    def type(self, command: str) -> None:
        """The prompt, and the command as somebody types it."""
        self._add("$ ", bold=True)
        for start in range(0, len(command), 3):
            self._add(command[start : start + 3], bold=True)
            self.camera.hold(3 * TYPED_S)
        self._add("\n")
        self.camera.hold(0.3)

    def play(self, lines: list[tuple[float, str]], longest_pause_s: float = 0.6, last_s: float = 2.0) -> None:
        """Recorded lines, with pauses shortened; lines that came together appear together."""
        for index, (at_s, text) in enumerate(lines):
            self._add(text + "\n")
            pause_s = lines[index + 1][0] - at_s if index + 1 < len(lines) else last_s
            if pause_s > 0.04:
                self.camera.hold(min(pause_s, longest_pause_s) if index + 1 < len(lines) else last_s)

    def _add(self, text: str, *, bold: bool = False) -> None:
        self.camera.page.evaluate(
            """([text, bold]) => {
                const part = document.createElement(bold ? 'b' : 'span');
                part.textContent = text; part.style.whiteSpace = 'pre-wrap';
                document.getElementById('screen').append(part);
                document.querySelector('pre').scrollTop = 1e9;
            }""",
            [text, bold],
        )
