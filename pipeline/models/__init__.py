"""Networks by name, and the bundle on disk that holds one: weights, labels, features, model card, ONNX, temperature.

Not here: training (``training``), and predictions for recordings (``inference``).

Start with: ``bundle.load_bundle``, ``bundle.save_bundle``, ``networks.build_model``, ``backends.open_backend``.
"""
