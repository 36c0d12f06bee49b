"""Follows a job on a cluster from a terminal: prints its log, handles Ctrl-C, returns the exit code of its command."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

from jobs._common import EXIT_INTERRUPTED, EXIT_OURS, say
from pipeline.cluster.submit import ClusterError, JobClient, JobState

Sleep = Callable[[float], None]
_PATIENCE_S = 60.0
_LOOK_S = 0.5
_SECOND_S = 5.0


def follow(client: JobClient, name: str, *, sleep: Sleep = time.sleep, patience_s: float = _PATIENCE_S) -> int:
    """Print the job's output until it ends; returns the exit code of its command.

    Ctrl-C leaves the job running and prints how to stop it; a second Ctrl-C within 5 seconds stops it. After a lost
    connection the cluster is tried again for ``patience_s`` seconds; then ClusterError is raised.
    """
    try:
        return _exit_code(name, _watch(client, name, sleep, patience_s))
    except KeyboardInterrupt:
        say(f"{name} keeps running; its log: ray job logs --follow {name}; to stop it: ray job stop {name}")
        say(f"press Ctrl-C again within {_SECOND_S:.0f} s to stop it now")
    try:
        sleep(_SECOND_S)
    except KeyboardInterrupt:
        client.stop(name)
        say(f"stopping {name}; run the same command again to continue where it stopped")
    return EXIT_INTERRUPTED


def _watch(client: JobClient, name: str, sleep: Sleep, patience_s: float) -> JobState:
    """Print the job's log as it grows, until the job has ended."""
    printed, left_s = 0, patience_s
    while True:
        try:
            seen = 0
            for text in client.log(name):  # from its beginning each time: skip what is printed already
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
                    f"{error}; when the cluster is back, run: ray job status {name}; if it does not know the job, "
                    "run the same command again: it continues where it stopped"
                ) from error
        sleep(_LOOK_S)
        left_s -= _LOOK_S


def _exit_code(name: str, state: JobState) -> int:
    if state.state == "STOPPED":
        say(f"{name} was stopped; run the same command again to continue where it stopped")
        return EXIT_INTERRUPTED
    if state.exit_code is None:  # the command never ran, or its node is lost
        reason = next((line.strip() for line in reversed(state.message.splitlines()) if line.strip()), state.state)
        say(
            f"error: {name} ended without an exit code: {reason}; run the same command again to continue where it "
            "stopped"
        )
        return EXIT_OURS
    say(f"{name}: exit code {state.exit_code}")
    return state.exit_code if state.exit_code >= 0 else 128 - state.exit_code
