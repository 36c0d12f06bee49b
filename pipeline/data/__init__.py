"""What is learnt from: the known corpora (``corpora``), and folders of recordings as manifest tables (``folder``).

Reading audio and making features of it is elsewhere.
"""
