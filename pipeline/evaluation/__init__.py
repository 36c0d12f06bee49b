"""Answers to figures: metrics with intervals, breakdowns, hints, comparisons, the verdict. No drawing, no pages.

Not here: pages and pictures of the figures (``reporting``), and temperature scaling (``models``).
"""
