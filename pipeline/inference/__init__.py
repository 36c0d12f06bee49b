"""A bundle and a recording to answers: the one path from audio to probabilities, over time, and explained.

Not here: whole manifests (``scoring``), and HTTP (``serve``).
"""
