"""Networks by name and the bundle on disk that holds one: weights, labels, features, card, ONNX, temperature.

Not here: training them (``training``), and recordings in, probabilities out (``inference``).
"""
