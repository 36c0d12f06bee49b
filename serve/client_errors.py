"""What can go wrong when the service is asked: one exception a remedy.

ClientError
├── Refused               the service answered with a problem; ``code`` is stable, ``status`` is HTTP's (404: no such
│   │                     model or address)
│   ├── BadRecording      this recording cannot be used (400, 413, 415, 422; 503 decode_timeout): another one may
│   ├── WrongKey          401, 403: give the service's key
│   ├── Busy              429, 503, after the retries: try again later
│   └── ServiceFault      500, or an answer that is none of ours
├── Unreachable           no connection: is the service running?
└── NoAnswer              connected, but no answer within the timeout
"""

# ruff: noqa: D101 - the tree above says what each is

from __future__ import annotations

from serve.schema import Problem

FOREIGN = "foreign_answer"
"""The code of answers that are none of the service's."""


class ClientError(Exception):
    """``str()`` is one sentence for people."""


class Refused(ClientError):
    def __init__(self, problem: Problem) -> None:
        super().__init__(problem.detail)
        self.problem = problem

    @property
    def code(self) -> str:
        """Stable, snake_case."""
        return self.problem.code

    @property
    def status(self) -> int:
        """HTTP status."""
        return self.problem.status


class BadRecording(Refused):
    pass


class WrongKey(Refused):
    pass


class Busy(Refused):
    pass


class ServiceFault(Refused):
    pass


class Unreachable(ClientError):
    pass


class NoAnswer(ClientError):
    pass


def refused(problem: Problem) -> Refused:
    """The exception for a problem."""
    if problem.status in (401, 403):
        return WrongKey(problem)
    if problem.code == "decode_timeout":  # a 503 that would be the same again
        return BadRecording(problem)
    if problem.status in (429, 503):
        return Busy(problem)
    if problem.status >= 500 or problem.code == FOREIGN:
        return ServiceFault(problem)
    if problem.status in (404, 405):
        return Refused(problem)
    return BadRecording(problem)
