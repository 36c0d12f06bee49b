"""Tables of recordings: manifests, labels, known corpora, splits and folds, CSV files that are safe to open.

Not here: decoding (``audio``), and figures over answers (``evaluation``).
"""
