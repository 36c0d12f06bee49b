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
    parser.add_argument("--data", type=Path, help="your folder or CSV of recordings (default: the sample clips)")
    arguments, further = parser.parse_known_args(argv)
    try:
        source = unlabelled(arguments.out) if arguments.data is None else arguments.data
    except OSError as error:
        print(f"error: cannot write into {arguments.out}: {error.strerror}; choose another --out", file=sys.stderr)
        return 2
    options = ["--input", str(source), "--out", str(arguments.out), "--overwrite"]
    if arguments.data is None:
        options += ["--note", SYNTHETIC, "--engine", "local"]
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
