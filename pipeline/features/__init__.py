"""Samples to features: log-mel spectrograms and frame vectors, extracted into shards and read back.

Not here: augmentation during training (``training.augment``).

Start with: ``features.FeatureConfig``, ``features.extract``, ``extract.extract_shards``, ``store.load_features``.
"""
