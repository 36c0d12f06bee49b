"""From features to a trained bundle: data, losses, training loop, the run's folder, Ray workers, cross-validation.

Not here: the networks (``models``) and predictions for a whole manifest (``scoring``).

Start with: ``config.FitConfig``, ``loop.fit``, ``on_ray.train_on_ray``, ``cross_validation.train_folds``,
``adapt.judge``.
"""
