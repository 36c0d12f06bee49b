"""Figures to pages: report, comparison and protocols as HTML, drawings, and text for a terminal.

Not here: the figures themselves (``evaluation``).
"""
