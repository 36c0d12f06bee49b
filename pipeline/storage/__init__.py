"""Files and addresses: scanned, fetched, locked, written whole or not at all, and the journal of a job.

Not here: what the bytes mean (``audio``), and tables of recordings (``data``).
"""
