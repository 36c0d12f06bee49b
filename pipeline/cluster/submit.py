"""Submits commands as Ray jobs over HTTP to a cluster's dashboard, follows and stops them; creates Ray's token.

Requests carry the token. Ray stores uploads by their content: an unchanged folder is uploaded only once.

Ray's authentication token: anybody who has it can run code on the cluster, so only its owner may read it. Ray takes the
token from ``RAY_AUTH_TOKEN``, else from the file ``RAY_AUTH_TOKEN_PATH``, else from ``~/.ray/auth_token``, and would
create that file readable by everybody. So it is created here first, with mode 0600. The token authenticates but does
not encrypt. The token functions do not import Ray, because the environment must be set before Ray is imported.
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.cluster.ray_internals import TALKATIVE
from pipeline.storage.errors import SerError

_MODE, _TOKEN, _PATH = "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"


def token_file() -> Path:
    """Path of the token's file, used if the token is not in the environment."""
    return Path(os.environ.get(_PATH) or Path.home() / ".ray" / "auth_token")


def make_token() -> None:
    """Create a token of 256 bits unless there is one; make an existing file readable by its owner only.

    Does nothing if authentication was switched off (``RAY_AUTH_MODE=disabled``), or if the home folder cannot be
    written: Ray then reports that itself.
    """
    if os.environ.get(_TOKEN) or os.environ.get(_MODE, "token").lower() != "token":
        return
    path = token_file()
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="ascii") as file:
            file.write(secrets.token_hex(32))
    except FileExistsError:
        keep_private(path)
    except OSError:
        return


def keep_private(path: Path) -> None:
    """Make a file accessible by its owner only, if that is permitted."""
    try:
        if path.stat().st_mode & 0o077:
            path.chmod(0o600)
    except OSError:
        return


def use_token() -> bool:
    """Make Ray, when imported later, send the token to the cluster it joins. Returns whether there is a token.

    A mode set in the environment is kept. A cluster without authentication ignores the token.
    """
    found = bool(os.environ.get(_TOKEN)) or token_file().is_file()
    if found:
        os.environ.setdefault(_MODE, "token")
    return found


DEFAULT_ADDRESS = "http://127.0.0.1:8265"
_API, _ADDRESS = "RAY_API_SERVER_ADDRESS", "RAY_ADDRESS"
# Stopping a job sends SIGINT (Ctrl-C) to its command, which has a minute to print how to continue, and to end.
_STOP = {"RAY_JOB_STOP_SIGNAL": "SIGINT", "RAY_JOB_STOP_WAIT_TIME_S": "60"}


class ClusterError(SerError):
    """A cluster does not answer, or refuses a request."""


@dataclass(frozen=True)
class JobState:
    """State of a job: ``state`` is Ray's word for it; ``exit_code`` of its command, None if there is none (yet)."""

    state: str
    exit_code: int | None
    message: str

    @property
    def ended(self) -> bool:
        """Whether the job has ended."""
        return self.state in ("SUCCEEDED", "FAILED", "STOPPED")


def new_name(job: str) -> str:
    """A unique name for a run of ``job``."""
    return f"ser-{job}-{time.strftime('%m%d-%H%M%S')}-{secrets.token_hex(2)}"


@contextmanager
def _failing(what: str) -> Iterator[None]:
    """Errors of Ray, of requests and of aiohttp become a ClusterError."""
    try:
        yield
    except Exception as error:
        raise ClusterError(f"{what}: {_first_line(error)}") from error


class JobClient:
    """Access to a cluster's jobs. ``client`` is a ``ray.job_submission.JobSubmissionClient``."""

    def __init__(self, client: Any, address: str) -> None:
        self._client, self.address = client, address

    def submit(self, command: str, folder: Path, *, name: str, environment: Mapping[str, str]) -> str:
        """Upload ``folder``, start ``command`` in it under the unique ``name``, which is returned."""
        settings = {"working_dir": str(folder), "env_vars": {**_STOP, **environment}}
        with _failing(f"{self.address} did not accept the job"):
            return str(self._client.submit_job(entrypoint=command, submission_id=name, runtime_env=settings))

    def state(self, name: str) -> JobState:
        """The job's current state. Raises ClusterError if there is no answer."""
        with _failing(f"{self.address} does not report on {name}"):
            info = self._client.get_job_info(name)
        return JobState(str(getattr(info.status, "value", info.status)), info.driver_exit_code, info.message or "")

    def log(self, name: str) -> Iterator[str]:
        """The job's output from its beginning, in pieces as they arrive, to its end. Raises ClusterError."""
        lines = self._client.tail_job_logs(name)
        with asyncio.Runner() as runner:  # on Ctrl-C it cancels the waiting call
            while True:
                with _failing(f"connection to {self.address} was lost"):
                    text = runner.run(_next(lines))
                if text is None:
                    return
                yield text

    def stop(self, name: str) -> None:
        """Ask the job's command to end, as with Ctrl-C. Raises ClusterError if there is no answer."""
        with _failing(f"{self.address} did not stop {name}"):
            self._client.stop_job(name)


def connect(address: str | None = None) -> JobClient:
    """Connect to the cluster at ``address``; default: the address in the environment, else ``DEFAULT_ADDRESS``.

    Raises:
        ClusterError: no answer, or the token is missing or wrong.
    """
    where = address or os.environ.get(_API) or os.environ.get(_ADDRESS) or DEFAULT_ADDRESS
    os.environ[_API] = where  # for Ray's client, the environment overrides its argument
    known = use_token()
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    for name in TALKATIVE:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        return JobClient(JobSubmissionClient(where), where)
    except AuthenticationError as error:
        what = "rejects this machine's token" if known else "requires a token"
        raise ClusterError(f"{where} {what}; copy ~/.ray/auth_token from the cluster's head here, mode 600") from error
    except Exception as error:  # ConnectionError, RuntimeError, and errors of requests
        raise ClusterError(
            f"no Ray cluster answers at {where} ({_first_line(error)}); start one (docs/cluster.md), or give --address"
        ) from error


async def _next(lines: AsyncIterator[str]) -> str | None:
    """The next piece of output; None after the last."""
    return await anext(lines, None)


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
