"""From predictions to figures: metrics with intervals, breakdowns, hints, comparisons, the verdict.

Not here: report pages and drawings (``reporting``), and temperature scaling (``models``).

Start with: ``metrics.evaluate``, ``verdict.Targets``, ``compare.compare``, ``leaks.describe``.
"""
