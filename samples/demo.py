"""``make demo``: score the sample clips, or a folder of your own, and show a small table and where the report is.

    python samples/demo.py --out demo_report [--data FOLDER_OR_CSV] [further options of jobs.score]

A second run replaces what the first one wrote.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from jobs import score
from pipeline.scoring.predictions import PARQUET

SAMPLES = Path(__file__).resolve().parent / "metadata.csv"
SHOWN_ROWS = 20
SYNTHETIC = (
    "These clips are synthetic speech: espeak-ng spoke them, nobody felt anything. Their labels are the style that the "
    "synthesiser was set to, not a truth: they show that the machinery works, not how well the model hears people."
)
OWN = "Your own recordings: make demo DATA=/path/to/folder"


def small_table(predictions: pd.DataFrame) -> str:
    """File, label where there are any, answer and confidence; at most ``SHOWN_ROWS`` rows, and how many more."""
    shown = predictions.head(SHOWN_ROWS)
    read = shown["status"] == "ok"
    columns = {"recording": [Path(str(path)).name.replace("\n", "\\n") for path in shown["speech"]]}
    if "label_name" in shown:
        columns["label"] = shown["label_name"].fillna("-").tolist()
    columns["answer"] = shown["predicted"].where(read, "-").tolist()
    columns["confidence"] = (
        shown["confidence"].map("{:.0%}".format, na_action="ignore").fillna("").where(read, shown["status"]).tolist()
    )
    widths = [max(map(len, [name, *cells])) for name, cells in columns.items()]
    rows = [tuple(columns), *zip(*columns.values(), strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    more = len(predictions) - SHOWN_ROWS
    return "\n".join([*lines, *([f"... and {more:,} more"] if more > 0 else [])])


def main(argv: Sequence[str] | None = None) -> int:
    """Score, then print; the exit code is that of jobs.score."""
    parser = argparse.ArgumentParser(description="Score samples/ or your own recordings, and show what came of it.")
    parser.add_argument("--out", type=Path, default=Path("demo_report"), help="folder of the report (replaced)")
    parser.add_argument("--data", type=Path, help="your folder or CSV of recordings (default: the sample clips)")
    arguments, further = parser.parse_known_args(argv)
    options = ["--input", str(arguments.data or SAMPLES), "--out", str(arguments.out), "--overwrite"]
    if arguments.data is None:
        options += ["--note", SYNTHETIC, "--num_cpus", "0"]  # a dozen clips: starting Ray takes longer than they do
    with contextlib.redirect_stdout(io.StringIO()):  # the figures stay in the report: the table below is the small one
        code = score.main([*options, "--tolerate_failures", *further])
    if code:
        return code
    predictions = pd.read_parquet(arguments.out / PARQUET)
    print(f"\n{small_table(predictions)}\n")
    if arguments.data is None:
        print(f"{textwrap.fill(SYNTHETIC, 100)}\n{OWN}\n")
    print(f"Report: {(arguments.out / 'report.html').resolve()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
