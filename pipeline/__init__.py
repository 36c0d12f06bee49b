"""Speech emotion recognition: audio in, emotion probabilities and reports out. No command line, no HTTP."""

__version__ = "0.2.0"
