"""Features to a bundle: the loop, its data and losses, the run's folder, several workers, folds side by side.

Not here: the networks (``models``), and answers about a manifest (``scoring``); the two never meet.
"""
