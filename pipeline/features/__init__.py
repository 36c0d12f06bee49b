"""Samples to features: log-mel spectrograms and frame vectors, extracted into shards and read back.

Not here: augmentation during training (``training.augment``).
"""
