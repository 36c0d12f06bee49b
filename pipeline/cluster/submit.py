"""Commands as Ray jobs: submitted over HTTP to a cluster's dashboard, followed, stopped; failures in one line.

The token (``pipeline.cluster.ray_token``) goes along. Uploads are kept by their content: the same folder is uploaded
once.
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

from pipeline.cluster.ray_token import use_token
from pipeline.storage.errors import SerError

DEFAULT_ADDRESS = "http://127.0.0.1:8265"
_API, _ADDRESS = "RAY_API_SERVER_ADDRESS", "RAY_ADDRESS"
# Stopping a job is Ctrl-C to its command, which then says how to go on, and has a minute for it.
_STOP = {"RAY_JOB_STOP_SIGNAL": "SIGINT", "RAY_JOB_STOP_WAIT_TIME_S": "60"}

_TALKATIVE = (
    "ray.dashboard.modules.dashboard_sdk",
    "ray.dashboard.modules.job.sdk",
    "ray._private.runtime_env.packaging",
)


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

    for name in _TALKATIVE:
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
