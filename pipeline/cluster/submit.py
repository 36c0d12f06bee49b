"""Commands as Ray jobs: submitted over HTTP to a cluster's dashboard, followed, stopped; failures in one line.

The token (``pipeline.cluster.submit``) goes along. Uploads are kept by their content: the same folder is uploaded
once.

Ray's authentication token: whoever holds it can run code on the cluster, so only its owner may read it.

Ray takes the token from ``RAY_AUTH_TOKEN``, else from the file ``RAY_AUTH_TOKEN_PATH``, else from
``~/.ray/auth_token``, and writes that file readable by everybody. Here it is made before Ray would, with mode 0600. The
token authenticates; it encrypts nothing. Ray itself is not imported: this must be in the environment before it is.
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.cluster.ray_internals import TALKATIVE
from pipeline.storage.errors import SerError

_MODE, _TOKEN, _PATH = "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"


def token_file() -> Path:
    """Where the token is, when it is not in the environment itself."""
    return Path(os.environ.get(_PATH) or Path.home() / ".ray" / "auth_token")


def make_token() -> None:
    """Make a token of 256 bits unless there is one; take an existing file from all but its owner.

    Does nothing where authentication was switched off on purpose (``RAY_AUTH_MODE=disabled``), or the home folder
    cannot be written: Ray then says so itself.
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
    """Take a file's permissions from all but its owner, where that is allowed."""
    try:
        if path.stat().st_mode & 0o077:
            path.chmod(0o600)
    except OSError:
        return


def use_token() -> bool:
    """Have a Ray that is imported later send the token to the cluster it joins; whether there is one.

    A mode that was set in the environment stays. A cluster without authentication takes no notice of a token.
    """
    found = bool(os.environ.get(_TOKEN)) or token_file().is_file()
    if found:
        os.environ.setdefault(_MODE, "token")
    return found


DEFAULT_ADDRESS = "http://127.0.0.1:8265"
_API, _ADDRESS = "RAY_API_SERVER_ADDRESS", "RAY_ADDRESS"
# Stopping a job is Ctrl-C to its command, which then says how to go on, and has a minute for it.
_STOP = {"RAY_JOB_STOP_SIGNAL": "SIGINT", "RAY_JOB_STOP_WAIT_TIME_S": "60"}


class ClusterError(SerError):
    """A cluster that does not answer, or refuses."""


@dataclass(frozen=True)
class JobState:
    """Where a job is: ``state`` as Ray says it, ``exit_code`` of its command, None when it has none (yet)."""

    state: str
    exit_code: int | None
    message: str

    @property
    def ended(self) -> bool:
        """Whether nothing more will happen."""
        return self.state in ("SUCCEEDED", "FAILED", "STOPPED")


def new_name(job: str) -> str:
    """A name for a run of ``job`` that no other one has."""
    return f"ser-{job}-{time.strftime('%m%d-%H%M%S')}-{secrets.token_hex(2)}"


class JobClient:
    """A cluster's jobs. ``client`` is a ``ray.job_submission.JobSubmissionClient``."""

    def __init__(self, client: Any, address: str) -> None:
        self._client, self.address = client, address

    def submit(self, command: str, folder: Path, *, name: str, environment: Mapping[str, str]) -> str:
        """Upload ``folder`` and start ``command`` in it, under a ``name`` that no other job has; returns that name.

        Raises:
            ClusterError: the cluster refused.
        """
        settings = {"working_dir": str(folder), "env_vars": {**_STOP, **environment}}
        try:
            return str(self._client.submit_job(entrypoint=command, submission_id=name, runtime_env=settings))
        except Exception as error:  # Ray raises RuntimeError, ValueError and those of requests
            raise ClusterError(f"{self.address} did not take the job: {_first_line(error)}") from error

    def state(self, name: str) -> JobState:
        """Where the job is.

        Raises:
            ClusterError: no answer.
        """
        try:
            info = self._client.get_job_info(name)
        except Exception as error:
            raise ClusterError(f"{self.address} does not tell about {name}: {_first_line(error)}") from error
        return JobState(str(getattr(info.status, "value", info.status)), info.driver_exit_code, info.message or "")

    def log(self, name: str) -> Iterator[str]:
        """The job's output from its beginning, as it comes, until the job has ended.

        Raises:
            ClusterError: the connection was lost.
        """
        lines = self._client.tail_job_logs(name)
        with asyncio.Runner() as runner:  # whose Ctrl-C cancels what is waited for
            while True:
                try:
                    text = runner.run(_next(lines))
                except Exception as error:  # of Ray and of aiohttp
                    raise ClusterError(f"{self.address} was lost: {_first_line(error)}") from error
                if text is None:
                    return
                yield text

    def stop(self, name: str) -> None:
        """Ask the job's command to end, as Ctrl-C would.

        Raises:
            ClusterError: no answer.
        """
        try:
            self._client.stop_job(name)
        except Exception as error:
            raise ClusterError(f"{self.address} did not stop {name}: {_first_line(error)}") from error


def connect(address: str | None = None) -> JobClient:
    """The jobs of the cluster at ``address``, by default where the environment says.

    Raises:
        ClusterError: nobody answers, or the token is missing or wrong.
    """
    where = address or os.environ.get(_API) or os.environ.get(_ADDRESS) or DEFAULT_ADDRESS
    os.environ[_API] = where  # Ray's client believes the environment more than its argument
    known = use_token()
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    for name in TALKATIVE:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        return JobClient(JobSubmissionClient(where), where)
    except AuthenticationError as error:
        what = "does not know our token" if known else "wants a token"
        raise ClusterError(f"{where} {what}; copy ~/.ray/auth_token from the cluster's head here, mode 600") from error
    except Exception as error:  # ConnectionError, RuntimeError, those of requests
        raise ClusterError(
            f"no Ray cluster answers at {where} ({_first_line(error)}); start one (docs/cluster.md), or give --address"
        ) from error


async def _next(lines: AsyncIterator[str]) -> str | None:
    """The next piece, None after the last."""
    return await anext(lines, None)


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
