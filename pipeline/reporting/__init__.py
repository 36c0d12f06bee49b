"""Shows figures: report, comparison and protocols as HTML pages, drawings, and text for a terminal.

Not here: computing the figures (``evaluation``).

Start with: ``report.write_report``, ``report.write_comparison``, ``figures.drawings``.
"""

REPORT_TABLES = (
    "verdict per_class confusion_counts confusion_normalised breakdowns reliability risk_coverage mistakes failures"
)
REPORT_FIGURES = "confusion_matrix per_class reliability risk_coverage"
REPORT = (  # the files of a report
    *(f"{name}.csv" for name in REPORT_TABLES.split()),
    *(f"{name}.{form}" for name in REPORT_FIGURES.split() for form in ("png", "svg")),
    "metrics.json",
    "report.html",
)
