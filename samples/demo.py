"""``make demo``: score a few recordings, or a folder of your own, and show a small table and where the report is.

    python samples/demo.py --out demo_report [--data FOLDER_OR_CSV] [further options of jobs.score]

Without ``--data`` it fetches 16 recordings of RAVDESS, of two actors that the shipped model was not trained on, out of
the archive in the public record (some 8 MB of its 200); without a network it takes the synthetic clips of this folder.
A second run replaces what the first one wrote, and fetches nothing again.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlsplit

import pandas as pd

from jobs import score
from jobs.ravdess import ARCHIVE, BASE_URL, NOTICE, NOTICE_FILE
from pipeline.scoring.predictions import PARQUET
from pipeline.storage.journal import atomic_path

SAMPLES = Path(__file__).resolve().parent / "metadata.csv"
SHOWN_ROWS = 20
EMOTIONS = ("neutral", "calm", "happy", "sad", "angry", "fearful", "disgust", "surprised")  # 01 to 08 in file names
VOICES = tuple(f"Actor_{a}/03-01-{e:02}-01-01-01-{a}.wav" for a in (18, 19) for e in range(1, 9))
TIMEOUT_S = 10.0
PEOPLE = "Two actors of RAVDESS whom the shipped model was not trained on: 16 recordings, too few for a figure."
SYNTHETIC = (
    "These clips are synthetic speech: espeak-ng spoke them, nobody felt anything. The style is what the synthesiser "
    "was set to, not a label: the clips show that everything runs, not how well the model does with people."
)
OWN = "Your own recordings: make demo DATA=/path/to/folder"


def small_table(predictions: pd.DataFrame) -> str:
    """File, label or style where there is one, answer and confidence; ``SHOWN_ROWS`` at most, and how many more."""
    shown = predictions.head(SHOWN_ROWS)
    read = shown["status"] == "ok"
    columns = {"recording": [Path(str(path)).name.replace("\n", "\\n") for path in shown["speech"]]}
    for column, heading in (("label_name", "label"), ("style", "style")):
        if column in shown:
            columns[heading] = shown[column].fillna("-").tolist()
    columns["answer"] = shown["predicted"].where(read, "-").tolist()
    columns["confidence"] = (
        shown["confidence"].map("{:.0%}".format, na_action="ignore").fillna("").where(read, shown["status"]).tolist()
    )
    widths = [max(map(len, [name, *cells])) for name, cells in columns.items()]
    rows = [tuple(columns), *zip(*columns.values(), strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    more = len(predictions) - SHOWN_ROWS
    return "\n".join([*lines, *([f"... and {more:,} more"] if more > 0 else [])])


def two_voices(url: str, out: Path) -> Path | None:
    """The 16 recordings as a labelled CSV in ``out``; None, said in one line, when they cannot be had.

    Raises:
        OSError: ``out`` cannot be written.
    """
    folder = out / "ravdess"
    missing = [name for name in VOICES if not (folder / Path(name).name).is_file()]
    folder.mkdir(parents=True, exist_ok=True)
    if missing:
        from remotezip import RemoteZip

        try:
            with RemoteZip(url, timeout=TIMEOUT_S) as archive:
                for done, name in enumerate(missing):
                    print(f"fetching recordings of two actors: {done}/{len(missing)}", end="\r", file=sys.stderr)
                    content = archive.read(name)  # zipfile checks the CRC
                    with atomic_path(folder / Path(name).name) as beside:
                        beside.write_bytes(content)
        except OSError as error:
            if error.filename is not None:  # of this machine; those of the network have none
                raise
            return _not_fetched(url, error)
        except Exception as error:  # remotezip, requests, urllib3 and zipfile have classes of their own
            return _not_fetched(url, error)
        (folder / NOTICE_FILE).write_text(NOTICE, encoding="utf-8")
        print(f"fetched {len(missing)} recordings of RAVDESS (CC BY-NC-SA 4.0) to {folder}", file=sys.stderr)
    table = pd.DataFrame(
        {
            "speech": [str((folder / Path(name).name).resolve()) for name in VOICES],
            "label": [EMOTIONS[int(Path(name).name[6:8]) - 1] for name in VOICES],
            "speaker": [f"RAVDESS_{name[6:8]}" for name in VOICES],
        }
    )
    table.to_csv(out / "clips.csv", index=False)
    return out / "clips.csv"


def _not_fetched(url: str, error: Exception) -> None:
    reason = (str(error).splitlines() or [""])[0]
    if not 0 < len(reason) <= 60:  # requests puts whole objects and addresses into its messages
        reason = type(error).__name__
    print(
        f"cannot download the recordings of two actors from {urlsplit(url).netloc} ({reason}); using synthetic clips",
        file=sys.stderr,
    )


def unlabelled(out: Path) -> Path:
    """The sample clips as a CSV in ``out``, their styles as a column that is no label."""
    table = pd.read_csv(SAMPLES).rename(columns={"label": "style"})
    table["speech"] = [str(SAMPLES.parent / name) for name in table["speech"]]
    out.mkdir(parents=True, exist_ok=True)
    table.to_csv(out / "clips.csv", index=False)
    return out / "clips.csv"


def main(argv: Sequence[str] | None = None) -> int:
    """Score, then print; the exit code is that of jobs.score."""
    parser = argparse.ArgumentParser(description="Score samples/ or your own recordings, and show what came of it.")
    parser.add_argument("--out", type=Path, default=Path("demo_report"), help="folder of the report (replaced)")
    parser.add_argument("--data", type=Path, help="your folder or CSV of recordings (default: those of two actors)")
    parser.add_argument("--base_url", default=BASE_URL, help=f"where {ARCHIVE} lies (default: the public record)")
    arguments, further = parser.parse_known_args(argv)
    note = None
    try:
        source = arguments.data
        if source is None:
            source, note = two_voices(f"{arguments.base_url}/{ARCHIVE}", arguments.out), PEOPLE
        if source is None:
            source, note = unlabelled(arguments.out), SYNTHETIC
    except OSError as error:
        print(f"error: cannot write into {arguments.out}: {error.strerror}; choose another --out", file=sys.stderr)
        return 2
    options = ["--input", str(source), "--out", str(arguments.out), "--overwrite"]
    if note is not None:
        options += ["--note", note, "--engine", "local"]
    with contextlib.redirect_stdout(io.StringIO()):  # the figures stay in the report: the table below is the small one
        code = score.main([*options, "--tolerate_failures", *further])
    if code:
        return code
    predictions = pd.read_parquet(arguments.out / PARQUET)
    print(f"\n{small_table(predictions)}\n")
    if note is not None:
        print(f"{textwrap.fill(note, 100)}\n{OWN}\n")
    print(f"Report: {(arguments.out / 'report.html').resolve()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
