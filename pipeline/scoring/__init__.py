"""Scores a manifest into tables of predictions: in blocks, on one machine or a cluster, resumable, one row a recording.

Not here: the prediction for one recording (``inference``), and training (``training``).

Start with: ``scoring.score_manifest``, ``predictions.read_predictions``.
"""

AUDACITY = "audacity"  # a folder of label tracks
FORMATS = ("jsonl", AUDACITY)  # export formats
