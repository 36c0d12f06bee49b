"""Command-line jobs: each module parses its options, calls ``pipeline``, prints, and returns an exit code."""
