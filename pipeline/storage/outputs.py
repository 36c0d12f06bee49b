"""The names of what a scoring run leaves in its folder: tables, report, exports, and the record that closes it."""

from __future__ import annotations

RUN = "run.json"
AUDACITY = "audacity"  # a folder of label tracks
FORMATS = ("jsonl", AUDACITY)  # of exports
TABLES = ("predictions", "segments", "channels", "timeline")
REPORT_TABLES = (
    "verdict per_class confusion_counts confusion_normalised breakdowns reliability risk_coverage mistakes failures"
)
REPORT_FIGURES = "confusion_matrix per_class reliability risk_coverage"
REPORT = (
    *(f"{name}.csv" for name in REPORT_TABLES.split()),
    *(f"{name}.{form}" for name in REPORT_FIGURES.split() for form in ("png", "svg")),
    "metrics.json",
    "report.html",
)
OUTPUTS = (RUN, *(f"{t}.{form}" for t in TABLES for form in ("parquet", "csv", "jsonl")), AUDACITY, *REPORT)
