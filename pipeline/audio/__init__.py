"""Bytes to samples: every format read by one door, what is refused and why, and which windows are cut out.

Not here: features of the samples (``features``), and where files come from (``storage``).
"""
