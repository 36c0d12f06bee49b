"""Checks whether the terminal that a command was started in is still open."""

from __future__ import annotations

import os


class Terminal:
    """Those of stdin, stdout and stderr that are a terminal at the start; there may be none."""

    def __init__(self) -> None:
        self._descriptors = [descriptor for descriptor in (0, 1, 2) if os.isatty(descriptor)]

    def left(self) -> bool:
        """Whether there was a terminal and it has been closed; if so, later output is discarded."""
        if not self._descriptors or any(map(os.isatty, self._descriptors)):
            return False
        nowhere = os.open(os.devnull, os.O_RDWR)
        for descriptor in self._descriptors:  # writing to them would raise an error
            os.dup2(nowhere, descriptor)
        return True
