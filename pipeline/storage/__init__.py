"""Files and URLs: folder scans, downloads, locks, atomic writes, and the journal of a job.

Not here: decoding of audio (``audio``), and tables of recordings (``data``).

Start with: ``errors.SerError``, ``journal.atomic_path``, ``journal.locked``, ``files.scan``.
"""
