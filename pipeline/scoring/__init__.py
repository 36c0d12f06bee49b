"""A manifest to tables of answers: in blocks, here or on a cluster, resumed, one row a recording always.

Not here: one recording's answer (``inference``), and how a model came to be (``training``).
"""

AUDACITY = "audacity"  # a folder of label tracks
FORMATS = ("jsonl", AUDACITY)  # of exports
