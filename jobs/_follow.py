"""Following a job on a cluster from a terminal: its log as it comes, Ctrl-C, and the exit code of its command."""

from __future__ import annotations

import sys
import time
from typing import Protocol

from jobs._common import EXIT_INTERRUPTED, EXIT_OURS, say
from pipeline.cluster.submit import ClusterError, JobClient, JobState

_PATIENCE_S = 60.0
_LOOK_S = 0.5
_SECOND_S = 5.0


class _Clock(Protocol):
    def __call__(self, seconds: float, /) -> None: ...


def follow(client: JobClient, name: str, *, sleep: _Clock = time.sleep, patience_s: float = _PATIENCE_S) -> int:
    """Print the job's output until it ends; returns the exit code of its command.

    Ctrl-C leaves the job alone and says how to stop it; a second one, within some seconds, stops it. A connection that
    is lost is tried again for ``patience_s`` seconds.

    Raises:
        ClusterError: the cluster does not come back.
    """
    try:
        return _exit_code(name, _watch(client, name, sleep, patience_s))
    except KeyboardInterrupt:
        say(f"{name} goes on without this terminal; see it: ray job logs --follow {name}; stop it: ray job stop {name}")
        say(f"Ctrl-C again within {_SECOND_S:.0f} s stops it now")
    try:
        sleep(_SECOND_S)
    except KeyboardInterrupt:
        client.stop(name)
        say(f"{name} is told to stop; the same command again goes on where it stopped")
    return EXIT_INTERRUPTED


def _watch(client: JobClient, name: str, sleep: _Clock, patience_s: float) -> JobState:
    """Print what comes, until the job has ended."""
    printed, left_s = 0, patience_s
    while True:
        try:
            seen = 0
            for text in client.log(name):  # from its beginning each time: what is on the terminal already is left out
                fresh = text[max(0, printed - seen) :]
                seen += len(text)
                printed = max(printed, seen)
                left_s = patience_s
                sys.stdout.write(fresh)
                sys.stdout.flush()
            state = client.state(name)
            if state.ended:
                return state
        except ClusterError as error:
            if left_s <= 0:
                raise ClusterError(
                    f"{error}; when the cluster is back, look with: ray job status {name}; if it does not know "
                    "the job, give the same command again: it goes on where it stopped"
                ) from error
        sleep(_LOOK_S)
        left_s -= _LOOK_S


def _exit_code(name: str, state: JobState) -> int:
    if state.state == "STOPPED":
        say(f"{name} was stopped; the same command again goes on where it stopped")
        return EXIT_INTERRUPTED
    if state.exit_code is None:  # its command never ran, or the node it ran on is gone
        reason = next((line.strip() for line in reversed(state.message.splitlines()) if line.strip()), state.state)
        say(f"error: {name} ended without an exit code: {reason}; the same command again goes on where it stopped")
        return EXIT_OURS
    say(f"{name}: exit code {state.exit_code}")
    return state.exit_code if state.exit_code >= 0 else 128 - state.exit_code
