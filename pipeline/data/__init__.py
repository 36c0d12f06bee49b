"""Tables of recordings: manifests, labels, known corpora, splits and folds, and safe CSV files.

Not here: decoding (``audio``), and metrics over predictions (``evaluation``).

Start with: ``manifest.scan_folder``, ``manifest.read_manifest``, ``labels.LabelSet``, ``splits.split_table``,
``corpora.CORPORA``.
"""
