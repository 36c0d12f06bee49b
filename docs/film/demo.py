"""The demo video: set-up, a small training, a report, adapting to another corpus, the web page. All of it really runs.

    python -m docs.film.demo --data_dir RAVDESS --own_dir EMODB --out docs/demo.mp4

Needs chromium, ffmpeg, git, and Playwright (`make test-browser` installs it). Every command runs while it is filmed, in
a fresh clone of this repository in --work: `make demo` makes that clone's environment, the training has two epochs,
the evaluation is that of `inception_ravdess` on the test part, which it was not trained on, and the page has a service
of its own. Pauses are cut, and the captions say so.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd

from docs.film.camera import Camera
from docs.film.terminal import Terminal, run
from tests.support.browser import chromium, healthy, tab
from tests.support.processes import ROOT, free_port

SPLIT = "models/splits/ravdess_split.csv"
TITLE = """<!doctype html><meta charset=utf-8><style>
body {{ margin: 0; height: 720px; display: grid; place-content: center; text-align: center;
  background: #f4f4f2; color: #1d2a35; font-family: "DejaVu Sans", sans-serif }}
h1 {{ font-size: 46px; margin: 0 0 18px }} p {{ font-size: 24px; margin: 6px 60px }}
</style><h1>{title}</h1>{lines}"""
QUIET = {"PYTHONWARNINGS": "ignore", "PIP_QUIET": "1", "COLUMNS": "110"}  # pip tells errors only


def card(camera: Camera, title: str, lines: list[str], seconds: float) -> None:
    """A title card."""
    camera.page.set_content(TITLE.format(title=title, lines="".join(f"<p>{line}</p>" for line in lines)))
    camera.hold(seconds)


def in_terminal(camera: Camera, clone: Path, data: Path, own: Path) -> None:
    """Set-up, features, a small training, an evaluation, and a model adapted to the recordings in ``own``."""
    terminal = Terminal(camera)

    def shown(caption: str, command: str, really: str | None = None, last_s: float = 2.5) -> None:
        camera.caption = caption
        lines = run(really or command, clone, QUIET)
        terminal.clear()
        terminal.type(command)
        terminal.play(lines, last_s=last_s)

    shown("A fresh clone: one command makes the environment and runs the main job (pauses cut)", "make demo", last_s=5)
    os.environ["PATH"] = f"{clone / '.venv/bin'}{os.pathsep}{os.environ['PATH']}"
    shown("Your own recordings: a manifest, then features on Ray Data", f"ser manifest {data} --out metadata.csv")
    shown("Recordings become log-mel shards in Parquet", "ser extract --data_csv metadata.csv --out features")
    train = "ser train --features features --epochs 2 --num_workers 2 --report_split none --out runs/small"
    shown("A small training on Ray Train: two epochs, from scratch", train)
    parts = pd.read_csv(clone / SPLIT, dtype=str)
    manifest = pd.read_csv(clone / "metadata.csv")
    tested = manifest["speech"].map(lambda path: Path(path).stem).isin(parts.loc[parts["split"] == "test", "id"])
    manifest[tested].to_csv(clone / "test.csv", index=False)
    shown(
        "The model of RAVDESS alone, on the 20 % it was not trained on (same speakers)",
        "ser evaluate --model_weights models/inception_ravdess --data_csv test.csv --out report",
        last_s=6,
    )
    shown("Recordings that the model does not know: here the German corpus EmoDB", f"ser manifest {own} --out mine.csv")
    shown(
        "Adapt the shipped model to them, and see whether it helps",
        "ser adapt --data_csv mine.csv --out runs/mine",
        last_s=6,
    )


def report(camera: Camera, path: Path) -> None:
    """The report in the browser, from the verdict to the figures."""
    camera.caption = "The report: one page that opens offline, verdict first"
    camera.page.goto(path.absolute().as_uri())
    camera.hold(4.0)
    camera.caption = "Confusion matrix and accuracy by class, with intervals"
    camera.scroll("html", 900, 3.0)
    camera.hold(3.0)
    camera.scroll("html", 900, 3.0)
    camera.hold(3.0)


def web_page(camera: Camera, address: str, clone: Path) -> None:
    """The page: an upload, what mattered, many recordings, the model."""
    page, main = camera.page, '[data-testid="stMain"]'
    camera.caption = "The web page: upload a recording, speak, or try an example"
    page.goto(address)
    page.wait_for_selector("h1")
    _rested(page)
    camera.hold(4.0)
    camera.caption = "An upload: the answer in words, all eight classes, and the analysed part"
    page.locator("input[type=file]").first.set_input_files(str(clone / "samples/ben_sad_window.wav"))
    camera.hold(0.4)
    page.wait_for_function("() => document.querySelector('.ser-from strong')?.innerText === 'ben_sad_window.wav'")
    _answered(page)
    camera.hold(5.0)
    camera.scroll(main, 420, 2.0)
    camera.hold(3.0)
    camera.caption = "Many recordings at once: a table to filter, play and download"
    page.goto(f"{address}/many")
    page.wait_for_selector("h1")
    camera.hold(1.5)
    clips = sorted(str(path) for path in (clone / "samples").glob("*.*") if path.suffix in (".wav", ".flac", ".ogg"))
    page.locator("input[type=file]").first.set_input_files([*clips, str(clone / "samples/metadata.csv")])
    camera.hold(0.6)
    page.wait_for_selector('[data-testid="stDataFrame"]')
    _rested(page)
    camera.hold(4.0)
    camera.scroll(main, 600, 3.0)
    camera.hold(2.5)
    camera.caption = "The model: measured figures, confusion matrix, limits, and what the law forbids"
    page.goto(f"{address}/model")
    page.wait_for_selector("h1")
    _rested(page)
    camera.hold(3.0)
    camera.scroll(main, 1100, 4.0)
    camera.hold(4.0)


def _rested(page: Any) -> None:
    page.wait_for_selector('[data-testid="stApp"][data-test-script-state="notRunning"]')
    page.wait_for_timeout(1500)  # charts fade in


def _answered(page: Any) -> None:
    page.wait_for_selector(".ser-answer")
    _rested(page)


@contextmanager
def page_and_service(clone: Path) -> Iterator[str]:
    """The address of a page whose service answers."""
    subprocess.run(
        ["make", "-s", ".venv/.ready-app"], cwd=clone, env={**os.environ, **QUIET}, check=True
    )  # as `make app`
    ports = [free_port() for _ in range(3)]
    words = [str(clone / ".venv/bin/python"), "-m", "jobs.app", "--port", str(ports[0])]
    words += ["--service_port", str(ports[1]), "--metrics_port", str(ports[2])]
    process = subprocess.Popen(words, cwd=clone, env={**os.environ, "STREAMLIT_SERVER_HEADLESS": "true"})
    try:
        until_s = time.monotonic() + 300
        while not healthy(f"http://127.0.0.1:{ports[1]}/v2/health/ready"):
            if process.poll() is not None or time.monotonic() > until_s:
                raise SystemExit("the service did not start; what it said is above")
            time.sleep(0.5)
        yield f"http://127.0.0.1:{ports[0]}"
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(90)


def main() -> None:
    """Film it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", type=Path, required=True, help="RAVDESS, with its Actor_NN folders")
    parser.add_argument("--own_dir", type=Path, required=True, help="recordings to adapt to, such as EmoDB's")
    parser.add_argument("--out", type=Path, default=ROOT / "docs/demo.mp4")
    parser.add_argument("--work", type=Path, help="empty folder for clone and frames (default: a temporary one)")
    arguments = parser.parse_args()
    work = arguments.work or Path(tempfile.mkdtemp(prefix="ser-film-"))
    frames, clone, data, own = work / "frames", work / "ser", work / "ravdess", work / "emodb"
    frames.mkdir(parents=True)
    data.symlink_to(arguments.data_dir.resolve())
    own.symlink_to(arguments.own_dir.resolve())
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
    with chromium() as browser:
        camera = Camera(tab(browser), frames)
        about = ["Trained from scratch on RAVDESS and CREMA-D. Batch scoring, reports, HTTP and a web page."]
        card(camera, "Speech emotion recognition on Ray", about, 4.0)
        in_terminal(camera, clone, Path("..") / data.name, Path("..") / own.name)
        report(camera, clone / "report/report.html")
        with page_and_service(clone) as address:
            web_page(camera, address, clone)
        camera.caption = ""
        limits = [
            "It was trained on acted speech from studios. It does not know what anybody feels.",
            "Do not judge people by it.",
        ]
        card(camera, "What it is not", limits, 4.0)
    camera.develop(arguments.out)
    print(f"{arguments.out}: {camera.seconds:.0f} s, {arguments.out.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
