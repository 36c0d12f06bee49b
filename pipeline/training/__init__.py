"""From features to a trained bundle: data, losses, training loop, the run's folder, Ray workers, cross-validation.

Not here: the networks (``models``) and predictions for a whole manifest (``scoring``).
"""
