"""Samples to features: log-mel pictures and frame vectors, extracted into shards and read back.

Not here: changes made while training (``training.augment``).
"""
