"""Whether the terminal that a command was started in is still there."""

from __future__ import annotations

import os


class Terminal:
    """The standard descriptors that are a terminal's now; there may be none."""

    def __init__(self) -> None:
        self._descriptors = [descriptor for descriptor in (0, 1, 2) if os.isatty(descriptor)]

    def left(self) -> bool:
        """Whether there was one that has gone; if so, what is written to it from now on goes nowhere."""
        if not self._descriptors or any(map(os.isatty, self._descriptors)):
            return False
        nowhere = os.open(os.devnull, os.O_RDWR)
        for descriptor in self._descriptors:  # writing to them would be an error
            os.dup2(nowhere, descriptor)
        return True
