"""Score one recording in each supported format; makes the page ``docs/formats.md``.

    python -m benchmarks.formats            # prints the table; exit status 1 when a recording has no answer
    python -m benchmarks.formats --write    # writes docs/formats.md

Each recording is 2.5 s of synthetic speech, written by libsndfile or FFmpeg (``tests.support.recordings``).
"""

from __future__ import annotations

import argparse
import io
import tempfile
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pandas as pd

from jobs.score import main as score
from pipeline.audio import load as audio
from tests.support.recordings import every_format

OUT = Path(__file__).parents[1] / "docs" / "formats.md"
HEAD = """# Formats

`python -m benchmarks.formats --write` makes this page. It writes one recording of each kind, scores the folder, and \
lists the rows. Every one has an answer.

A recording's format is recognised by its content. The ending of its name only decides whether a folder scan \
includes it. `ser infer --file` reads any
ending.

Folder scans include these endings: {endings}. They report the files that they leave out, by ending and count.

- **Length.** If a header only estimates the length, leaves it open (0, 0xFFFFFFFF, 2e9) or is wrong, the real \
length is measured. A sound track that is shorter
  than its video is measured too. `truncated` means that the stream ends within a frame, page or box.
- **Joined files** (Ogg, MP3, FLAC, AAC, AMR, WAV, mp4, webm ... end to end) are read as a whole. Parts with another \
sample rate or number of channels than
  the first are left out, with a notice. In MP3 and AAC they are converted instead.
- **Channels** are mixed. If they cancel each other, only the loudest one is analysed, with a notice.
- **Not read**: SPHERE with shorten (convert with `sph2pipe -f wav IN OUT.wav`), DSD, protected files, \
and raw samples without a header (`.raw`, `.pcm`,
  `.vox`, `.ul`; convert with `ffmpeg -f mulaw -ar 8000 -ac 1 -i IN OUT.wav`).

| ending | container | codec | rate, Hz | channels | read by | seconds |
|---|---|---|---:|---:|---|---:|
"""


def measure() -> tuple[pd.DataFrame, list[str]]:
    """A table with a row per format, and the names of the recordings without an answer."""
    with tempfile.TemporaryDirectory() as name:
        folder, out = Path(name) / "recordings", Path(name) / "scores"
        folder.mkdir()
        for file_name, data in every_format().items():
            (folder / file_name).write_bytes(data)
        words = ["--input", str(folder), "--out", str(out), "--num_cpus", "0", "--no_report", "--tolerate_failures"]
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            score(words)
        scores = pd.read_parquet(out / "predictions.parquet")
        rows = [row_of(Path(path)) for path in scores["speech"]]
    unanswered = scores["predicted"].isna() & (scores["status"] != "ok")
    failed = [Path(path).name for path in scores.loc[unanswered, "speech"]]
    return pd.DataFrame(rows).drop_duplicates().sort_values(["ending", "container", "codec", "rate_hz"]), failed


def row_of(path: Path) -> dict[str, object]:
    """The row of one recording in the table."""
    info = audio.probe(path)
    return {
        "ending": path.suffix,
        "container": info.container,
        "codec": info.codec,
        "rate_hz": info.sample_rate_hz,
        "channels": info.channels,
        "reader": "libsndfile" if info.codec.isupper() else "FFmpeg",
        "seconds": f"{info.duration_s:.2f}",
    }


def main() -> int:
    """Measure, print or write; 1 when a recording has no answer."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write docs/formats.md")
    arguments = parser.parse_args()
    table, failed = measure()
    lines = ["| " + " | ".join(map(str, row)) + " |" for row in table.itertuples(index=False)]
    endings = ", ".join(sorted(f"`{ending}`" for ending in audio.EXTENSIONS))
    page = HEAD.format(endings=endings) + "\n".join(lines) + "\n"
    if arguments.write:
        OUT.write_text(page, encoding="utf-8")
    print(page if not arguments.write else f"{OUT}: {len(table)} formats")
    for name in failed:
        print(f"no answer: {name}")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
