"""From a recording and a bundle to predictions: for one window, for all windows over time, and with an explanation.

Not here: whole manifests (``scoring``), and HTTP (``serve``).

Start with: ``predictor.Predictor``, ``predictor.ScoreOptions``, ``timeline.Timeline``, ``explain.Picture``.
"""
